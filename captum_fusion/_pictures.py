"""Conversion of pictures, and what preprocessing keeps of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captum_fusion import functional

Preprocess = Callable[[Image.Image], Tensor]

#: Left, top, right and bottom edges, in pixels.
Box = tuple[float, float, float, float]


def on_white(image: Image.Image) -> Image.Image:
    """An RGB picture; transparent pixels become white.

    Examples::

        >>> on_white(Image.new("RGBA", (1, 1), (255, 0, 0, 0))).getpixel((0, 0))
        (255, 255, 255)
    """
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(white, layer).convert("RGB")


def visible_box(preprocess: Preprocess, size: tuple[int, int]) -> Box | None:
    """The part of a picture that preprocessing keeps, found by preprocessing pictures of the pixels' coordinates.

    Args:
        preprocess (callable): From an RGB picture to the network's input, (1, 3, H, W). It may resize, crop and
            normalise.
        size (tuple[int, int]): Width and height of the picture.

    Returns:
        tuple or None: Left, top, right and bottom edges in pixels of the picture; None if preprocessing does anything
        else, such as padding or flipping.

    Examples::

        >>> from captum_fusion import models
        >>> import torch
        >>> usual = models.from_module("any", torch.nn.Identity()).preprocess
        >>> [round(edge) for edge in visible_box(usual, (800, 400))]
        [225, 25, 575, 375]
    """
    width, height = size
    black, white = (preprocess(Image.new("RGB", size, colour)) for colour in ("black", "white"))
    columns = np.broadcast_to(np.linspace(0, 255, width).round().astype(np.uint8), (height, width))
    rows = np.broadcast_to(np.linspace(0, 255, height).round().astype(np.uint8)[:, None], (height, width))
    ramps = preprocess(Image.fromarray(np.stack([columns, rows, np.zeros_like(rows)], 2)))
    if not black.shape == white.shape == ramps.shape or black.dim() != 4 or black.shape[1] != 3:
        return None
    light = functional.at_least_float32((ramps - black) / (white - black))[0]
    if not light.isfinite().all() or light[2].abs().max() > 0.02:
        return None
    across, down = _edges(light[0].mean(0), width), _edges(light[1].mean(1), height)
    if across is None or down is None:
        return None
    return across[0], down[0], across[1], down[1]


def _edges(ramp: Tensor, length: int) -> tuple[float, float] | None:
    """The first and last edge of a straight ramp, in pixels of the picture."""
    count = len(ramp)
    positions = torch.arange(count, dtype=torch.float64)
    inner = slice(count // 4, count - count // 4)
    x, y = positions[inner], ramp.double().cpu()[inner] * (length - 1) + 0.5
    if len(x) < 2 or length < 2:
        return 0.0, float(length)
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    if slope <= 0 or float((y - y.mean() - slope * (x - x.mean())).abs().max()) > 0.02 * length + slope:
        return None
    first = float(y.mean()) - slope * (float(x.mean()) + 0.5)
    low, high = (min(max(edge, 0.0), float(length)) for edge in (first, first + slope * count))
    return (low, high) if high - low >= 1 and math.isfinite(low + high) else None
