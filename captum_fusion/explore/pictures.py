"""Pictures: read safely, and shown as the network sees them, in their own resolution."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from captum_fusion._pictures import Preprocess, visible_box
from captum_fusion.evaluation.data import load_image
from captum_fusion.visualization import to_picture

#: The most pixels of a picture.
MOST_PIXELS = 50_000_000

#: The longest side of the pictures that are shown, in pixels.
SHOWN = 672


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
