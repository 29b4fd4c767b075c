"""Pictures: read safely, and shown as the network sees them, in their own resolution."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from captum_fusion import functional
from captum_fusion.evaluation.data import load_image
from captum_fusion.visualization import to_picture

#: The most pixels of a picture.
MOST_PIXELS = 50_000_000

#: The longest side of the pictures that are shown, in pixels.
SHOWN = 672

Preprocess = Callable[[Image.Image], Tensor]

#: Left, top, right and bottom edges, in pixels.
Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture and what the network says of it.

    Attributes:
        name: Its file name.
        content: The file.
        key: A content hash.
        size: Width and height, in pixels.
        inputs: The network's input, (1, C, H, W).
        view: What the network sees of it, in the picture's own resolution where that is known.
        unseen: The share of the picture that the network does not see, in [0, 1].
        scores: The score of every class, (classes,).
        live: The number of channels that vary over space, for each layer.
    """

    name: str
    content: bytes
    key: str
    size: tuple[int, int]
    inputs: Tensor
    view: Image.Image
    unseen: float
    scores: Tensor
    live: dict[str, int]


def read(path: str | Path, name: str | None = None) -> tuple[bytes, Image.Image]:
    """Read a picture file of an unknown origin.

    Args:
        path (str or Path): The file.
        name (str, optional): Its name in messages.
            Default: None (the name of the file)

    Returns:
        tuple[bytes, Image]: The file's content, and the upright picture in 8-bit RGB; of an animation the first frame.

    Raises:
        ValueError: If it is not a picture, cannot be decoded, or has more than :data:`MOST_PIXELS` pixels.

    Examples::

        >>> from captum_fusion.demo import digits
        >>> read(digits.scene_path("four_and_six"))[1].size
        (96, 96)
    """
    path = Path(path)
    name = name or path.name
    try:
        content = path.read_bytes()
        with Image.open(BytesIO(content)) as opened:
            width, height = opened.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} has too many pixels; the most is {MOST_PIXELS // 10**6} million") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{name} could not be read ({error})") from error
    if width * height > MOST_PIXELS:
        raise ValueError(
            f"{name} has {width} x {height} pixels; the most is {MOST_PIXELS // 10**6} million, so make it smaller"
        )
    try:
        image = load_image(path)
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), name)) from error
    assert isinstance(image, Image.Image)
    return content, image


def look(preprocess: Preprocess, image: Image.Image, inputs: Tensor) -> tuple[Image.Image, float]:
    """What a network sees of a picture.

    Args:
        preprocess (callable): From a picture to the network's input.
        image (Image): The picture.
        inputs (Tensor): The network's input, (1, C, H, W).

    Returns:
        tuple[Image, float]: The visible part, of at most :data:`SHOWN` pixels a side, and the invisible share of the
        picture.
    """
    box = visible_box(preprocess, image.size)
    if box is None:
        return _enlarged(Image.fromarray((to_picture(inputs) * 255).round().astype(np.uint8))), 0.0
    left, top, right, bottom = box
    unseen = 1 - (right - left) * (bottom - top) / (image.width * image.height)
    scale = min(1.0, SHOWN / max(right - left, bottom - top))
    size = max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale))
    return _enlarged(image.resize(size, Image.Resampling.BICUBIC, box)), max(0.0, unseen)


def _enlarged(image: Image.Image) -> Image.Image:
    """A picture that is large enough to look at."""
    scale = SHOWN / max(image.size)
    if scale <= 1.5:
        return image
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))


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
