"""Figures of attributions, built on ``captum.attr.visualization``. They use no pyplot and open no window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from captum.attr import visualization as viz
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from captum_fusion.functional import at_least_float32, upsample

#: Colour map of heat maps, as used in the CAM literature. It is legible on the grey picture underneath.
CMAP = "jet"


def to_picture(image: Tensor) -> NDArray[np.float32]:
    """Convert an image tensor to the format of matplotlib and captum.

    Args:
        image (Tensor): Image of shape (C, H, W) or (1, C, H, W) with one or three channels. If any value is outside
            [0, 1], for example after mean/std normalisation, the image is rescaled to [0, 1].

    Returns:
        ndarray: float32, of shape (H, W, 3), in [0, 1].

    Raises:
        ValueError: If the image has another shape.

    Examples::

        >>> import torch
        >>> to_picture(torch.rand(1, 1, 4, 6)).shape
        (4, 6, 3)
    """
    if image.dim() == 4 and image.shape[0] == 1:
        image = image[0]
    if image.dim() != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"image must be of shape (C, H, W) with one or three channels, not {tuple(image.shape)}")
    image = at_least_float32(image.detach().cpu())
    low, high = image.min(), image.max()
    if low < 0 or high > 1:
        image = (image - low) / (high - low if high > low else 1.0)
    picture: NDArray[np.float32] = image.float().expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    return picture


def visualize_map(
    attribution: Tensor,
    image: Tensor,
    *,
    method: str = "blended_heat_map",
    title: str | None = None,
    fig_axis: tuple[Figure, Axes] | None = None,
    cmap: str = CMAP,
    alpha_overlay: float = 0.55,
    outlier_perc: float = 1.0,
    show_colorbar: bool = False,
) -> tuple[Figure, Axes]:
    """Draw one map over its image with captum's ``visualize_image_attr``.

    Accepts the tensors that attributions return: the map is upsampled to the image's size, and mean/std-normalised and
    one-channel images are converted to pictures. An all-zero map, which captum rejects, is drawn as the grey image.

    Args:
        attribution (Tensor): Map of shape (1, C, h, w), (C, h, w) or (h, w). Channels are summed, and negative sums
            are ignored.
        image (Tensor): Image of shape (1, C, H, W) or (C, H, W).
        method (str, optional): Captum's ``"blended_heat_map"``, ``"heat_map"``, ``"masked_image"`` or
            ``"alpha_scaling"``. Default: ``"blended_heat_map"``
        title (str, optional): Title of the axes. Default: None
        fig_axis (tuple[Figure, Axes], optional): Figure and axes to draw on. Default: None (a new figure)
        cmap (str, optional): Matplotlib colour map. Default: ``"jet"``
        alpha_overlay (float, optional): Opacity of the heat map, 0 to 1. Default: 0.55
        outlier_perc (float, optional): Captum's percentage of outliers. Default: 1
        show_colorbar (bool, optional): Whether to draw a colour bar. Default: False

    Returns:
        tuple[Figure, Axes]: The figure and its axes. Save it with ``figure.savefig(...)``.

    Raises:
        ValueError: If the map or the image has another shape, or holds several examples.

    Examples::

        >>> import torch
        >>> figure, axis = visualize_map(torch.rand(1, 1, 4, 4), torch.rand(1, 3, 32, 32), title="a map")
        >>> axis.get_title()
        'a map'
    """
    picture = to_picture(image)
    flat = attribution.detach().cpu()
    flat = flat[(None,) * (4 - flat.dim())] if flat.dim() < 4 else flat
    if flat.dim() != 4 or flat.shape[0] != 1:
        raise ValueError(f"attribution must be one two-dimensional map, not of shape {tuple(attribution.shape)}")
    heat = upsample(flat.sum(1, keepdim=True).relu(), picture.shape[:2])[0, 0].float().numpy()
    if fig_axis is None:
        figure = Figure(figsize=(4, 4), layout="constrained")
        fig_axis = figure, figure.add_subplot()
    figure, axis = fig_axis
    if heat.max() > 0:
        viz.visualize_image_attr(
            heat[..., None],
            picture,
            method=method,
            sign="positive",
            plt_fig_axis=fig_axis,
            outlier_perc=outlier_perc,
            cmap=cmap,
            alpha_overlay=alpha_overlay,
            show_colorbar=show_colorbar,
            use_pyplot=False,
        )
    else:
        axis.imshow(picture.mean(2), cmap="gray", vmin=0, vmax=1)
        axis.text(0.5, 0.5, "all zero", transform=axis.transAxes, ha="center", va="center", color="white")
    axis.set_title(title or "", parse_math=False)
    axis.set_axis_off()
    return figure, axis


def visualize_grid(
    rows: Sequence[tuple[Tensor, Sequence[tuple[Tensor | None, str]]]], *, panel: float = 2.4, cmap: str = CMAP
) -> Figure:
    """Draw a grid of panels with one row per image. A panel shows a map over the image, or the image alone.

    Args:
        rows (sequence): For each row, a pair of the image, as in :func:`to_picture`, and its panels. A panel is a pair
            of a map, as in :func:`visualize_map`, and a title. If the map is None, the panel shows the image.
        panel (float, optional): Width of a panel, in inches. Default: 2.4
        cmap (str, optional): Matplotlib colour map. Default: ``"jet"``

    Returns:
        Figure: The figure. Save it with ``figure.savefig(...)``.

    Raises:
        ValueError: If there is no row, or the first row has no panel.

    Examples::

        >>> import torch
        >>> image = torch.rand(3, 8, 8)
        >>> figure = visualize_grid([(image, [(None, "image"), (torch.rand(1, 1, 8, 8), "map")])])
        >>> [axis.get_title() for axis in figure.axes]
        ['image', 'map']
    """
    if not rows or not rows[0][1]:
        raise ValueError("rows must contain at least one row with at least one panel")
    columns = max(len(panels) for _, panels in rows)
    height = sum(panel * image.shape[-2] / image.shape[-1] + 0.45 for image, _ in rows)
    figure = Figure(figsize=(panel * columns, height), layout="constrained")
    axes: Any = figure.subplots(len(rows), columns, squeeze=False)
    for line, (image, panels) in zip(axes, rows, strict=True):
        for axis in line[len(panels) :]:
            axis.remove()
        for axis, (heat, title) in zip(line, panels, strict=False):
            if heat is None:
                axis.imshow(to_picture(image))
                axis.set_axis_off()
            else:
                visualize_map(heat, image, fig_axis=(figure, axis), cmap=cmap)
            axis.set_title(title, fontsize=8.5, parse_math=False)
    return figure


def visualize_fusion(
    images: Tensor, attributions: Tensor, details: Any, *, titles: Sequence[str] | None = None, name: str = "fusion"
) -> Figure:
    """Draw the steps of a fusion, with one row per example: image | gradient map | region map | union | fusion.

    Args:
        images (Tensor): Images of shape (N, C, H, W), as in :func:`to_picture`.
        attributions (Tensor): Maps of the fusion, of shape (N, 1, H, W).
        details (FusionDetails): Details of the fusion, from ``return_details=True``.
        titles (sequence of str, optional): Title of each image, for example its class. Default: None
        name (str, optional): Title of the last column. Default: ``"fusion"``

    Returns:
        Figure: The figure. The titles of the maps give their contributions and weights.

    Examples::

        >>> from captum_fusion import LayerFusionCAM
        >>> from captum_fusion.demo import digits
        >>> model, scene = digits.load_model(), digits.load_scenes()[0]
        >>> inputs = digits.preprocess(scene.image)
        >>> maps, details = LayerFusionCAM(model, model.stage4).attribute(inputs, scene.labels[0], return_details=True)
        >>> figure = visualize_fusion(inputs, maps, details, titles=["what the network saw"])
        >>> [axis.get_title().split()[0] for axis in figure.axes]
        ['what', 'gradient', 'region', 'union', 'fusion']
    """
    rows = []
    for i in range(images.shape[0]):
        (gradient, region), (union, rival) = details.union_weights[i].tolist(), details.fusion_weights[i].tolist()
        if details.selected is None:
            last = f"{name}\n{union:.2f} union, {rival:.2f} region"
        else:
            last = f"{name}\nselected: {'union' if details.selected[i] else 'region map'}"
        rows.append(
            (
                images[i],
                [
                    (None, titles[i] if titles else ""),
                    (
                        details.denoised_map[i : i + 1],
                        f"gradient map\ncontributes {details.gradient_contribution[i]:+.2f}, weight {gradient:.2f}",
                    ),
                    (
                        details.region_map[i : i + 1],
                        f"region map\ncontributes {details.region_contribution[i]:+.2f}, weight {region:.2f}",
                    ),
                    (details.union_map[i : i + 1], f"union\ncontributes {details.union_contribution[i]:+.2f}"),
                    (attributions[i : i + 1], last),
                ],
            )
        )
    return visualize_grid(rows)
