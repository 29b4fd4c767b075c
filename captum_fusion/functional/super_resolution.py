"""Super-resolution: a high-resolution map from coarse maps of rotated and shifted copies of an image."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_fusion.functional.maps import precise


def affine_grids(angles: Tensor, moves: Tensor, size: Sequence[int]) -> Tensor:
    """Sampling grids of rotations about the centre followed by shifts, for ``torch.nn.functional.grid_sample``.

    Args:
        angles (Tensor): Rotation angles in radians, of shape (L,).
        moves (Tensor): Shifts in x and y as fractions of the width and the height, of shape (L, 2).
        size (sequence of int): Height and width in pixels. For unequal sizes the rotation is still rigid.

    Returns:
        Tensor: Of shape (L, height, width, 2).

    Examples::

        >>> affine_grids(torch.zeros(1), torch.zeros(1, 2), (2, 2))[0, 0]
        tensor([[-0.5000, -0.5000],
                [ 0.5000, -0.5000]])
    """
    height, width = size
    cos, sin, aspect = angles.cos(), angles.sin(), height / width
    rows = [torch.stack([cos, -sin * aspect], 1), torch.stack([sin / aspect, cos], 1)]
    matrices = torch.cat([torch.stack(rows, 1), 2 * moves[..., None]], 2)
    return F.affine_grid(matrices, [len(angles), 1, height, width], align_corners=False)


def coarsening(grids: Tensor, cells: Sequence[int]) -> Tensor:
    """Sparse matrix that resamples a fine map at each grid and averages the result over coarse cells.

    Args:
        grids (Tensor): Sampling grids, of shape (L, height, width, 2), see :func:`affine_grids`. The map is 0 outside.
        cells (sequence of int): Height h and width w of the coarse map.

    Returns:
        Tensor: Sparse CSR, in the dtype of ``grids``, of shape (L * h * w, height * width).

    Examples::

        >>> matrix = coarsening(affine_grids(torch.zeros(1), torch.zeros(1, 2), (1, 4)), (1, 2))
        >>> matrix.to_dense()
        tensor([[0.5000, 0.5000, 0.0000, 0.0000],
                [0.0000, 0.0000, 0.5000, 0.5000]])
    """
    height, width = grids.shape[1:3]
    sides = [
        torch.arange(pixels, device=grids.device) * n // pixels
        for pixels, n in zip((height, width), cells, strict=True)
    ]
    cell = sides[0][:, None] * cells[1] + sides[1]
    share = (1 / torch.bincount(cell.flatten()).to(grids.dtype))[cell]
    parts = []
    for grid in grids:  # one at a time, to limit the memory for entries before they are summed
        at = ((grid + 1) * grid.new_tensor([width, height]) - 1) / 2
        rows, columns, values = [], [], []
        for corner in ((0, 0), (0, 1), (1, 0), (1, 1)):
            pixel = at.floor() + grid.new_tensor(corner)
            inside = ((pixel >= 0) & (pixel < grid.new_tensor([width, height]))).all(-1)
            x, y = pixel[inside].unbind(-1)
            rows.append(cell[inside])
            columns.append((y * width + x).long())
            values.append(((1 - (at - pixel).abs()).prod(-1) * share)[inside])
        indices = torch.stack([torch.cat(rows), torch.cat(columns)])
        size = (cells[0] * cells[1], height * width)
        with _sparse():
            part = torch.sparse_coo_tensor(
                indices, torch.cat(values), size, device=grids.device, check_invariants=False
            )
            parts.append(part.coalesce())
    with _sparse():
        return torch.cat(parts).coalesce().to_sparse_csr()


@contextlib.contextmanager
def _sparse() -> Iterator[None]:
    """Every release of torch warns that CSR is in beta, and some that invariants are not checked."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse")
        yield


def super_resolve(
    maps: Tensor, grids: Tensor, tv_weight: float, energy_weight: float, iterations: int = 200, rate: float = 1e-3
) -> Tensor:
    """Augmented Grad-CAM's super-resolution [12]: the fine map whose resampled, coarsened copies fit the maps best.

    Adam minimises ``sum_l |D T_l h - g_l|^2 + tv_weight TV(h) + energy_weight |h|^2`` from ``h = 0``. ``T_l`` samples
    ``h`` at the l-th grid, ``D`` averages over the cells of the coarse map, and ``TV`` is the anisotropic total
    variation. It is smoothed, ``sqrt(d**2 + 0.003**2)`` for a difference ``d``, because the kink of ``|d|`` would
    amplify rounding errors. Each example is minimised independently.

    Args:
        maps (Tensor): Coarse maps, floating point, of shape (N, L, h, w). NaN maps are left out.
        grids (Tensor): Sampling grids, of shape (L, height, width, 2), see :func:`affine_grids`.
        tv_weight (float): Weight of the total variation.
        energy_weight (float): Weight of the squared norm.
        iterations (int): Number of Adam steps. Default: 200
        rate (float): Adam's learning rate. Default: 0.001

    Returns:
        Tensor: Of shape (N, 1, height, width), float64 (float32 on devices without it).

    Examples::

        >>> grids = affine_grids(torch.zeros(1), torch.zeros(1, 2), (2, 4))
        >>> super_resolve(torch.tensor([[[[0.0, 1.0]]]]), grids, 0.0, 0.0, iterations=200, rate=0.05) > 0.5
        tensor([[[[False, False,  True,  True],
                  [False, False,  True,  True]]]])
    """
    maps, grids, size = precise(maps), precise(grids), grids.shape[1:3]
    with torch.inference_mode(False), torch.no_grad(), maps.device:  # Adam creates a tensor on the default device
        counts = maps.isfinite().flatten(1).T  # (L * h * w, N)
        wanted = torch.where(maps.isfinite(), maps, 0.0).flatten(1).T
        forward: Any = coarsening(grids, maps.shape[2:])
        with _sparse():
            backward = forward.to_sparse_coo().t().coalesce().to_sparse_csr()
        fine = maps.new_zeros(size[0] * size[1], len(maps))
        optimizer = torch.optim.Adam([fine], lr=rate)
        for _ in range(iterations):
            gradient = 2 * (backward @ (counts * (forward @ fine - wanted))) + 2 * energy_weight * fine
            image = fine.reshape(*size, -1)
            for dim in (0, 1):
                steps = image.diff(dim=dim)
                signs = steps / (steps.square() + 3e-3**2).sqrt()
                edge = torch.zeros_like(image.narrow(dim, 0, 1))
                slope = torch.cat([edge, signs], dim) - torch.cat([signs, edge], dim)
                gradient += tv_weight * slope.reshape(fine.shape)
            fine.grad = gradient
            optimizer.step()
    return fine.T.reshape(-1, 1, *size)
