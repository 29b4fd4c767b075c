"""Pictures as arrays of pixels: conversion, and maps over pictures in the picture's own resolution."""

from __future__ import annotations

from typing import Any

import contourpy
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from captum_fusion._arguments import choice, share
from captum_fusion._pictures import on_white
from captum_fusion.functional import at_least_float32, upsample
from captum_fusion.visualization.colours import Array, colour_map, colours, end_of_scale, with_sign

#: The modes of :func:`overlay`.
MODES = ("overlay", "contour", "mask", "side_by_side")
#: Default opacity of a heat map.
ALPHA = 0.6
#: Default contours, as fractions of the scale.
LEVELS = (0.25, 0.5, 0.75)

#: A picture in one of the formats that :func:`to_picture` accepts.
Picture = Tensor | Image.Image | NDArray[Any]
#: A part of a picture in pixels: left, top, right, bottom.
Box = tuple[float, float, float, float]

_MASK_THRESHOLD = 0.5
_HIDDEN = 0.5  # the grey of what a mask hides: close to the baseline 0 of a normalised input
_DARK = 0.4  # mean of the channels of a dark line
_FINE = 400  # points of a contour plot along the longer side
_OUTSIDE = 0.45  # brightness of what the network did not see


def to_picture(image: Picture) -> Array:
    """Convert an image to the format of matplotlib and captum.

    Args:
        image (Tensor, Image or ndarray): Tensor of shape (C, H, W) or (1, C, H, W) with one or three channels; PIL
            picture; or array of shape (H, W), (H, W, 3) or (H, W, 4). Integers are from 0 to 255. If any value of a
            floating point image is outside [0, 1], for example after mean/std normalisation, the image is rescaled to
            [0, 1]. Transparent pixels are shown on white.

    Returns:
        ndarray: float32, of shape (H, W, 3), in [0, 1].

    Raises:
        TypeError: If the image is none of these.
        ValueError: If the image has another shape, or a value is not finite.

    Examples::

        >>> import torch
        >>> to_picture(torch.rand(1, 1, 4, 6)).shape
        (4, 6, 3)
        >>> to_picture(Image.new("L", (6, 4), 255)).max().item()
        1.0
    """
    if isinstance(image, Image.Image):
        image = np.asarray(on_white(image))
    if isinstance(image, Tensor):
        pixels = image[0] if image.dim() == 4 and image.shape[0] == 1 else image
        if pixels.dim() != 3 or pixels.shape[0] not in (1, 3):
            raise ValueError(f"image must be of shape (C, H, W) with one or three channels, not {tuple(image.shape)}")
        pixels = at_least_float32(pixels) if pixels.is_floating_point() else pixels
        array = pixels.detach().cpu().permute(1, 2, 0).numpy()
    elif isinstance(image, np.ndarray):
        array = image[..., None] if image.ndim == 2 else image
        if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
            raise ValueError(f"image must be an array of shape (H, W), (H, W, 3) or (H, W, 4), not {image.shape}")
    else:
        raise TypeError(f"image must be a tensor, a PIL picture or an array, not {type(image).__name__}")
    array = array / np.float32(255) if array.dtype.kind in "ui" else array
    if array.shape[2] == 4:
        array = array[..., 3:] * array[..., :3] + (1 - array[..., 3:])
    low, high = float(array.min()), float(array.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("image must be finite, but it has NaN or infinite values")
    if low < 0 or high > 1:
        array = (array - low) / (high - low if high > low else 1.0)
    picture: Array = np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)), np.float32)
    return picture


def overlay(
    image: Picture,
    attribution: Tensor | NDArray[Any],
    mode: str = "overlay",
    *,
    cmap: str | None = None,
    alpha_overlay: float = ALPHA,
    threshold: float | None = None,
    sign: str = "positive",
    scale: float | None = None,
    grey: bool = True,
    box: Box | None = None,
) -> NDArray[np.uint8]:
    """Draw one map over its picture, in the picture's own resolution. The result is an array of pixels.

    Args:
        image (Tensor, Image or ndarray): Picture, as in :func:`to_picture`.
        attribution (Tensor or ndarray): Map of shape (1, C, h, w), (C, h, w) or (h, w). Channels are summed, and the
            sum is interpolated to the picture's size.
        mode (str, optional): ``"overlay"``, the heat map over the picture; ``"contour"``, lines of equal value on the
            picture; ``"mask"``, only the part of the picture that exceeds the threshold, the rest in mid-grey; or
            ``"side_by_side"``, the picture and the overlay. Default: ``"overlay"``
        cmap (str, optional): Matplotlib colour map. Default: None (``"inferno"``, ``"RdBu_r"`` for ``sign="all"``)
        alpha_overlay (float, optional): Opacity of the heat map, 0 to 1. Default: 0.6
        threshold (float, optional): Fraction of the scale, 0 to 1. In an overlay, lower values show the picture
            alone; in a contour plot, it is the only line; in a mask, it separates shown and hidden parts.
            Default: None (0 for an overlay, lines at 0.25, 0.5 and 0.75, 0.5 for a mask)
        sign (str, optional): Captum's ``"positive"``, ``"negative"``, ``"absolute_value"`` or ``"all"``. With
            ``"all"``, the colour map is centred on 0, and a threshold applies to absolute values.
            Default: ``"positive"``
        scale (float, optional): Value at the end of the colour map, see :func:`shared_scale`.
            Default: None (the map's largest absolute value)
        grey (bool, optional): Whether the picture under a heat map is shown in greyscale, so that all colours are the
            map's. Default: True
        box (tuple of float, optional): Part of the picture that the map covers, as left, top, right and bottom in
            pixels. The rest is darkened. Default: None (the whole picture)

    Returns:
        ndarray: uint8, of shape (H, W, 3); for ``"side_by_side"`` of shape (H, 2 W + gap, 3). For
        ``PIL.Image.fromarray``.

    Raises:
        ValueError: If an argument does not fit. The message names it.

    Examples::

        >>> import torch
        >>> picture = Image.new("RGB", (640, 480))
        >>> overlay(picture, torch.rand(1, 1, 7, 7)).shape
        (480, 640, 3)
        >>> overlay(picture, torch.rand(1, 1, 7, 7), "mask", threshold=0.8).dtype
        dtype('uint8')
    """
    choice("mode", mode, MODES)
    opacity = share("alpha_overlay", alpha_overlay)
    threshold = None if threshold is None else share("threshold", threshold)
    name = colour_map(cmap, sign)
    picture = to_picture(image)
    heat, inside = placed(with_sign(attribution, sign), picture.shape[:2], box)
    values = heat / np.float32(end_of_scale(heat, scale))
    strength = np.abs(values)
    base = np.where(inside[..., None], picture, picture * np.float32(_OUTSIDE)) if box is not None else picture
    if mode == "mask":
        shown = inside & (strength >= (_MASK_THRESHOLD if threshold is None else threshold))
        return to_bytes(np.where(shown[..., None], picture, np.float32(_HIDDEN)))
    position = (values.clip(-1, 1) + 1) / 2 if sign == "all" else values.clip(0, 1)
    if mode == "contour":
        levels = LEVELS if threshold is None else (threshold,)
        return _contours(to_bytes(base), values, levels, name, sign)
    under = np.broadcast_to(base.mean(2, keepdims=True), base.shape) if grey else base
    weight = np.where(inside & (strength >= (threshold or 0.0)), np.float32(opacity), np.float32(0))[..., None]
    blended = to_bytes(under * (1 - weight) + colours(position, name) * weight)
    if mode == "overlay":
        return blended
    gap = np.full((picture.shape[0], max(2, picture.shape[1] // 50), 3), 255, np.uint8)
    return np.concatenate([to_bytes(picture), gap, blended], 1)


def placed(flat: Tensor, size: tuple[int, ...], box: Box | None) -> tuple[Array, NDArray[np.bool_]]:
    """A map (1, 1, h, w) interpolated to its place in a picture of a size (H, W), and the pixels that it covers.

    Raises:
        ValueError: If the box is empty or not in the picture.
    """
    height, width = size
    left, top, right, bottom = _rounded((0, 0, width, height) if box is None else box)
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ValueError(f"box must be (left, top, right, bottom) in a picture of {width} x {height} pixels, not {box}")
    heat, inside = np.zeros((height, width), np.float32), np.zeros((height, width), bool)
    heat[top:bottom, left:right] = upsample(flat, (bottom - top, right - left))[0, 0].numpy()
    inside[top:bottom, left:right] = True
    return heat, inside


def _rounded(box: Box) -> tuple[int, int, int, int]:
    left, top, right, bottom = box
    return round(left), round(top), round(right), round(bottom)


def to_bytes(picture: NDArray[Any]) -> NDArray[np.uint8]:
    """A picture in [0, 1] as bytes."""
    pixels: NDArray[np.uint8] = (picture * 255).round().clip(0, 255).astype(np.uint8)
    return pixels


def rim_of(colour: NDArray[Any]) -> str:
    """The colour of the rim of a line that is to be visible on any picture: the opposite of its own brightness."""
    return "white" if float(colour[:3].mean()) < _DARK else "black"


def _contours(
    picture: NDArray[np.uint8], values: Array, levels: tuple[float, ...], cmap: str, sign: str
) -> NDArray[np.uint8]:
    """Lines at fractions of the scale, in the colours of the colour map, with a rim."""
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    width = max(1, round(min(image.size) / 150))
    step = max(1, max(image.size) // _FINE)  # maps are smooth: fewer points give the same lines
    generator: Any = contourpy.contour_generator(z=values[::step, ::step])
    for level in sorted({*levels, *(-level for level in levels)} if sign == "all" else levels):
        position = np.float32((level + 1) / 2 if sign == "all" else level)
        colour = tuple(int(part) for part in to_bytes(colours(position, cmap)))
        lines: Any = [[(float(x) * step, float(y) * step) for x, y in line] for line in generator.lines(level)]
        for rim, ink in ((max(2, width // 2), rim_of(np.asarray(colour) / 255)), (0, colour)):
            for line in lines:
                draw.line(line, fill=ink, width=width + 2 * rim, joint="curve")
    return np.asarray(image)
