"""Figures of two-dimensional maps over their pictures: one map, a grid, methods by pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from captum.attr import visualization as viz
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor

from captum_fusion._arguments import choice, percentage, share
from captum_fusion.visualization import text
from captum_fusion.visualization.colours import Array, colour_map, end_of_scale, shared_scale, with_sign
from captum_fusion.visualization.pictures import ALPHA, LEVELS, Box, Picture, placed, rim_of, to_picture

#: Captum's methods, and our own.
METHODS = ("blended_heat_map", "heat_map", "masked_image", "alpha_scaling", "contour")

_TITLE, _GAP = 0.52, 0.08  # inches above a row of panels with and without titles
_TALLEST = 2.0  # height of a row divided by the width of its panels
_HEAT_MAPS = ("blended_heat_map", "heat_map")
_OUTLINE = "#7df9ff"  # bright, in greyscale too, and not a colour of the default colour maps


def visualize_map(
    attribution: Tensor | NDArray[Any],
    image: Picture,
    *,
    method: str = "blended_heat_map",
    title: str | None = None,
    fig_axis: tuple[Figure | SubFigure, Axes] | None = None,
    sign: str = "positive",
    cmap: str | None = None,
    alpha_overlay: float = ALPHA,
    outlier_perc: float = 1.0,
    scale: float | None = None,
    threshold: float | None = None,
    box: Box | None = None,
    outlines: Tensor | NDArray[Any] | None = None,
    show_colorbar: bool = False,
    colorbar_label: str | None = None,
) -> tuple[Figure, Axes]:
    """Draw one map over its image with captum's ``visualize_image_attr``.

    Accepts the tensors that attributions return: the map is upsampled to the image's size, and mean/std-normalised and
    one-channel images are converted to pictures. An all-zero map, which captum rejects, is drawn as the grey image.

    Args:
        attribution (Tensor or ndarray): Map of shape (1, C, h, w), (C, h, w) or (h, w). Channels are summed.
        image (Tensor, Image or ndarray): Image, as in :func:`to_picture`.
        method (str, optional): Captum's ``"blended_heat_map"``, ``"heat_map"``, ``"masked_image"`` or
            ``"alpha_scaling"``, or ``"contour"``: lines of equal value on the image.
            Default: ``"blended_heat_map"``
        title (str, optional): Title of the axes. Long titles are wrapped. Default: None
        fig_axis (tuple[Figure, Axes], optional): Figure and axes to draw on. Default: None (a new figure)
        sign (str, optional): Captum's ``"positive"`` (negative sums are ignored), ``"negative"``,
            ``"absolute_value"`` or ``"all"``. With ``"all"``, the colour map is centred on 0.
            Default: ``"positive"``
        cmap (str, optional): Matplotlib colour map. Default: None (``"inferno"``, ``"RdBu_r"`` for ``sign="all"``)
        alpha_overlay (float, optional): Opacity of the heat map, 0 to 1. Default: 0.6
        outlier_perc (float, optional): Captum's percentage of outliers, without effect if ``scale`` is given.
            Default: 1
        scale (float, optional): Value at the end of the colour map, see :func:`shared_scale`. For heat maps and
            contours. Default: None (the map's largest absolute value, apart from outliers)
        threshold (float, optional): Fraction of the scale, 0 to 1. Lower values are not drawn in a heat map; in a
            contour plot it is the only line. Default: None
        box (tuple of float, optional): Part of the image that the map covers, as left, top, right and bottom in pixels.
            Default: None (the whole image)
        outlines (Tensor or ndarray, optional): Masks of objects, bool (B, H, W) in the image's size, whose outlines are
            drawn. Default: None
        show_colorbar (bool, optional): Whether to draw a colour bar with the map's values. Default: False
        colorbar_label (str, optional): Label of the colour bar. Default: None (a description of the scale)

    Returns:
        tuple[Figure, Axes]: The figure and its axes. Save it with ``figure.savefig(...)``.

    Raises:
        ValueError: If an argument does not fit. The message names it.

    Examples::

        >>> import torch
        >>> figure, axis = visualize_map(torch.rand(1, 1, 4, 4), torch.rand(1, 3, 32, 32), title="a map")
        >>> axis.get_title()
        'a map'
    """
    choice("method", method, METHODS)
    percentage("outlier_perc", outlier_perc)
    name, picture = colour_map(cmap, sign), to_picture(image)
    if scale is not None and method not in (*_HEAT_MAPS, "contour"):
        raise ValueError(f"scale: captum's {method!r} has no colour map; use a heat map or contours")
    heat, inside = placed(with_sign(attribution, sign), picture.shape[:2], box)
    end = end_of_scale(heat, scale, outlier_perc)
    if fig_axis is None:
        figure = Figure(figsize=(4, 4), layout="constrained")
        fig_axis = figure, figure.add_subplot()
    _, axis = fig_axis
    limits = (-end if sign == "all" else 0.0, end)
    if not heat.any():
        axis.imshow(picture.mean(2), cmap="gray", vmin=0, vmax=1)
        axis.text(0.5, 0.5, "all zero", transform=axis.transAxes, ha="center", va="center", color="white")
    elif method == "contour":
        axis.imshow(picture)
        _draw_contours(axis, heat, LEVELS if threshold is None else (share("threshold", threshold),), end, name, sign)
    else:
        viz.visualize_image_attr(
            (heat / np.abs(heat).max())[..., None],  # captum normalises, but warns of maps with small values
            picture,
            method=method,
            sign=sign if sign != "negative" else "positive",  # a negative map has been inverted
            plt_fig_axis=fig_axis,
            outlier_perc=outlier_perc,
            cmap=name,
            alpha_overlay=alpha_overlay,
            use_pyplot=False,
        )
        if method in _HEAT_MAPS:
            drawn = np.abs(heat) >= (0.0 if threshold is None else share("threshold", threshold)) * end
            axis.images[-1].set_data(np.ma.masked_array(heat, ~(drawn & inside)))  # captum's is in shares of its scale
            axis.images[-1].set_clim(*limits)
    if box is not None:
        axis.add_patch(_frame(box))
    _draw_outlines(axis, outlines, picture.shape[:2])
    text.set_title(axis, title or "", _width(fig_axis))
    axis.set_axis_off()
    if show_colorbar:
        label = colorbar_label or ("attribution" if scale is None else "attribution, on a shared scale")
        text.colour_bar(fig_axis[0], [axis], name, limits, label, is_clipped=float(np.abs(heat).max()) > 1.001 * end)
    return fig_axis[0].figure, axis


def _draw_contours(axis: Axes, heat: Array, levels: Sequence[float], end: float, cmap: str, sign: str) -> None:
    """Lines at fractions of the scale; a rim keeps them visible on any picture."""
    values = sorted(level * end for level in levels if level > 0)
    values = sorted({*values, *(-value for value in values)} if sign == "all" else values)
    values = [value for value in values if heat.min() < value < heat.max()]  # matplotlib warns of others
    if not values:
        return
    norm = Normalize(-end if sign == "all" else 0.0, end)
    rims = [rim_of(np.asarray(colormaps[cmap](norm(value)))) for value in values]
    axis.contour(heat, values, colors=rims, linewidths=2.6, linestyles="solid")
    axis.contour(heat, values, cmap=cmap, norm=norm, linewidths=1.4, linestyles="solid")


def _draw_outlines(axis: Axes, masks: Tensor | NDArray[Any] | None, size: tuple[int, ...]) -> None:
    """Outlines of objects, with a rim, within the picture."""
    if masks is None:
        return
    inside = torch.as_tensor(masks).detach().cpu().numpy()
    if inside.ndim != 3 or inside.shape[1:] != size:
        height, width = size
        raise ValueError(f"outlines must be masks of shape (B, {height}, {width}), not {inside.shape}")
    x, y = (np.arange(-1, length + 1).clip(-0.2, length - 0.8) for length in size[::-1])
    for mask in np.pad(inside.astype(np.float32), ((0, 0), (1, 1), (1, 1))):
        if mask.any():
            axis.contour(x, y, mask, [0.5], colors="black", linewidths=2.4)
            axis.contour(x, y, mask, [0.5], colors=_OUTLINE, linewidths=1.2)


def _frame(box: Box) -> Rectangle:
    """The outline of what the network sees."""
    left, top, right, bottom = box
    return Rectangle(
        (left - 0.5, top - 0.5),
        right - left,
        bottom - top,
        fill=False,
        edgecolor="white",
        linewidth=0.8,
        linestyle="--",
    )


def _width(fig_axis: tuple[Figure | SubFigure, Axes]) -> float:
    """Width of axes in inches, for texts; a layout engine changes it only a little."""
    figure, axis = fig_axis
    width: float = axis.get_position().width * figure.bbox.width / figure.dpi
    return width


def visualize_grid(
    rows: Sequence[tuple[Picture, Sequence[tuple[Tensor | NDArray[Any] | None, str]]]],
    *,
    labels: Sequence[str] | None = None,
    panel: float = 2.4,
    is_shared: bool = False,
    show_colorbar: bool = False,
    legend: str | None = None,
    boxes: Sequence[Box | None] | None = None,
    outlines: Sequence[Tensor | NDArray[Any] | None] | None = None,
    figure: Figure | SubFigure | None = None,
    sign: str = "positive",
    cmap: str | None = None,
    **style: Any,
) -> Figure:
    """Draw a grid of panels with one row per image. A panel shows a map over the image, or the image alone.

    Args:
        rows (sequence): For each row, a pair of the image, as in :func:`to_picture`, and its panels. A panel is a pair
            of a map, as in :func:`visualize_map`, and a title. If the map is None, the panel shows the image.
        labels (sequence of str, optional): Text beside each row, for example its class. Default: None
        panel (float, optional): Width of a panel, in inches. Default: 2.4
        is_shared (bool, optional): Whether all maps have one scale, so that their values can be compared.
            Default: False (each map has its own)
        show_colorbar (bool, optional): Whether to draw one colour bar, which says what the scale is. Default: False
        legend (str, optional): Text below the panels. Default: None
        boxes (sequence, optional): For each row, the part of the image that the maps cover, see :func:`visualize_map`.
            Default: None (the whole image)
        outlines (sequence, optional): For each row, masks of objects whose outlines are drawn in every panel, see
            :func:`visualize_map`. Default: None
        figure (Figure or SubFigure, optional): Empty figure to draw on. Default: None (a new one)
        sign (str, optional): As in :func:`visualize_map`. Default: ``"positive"``
        cmap (str, optional): As in :func:`visualize_map`. Default: None
        style: Further arguments of :func:`visualize_map`.

    Returns:
        Figure: The figure, or that of the subfigure. Save it with ``figure.savefig(...)``.

    Raises:
        ValueError: If there is no row, the first row has no panel, or the number of labels, boxes or outlines is not
            that of rows.

    Examples::

        >>> import torch
        >>> image = torch.rand(3, 8, 8)
        >>> figure = visualize_grid([(image, [(None, "image"), (torch.rand(1, 1, 8, 8), "map")])])
        >>> [axis.get_title() for axis in figure.axes]
        ['image', 'map']
    """
    if not rows or not rows[0][1]:
        raise ValueError("rows must contain at least one row with at least one panel")
    labels, boxes = _for_each_row("labels", labels, len(rows)), _for_each_row("boxes", boxes, len(rows))
    outlines = _for_each_row("outlines", outlines, len(rows))
    columns = max(len(panels) for _, panels in rows)
    pictures = [to_picture(image) for image, _ in rows]
    heights = [panel * min(_TALLEST, picture.shape[0] / picture.shape[1]) for picture in pictures]
    if figure is None:
        extra = sum(_TITLE if any(title for _, title in panels) else _GAP for _, panels in rows)
        extra += 0.6 * show_colorbar + text.height(legend, panel * columns)
        figure = Figure(figsize=(panel * columns + 0.25 * any(labels), sum(heights) + extra), layout="constrained")
    inches = figure.bbox.width / figure.dpi / columns
    axes: Any = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    name, scale = colour_map(cmap, sign), None
    if is_shared:
        scale = shared_scale((heat for _, panels in rows for heat, _ in panels if heat is not None), sign=sign)
    for i, (line, picture, (_, panels)) in enumerate(zip(axes, pictures, rows, strict=True)):
        for axis in line[len(panels) :]:
            axis.remove()
        for axis, (heat, title) in zip(line, panels, strict=False):
            if heat is None:
                axis.imshow(picture)
                axis.set_axis_off()
                if boxes[i] is not None:
                    axis.add_patch(_frame(boxes[i]))
                _draw_outlines(axis, outlines[i], picture.shape[:2])
            else:
                visualize_map(
                    heat, picture, fig_axis=(figure, axis), sign=sign, cmap=name, scale=scale, box=boxes[i],
                    outlines=outlines[i], **style,
                )  # fmt: skip
            text.set_title(axis, title, inches)
        if labels[i]:
            text.label_row(line[0], labels[i], heights[i])
    if show_colorbar:
        end = 1.0 if scale is None else scale
        what = (
            "attribution, on one scale for all maps"
            if is_shared
            else "attribution, as a fraction of each map's maximum"
        )
        text.colour_bar(figure, figure.axes, name, (-end if sign == "all" else 0.0, end), what)
    if legend:
        text.legend_below(figure, legend, figure.bbox.width / figure.dpi)
    return figure.figure


def _for_each_row(name: str, values: Sequence[Any] | None, rows: int) -> list[Any]:
    values = [None] * rows if values is None else list(values)
    if len(values) != rows:
        raise ValueError(f"{name} must have one entry for each of the {rows} rows, not {len(values)}")
    return values


def visualize_comparison(
    images: Sequence[Picture] | Tensor,
    maps: Mapping[str, Sequence[Tensor | NDArray[Any]] | Tensor],
    *,
    titles: Sequence[str] | None = None,
    show_image: bool = True,
    **style: Any,
) -> Figure:
    """Compare methods on pictures: one row per picture, one column per method.

    Args:
        images (Tensor or sequence): Pictures, as in :func:`to_picture`; a tensor is of shape (N, C, H, W).
        maps (mapping): For each method's name, one map per picture, as in :func:`visualize_map`; a tensor is of shape
            (N, C, h, w).
        titles (sequence of str, optional): Text beside each row, for example the class. Default: None
        show_image (bool, optional): Whether the first column shows the pictures alone. Default: True
        style: Further arguments of :func:`visualize_grid`, for example ``is_shared`` and ``show_colorbar``.

    Returns:
        Figure: The figure, or that of the subfigure. Save it with ``figure.savefig(...)``.

    Raises:
        ValueError: If there is no method, or the number of maps or titles is not that of pictures.

    Examples::

        >>> import torch
        >>> maps = {"Grad-CAM": torch.rand(2, 1, 7, 7), "Score-CAM": torch.rand(2, 1, 7, 7)}
        >>> figure = visualize_comparison(torch.rand(2, 3, 64, 64), maps, is_shared=True)
        >>> [axis.get_title() for axis in figure.axes]
        ['picture', 'Grad-CAM', 'Score-CAM', '', '', '']
    """
    if not maps:
        raise ValueError("maps must contain at least one method")
    for method, given in maps.items():
        if len(given) != len(images):
            raise ValueError(
                f"maps must have one map of {method} for each of the {len(images)} pictures, not {len(given)}"
            )
    rows = []
    for i, image in enumerate(images):
        panels: list[tuple[Tensor | NDArray[Any] | None, str]] = [(None, "" if i else "picture")] if show_image else []
        panels += [(given[i], "" if i else method) for method, given in maps.items()]
        rows.append((image, panels))
    return visualize_grid(rows, labels=titles, **style)
