"""Localization metrics: maps with two spatial dimensions, compared with boxes or masks of the object."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from captum_fusion import functional as formulas
from captum_fusion._arguments import count, positive
from captum_fusion.metrics._docs import documented
from captum_fusion.metrics._maps import channel_sum, nan_where_undefined, varies

__all__ = ["boxes_to_masks", "energy_pointing_game", "localization_iou", "pointing_game", "segmentation_iou"]


@documented
def pointing_game(attributions: Tensor, masks: Tensor, *, tolerance: float = 15) -> Tensor:
    """Pointing game: 1 where the maximum of a map is on the object or near it, else 0. Higher is better.

    The maximum is a hit if it lies in the object's region, or if the centre of one of the region's pixels is closer to
    it than ``tolerance`` pixels, as in TorchRay. Of several maxima the first in reading order counts. A map that is
    constant or not finite is a miss. From the paper: J. Zhang, S. A. Bargal, Z. Lin, J. Brandt, X. Shen, S. Sclaroff,
    "Top-Down Neural Attention by Excitation Backprop", IJCV 2018, https://arxiv.org/abs/1608.00507

    Args:
        {attributions}
        {masks}
        tolerance (float, optional): In pixels of the masks. With 0 the maximum must lie in the region itself.
            Default: 15

    Returns:
        Tensor: Of shape (N,), 0 or 1. The published number is the mean over each class, then over the classes.

    Raises:
        {raises_shapes}

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
    pixels = torch.arange(flat.shape[1], device=flat.device)
    point = torch.where(highest, pixels, flat.shape[1] - 1).amin(1)
    down = (torch.arange(height, device=flat.device) - (point // width)[:, None]).square()
    across = (torch.arange(width, device=flat.device) - (point % width)[:, None]).square()
    squares = down[:, :, None] + across[:, None]
    accepted = (squares < near**2) | (squares == 0)
    hit = (accepted & masks).flatten(1).any(1) & varies(maps)
    return nan_where_undefined(hit.to(maps.dtype), maps)


@documented
def energy_pointing_game(attributions: Tensor, masks: Tensor) -> Tensor:
    """Energy-based pointing game: the share of a map's positive part that lies on the object. Higher is better.

    A map that has no positive value gets 0, one that is not finite NaN. From the paper: H. Wang et
    al., "Score-CAM", CVPRW 2020, https://arxiv.org/abs/1910.01279

    Args:
        {attributions}
        {masks}

    Returns:
        Tensor: Of shape (N,), in [0, 1].

    Raises:
        {raises_shapes}

    Examples::

        >>> attributions = torch.tensor([[[[3.0, 1.0], [-2.0, 0.0]]]])
        >>> energy_pointing_game(attributions, torch.tensor([[[True, False], [True, False]]]))
        tensor([0.7500])
    """
    masks, maps = _masks_and_maps(attributions, masks)
    energy = _positive_share(maps).flatten(1)
    total = energy.sum(1)
    inside = (energy * masks.flatten(1)).sum(1)
    share = torch.where(total > 0, inside / torch.where(total > 0, total, 1.0), 0.0).clamp(0, 1)
    return nan_where_undefined(share.to(maps.dtype), maps)


@documented
def localization_iou(
    attributions: Tensor, boxes: Sequence[Tensor], size: Sequence[int], *, threshold: float = 0.15
) -> Tensor:
    """Intersection over union of a map's bounding box and the object's. Higher is better.

    The map's box bounds the largest connected part of the pixels above ``threshold`` times the map's maximum. Pixels
    that share a corner are connected; of several largest parts the first in reading order counts. Of several boxes of
    an example the one with the largest overlap counts. An example without boxes gets 0, and so does a map that has no
    positive value; a map that is not finite gets NaN. An overlap of at least 0.5 usually counts as localized. From the
    papers: B. Zhou et al., CVPR 2016, https://arxiv.org/abs/1512.04150 (threshold 0.2); R. R. Selvaraju et al.,
    "Grad-CAM", https://arxiv.org/abs/1610.02391 (0.15).

    Args:
        attributions (Tensor): A map for each example, of shape ``(N, C, h, w)``. Channels are summed, and the map is
            upsampled to ``size``.
        boxes (sequence of Tensor): For each example a tensor of shape ``(B, 4)``, the left, upper, right and lower
            edges ``x0, y0, x1, y1`` of its B boxes in pixels. The whole picture is ``0, 0, width, height``. Boxes are
            not clipped to the picture: what lies outside of it counts as missed.
        size (sequence of int): Height and width of the picture, in pixels.
        threshold (float, optional): Share of the map's maximum, at least 0 and below 1.
            Default: 0.15

    Returns:
        Tensor: Of shape (N,), in [0, 1].

    Raises:
        {raises_shapes}

    Examples::

        >>> attributions = torch.zeros(1, 1, 4, 4)
        >>> attributions[0, 0, 1:3, 1:4] = 1.0
        >>> localization_iou(attributions, [torch.tensor([[1.0, 1.0, 3.0, 3.0]])], (4, 4))
        tensor([0.6667])
    """
    from torchvision.ops import box_iou

    maps = _maps(attributions, _size(size))
    overlaps = maps.new_zeros(len(maps))
    of_objects = _boxes(boxes)
    if len(of_objects) != len(maps):
        raise ValueError(f"boxes must hold a tensor for each of the {len(maps)} examples, not {len(of_objects)}")
    for i, (part, objects) in enumerate(zip(_largest_parts(maps, threshold), of_objects, strict=True)):
        if part.any() and len(objects):
            overlaps[i] = box_iou(bounding_boxes(part[None]), objects).max()
    return nan_where_undefined(overlaps, maps)


@documented
def segmentation_iou(attributions: Tensor, masks: Tensor, *, threshold: float = 0.15) -> Tensor:
    """Intersection over union of a map's largest part and the object's pixels. Higher is better.

    The part is the one whose bounding box :func:`localization_iou` uses. A map that has no positive value, or is not
    finite, gets 0.

    Args:
        {attributions}
        {masks}
        threshold (float, optional): Share of the map's maximum, at least 0 and below 1.
            Default: 0.15

    Returns:
        Tensor: Of shape (N,), in [0, 1].

    Raises:
        {raises_shapes}

    Examples::

        >>> attributions = torch.tensor([[[[1.0, 1.0, 0.0, 1.0]]]])
        >>> segmentation_iou(attributions, torch.tensor([[[True, True, True, True]]]))
        tensor([0.5000])
    """
    masks, maps = _masks_and_maps(attributions, masks)
    parts = _largest_parts(maps, threshold).to(masks.device)
    shared, union = ((parts & masks).flatten(1).sum(1), (parts | masks).flatten(1).sum(1))
    return nan_where_undefined((shared / union.clamp(min=1)).to(maps.dtype), maps)


def boxes_to_masks(boxes: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """Boxes as masks of pixels. A pixel belongs to a box if its centre lies in the box or on its left or upper edge.

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
    of_objects = _boxes(boxes)
    masks = torch.zeros(len(of_objects), height, width, dtype=torch.bool)
    y, x = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    for mask, objects in zip(masks, of_objects, strict=True):
        across = (x >= objects[:, :1]) & (x < objects[:, 2:3])
        down = (y >= objects[:, 1:2]) & (y < objects[:, 3:])
        mask |= (down[:, :, None] & across[:, None]).any(0)
    return masks.to(boxes[0].device) if len(boxes) else masks


def bounding_boxes(masks: Tensor) -> Tensor:
    """The bounding boxes ``x0, y0, x1, y1`` of masks (B, H, W) that are not empty; float64, (B, 4)."""
    from torchvision.ops import masks_to_boxes

    boxes: Tensor = masks_to_boxes(masks).double()
    boxes[:, 2:] += 1  # from the last pixel to its far edge
    return boxes


def _maps(attributions: Tensor, size: Sequence[int]) -> Tensor:
    """Signed attributions as (N, H, W)."""
    shape = "attributions must be of shape (N, channels, height, width)"
    if not isinstance(attributions, Tensor):
        raise TypeError(f"{shape}, not {type(attributions).__name__}")
    if attributions.dim() != 4 or 0 in attributions.shape[1:]:
        raise ValueError(f"{shape}, not {tuple(attributions.shape)}")
    return formulas.upsample(channel_sum(attributions), size)[:, 0]


def _masks_and_maps(attributions: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Masks (N, H, W), and the maps at their size, on the device of the maps."""
    shape = "masks must be bool and of shape (N, height, width) or (N, 1, height, width)"
    if not isinstance(masks, Tensor):
        raise TypeError(f"{shape}, not {type(masks).__name__}")
    if masks.dtype != torch.bool:
        raise TypeError(f"{shape}, not {masks.dtype}; give masks > 0, for example")
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
    for objects in boxes:
        if not isinstance(objects, Tensor):
            raise TypeError(f"{wanted}, not {type(objects).__name__}")
        if objects.dim() != 2 or objects.shape[1] != 4:
            raise ValueError(f"{wanted}, not {tuple(objects.shape)}")
        precise = objects.detach().cpu().double()
        if not precise.isfinite().all() or (precise[:, :2] > precise[:, 2:]).any():
            raise ValueError(f"boxes must be finite, with x0 <= x1 and y0 <= y1, not {objects.tolist()!r:.80}")
        checked.append(precise)
    return checked


def _positive_share(maps: Tensor) -> Tensor:
    """The positive part divided by its maximum, float64; zeros for a map that has none or is not finite."""
    values = formulas.precise(maps).relu()
    highest = values.amax((1, 2), keepdim=True)
    defined = maps.isfinite().all(2, keepdim=True).all(1, keepdim=True) & (highest > 0)
    return torch.where(defined, values / torch.where(defined, highest, 1.0), 0.0)


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
