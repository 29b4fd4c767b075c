"""Attributions as maps of the input, as masks and as rankings of pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from captum_fusion import functional as formulas
from captum_fusion._passes.masking import Masking


def single_tensor(result: object, name: str) -> Tensor:
    """The only tensor that an attribution method returned; ``name`` is what an error calls the method.

    Raises:
        TypeError: If it returned anything else.
    """
    if isinstance(result, tuple) and len(result) == 1:
        result = result[0]
    if not isinstance(result, Tensor):
        raise TypeError(f"{name} must return one tensor (of one layer or one input), not {type(result).__name__}")
    return result


def channel_sum(attributions: Tensor) -> Tensor:
    """Attributions summed over their channels, in float32 at least: (N, 1, *spatial), without gradients."""
    return formulas.at_least_float32(attributions.detach()).sum(1, keepdim=True)


def input_maps(attributions: Tensor, masking: Masking, name: str = "attributions") -> Tensor:
    """Signed attributions as (N, 1, *input spatial); ``name`` is what an error calls them.

    Raises:
        ValueError: If they do not fit the inputs.
    """
    size = masking.spatial_size
    shape = tuple(attributions.shape) if isinstance(attributions, Tensor) else type(attributions).__name__
    if (
        not isinstance(attributions, Tensor)
        or attributions.dim() != len(size) + 2
        or len(attributions) != masking.examples
    ):
        raise ValueError(
            f"{name} must be of shape ({masking.examples}, channels, {len(size)} spatial dimensions), not {shape}"
        )
    return formulas.upsample(channel_sum(attributions), size)


def as_masks(maps: Tensor, normalize: bool) -> Tensor:
    """Maps in [0, 1]: their positive part stretched to [0, 1], or the maps themselves without ``normalize``.

    A map that is not finite becomes NaN.

    Raises:
        ValueError: If they must be in [0, 1] and are not.
    """
    if normalize:
        return formulas.normalize(maps.relu())
    if maps.min() < 0 or maps.max() > 1 or not maps.isfinite().all():
        raise ValueError(
            "attributions must be in [0, 1] with normalize=False, not from "
            f"{float(maps.min()):.4g} to {float(maps.max()):.4g}"
        )
    return maps


def varies(maps: Tensor) -> Tensor:
    """Whether each map is finite and not constant up to rounding errors, (N,)."""
    return formulas.normalize(maps).flatten(1).amax(1) > 0


def nan_where_undefined(values: Tensor, *maps: Tensor) -> Tensor:
    """Values (N, ...), NaN for examples one of whose maps (N, ...) is not finite."""
    broken = ~torch.stack([each.isfinite().flatten(1).all(1) for each in maps]).all(0).to(values.device)
    return values.masked_fill(broken.reshape(-1, *[1] * (values.dim() - 1)), torch.nan)


def pixel_ranks(flat: Tensor, descending: bool) -> Tensor:
    """The rank of each pixel in its map (N, pixels). Equal values are ranked in reading order."""
    order = flat.argsort(dim=1, descending=descending, stable=True)
    ranks = torch.arange(flat.shape[1], device=flat.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, ranks)


def pixel_masks(shown: Tensor, size: Sequence[int], wanted: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Masks of whole pixels (S, 1, *wanted), zeros and ones, of bools (S, pixels) at another ``size``."""
    masks = shown.reshape(-1, 1, *size).to(dtype)
    return masks if tuple(wanted) == tuple(size) else (formulas.upsample(masks, wanted) > 0.5).to(dtype)
