"""Several targets, and several methods, for less than the price of as many calls; and the same maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_fusion import (
    GuidedFusionCAM,
    LayerFusionCAM,
    LayerISCAM,
    LayerScoreCAM,
    LayerSSCAM,
    LayerUnionCAM,
    shared_work,
)
from tests.classes import CLASSES
from tests.networks import Counter, TupleLayer, WithBatchNorm, images, make
from tests.test_contract import same


@pytest.fixture
def x() -> Tensor:
    return images(3, 3, 8, 8)


TARGETS: list[Any] = [1, [0, 3, 2], torch.tensor([4, 4, 1])]


def test_several_targets_equal_separate_calls(cls: Any, x: Tensor) -> None:
    model = make()
    method = cls(model, model.conv2)
    found = method.attribute_targets(x, targets=TARGETS)
    assert len(found) == len(TARGETS)
    for result, target in zip(found, TARGETS, strict=True):
        same(result, method.attribute(x, target))
    for wrong in (3, None, torch.tensor([1, 2])):
        with pytest.raises(TypeError, match="targets must be a list"):
            method.attribute_targets(x, targets=wrong)


@pytest.mark.parametrize("weighting", ["softmax", "increase"])
def test_masked_rows_of_score_cam_are_run_once(x: Tensor, weighting: str) -> None:
    counted = Counter(model := make())
    method = LayerScoreCAM(counted, model.conv2, weighting=weighting)
    method.attribute_targets(x, targets=TARGETS)
    assert counted.rows == 3 * (1 + 8 + (weighting == "increase")), "clean, eight channels, baseline: once"
    counted.rows = 0
    method.attribute(x, 1)
    method.attribute(x, 1)
    assert counted.rows == 2 * 3 * (1 + 8 + (weighting == "increase")), "nothing is remembered between calls"


@pytest.mark.parametrize("cls", [LayerFusionCAM, LayerUnionCAM])
def test_a_fusion_runs_the_masked_rows_of_its_region_map_once(x: Tensor, cls: Any) -> None:
    counted = Counter(model := make())
    cls(counted, model.conv2).attribute_targets(x, targets=TARGETS, perturbations_per_eval=3)
    assert counted.rows == 3 * (8 + 1 + 3 * (1 + 3)), (
        "channels and baseline once; a pass and three maps for each target"
    )


@pytest.mark.parametrize("cls", [LayerSSCAM, LayerISCAM])
def test_other_masks_that_do_not_depend_on_the_target(x: Tensor, cls: Any) -> None:
    counted = Counter(model := make())
    method = cls(counted, model.conv2)
    method.attribute_targets(x, targets=TARGETS)
    assert counted.rows == 3 * (1 + 8 * method.copies)
    counted.rows = 0
    with shared_work():
        first = LayerSSCAM(counted, model.conv2, n_samples=2).attribute(x, 1)
        other = LayerSSCAM(counted, model.conv2, n_samples=2, seed=1).attribute(x, 1)
    assert counted.rows == 3 * (1 + 2 * 8 * 2), "another seed has other masks"
    assert not torch.allclose(first, other, atol=1e-6)


def test_methods_share_passes_and_rows(x: Tensor) -> None:
    model = make()
    alone = [cls(model, model.conv2).attribute(x, [0, 3, 1]) for cls in CLASSES]
    counted = Counter(model)
    with shared_work():
        together = [cls(counted, model.conv2).attribute(x, [0, 3, 1]) for cls in CLASSES]
        rows = counted.rows
        LayerFusionCAM(counted, model.conv2).attribute(x, [0, 3, 1])
        assert counted.rows == rows + 3 * 3, "only the three maps that it masks with"
    same(together, alone)


def test_components_on_other_layers_and_guided_fusions_share_too(x: Tensor) -> None:
    counted = Counter(model := make())
    elsewhere = LayerScoreCAM(counted, model.conv1)
    with shared_work():
        elsewhere.attribute(x, 1)
        rows = counted.rows
        LayerFusionCAM(counted, model.conv2, region_method=elsewhere).attribute(x, 1)
        assert counted.rows == rows + 3 * (1 + 1 + 3), "a pass at its own layer, the baseline, three maps"
    seen: list[int] = []
    model.head.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    with shared_work():
        LayerFusionCAM(model, model.conv2).attribute(x, 1)
        before = sum(seen)
        GuidedFusionCAM(model, model.conv2).attribute(x, 1)
    assert sum(seen) == before + 3 * (3 + 1), "three maps, and guided backpropagation"


def test_what_differs_is_not_shared(x: Tensor) -> None:
    model, other = make(), make(seed=2)
    score = LayerScoreCAM(model, model.conv2, weighting="increase")
    scale = torch.full((3, 1), 2.0)
    variants: list[tuple[Any, Tensor, dict[str, Any]]] = [
        (score, x, {}),
        (score, x, {"baselines": 0.5}),
        (score, x, {"baselines": torch.full((1, 3, 1, 1), 0.25)}),
        (score, x, {"additional_forward_args": scale}),
        (score, x + 1, {}),
        (score, x[:2], {}),
        (LayerScoreCAM(model, model.conv1, weighting="increase"), x, {}),
        (score, x, {"attribute_to_layer_input": True}),
        (LayerScoreCAM(other, other.conv2, weighting="increase"), x, {}),
        (LayerScoreCAM(model, [model.conv1, model.relu2]), x, {}),
    ]
    alone = [method.attribute(given, 1, **kwargs) for method, given, kwargs in variants]
    with shared_work():
        together = [method.attribute(given, 1, **kwargs) for method, given, kwargs in variants]
    same(together, alone)


def test_tensors_changed_in_place_are_noticed(x: Tensor) -> None:
    model, given, target = make(), x.clone(), torch.tensor([0, 1, 2])
    method = LayerFusionCAM(model, model.conv2)
    with shared_work():
        method.attribute(given, target)
        given += 1
        target += 1
        result = method.attribute(given, target)
    same(result, method.attribute(x + 1, [1, 2, 3]))


def test_wrong_targets_and_failing_networks(x: Tensor) -> None:
    model = make()
    method = LayerScoreCAM(model, model.conv2)
    with shared_work():
        method.attribute(x, 1)
        for wrong in (None, [0, 1], "cat"):
            with pytest.raises(AssertionError):
                method.attribute(x, wrong)
        with pytest.raises(IndexError, match="out of bounds"):
            method.attribute(x, 9)
    failing = Counter(model, fail_at=3)
    with pytest.raises(RuntimeError, match="the network failed"), shared_work():
        LayerScoreCAM(failing, model.conv2).attribute(x, 1)
    counted = Counter(model)
    LayerScoreCAM(counted, model.conv2).attribute(x, 1)
    assert counted.rows == 3 * 9, "the block has ended"


def test_blocks_within_blocks_and_tuple_layers(x: Tensor) -> None:
    model = make(TupleLayer)
    method = LayerScoreCAM(model, model.branches)
    with shared_work():
        first = method.attribute_targets(x, targets=[1, 2])
        counted_before = first[0]
    same(counted_before, method.attribute(x, 1))
    same(first[1], method.attribute(x, 2))


@pytest.mark.filterwarnings("ignore:the model is in train mode")
def test_networks_in_train_mode_share_nothing(x: Tensor) -> None:
    model = make(WithBatchNorm)
    model.drop.train()
    seen: list[int] = []
    model.conv.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    with shared_work():
        LayerScoreCAM(model, model.norm).attribute(x, 1)
        once = sum(seen)
        LayerScoreCAM(model, model.norm).attribute(x, 1)
    assert sum(seen) == 2 * once


def test_large_outputs_are_not_kept() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x).relu()).repeat(1, 1, 500, 500)

    model, x = make(Dense), images(1, 3, 8, 8)
    seen: list[int] = []
    model.head.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    method = LayerScoreCAM(model, model.conv)
    found = method.attribute_targets(x, targets=[(0, 4, 4), (1, 4, 4)])
    assert sum(seen) == 1 + 2 * 4, "twelve million numbers for each row: run again"
    same(found[1], method.attribute(x, (1, 4, 4)))


def test_what_is_run_and_what_is_spared_add_up_to_what_each_would_cost_alone(x: Tensor) -> None:
    counted = Counter(model := make())
    methods = [
        LayerScoreCAM(counted, model.conv2),
        LayerFusionCAM(counted, model.conv2),
        LayerUnionCAM(counted, model.conv2),
        LayerScoreCAM(counted, model.conv2, weighting="increase"),
    ]
    alone = []
    for method in methods:
        counted.rows = 0
        method.attribute(x, 1, perturbations_per_eval=2)
        alone.append(counted.rows)
    with shared_work() as spared:
        for method, expected in zip(methods, alone, strict=True):
            counted.rows = spared.rows = 0
            method.attribute(x, 1, perturbations_per_eval=2)
            assert counted.rows + spared.rows == expected, type(method).__name__
            if method is not methods[0]:
                assert counted.rows < expected / 2
        assert spared.seconds > 0
        before = spared.backward_rows
        methods[1].attribute(x, 1, perturbations_per_eval=2)
        assert spared.backward_rows == before + 3, "the pass with gradients is shared, and counted as such"
    assert alone == [3 * (1 + 8), 3 * (8 + 5), 3 * (8 + 5), 3 * (1 + 8 + 1)]
