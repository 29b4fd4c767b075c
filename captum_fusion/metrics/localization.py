"""Where a map points, against where the object is: boxes or masks of pixels. For maps with two spatial dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from captum_fusion import functional as formulas
from captum_fusion._arguments import count, positive
from captum_fusion.metrics._common import channel_sum

_ARGS_MAPS = "attributions must be of shape (N, channels, height, width)"


def pointing_game(attributions: Tensor, masks: Tensor, *, tolerance: float = 15) -> Tensor:
    """Pointing game: 1 where the highest value of a map is on the object, or near it, else 0. Higher is better.

    The point is a hit if it lies in the region, or if the centre of one of the region's pixels is closer to it than
    ``tolerance`` pixels, as in TorchRay. Of several highest values the first in reading order counts. A constant map
    points nowhere and misses, as does one that is not finite. From the paper: J. Zhang, S. A. Bargal, Z. Lin, J.
    Brandt, X. Shen, S. Sclaroff, "Top-Down Neural Attention by Excitation Backprop", IJCV 2018,
    https://arxiv.org/abs/1608.00507

    Args:
        attributions (Tensor): A map for each example, of shape ``(N, C, h, w)``: channels are summed, and the map is
            brought to the masks' size.
        masks (Tensor): Where the object is, bool, of shape ``(N, H, W)`` or ``(N, 1, H, W)``.
        tolerance (float, optional): In pixels of the masks. 0 wants the point on the region itself.
            Default: 15

    Returns:
        Tensor: Of shape (N,), 0 or 1; the paper's figure is the mean over each class, then over the classes.

    Raises:
        TypeError: If an argument is not the tensor that it should be.
        ValueError: If shapes do not fit, or ``tolerance`` is negative; the message names the argument.

    Examples::

        >>> attributions = torch.tensor([[[[0.0, 0.0, 3.0, 1.0]]]])
        >>> masks = torch.tensor([[[True, False, False, False]]])
        >>> pointing_game(attributions, masks, tolerance=2), pointing_game(attributions, masks, tolerance=3)
        (tensor([0.]), tensor([1.]))
    """
    near = positive("tolerance", tolerance, or_zero=True)
    masks, maps = _masks_and_maps(attributions, masks)
    height, width = masks.shape[1:]
    flat = maps.flatten(1)
    highest = flat == flat.amax(1, keepdim=True)
    places = torch.arange(flat.shape[1], device=flat.device)
    point = torch.where(highest, places, flat.shape[1] - 1).amin(1)
    rows = (torch.arange(height, device=flat.device) - (point // width)[:, None]).square()
    columns = (torch.arange(width, device=flat.device) - (point % width)[:, None]).square()
    squares = rows[:, :, None] + columns[:, None]
    accepted = (squares < near**2) | (squares == 0)
    hit = (accepted & masks).flatten(1).any(1) & _varies(maps)
    return hit.to(maps.dtype)


def energy_pointing_game(attributions: Tensor, masks: Tensor) -> Tensor:
    """Energy-based pointing game: the share of a map's positive part that is on the object. Higher is better.

    A map without a positive value has no energy and gets 0, as does one that is not finite. From the paper: H. Wang et
    al., "Score-CAM", CVPRW 2020, https://arxiv.org/abs/1910.01279

    Args:
        attributions (Tensor): A map for each example, of shape ``(N, C, h, w)``: channels are summed, and the map is
            brought to the masks' size.
        masks (Tensor): Where the object is, bool, of shape ``(N, H, W)`` or ``(N, 1, H, W)``.

    Returns:
        Tensor: Of shape (N,), in [0, 1].

    Raises:
        TypeError: If an argument is not the tensor that it should be.
        ValueError: If shapes do not fit; the message names the argument.

    Examples::

        >>> attributions = torch.tensor([[[[3.0, 1.0], [-2.0, 0.0]]]])
        >>> energy_pointing_game(attributions, torch.tensor([[[True, False], [True, False]]]))
        tensor([0.7500])
    """
    masks, maps = _masks_and_maps(attributions, masks)
    energy = _positive_share(maps).flatten(1)
    whole = energy.sum(1)
    inside = (energy * masks.flatten(1)).sum(1)
    return torch.where(whole > 0, inside / torch.where(whole > 0, whole, 1.0), 0.0).clamp(0, 1).to(maps.dtype)


def localization_iou(
    attributions: Tensor, boxes: Sequence[Tensor], size: Sequence[int], *, threshold: float = 0.15
) -> Tensor:
    """Overlap of a map's box with the object's: intersection over union. Higher is better.

    The map's box bounds the largest connected part (of eight neighbours; of several, the first in reading order) of
    the pixels above ``threshold`` times the map's maximum. Of several boxes of an example the one with the largest
    overlap counts. A map without a positive value has no box and gets 0, as does one that is not finite, and an example
    without boxes. From the papers: B. Zhou et al., CVPR 2016, https://arxiv.org/abs/1512.04150 (threshold 0.2); R. R.
    Selvaraju et al., "Grad-CAM", https://arxiv.org/abs/1610.02391 (0.15). An overlap of at least 0.5 is usually called
    a find.

    Args:
        attributions (Tensor): A map for each example, of shape ``(N, C, h, w)``: channels are summed, and the map is
            brought to ``size``.
        boxes (sequence of Tensor): For each example a tensor of shape ``(B, 4)``, the left, upper, right and lower
            edges ``x0, y0, x1, y1`` of its B boxes in pixels; the whole picture is ``0, 0, width, height``.
        size (sequence of int): Height and width, in pixels, of the picture that the boxes are of.
        threshold (float, optional): Share of the map's maximum, at least 0 and below 1.
            Default: 0.15

    Returns:
        Tensor: Of shape (N,), in [0, 1].

    Raises:
        TypeError: If an argument is not the tensor that it should be.
        ValueError: If shapes do not fit, or an option has a bad value; the message names the argument.

    Examples::

        >>> attributions = torch.zeros(1, 1, 4, 4)
        >>> attributions[0, 0, 1:3, 1:4] = 1.0
        >>> localization_iou(attributions, [torch.tensor([[1.0, 1.0, 3.0, 3.0]])], (4, 4))
        tensor([0.6667])
    """
    height, width = _size(size)
    maps = _maps(attributions, (height, width))
    found = maps.new_zeros(len(maps))
    given = _boxes(boxes)
    if len(given) != len(maps):
        raise ValueError(f"boxes must hold a tensor for each of the {len(maps)} examples, not {len(given)}")
    for i, (part, each) in enumerate(zip(_largest_parts(maps, threshold), given, strict=True)):
        if not part.any() or not len(each):
            continue
        rows, columns = part.any(1).nonzero(), part.any(0).nonzero()
        own = torch.cat([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).double()
        low, high = torch.maximum(own[:2], each[:, :2]), torch.minimum(own[2:], each[:, 2:])
        shared = (high - low).clamp(min=0).prod(1)
        union = (own[2:] - own[:2]).prod() + (each[:, 2:] - each[:, :2]).prod(1) - shared
        found[i] = (shared / union).max()
    return found


def segmentation_iou(attributions: Tensor, masks: Tensor, *, threshold: float = 0.15) -> Tensor:
    """Overlap of a map's largest part with the object's pixels: intersection over union. Higher is better.

    The part is the one that :func:`localization_iou` puts a box around. A map without a positive value has none and
    gets 0, as does one that is not finite.

    Args:
        attributions (Tensor): A map for each example, of shape ``(N, C, h, w)``: channels are summed, and the map is
            brought to the masks' size.
        masks (Tensor): Where the object is, bool, of shape ``(N, H, W)`` or ``(N, 1, H, W)``.
        threshold (float, optional): Share of the map's maximum, at least 0 and below 1.
            Default: 0.15

    Returns:
        Tensor: Of shape (N,), in [0, 1].

    Raises:
        TypeError: If an argument is not the tensor that it should be.
        ValueError: If shapes do not fit, or ``threshold`` has a bad value; the message names the argument.

    Examples::

        >>> attributions = torch.tensor([[[[1.0, 1.0, 0.0, 1.0]]]])
        >>> segmentation_iou(attributions, torch.tensor([[[True, True, True, True]]]))
        tensor([0.5000])
    """
    masks, maps = _masks_and_maps(attributions, masks)
    parts = _largest_parts(maps, threshold).to(masks.device)
    shared, union = ((parts & masks).flatten(1).sum(1), (parts | masks).flatten(1).sum(1))
    return (shared / union.clamp(min=1)).to(maps.dtype)


def boxes_to_masks(boxes: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """Boxes as masks of pixels. A pixel belongs to a box if its centre lies in it (the left and upper edges included).

    Args:
        boxes (sequence of Tensor): For each example a tensor of shape ``(B, 4)``, the left, upper, right and lower
            edges ``x0, y0, x1, y1`` of its B boxes in pixels.
        size (sequence of int): Height and width, in pixels.

    Returns:
        Tensor: bool, of shape (N, height, width): the union of each example's boxes.

    Raises:
        TypeError: If ``boxes`` is not a sequence of tensors.
        ValueError: If a box is not ``x0 <= x1, y0 <= y1``, or ``size`` not two positive ints.

    Examples::

        >>> boxes_to_masks([torch.tensor([[1.0, 0.0, 3.0, 1.0]])], (2, 4)).int()
        tensor([[[0, 1, 1, 0],
                 [0, 0, 0, 0]]], dtype=torch.int32)
    """
    height, width = _size(size)
    given = _boxes(boxes)
    masks = torch.zeros(len(given), height, width, dtype=torch.bool)
    rows, columns = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    for mask, each in zip(masks, given, strict=True):
        across = (columns >= each[:, :1]) & (columns < each[:, 2:3])
        down = (rows >= each[:, 1:2]) & (rows < each[:, 3:])
        mask |= (down[:, :, None] & across[:, None]).any(0)
    return masks.to(boxes[0].device) if len(boxes) else masks


def _maps(attributions: Tensor, size: Sequence[int]) -> Tensor:
    """Attributions as (N, H, W), signed as they are."""
    if not isinstance(attributions, Tensor):
        raise TypeError(f"{_ARGS_MAPS}, not {type(attributions).__name__}")
    if attributions.dim() != 4 or 0 in attributions.shape[1:]:
        raise ValueError(f"{_ARGS_MAPS}, not {tuple(attributions.shape)}")
    return formulas.upsample(channel_sum(attributions), size)[:, 0]


def _masks_and_maps(attributions: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Masks (N, H, W), and the maps at their size, on the device of the maps."""
    shape = "masks must be bool and of shape (N, height, width) or (N, 1, height, width)"
    if not isinstance(masks, Tensor):
        raise TypeError(f"{shape}, not {type(masks).__name__}")
    if masks.dtype != torch.bool:
        raise TypeError(f"{shape}, not {masks.dtype}; give masks > 0, say")
    if masks.dim() == 4 and masks.shape[1] == 1:
        masks = masks[:, 0]
    if masks.dim() != 3 or 0 in masks.shape[1:]:
        raise ValueError(f"{shape}, not {tuple(masks.shape)}")
    maps = _maps(attributions, masks.shape[1:])
    if len(maps) != len(masks):
        raise ValueError(f"masks must be one for each of the {len(maps)} examples, not {len(masks)}")
    return masks.to(maps.device), maps


def _size(size: Sequence[int]) -> tuple[int, int]:
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise ValueError(f"size must be (height, width), not {size!r:.80}")
    return count("size", size[0]), count("size", size[1])


def _boxes(boxes: Sequence[Tensor]) -> list[Tensor]:
    """Boxes as float64 tensors of shape (B, 4) on the CPU."""
    wanted = "boxes must be a tensor of shape (number, 4) for each example"
    if not isinstance(boxes, (Tensor, Sequence)):
        raise TypeError(f"{wanted}, not {type(boxes).__name__}")
    checked = []
    for each in boxes:
        if not isinstance(each, Tensor):
            raise TypeError(f"{wanted}, not {type(each).__name__}")
        if each.dim() != 2 or each.shape[1] != 4:
            raise ValueError(f"{wanted}, not {tuple(each.shape)}")
        box = each.detach().cpu().double()
        if not box.isfinite().all() or (box[:, :2] > box[:, 2:]).any():
            raise ValueError(f"boxes must be finite, with x0 <= x1 and y0 <= y1, not {each.tolist()!r:.80}")
        checked.append(box)
    return checked


def _varies(maps: Tensor) -> Tensor:
    """Whether each map is finite, and more than a constant with rounding errors; (N,)."""
    return formulas.normalize(maps).flatten(1).any(1)


def _positive_share(maps: Tensor) -> Tensor:
    """The positive part as shares of its maximum, float64; zeros for a map that has none or is not finite."""
    values = formulas.precise(maps).relu()
    highest = values.amax((1, 2), keepdim=True)
    good = maps.isfinite().all(2, keepdim=True).all(1, keepdim=True) & (highest > 0)
    return torch.where(good, values / torch.where(good, highest, 1.0), 0.0)


def _largest_parts(maps: Tensor, threshold: float) -> Tensor:
    """The largest connected part of each map's pixels above the threshold; bool (N, H, W), on the CPU."""
    from scipy import ndimage

    if positive("threshold", threshold, or_zero=True) >= 1:
        raise ValueError(f"threshold must be at least 0 and below 1, not {threshold!r}")
    parts = torch.zeros(maps.shape, dtype=torch.bool)
    for part, share in zip(parts, _positive_share(maps).cpu(), strict=True):
        labels, number = ndimage.label((share > threshold).numpy(), structure=[[1, 1, 1]] * 3)
        if number:
            flat = torch.from_numpy(labels).long()
            areas = flat.flatten().bincount(minlength=number + 1)[1:]
            part |= flat == 1 + int((areas == areas.max()).nonzero()[0])
    return parts
