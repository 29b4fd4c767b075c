"""Figures of three-dimensional maps: slices in three planes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray
from torch import Tensor

from captum_fusion.functional import at_least_float32, upsample
from captum_fusion.visualization import text
from captum_fusion.visualization.colours import colour_map, end_of_scale, with_sign
from captum_fusion.visualization.maps import visualize_map

_PANEL = 2.6  # inches


def visualize_volume(
    attribution: Tensor | NDArray[Any],
    volume: Tensor | NDArray[Any],
    *,
    position: Sequence[int] | None = None,
    axes: Sequence[str] = ("depth", "height", "width"),
    titles: Sequence[str] | None = None,
    sign: str = "positive",
    cmap: str | None = None,
    show_colorbar: bool = True,
    figure: Figure | SubFigure | None = None,
    **style: Any,
) -> Figure:
    """Draw slices of a three-dimensional map over its volume in the three planes through one point.

    All slices have one scale, and the volume's values go from black to white.

    Args:
        attribution (Tensor or ndarray): Map of shape (1, C, d, h, w), (C, d, h, w) or (d, h, w). Channels are summed,
            and the sum is interpolated to the volume's size.
        volume (Tensor or ndarray): Volume of shape (1, C, D, H, W), (C, D, H, W) or (D, H, W). Channels are averaged.
        position (sequence of int, optional): Indices of the slices along depth, height and width, in voxels of the
            volume. Default: None (through the map's largest absolute value)
        axes (sequence of str, optional): Names of the three axes, for titles.
            Default: ``("depth", "height", "width")``
        titles (sequence of str, optional): Titles of the three panels. Default: None (the axis and the slice's number)
        sign (str, optional): As in :func:`visualize_map`. Default: ``"positive"``
        cmap (str, optional): As in :func:`visualize_map`. Default: None
        show_colorbar (bool, optional): Whether to draw a colour bar with the map's values. Default: True
        figure (Figure or SubFigure, optional): Empty figure to draw on. Default: None (a new one)
        style: Further arguments of :func:`visualize_map`.

    Returns:
        Figure: The figure, or that of the subfigure. Save it with ``figure.savefig(...)``.

    Raises:
        ValueError: If an argument does not fit. The message names it.

    Examples::

        >>> import torch
        >>> heat = torch.zeros(1, 1, 4, 4, 4)
        >>> heat[..., 1, 2, 3] = 1
        >>> figure = visualize_volume(heat, torch.rand(1, 1, 4, 4, 4), show_colorbar=False)
        >>> [axis.get_title() for axis in figure.axes]
        ['depth 2 of 4', 'height 3 of 4', 'width 4 of 4']
    """
    grey = _grey(volume)
    size = grey.shape
    heat = upsample(with_sign(attribution, sign, 3), size)[0, 0].numpy()
    if position is None:
        position = [int(index) for index in np.unravel_index(np.abs(heat).argmax(), size)]
    if len(position) != 3 or not all(0 <= int(index) < side for index, side in zip(position, size, strict=True)):
        raise ValueError(f"position must be three indices in a volume of {' x '.join(map(str, size))}, not {position}")
    titles = titles or [f"{name} {index + 1} of {side}" for name, index, side in zip(axes, position, size, strict=True)]
    slices: list[tuple[Any, Any]] = [
        (heat.take(index, axis), grey.take(index, axis)) for axis, index in enumerate(position)
    ]
    if figure is None:
        figure = Figure(figsize=(3 * _PANEL, _PANEL + 0.4 + 0.5 * show_colorbar), layout="constrained")
    name, scale = colour_map(cmap, sign), end_of_scale(heat, None)
    panels: Any = figure.subplots(1, 3, width_ratios=[picture.shape[1] for _, picture in slices])  # equal voxels
    for panel, (values, picture), title in zip(panels, slices, titles, strict=True):
        visualize_map(
            values, picture, title=title, fig_axis=(figure, panel), sign=sign, cmap=name, scale=scale, **style
        )
    if show_colorbar:
        limits = (-scale if sign == "all" else 0.0, scale)
        text.colour_bar(figure, list(panels), name, limits, "attribution, on one scale for the volume")
    return figure.figure


def _grey(volume: Tensor | NDArray[Any]) -> NDArray[np.float32]:
    """A volume (D, H, W) in [0, 1]."""
    values = torch.as_tensor(volume).detach().cpu()
    values = values[0] if values.dim() == 5 and values.shape[0] == 1 else values
    if values.dim() not in (3, 4):
        raise ValueError(f"volume must be of shape (C, D, H, W) or (D, H, W), not {tuple(np.shape(volume))}")
    values = at_least_float32(values)
    values = values.mean(0) if values.dim() == 4 else values
    low, high = values.min(), values.max()
    scaled: NDArray[np.float32] = ((values - low) / (high - low if high > low else 1.0)).float().numpy()
    return scaled
