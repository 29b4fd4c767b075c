"""Bayesian linear regression of masked scores on the cells of the masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from captum_fusion.functional.maps import seeded, varies

#: Prior variance of the scores relative to the noise's. The last two are for scores that are exactly linear in the
#: cells: they give least squares.
_RATIOS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 1e4, 1e8)


def antithetic_cells(number: int, cells: int, seed: int = 0) -> Tensor:
    """Random masks in which each cell is 1 with probability 1/2, in pairs of a mask and its complement.

    The difference of a pair's scores does not contain interactions of an even number of cells, which are the same for
    a mask and its complement.

    Args:
        number (int): Number of masks. If it is odd, the last mask has no complement.
        cells (int): Number of cells.
        seed (int, optional): Seed of the masks. The global random generator is not used. Default: 0

    Returns:
        Tensor: Of shape (number, cells), float32, on the CPU.

    Examples::

        >>> masks = antithetic_cells(4, 9)
        >>> masks.shape, bool((masks[0] + masks[1] == 1).all())
        (torch.Size([4, 9]), True)
    """
    shown = (torch.rand((number + 1) // 2, cells, **seeded(seed)) < 0.5).float()
    return torch.stack([shown, 1 - shown], 1).reshape(-1, cells)[:number]


def cell_covariance(shape: Sequence[int], length: float = 1.0, own: float = 0.15) -> Tensor:
    """Covariance in which neighbouring cells of a grid have similar values.

    ``S_ij = exp(-d_ij^2 / (2 length^2)) + own [i = j]`` with the distance ``d`` in cells.

    Args:
        shape (sequence of int): Number of cells in each dimension; C is their product.
        length (float, optional): Correlation length, in cells. Default: 1.0
        own (float, optional): Variance that a cell does not share with its neighbours. Default: 0.15

    Returns:
        Tensor: Of shape (C, C), float64, on the CPU.

    Examples::

        >>> cell_covariance((1, 2))
        tensor([[1.1500, 0.6065],
                [0.6065, 1.1500]], dtype=torch.float64)
    """
    axes = [torch.arange(size, dtype=torch.double, device="cpu") for size in shape]
    cells = torch.cartesian_prod(*axes).reshape(-1, len(axes))
    return torch.exp(-(torch.cdist(cells, cells) ** 2) / (2 * length**2)) + own * torch.eye(len(cells), device="cpu")


def grid_means(maps: Tensor, shape: Sequence[int]) -> Tensor:
    """Means of maps over the cells of a grid.

    Args:
        maps (Tensor): Floating point, of shape ``(N, C, *spatial)`` with one to three spatial dimensions.
        shape (sequence of int): Number of cells in each dimension. Cells overlap if the map's size is not a
            multiple of the number of cells.

    Returns:
        Tensor: Of shape ``(N, C, *shape)``.

    Examples::

        >>> grid_means(torch.tensor([[[0.0, 2.0, 4.0, 8.0]]]), (2,))
        tensor([[[1., 6.]]])
    """
    pools: dict[int, Callable[..., Tensor]] = {3: F.adaptive_avg_pool1d, 4: F.adaptive_avg_pool2d}
    return pools.get(maps.dim(), F.adaptive_avg_pool3d)(maps, tuple(shape))


def cell_regression(
    masks: Tensor, scores: Tensor, prior: Tensor, covariance: Tensor | None = None, intercept: bool = True
) -> tuple[Tensor, Tensor]:
    r"""Weights of the cells in a linear model of masked scores, and their standard errors.

    The scores ``y`` (M) of an example under masks ``X`` (M, C) are modelled as

    ``y = b + X w + e``, with ``w ~ N(a g, t^2 S)`` and ``e ~ N(0, s^2 I)``.

    ``g`` is a first guess of the weights, such as the map of a gradient method, and ``S`` their covariance. The
    intercept ``b`` has a flat prior. The scale ``a >= 0``, the noise ``s`` and the ratio ``t / s`` have the values of
    largest evidence; the ratio is searched for on a grid. The result is the posterior mean of ``w``, and its standard
    deviation given the chosen ``a``, ``s`` and ``t``. With few masks, it follows the first guess as far as this
    explains the scores. With many, it approaches least squares. If the scores are exactly linear in the cells and the
    masks determine the weights, the weights are exact.

    Args:
        masks (Tensor): Of shape (M, C), the same for all examples.
        scores (Tensor): Of shape (N, M).
        prior (Tensor): First guess of the weights, up to a factor, of shape (N, C).
        covariance (Tensor, optional): Positive definite, of shape (C, C). Default: None (the identity)
        intercept (bool, optional): Whether the model has the intercept ``b``. It has none if masks and scores are
            differences of pairs. Default: True

    Returns:
        tuple[Tensor, Tensor]: Weights and standard errors, each of shape (N, C), float64, on the CPU. Both are 0 for
        examples whose scores are constant (0 without an intercept), and NaN for examples with a score that is not
        finite.

    Examples::

        >>> masks = antithetic_cells(32, 4)
        >>> scores = 0.5 + masks @ torch.tensor([3.0, 0.0, 0.0, 1.0])
        >>> weights, errors = cell_regression(masks, scores[None], torch.ones(1, 4))
        >>> (weights - torch.tensor([3.0, 0.0, 0.0, 1.0])).abs().max() < 1e-6
        tensor(True)
    """
    x, y, guess = (tensor.detach().to("cpu", torch.double) for tensor in (masks, scores, prior))
    finite = y.isfinite().all(1)
    constant = finite & ~y.any(1)
    if intercept:
        constant = finite & ~varies(y.amin(1), y.amax(1))
        x, y = x - x.mean(0), y - y.mean(1, keepdim=True)
    root = torch.eye(x.shape[1], dtype=torch.double, device="cpu")
    if covariance is not None:
        root = torch.linalg.cholesky(covariance.detach().to("cpu", torch.double))
    # With w = a g + t root v, the prior of the scores is diagonal in the basis `left`.
    left, sizes, right = torch.linalg.svd(x @ root, full_matrices=False)
    total = sizes.square().sum()
    if not total > 0:
        nothing = torch.where(finite[:, None], 0.0, torch.nan).expand_as(guess)
        return nothing.clone(), nothing.clone()
    ratios = torch.tensor(_RATIOS, dtype=torch.double, device="cpu")[:, None] * len(x) / total
    spread = 1 + ratios * sizes.square()  # (R, C)
    freedom = len(x) - intercept
    scores_in, guess_in = y @ left, guess @ x.T @ left  # (N, C)
    outside = (y.square().sum(1) - scores_in.square().sum(1)).clamp_min(0)
    cross = (scores_in * guess_in) @ (1 / spread).T  # (N, R)
    power = guess_in.square() @ (1 / spread).T
    scale = torch.where(power > 0, cross.clamp_min(0) / torch.where(power > 0, power, 1.0), 0.0)
    misfit = outside[:, None] + scores_in.square() @ (1 / spread).T - 2 * scale * cross + scale.square() * power
    noise = misfit.clamp_min(torch.finfo(torch.double).tiny) / freedom
    evidence = -freedom / 2 * noise.log() - spread.log().sum(1) / 2
    best = evidence.argmax(1)
    chosen = torch.arange(len(y), device="cpu"), best
    scale, noise, spread, ratio = scale[chosen][:, None], noise[chosen], spread[best], ratios[best]
    axes = root @ right.T  # (C, C)
    weights = scale * guess + (ratio * sizes / spread * (scores_in - scale * guess_in)) @ axes.T
    share = root.square().sum(1) - (ratio * sizes.square() / spread) @ axes.square().T
    errors = (noise[:, None] * ratio * share.clamp_min(0)).sqrt()
    known = torch.where(finite & ~constant, 1.0, torch.where(constant, 0.0, torch.nan))[:, None]
    return known * weights.nan_to_num(), known * errors.nan_to_num()
