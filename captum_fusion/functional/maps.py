"""Maps: precision, normalisation, upsampling, percentiles, blurs and random masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: A range or gradient below this fraction of the magnitude it is compared with is rounding noise and is treated as 0.
FLOOR = 1e-6


def at_least_float32(tensor: Tensor) -> Tensor:
    """``tensor`` itself if float32 or float64, else a float32 copy. Half types are too imprecise for reductions."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def precise(tensor: Tensor) -> Tensor:
    """``tensor`` in float64 if its device supports it. Small differences of probabilities need the precision."""
    return at_least_float32(tensor) if tensor.device.type == "mps" else tensor.double()


def seeded(seed: int) -> dict[str, Any]:
    """Options of ``torch.rand`` and ``torch.randn`` for numbers that depend on the seed and not on torch's defaults."""
    return {"generator": torch.Generator("cpu").manual_seed(seed), "dtype": torch.float32, "device": "cpu"}


def spatial_dims(tensor: Tensor) -> tuple[int, ...]:
    """The spatial dimensions of a tensor (N, channels, *spatial)."""
    return tuple(range(2, tensor.dim()))


def normalize(maps: Tensor) -> Tensor:
    """Min-max normalisation of each example to [0, 1]; a constant map gives zeros, one that is not finite NaN.

    A map is treated as constant if its range is at most 1e-6 times its largest magnitude, because scaling it to [0, 1]
    would show only rounding errors. There is no additive epsilon, so the result does not depend on the map's scale.

    Args:
        maps (Tensor): Floating point, of shape (N, ...).

    Returns:
        Tensor: Of the same shape, float32 (float64 if ``maps`` is), in [0, 1].

    Examples::

        >>> normalize(torch.tensor([[[2e-9, 4e-9, 6e-9]], [[5.0, 5.0, 5.0]]]))
        tensor([[[0.0000, 0.5000, 1.0000]],
        <BLANKLINE>
                [[0.0000, 0.0000, 0.0000]]])
    """
    maps = at_least_float32(maps)
    dims = tuple(range(1, maps.dim()))
    low, high = maps.amin(dims, keepdim=True), maps.amax(dims, keepdim=True)
    varying = varies(low, high)
    constant = torch.where(low.isfinite() & high.isfinite(), 0.0, torch.nan)
    return torch.where(varying, (maps - low) / torch.where(varying, high - low, 1.0), constant.to(maps.dtype))


def with_area(masks: Tensor, area: float) -> Tensor:
    """Masks raised to the power at which their mean is ``area``, one power per example.

    This makes masks of different methods comparable, because the score under a mask usually grows with its area. A
    power keeps the order of the pixels.

    Args:
        masks (Tensor): Floating point, of shape (N, ...), in [0, 1].
        area (float): Mean of the result, above 0 and below 1. The power is limited to the range from 1/64 to 64: a mask
            with too many zeros or ones for the area keeps the nearest area that these powers give.

    Returns:
        Tensor: Of the same shape, float32 (float64 if ``masks`` is), in [0, 1]. Zeros stay 0, and ones stay 1.

    Examples::

        >>> with_area(torch.tensor([[0.0, 0.5, 1.0, 0.5]]), 0.5)
        tensor([[0.0000, 0.5000, 1.0000, 0.5000]])
        >>> with_area(torch.tensor([[0.5, 0.5]]), 0.25)
        tensor([[0.2500, 0.2500]])
    """
    masks = at_least_float32(masks)
    low, high = (torch.full((len(masks), *[1] * (masks.dim() - 1)), end, device=masks.device) for end in (-6.0, 6.0))
    for _ in range(40):  # bisection of the power's logarithm, to the last bit of float32
        middle = (low + high) / 2
        too_large = (masks ** (2**middle)).flatten(1).mean(1).reshape(middle.shape) > area
        low, high = torch.where(too_large, middle, low), torch.where(too_large, high, middle)
    return masks ** (2 ** ((low + high) / 2)).to(masks)


def varies(low: Tensor, high: Tensor) -> Tensor:
    """Whether a range exceeds the rounding noise of a constant."""
    span = high - low
    return span.isfinite() & (span > FLOOR * torch.maximum(low.abs(), high.abs()))


def upsample(maps: Tensor, size: Sequence[int], smooth: bool = False) -> Tensor:
    """Linear, bilinear or trilinear interpolation to ``size``, with half-pixel centres (``align_corners=False``).

    Args:
        maps (Tensor): Floating point, of shape ``(N, C, *spatial)`` with one to three spatial dimensions.
        size (sequence of int): Spatial size of the result, in pixels.
        smooth (bool): Whether to use bicubic interpolation for two spatial dimensions. It can exceed the range of the
            values. Default: False

    Returns:
        Tensor: Of shape ``(N, C, *size)``, float32 (float64 if ``maps`` is).

    Examples::

        >>> upsample(torch.tensor([[[0.0, 1.0]]]), (4,))
        tensor([[[0.0000, 0.2500, 0.7500, 1.0000]]])
    """
    maps = at_least_float32(maps)
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    mode = {3: "linear", 4: "bicubic" if smooth else "bilinear", 5: "trilinear"}[maps.dim()]
    return F.interpolate(maps, size=tuple(size), mode=mode, align_corners=False)


def percentile(values: Tensor, theta: float) -> Tensor:
    """The ``theta`` percentile along the last dimension, with linear interpolation as in ``numpy.percentile``.

    ``torch.quantile`` computes the same, but only for up to 2**24 elements.

    Args:
        values (Tensor): float32 or float64, of shape (..., P).
        theta (float): Percentile, 0 to 100.

    Returns:
        Tensor: Of shape (..., 1).

    Examples::

        >>> percentile(torch.tensor([[4.0, 1.0, 2.0, 3.0]]), 50.0)
        tensor([[2.5000]])
    """
    position = theta / 100 * (values.shape[-1] - 1)
    below, share = math.floor(position), position - math.floor(position)
    low = values.kthvalue(below + 1, dim=-1, keepdim=True).values
    if share == 0:
        return low
    return torch.lerp(low, values.kthvalue(below + 2, dim=-1, keepdim=True).values, share)


def rise_masks(grids: Tensor, shifts: Tensor, size: Sequence[int]) -> Tensor:
    """RISE's masks [11]: random grids, upsampled to one cell more than the input and cropped at random shifts.

    Args:
        grids (Tensor): Grids of zeros and ones, floating point, of shape ``(R, 1, *cells)``.
        shifts (Tensor): Shifts as fractions of a cell, 0 to 1, of shape (R, spatial dimensions).
        size (sequence of int): Spatial size of a mask, in pixels.

    Returns:
        Tensor: Of shape ``(R, 1, *size)``, in [0, 1].

    Examples::

        >>> rise_masks(torch.tensor([[[0.0, 1.0]]]), torch.tensor([[0.0]]), (4,)).round(decimals=4)
        tensor([[[0.0000, 0.0000, 0.3333, 0.6667]]])
    """
    cells = [-(-pixels // n) for pixels, n in zip(size, grids.shape[2:], strict=True)]
    stretched = upsample(grids, [(n + 1) * cell for n, cell in zip(grids.shape[2:], cells, strict=True)])
    starts = (shifts.to("cpu", torch.float64) * torch.tensor(cells, device="cpu")).long().tolist()
    parts = []
    for mask, start in zip(stretched, starts, strict=True):
        for dim, (first, pixels) in enumerate(zip(start, size, strict=True)):
            mask = mask.narrow(dim + 1, first, pixels)
        parts.append(mask)
    return torch.stack(parts)


def smooth_neighbours(maps: Tensor) -> Tensor:
    """Smoothing with the kernel ``[1 2 1] / 4`` along every spatial dimension.

    Args:
        maps (Tensor): Floating point, of shape ``(N, 1, *spatial)``.

    Returns:
        Tensor: Of the same shape and dtype. Values outside the border are treated as 0.

    Examples::

        >>> smooth_neighbours(torch.tensor([[[0.0, 4.0, 0.0, 0.0]]]))
        tensor([[[1., 2., 1., 0.]]])
    """
    for dim in spatial_dims(maps):
        moved = F.pad(maps.movedim(dim, -1), (1, 1))
        maps = ((moved[..., :-2] + 2 * moved[..., 1:-1] + moved[..., 2:]) / 4).movedim(-1, dim)
    return maps


def gaussian_blur(x: Tensor, kernel_size: int = 51, sigma: float = 50.0) -> Tensor:
    """Gaussian blur over all spatial dimensions, with reflected borders.

    Args:
        x (Tensor): Floating point, of shape ``(N, C, *spatial)``.
        kernel_size (int): Odd size of the kernel, in pixels. If the input is too small to be reflected that far, the
            largest possible size is used. Default: 51
        sigma (float): Standard deviation, in pixels. Default: 50

    Returns:
        Tensor: Of the same shape, float32 (float64 if ``x`` is).

    Examples::

        >>> gaussian_blur(torch.tensor([[[0.0, 0.0, 3.0, 0.0, 0.0]]]), 3, 1e6)
        tensor([[[0., 1., 1., 1., 0.]]])
    """
    x = at_least_float32(x)
    for dim in spatial_dims(x):
        pixels = x.shape[dim]
        half = min(kernel_size // 2, pixels - 1)
        offsets = torch.arange(-half, half + 1, device=x.device)
        kernel = torch.exp(-0.5 * (offsets.to(x.dtype) / sigma) ** 2)
        sources = (torch.arange(pixels, device=x.device)[:, None] + offsets).abs()
        sources = torch.where(sources < pixels, sources, 2 * (pixels - 1) - sources)
        matrix = x.new_zeros(pixels, pixels).scatter_add_(1, sources, (kernel / kernel.sum()).expand(pixels, -1))
        x = (x.movedim(dim, -1) @ matrix.T).movedim(-1, dim)
    return x


def rise_blur(x: Tensor) -> Tensor:
    """The blur of RISE's code [11]: a kernel of 11 pixels, and zeros outside the border.

    The kernel is a Gaussian with standard deviation 5, cut off at 20 pixels, whose tails are folded into the window at
    its edges, because the code filters an impulse in a window of 11 pixels with reflection. It is flatter than a
    truncated Gaussian, ``gaussian_blur(x, 11, 5.0)``.

    Args:
        x (Tensor): Floating point, of shape ``(N, C, *spatial)``.

    Returns:
        Tensor: Of the same shape, float32 (float64 if ``x`` is).

    Examples::

        >>> rise_blur(torch.ones(1, 1, 20))[0, 0, [0, 10]]
        tensor([0.5470, 1.0000])
    """
    x = at_least_float32(x)
    size, sigma, reach = 11, 5.0, 20
    distances = torch.arange(-reach, reach + 1, dtype=torch.float64, device="cpu")
    gaussian = torch.exp(-0.5 * (distances / sigma) ** 2)
    places = (distances.long() + size // 2) % (2 * size)  # reflection repeats the pixel at the edge
    places = torch.where(places < size, places, 2 * size - 1 - places)
    kernel = torch.zeros(size, dtype=torch.float64, device="cpu").index_add_(0, places, gaussian / gaussian.sum())
    weight = kernel.to(x).reshape(1, 1, size)
    for dim in spatial_dims(x):
        moved = x.movedim(dim, -1)
        blurred = F.conv1d(moved.reshape(-1, 1, moved.shape[-1]), weight, padding=size // 2)
        x = blurred.reshape(moved.shape).movedim(-1, dim)
    return x
