"""Maps over pictures, as Pillow images, fast enough to follow a slider."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from captum_fusion import functional
from captum_fusion.visualization import CMAP, overlay, shared_scale, to_picture

#: The colour maps that are offered; the first is the default.
CMAPS = (CMAP, "viridis", "magma", "cividis", "turbo", "jet", "gray")

_GREY = 124  # close to the mean colour of ImageNet, which is 0 in a network's input


class Display(NamedTuple):
    """How maps are drawn.

    Attributes:
        mode: One of :data:`captum_fusion.visualization.MODES`. Default: ``"overlay"``
        alpha: The opacity of the map, in [0, 1]. Default: 0.6
        cmap: The name of a colour map. Default: ``"inferno"``
        threshold: Lower values are not shown, in [0, 1]; 0 for the mode's own. Default: 0
        shared: Whether one colour means the same share of the map in all maps; otherwise each map has its own scale,
            from 0 to its maximum. Default: False
    """

    mode: str = "overlay"
    alpha: float = 0.6
    cmap: str = CMAP
    threshold: float = 0.0
    shared: bool = False


def draw(view: Image.Image, heats: Sequence[Tensor], display: Display) -> list[Image.Image]:
    """Draw maps over a picture.

    Args:
        view (Image): The picture.
        heats (sequence of Tensor): Maps of what the picture shows, (H, W) in [0, 1].
        display (Display): How they are drawn.

    Returns:
        list[Image]: One for each map.

    Examples::

        >>> import torch
        >>> [image.size for image in draw(Image.new("RGB", (40, 30)), [torch.rand(3, 4)], Display())]
        [(40, 30)]
    """
    maps, scale = list(heats), None
    if display.shared:
        maps = [heat / heat.sum() if heat.any() else heat for heat in heats]
        scale = shared_scale(maps)
    return [
        Image.fromarray(
            overlay(
                view,
                heat,
                display.mode,
                cmap=display.cmap,
                alpha_overlay=display.alpha,
                threshold=display.threshold or None,
                scale=scale,
            )
        )
        for heat in maps
    ]


def masked(view: Image.Image, shown: Tensor) -> Image.Image:
    """The picture with only a part shown, on grey.

    Args:
        view (Image): The picture.
        shown (Tensor): The part, (H, W) in [0, 1].
    """
    weights = functional.upsample(shown[None, None].float(), view.size[::-1])[0, 0, ..., None].numpy().clip(0, 1)
    drawn = to_picture(view) * 255 * weights + _GREY * (1 - weights)
    return Image.fromarray(drawn.round().astype(np.uint8))


def side_by_side(images: Sequence[Image.Image], columns: int = 2, gap: int = 12) -> Image.Image:
    """Pictures of equal size in a grid on white."""
    width, height = images[0].size
    columns = min(columns, len(images))
    lines = -(-len(images) // columns)
    canvas = Image.new("RGB", (columns * (width + gap) - gap, lines * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        canvas.paste(image, (i % columns * (width + gap), i // columns * (height + gap)))
    return canvas
