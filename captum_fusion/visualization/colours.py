"""From the values of a map to colours: sign, scale and colour map."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from numpy.typing import NDArray
from torch import Tensor

from captum_fusion._arguments import choice, near_misses, positive
from captum_fusion.functional import at_least_float32

#: Default colour map of maps without a sign.
CMAP = "inferno"
#: Default colour map of signed maps (``sign="all"``), centred on 0.
DIVERGING_CMAP = "RdBu_r"
#: Captum's names for the part of a signed map that is drawn.
SIGNS = ("positive", "negative", "absolute_value", "all")

Array = NDArray[np.float32]


def with_sign(attribution: Tensor | NDArray[Any], sign: str = "positive", spatial: int = 2) -> Tensor:
    """Sum the channels of one map and select its sign.

    Args:
        attribution (Tensor or ndarray): Map of shape (1, C, *spatial), (C, *spatial) or (*spatial).
        sign (str): Captum's ``"positive"``, ``"negative"``, ``"absolute_value"`` or ``"all"``.
        spatial (int): Number of spatial dimensions. Default: 2

    Returns:
        Tensor: On the CPU, float32 (float64 if the map is), of shape (1, 1, *spatial).

    Raises:
        ValueError: If there are several maps, the map has another shape, or a value is not finite.

    Examples::

        >>> with_sign(torch.tensor([[1.0, -2.0]]), "absolute_value").tolist()
        [[[[1.0, 2.0]]]]
    """
    choice("sign", sign, SIGNS)
    flat = torch.as_tensor(attribution).detach().cpu()
    missing = 2 + spatial - flat.dim()
    flat = flat[(None,) * missing] if missing in (1, 2) else flat
    if flat.dim() != 2 + spatial or flat.shape[0] != 1:
        dimensions = {1: "one-dimensional", 2: "two-dimensional", 3: "three-dimensional"}[spatial]
        raise ValueError(f"attribution must be one {dimensions} map, not of shape {tuple(np.shape(attribution))}")
    flat = at_least_float32(flat).sum(1, keepdim=True)
    if not flat.isfinite().all():
        raise ValueError("attribution must be finite, but it has NaN or infinite values")
    if sign == "all":
        return flat
    return flat.abs() if sign == "absolute_value" else (flat if sign == "positive" else -flat).relu()


def shared_scale(maps: Iterable[Tensor | NDArray[Any]], *, sign: str = "positive") -> float:
    """The ``scale`` on which several maps can be compared: the largest value of all of them.

    Args:
        maps (iterable of Tensor or ndarray): Two-dimensional maps, as in :func:`visualize_map`.
        sign (str, optional): As in :func:`visualize_map`. Default: ``"positive"``

    Returns:
        float: Above 0; 1 if all maps are 0.

    Examples::

        >>> shared_scale([torch.tensor([[0.1, 0.2]]), torch.tensor([[0.5, -3.0]])])
        0.5
    """
    return max((float(with_sign(one, sign).abs().max()) for one in maps), default=0.0) or 1.0


def end_of_scale(heat: NDArray[Any], scale: float | None, outlier_perc: float = 0.0) -> float:
    """The value at the end of the colour map: ``scale``, or the map's largest value apart from outliers.

    Outliers are captum's: the largest values that hold ``outlier_perc`` percent of the sum of all absolute values.

    Examples::

        >>> end_of_scale(np.array([1.0, 1.0, 8.0]), None), end_of_scale(np.zeros(2), None)
        (8.0, 1.0)
    """
    if scale is not None:
        return positive("scale", scale)
    values = np.abs(heat, dtype=float).ravel()
    if not outlier_perc or not values.any():
        return float(values.max()) or 1.0
    values.sort()
    sums = values.cumsum()
    return float(values[np.searchsorted(sums, sums[-1] * (1 - outlier_perc / 100))]) or 1.0


def colour_map(cmap: str | None, sign: str) -> str:
    """The name of a colour map, or the default for a sign.

    Raises:
        ValueError: If matplotlib has no colour map of that name.

    Examples::

        >>> colour_map(None, "positive"), colour_map(None, "all"), colour_map("jet", "positive")
        ('inferno', 'RdBu_r', 'jet')
    """
    if cmap is None:
        return DIVERGING_CMAP if sign == "all" else CMAP
    if cmap not in colormaps:
        near = near_misses(cmap, colormaps) or [CMAP, "viridis", "magma", "cividis", "jet"]
        raise ValueError(f"cmap: matplotlib has no colour map {cmap!r}; did you mean {', '.join(near)}?")
    return cmap


def colours(shares: Array, cmap: str) -> Array:
    """The colours of values from 0 to 1, of shape (..., 3), in [0, 1]."""
    table = colormaps[cmap](np.linspace(0, 1, 256))[:, :3].astype(np.float32)
    picked: Array = table[(shares * 255).round().clip(0, 255).astype(np.uint8)]
    return picked
