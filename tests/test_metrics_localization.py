"""Pointing games and overlaps, against values computed by hand and against slow loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from captum_fusion import functional
from captum_fusion.metrics import (
    boxes_to_masks,
    energy_pointing_game,
    localization_iou,
    pointing_game,
    segmentation_iou,
)
from tests.networks import images
from tests.test_contract import same

BY_MASK = [pointing_game, energy_pointing_game, segmentation_iou]


def picture(*rows: str) -> Tensor:
    """A map or mask of the digits of some rows, (1, H, W)."""
    return torch.tensor([[[int(pixel) for pixel in line] for line in rows]])


def maps_of(*rows: str) -> Tensor:
    return picture(*rows)[None].float()


# -------------------------------------------------------------------------------------------------- pointing game


def test_pointing_game_by_hand() -> None:
    maps = maps_of("00000", "00090", "09000")
    far = picture("10000", "00000", "00000").bool()  # the first 9 is at (1, 3): squared distance 1 + 9
    for tolerance, hit in ((0, 0), (1, 0), (3, 0), (math.sqrt(10), 0), (3.2, 1), (15, 1)):
        assert pointing_game(maps, far, tolerance=tolerance).tolist() == [hit]
    on = picture("00000", "00010", "00000").bool()
    assert pointing_game(maps, on, tolerance=0).tolist() == [1]
    assert pointing_game(maps, on, tolerance=1).tolist() == [1]
    second = picture("00000", "00000", "01000").bool()
    assert pointing_game(maps, second, tolerance=0).tolist() == [0], "of equals, the first in reading order"
    beside = picture("00000", "00001", "00000").bool()
    assert pointing_game(maps, beside, tolerance=1).tolist() == [0], "a distance of exactly the tolerance misses"
    assert pointing_game(maps, beside, tolerance=1.01).tolist() == [1]
    assert pointing_game(maps, torch.zeros_like(on)).tolist() == [0], "no object"


def test_maps_that_point_nowhere_miss() -> None:
    everywhere = torch.ones(1, 4, 4, dtype=torch.bool)
    for value in (0.0, 3.0, -2.0):
        assert pointing_game(torch.full((1, 1, 4, 4), value), everywhere).tolist() == [0]
    for value in (float("nan"), float("inf")):
        maps = torch.rand(1, 1, 4, 4)
        maps[0, 0, 1, 1] = value
        assert pointing_game(maps, everywhere).isnan().all()
        assert energy_pointing_game(maps, everywhere).isnan().all()
        assert segmentation_iou(maps, everywhere).isnan().all()
        assert localization_iou(maps, [torch.tensor([[0, 0, 4, 4]])], (4, 4)).isnan().all()
    assert pointing_game(-torch.rand(1, 1, 4, 4), everywhere).tolist() == [1], "a negative map has a highest value"


@settings(deadline=None, max_examples=50)
@given(
    hnp.arrays(np.float32, (5, 6), elements=st.integers(0, 4).map(float)),
    hnp.arrays(np.bool_, (5, 6)),
    st.integers(1, 6),
)
def test_pointing_game_is_torchrays(values: Any, region: Any, tolerance: int) -> None:
    maps, mask = torch.from_numpy(values)[None, None], torch.from_numpy(region)[None]
    y, x = np.unravel_index(values.argmax(), values.shape)
    near = [(i - y) ** 2 + (j - x) ** 2 < tolerance**2 for i, j in zip(*np.nonzero(region), strict=True)]
    expected = float(any(near) and values.max() > values.min())
    assert pointing_game(maps, mask, tolerance=tolerance).tolist() == [expected]


# --------------------------------------------------------------------------------------------------------- energy


def test_energy_by_hand() -> None:
    maps = maps_of("1203", "0040") - picture("0000", "0005")[None]
    assert energy_pointing_game(maps, picture("0101", "0001").bool()).tolist() == [0.5]
    assert energy_pointing_game(maps * 1e30, picture("0101", "0001").bool()[:, None]).tolist() == [0.5]
    assert energy_pointing_game(maps * 0, picture("0101", "0001").bool()).tolist() == [0]
    assert energy_pointing_game(-maps_of("12"), picture("11").bool()).tolist() == [0], "nothing positive"


@settings(deadline=None, max_examples=50)
@given(
    hnp.arrays(np.float32, (4, 5), elements=st.floats(-(2.0**100), 2.0**100, width=32)), hnp.arrays(np.bool_, (4, 5))
)
def test_shares_of_a_region_and_of_the_rest(values: Any, region: Any) -> None:
    maps, mask = torch.from_numpy(values)[None, None], torch.from_numpy(region)[None]
    inside, outside = (float(energy_pointing_game(maps, each)) for each in (mask, ~mask))
    assert 0 <= inside <= 1
    assert inside + outside == pytest.approx(1.0 if values.max() > 0 else 0.0, abs=1e-6)


# ------------------------------------------------------------------------------------------------------- overlaps


def test_the_largest_part_by_hand() -> None:
    maps = maps_of(
        "990000",
        "990000",
        "000550",
        "000005",
        "001005",
    )
    mask = picture("000000", "000000", "000110", "000000", "000000").bool()
    # (2, 3), (2, 4), (3, 5), (4, 5) touch at a corner; both parts have four pixels, the first in reading order counts.
    assert segmentation_iou(maps, mask).tolist() == [0]
    maps[0, 0, 1, 0] = 0
    assert segmentation_iou(maps, mask).tolist() == [2 / 4]
    assert segmentation_iou(maps, mask, threshold=5 / 9 + 1e-6).tolist() == [0], "above the threshold only the 9s"
    assert segmentation_iou(maps, mask, threshold=0.1).tolist() == [2 / 4], "the 1 is above it, and touches nothing"
    box = torch.tensor([[3.0, 2.0, 6.0, 5.0]])
    assert localization_iou(maps, [box], (5, 6)).tolist() == [1]
    assert localization_iou(maps, [box + 1], (5, 6)).tolist() == pytest.approx([4 / 14])
    assert localization_iou(maps, [torch.cat([box + 1, box + 10])], (5, 6)).tolist() == pytest.approx([4 / 14])
    assert localization_iou(maps, [torch.cat([box + 1, box])], (5, 6)).tolist() == [1], "the best of several boxes"
    assert localization_iou(maps, [torch.tensor([[3.5, 2.0, 6.0, 4.5]])], (5, 6)).tolist() == pytest.approx(
        [2.5 * 2.5 / 9]
    )
    assert localization_iou(maps, [torch.empty(0, 4)], (5, 6)).tolist() == [0]
    assert localization_iou(maps, [torch.tensor([[4, 3, 4, 3]])], (5, 6)).tolist() == [0], "a box without area"


def test_the_threshold_is_strict() -> None:
    maps = maps_of("4820")
    for threshold, pixels in ((0, 3), (0.2, 3), (0.25, 2), (0.5, 1), (0.99, 1)):
        assert segmentation_iou(maps, picture("1111").bool(), threshold=threshold).tolist() == [pixels / 4]


def test_nothing_positive_has_no_part() -> None:
    for maps in (torch.zeros(1, 1, 3, 3), -torch.rand(1, 1, 3, 3)):
        assert segmentation_iou(maps, torch.ones(1, 3, 3, dtype=torch.bool)).tolist() == [0]
        assert segmentation_iou(maps, torch.zeros(1, 3, 3, dtype=torch.bool)).tolist() == [0]
        assert localization_iou(maps, [torch.tensor([[0, 0, 3, 3]])], (3, 3)).tolist() == [0]


def slow_part(values: Any, threshold: float) -> set[tuple[int, int]]:
    """The largest part, by flooding from each pixel."""
    high = {(i, j) for i, j in np.ndindex(values.shape) if values[i, j] > threshold * values.max()}
    best: set[tuple[int, int]] = set()
    for start in sorted(high):
        if start not in high:
            continue
        part, todo = set(), [start]
        while todo:
            i, j = todo.pop()
            if (i, j) in high:
                high.discard((i, j))
                part.add((i, j))
                todo += [(i + a, j + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
        best = part if len(part) > len(best) else best
    return best


@settings(deadline=None, max_examples=60)
@given(
    hnp.arrays(np.float32, (6, 5), elements=st.sampled_from([0.0, 0.0, 0.25, 0.5, 1.0])),
    hnp.arrays(np.bool_, (6, 5)),
    st.sampled_from([0.0, 0.15, 0.3, 0.7]),
)
def test_overlaps_are_those_of_a_slow_search(values: Any, region: Any, threshold: float) -> None:
    maps, mask = torch.from_numpy(values)[None, None], torch.from_numpy(region)[None]
    part = slow_part(values, threshold) if values.max() > 0 else set()
    object_pixels = set(zip(*map(np.ndarray.tolist, np.nonzero(region)), strict=True))
    expected = len(part & object_pixels) / len(part | object_pixels) if part else 0
    assert float(segmentation_iou(maps, mask, threshold=threshold)) == pytest.approx(expected)
    if not part:
        return
    rows, columns = zip(*part, strict=True)
    box = [min(columns), min(rows), max(columns) + 1, max(rows) + 1]
    wanted = [1, 2, 4, 5]
    inter = max(0, min(box[2], 4) - max(box[0], 1)) * max(0, min(box[3], 5) - max(box[1], 2))
    union = (box[2] - box[0]) * (box[3] - box[1]) + 9 - inter
    found = localization_iou(maps, [torch.tensor([wanted])], (6, 5), threshold=threshold)
    assert float(found) == pytest.approx(inter / union)


# ---------------------------------------------------------------------------------------------------------- boxes


def test_boxes_as_masks_by_hand() -> None:
    boxes = [
        torch.tensor([[1, 0, 3, 2]]),
        torch.tensor([[0.0, 0.0, 0.5, 0.5], [2.5, 1.5, 9.0, 9.0]]),
        torch.empty(0, 4),
    ]
    assert boxes_to_masks(boxes, (3, 4)).int().tolist() == [
        [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]],
        [[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]],
        [[0] * 4] * 3,
    ]
    assert boxes_to_masks([], (3, 4)).shape == (0, 3, 4)
    assert boxes_to_masks([torch.tensor([[0.0, 0.0, 0.51, 0.51]])], [2, 2]).sum() == 1


edges = st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(1, 5), st.integers(1, 5)).map(
    lambda box: (min(box[0], box[2] - 1), min(box[1], box[3] - 1), box[2], box[3])
)


@settings(deadline=None, max_examples=40)
@given(st.lists(edges, min_size=1, max_size=3))
def test_a_box_of_whole_pixels_is_its_mask(boxes: list[tuple[int, int, int, int]]) -> None:
    expected = np.zeros((5, 5), bool)
    for x0, y0, x1, y1 in boxes:
        expected[y0:y1, x0:x1] = True
    mask = boxes_to_masks([torch.tensor(boxes)], (5, 5))
    assert mask[0].tolist() == expected.tolist()
    alone = boxes_to_masks([torch.tensor(boxes[:1])], (5, 5))
    assert float(localization_iou(alone[:, None].float(), [torch.tensor(boxes)], (5, 5))) == 1
    assert float(segmentation_iou(alone[:, None].float(), alone)) == 1


# --------------------------------------------------------------------------------------------------------- common


@pytest.mark.parametrize("metric", BY_MASK)
def test_batches_sizes_and_channels(metric: Any) -> None:
    maps, masks = images(4, 2, 5, 5), images(4, 12, 10, seed=3) > 0.5
    found = metric(maps, masks)
    assert found.shape == (4,)
    same(found, torch.cat([metric(maps[[i]], masks[[i]]) for i in range(4)]))
    same(found, metric(maps, masks[:, None]))
    same(found, metric(functional.upsample(maps.sum(1, keepdim=True), (12, 10)), masks))
    same(found, metric(maps * 1e-12, masks))
    same(found, metric(maps.clone().requires_grad_(), masks))
    assert metric(maps[:0], masks[:0]).shape == (0,)
    assert metric(maps.half(), masks).dtype is torch.float32
    boxes = [torch.tensor([[1.0, 1.0, 7.0, 8.0]])] * 4
    whole = localization_iou(maps, boxes, (12, 10))
    same(whole, torch.cat([localization_iou(maps[[i]], boxes[:1], (12, 10)) for i in range(4)]))


@pytest.mark.parametrize("metric", BY_MASK)
def test_errors_name_the_argument(metric: Any) -> None:
    maps, masks = torch.rand(2, 1, 4, 4), torch.ones(2, 4, 4, dtype=torch.bool)
    for wrong in (maps[:, 0], maps[..., None], torch.rand(2, 1, 4), maps[:, :0]):
        with pytest.raises(ValueError, match=r"attributions must be of shape \(N, channels, height, width\)"):
            metric(wrong, masks)
    with pytest.raises(TypeError, match="attributions must be"):
        metric(maps.numpy(), masks)
    for bad in (masks.float(), masks.int(), masks.numpy(), None):
        with pytest.raises(TypeError, match="masks must be bool"):
            metric(maps, bad)
    for bad in (masks[0], masks[:, None].repeat(1, 2, 1, 1), masks[:, :0]):
        with pytest.raises(ValueError, match="masks must be bool and of shape"):
            metric(maps, bad)
    with pytest.raises(ValueError, match="masks must be one for each of the 2 examples, not 1"):
        metric(maps, masks[:1])


def test_errors_of_options() -> None:
    maps, masks, boxes = torch.rand(1, 1, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool), [torch.tensor([[0, 0, 2, 2]])]
    for bad in (-1, "15", None, float("nan"), True):
        with pytest.raises(ValueError, match="tolerance"):
            pointing_game(maps, masks, tolerance=bad)
    for bad in (-0.1, 1, 1.5, "0.2", float("nan")):
        with pytest.raises(ValueError, match="threshold"):
            segmentation_iou(maps, masks, threshold=bad)
        with pytest.raises(ValueError, match="threshold"):
            localization_iou(maps, boxes, (4, 4), threshold=bad)
    for bad in (4, (4,), (4, 0), (4.0, 4), "44"):
        with pytest.raises(ValueError, match="size"):
            localization_iou(maps, boxes, bad)
        with pytest.raises(ValueError, match="size"):
            boxes_to_masks(boxes, bad)
    for bad in ([torch.tensor([0, 0, 2, 2])], torch.tensor([[0, 0, 2, 2]]), [torch.tensor([[2, 0, 1, 2]])]):
        with pytest.raises(ValueError, match="boxes"):
            boxes_to_masks(bad, (4, 4))
    for bad in ([[0, 0, 2, 2]], None, 3, [None]):
        with pytest.raises(TypeError, match="boxes"):
            boxes_to_masks(bad, (4, 4))
    with pytest.raises(ValueError, match="boxes must be finite"):
        boxes_to_masks([torch.tensor([[0, 0, float("nan"), 2]])], (4, 4))
    with pytest.raises(ValueError, match="boxes must hold a tensor for each of the 1 examples, not 2"):
        localization_iou(maps, boxes * 2, (4, 4))
