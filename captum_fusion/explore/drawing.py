"""Maps over pictures, as Pillow images, fast enough to follow a slider."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from captum_fusion import functional

#: How a map is shown.
MODES = ("overlay", "contour", "mask", "side by side")

#: The colour maps that are offered; the first is the default.
CMAPS = ("viridis", "magma", "inferno", "cividis", "turbo", "jet", "gray")

#: The value at which a contour or mask is drawn while the threshold is 0.
_HALF = 0.5


class Display(NamedTuple):
    """How maps are drawn.

    Attributes:
        mode: One of :data:`MODES`. Default: ``"overlay"``
        alpha: The opacity of the map, in [0, 1]. Default: 0.6
        cmap: The name of a colour map. Default: ``"viridis"``
        threshold: Lower values are not shown, in [0, 1]. Default: 0
        shared: Whether one colour means the same share of the map in all maps; otherwise each map has its own scale,
            from 0 to its maximum. Default: False
    """

    mode: str = "overlay"
    alpha: float = 0.6
    cmap: str = CMAPS[0]
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

        >>> [image.size for image in draw(Image.new("RGB", (40, 30)), [torch.rand(3, 4)], Display())]
        [(40, 30)]
    """
    scales = [1.0] * len(heats)
    if display.shared:
        densities = [float(heat.max() / heat.sum()) if heat.any() else 0.0 for heat in heats]
        highest = max(densities, default=0.0) or 1.0
        scales = [density / highest for density in densities]
    return [_draw(view, heat, scale, display) for heat, scale in zip(heats, scales, strict=True)]


def _draw(view: Image.Image, heat: Tensor, scale: float, display: Display) -> Image.Image:
    picture = np.asarray(view, dtype=np.float32) / 255
    values = _resized(heat, view.size)
    level = display.threshold or _HALF
    if display.mode == "mask":
        drawn = np.where((values >= level)[..., None], picture, picture.mean(2, keepdims=True) * (1 - display.alpha))
    elif display.mode == "contour":
        drawn = _contour(picture, values >= level)
    else:
        colours = colormaps[display.cmap](values * scale)[..., :3].astype(np.float32)
        if display.mode == "side by side":
            drawn = np.concatenate([picture, np.where((values >= display.threshold)[..., None], colours, 0)], 1)
        else:
            opacity = display.alpha * (values >= display.threshold)[..., None]
            drawn = picture * (1 - opacity) + colours * opacity
    return Image.fromarray((drawn.clip(0, 1) * 255).round().astype(np.uint8))


def _resized(heat: Tensor, size: tuple[int, int]) -> NDArray[np.float32]:
    values: NDArray[np.float32] = functional.upsample(heat[None, None].float(), size[::-1])[0, 0].numpy()
    return values.clip(0, 1)


def _contour(picture: NDArray[np.float32], inside: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The picture with a white line in a black one around a region."""
    drawn = picture.copy()
    width = max(1, max(inside.shape) // 250)
    area = torch.from_numpy(inside)[None].float()
    for thickness, colour in ((2 * width, 0.0), (width, 1.0)):
        size = 2 * thickness + 1
        outer = torch.nn.functional.max_pool2d(area, size, 1, thickness)
        inner = -torch.nn.functional.max_pool2d(-area, size, 1, thickness)
        drawn[(outer > inner)[0].numpy()] = colour
    return drawn


def masked(view: Image.Image, shown: Tensor) -> Image.Image:
    """The picture with only a part shown, on grey.

    Args:
        view (Image): The picture.
        shown (Tensor): The part, (H, W) in [0, 1].
    """
    weights = _resized(shown, view.size)[..., None]
    drawn = np.asarray(view, dtype=np.float32) * weights + 124 * (1 - weights)
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
