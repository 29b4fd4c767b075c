"""Draws the scenes: handwritten digits pasted among distractors on a textured background.

Only training and ``python -m captum_fusion.demo.digits.train --scenes`` draw scenes;
:func:`captum_fusion.demo.digits.load_scenes` reads the bundled ones. Every function takes a random generator, so the
same generator state gives the same scene.
"""

import colorsys
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIZE = 96
"""Height and width of a scene, in pixels."""

TRAIN_DIGITS = 1397
"""Number of digits of ``load_digits`` used for training. The other 400 are for testing."""

MASK_THRESHOLD = 0.3
"""A pixel belongs to a digit if the digit's ink covers more than this fraction of it."""

Colour = NDArray[np.float32]  # (3,): red, green and blue in [0, 1]


class Digits(NamedTuple):
    """Handwritten digits to paste.

    Attributes:
        images: amount of ink, uint8 (N, 8, 8) from 0 to 255.
        labels: int64 (N,) from 0 to 9.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


class Drawing(NamedTuple):
    """A drawn scene.

    Attributes:
        image: uint8 (96, 96, 3).
        labels: class index of each digit, all different.
        masks: mask of each digit, bool (len(labels), 96, 96).
    """

    image: NDArray[np.uint8]
    labels: tuple[int, ...]
    masks: NDArray[np.bool_]


def load_digits() -> tuple[Digits, Digits]:
    """Read the handwritten digits of scikit-learn.

    Returns:
        The training digits and the test digits.

    Raises:
        ImportError: if scikit-learn is not installed.

    Example::

        >>> train, test = load_digits()
        >>> train.images.shape, test.images.shape
        ((1397, 8, 8), (400, 8, 8))
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("drawing scenes needs scikit-learn: pip install captum-fusion[train]") from error
    data = datasets.load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)
    labels = data.target.astype(np.int64)
    return (
        Digits(images[:TRAIN_DIGITS], labels[:TRAIN_DIGITS]),
        Digits(images[TRAIN_DIGITS:], labels[TRAIN_DIGITS:]),
    )


def draw_scene(digits: Digits, count: int, rng: np.random.Generator) -> Drawing:
    """Draw one scene.

    Args:
        digits: the digits to choose from.
        count: number of digits to paste: 0, 1 or 2 (of different classes).
        rng: source of all randomness.

    Returns:
        The scene.

    Example::

        >>> train, _ = load_digits()
        >>> scene = draw_scene(train, 2, np.random.default_rng(0))
        >>> scene.image.shape, len(scene.labels), scene.masks.shape
        ((96, 96, 3), 2, (2, 96, 96))
    """
    chosen = [int(i) for i in rng.choice(len(digits.labels), size=count, replace=False)]
    while len(set(digits.labels[chosen])) < count:
        chosen[-1] = int(rng.integers(len(digits.labels)))
    boxes = _place(count, rng)
    ink = np.zeros((count, SIZE, SIZE), dtype=np.float32)
    for i, box in enumerate(boxes):
        ink[i] = _ink(digits.images[chosen[i]], box, rng)

    base = _background_colour(rng)
    canvas = _add_distractors(_texture(base, rng), base, boxes, rng)
    for alpha in ink:
        canvas += alpha[..., None] * (_ink_colour(base, rng) - canvas)
    canvas += rng.uniform(0, 0.02) * rng.standard_normal(canvas.shape, dtype=np.float32)
    return Drawing(
        image=np.round(canvas.clip(0, 1) * 255).astype(np.uint8),
        labels=tuple(int(digits.labels[i]) for i in chosen),
        masks=ink > MASK_THRESHOLD,
    )


def smooth_noise(cells: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Draw a smooth random field.

    Args:
        cells: number of independent random values along each side.
        rng: source of the randomness.

    Returns:
        float (96, 96) with minimum 0 and maximum 1.

    Example::

        >>> field = smooth_noise(3, np.random.default_rng(0))
        >>> field.shape, float(field.min()), float(field.max())
        ((96, 96), 0.0, 1.0)
    """
    coarse = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
    field: NDArray[np.float32] = np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC), dtype=np.float32)
    field = field - field.min()
    field /= field.max()
    return field


class _Box(NamedTuple):
    """A square of the scene, in pixels."""

    x: float  # of the centre
    y: float
    size: float

    def near(self, x: float, y: float, margin: float) -> bool:
        return max(abs(x - self.x), abs(y - self.y)) < self.size / 2 + margin


def _place(count: int, rng: np.random.Generator) -> list[_Box]:
    """Choose boxes that do not overlap: in sequence along a random axis, at random positions across it."""
    sizes = rng.uniform(26, 46 if count == 1 else 42, size=count)
    gaps = rng.dirichlet(np.ones(count + 1)) * (SIZE - 6 - sizes.sum())
    along = 3 + np.cumsum(gaps[:count]) + np.cumsum(sizes) - sizes / 2
    across = rng.uniform(sizes / 2 + 3, SIZE - 3 - sizes / 2)
    if rng.random() < 0.5:
        along, across = across, along
    return [_Box(float(x), float(y), float(size)) for x, y, size in zip(along, across, sizes, strict=True)]


def _ink(digit: NDArray[np.uint8], box: _Box, rng: np.random.Generator) -> NDArray[np.float32]:
    """Enlarge a digit into its box, slightly rotated and slanted, and return the ink coverage of each pixel."""
    angle, slant, stretch = rng.uniform(-0.17, 0.17), rng.uniform(-0.12, 0.12), rng.uniform(0.9, 1.1)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    to_digit = (8 / box.size) * np.diag([1 / stretch, 1]) @ np.array([[1, slant], [0, 1]]) @ rotation
    padded = np.pad(digit, 2)
    offset = np.full(2, len(padded) / 2) - to_digit @ (box.x, box.y)
    enlarged = Image.fromarray(padded).transform(
        (SIZE, SIZE),
        Image.Transform.AFFINE,
        tuple(np.column_stack([to_digit, offset]).ravel()),
        Image.Resampling.BICUBIC,
    )
    # A steep ramp turns the blurred grey values of the enlarged digit into crisp strokes.
    middle, width = rng.uniform(0.5, 0.6), 0.5
    grey: NDArray[np.float32] = np.asarray(enlarged, dtype=np.float32) / np.float32(255)
    return ((grey - middle) / width + 0.5).clip(0, 1)


def _background_colour(rng: np.random.Generator) -> Colour:
    value, saturation = (0.15, 0.4), (0.2, 0.6)
    if rng.random() < 0.5:
        value, saturation = (0.75, 0.97), (0.05, 0.35)
    return np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value)), dtype=np.float32)


def _ink_colour(background: Colour, rng: np.random.Generator) -> Colour:
    """Draw a colour that differs clearly in lightness from the background."""
    lightness = np.array([0.299, 0.587, 0.114], dtype=np.float32)
    while True:
        saturation, value = rng.uniform(0.3, 0.95), rng.uniform(0.1, 1.0)
        colour = np.array(colorsys.hsv_to_rgb(rng.random(), saturation, value), dtype=np.float32)
        if abs(float((colour - background) @ lightness)) > 0.4:
            return colour


def _texture(base: Colour, rng: np.random.Generator) -> NDArray[np.float32]:
    """Paint a soft background, float (96, 96, 3)."""
    tint = rng.uniform(-0.12, 0.12, size=3).astype(np.float32)
    coarse, fine = smooth_noise(int(rng.integers(2, 5)), rng), smooth_noise(int(rng.integers(8, 20)), rng)
    canvas: NDArray[np.float32] = base + (coarse - 0.5)[..., None] * tint * 2
    canvas += (fine - 0.5)[..., None] * rng.uniform(0.02, 0.1)
    return canvas


def _add_distractors(
    canvas: NDArray[np.float32], base: Colour, boxes: list[_Box], rng: np.random.Generator
) -> NDArray[np.float32]:
    """Scatter small shapes outside the digits' boxes."""
    scale = 2  # drawn at a larger scale and averaged, for smooth edges
    pixels = Image.fromarray(np.round(canvas.clip(0, 1) * 255).astype(np.uint8))
    pixels = pixels.resize((SIZE * scale, SIZE * scale), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(pixels)
    for _ in range(rng.integers(4, 16)):
        radius = rng.uniform(2, 10)
        x, y = rng.uniform(0, SIZE, size=2)
        if not any(box.near(x, y, margin=radius - 2) for box in boxes):
            red, green, blue = np.round(_ink_colour(base, rng) * 255).astype(int).tolist()
            _draw_distractor(draw, x * scale, y * scale, radius * scale, (red, green, blue), rng)
    canvas = np.array(pixels.reduce(scale), dtype=np.float32)
    canvas /= 255
    return canvas


def _draw_distractor(
    draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour: tuple[int, int, int], rng: np.random.Generator
) -> None:
    """Draw a shape that resembles at most a part of a digit."""
    angle = rng.uniform(0, 2 * math.pi)
    square = (x - radius, y - radius, x + radius, y + radius)
    width = round(radius * rng.uniform(0.25, 0.6))
    kind = rng.integers(6)
    if kind == 0:  # stroke
        dx, dy = radius * math.cos(angle), radius * math.sin(angle)
        draw.line([(x - dx, y - dy), (x + dx, y + dy)], colour, width)
    elif kind == 1:  # corner
        turn = angle + rng.uniform(0.8, 2.4)
        ends = [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in (angle, turn)]
        draw.line([ends[0], (x, y), ends[1]], colour, width, joint="curve")
    elif kind == 2:  # arc
        draw.arc(square, math.degrees(angle), math.degrees(angle) + rng.uniform(60, 220), colour, width)
    elif kind == 3:  # disc
        draw.ellipse((x - radius / 2, y - radius / 2, x + radius / 2, y + radius / 2), colour)
    elif kind == 4:  # triangle, square or pentagon
        draw.regular_polygon((x, y, radius * 0.7), int(rng.integers(3, 6)), math.degrees(angle), colour)
    else:  # spray of dots
        for dx, dy in rng.normal(scale=radius / 2, size=(12, 2)):
            dot = radius * 0.12
            draw.ellipse((x + dx - dot, y + dy - dot, x + dx + dot, y + dy + dot), colour)
