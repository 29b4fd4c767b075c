"""ROAD: how the score changes when pixels are imputed from their neighbours, which leaves no visible mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from captum_fusion import functional as formulas
from captum_fusion._arguments import count, percentage, positive
from captum_fusion._passes.modes import own_arithmetic
from captum_fusion._passes.passes import Passes
from captum_fusion._types import Target, TensorOrTupleOfTensors
from captum_fusion.functional import ScoreFn
from captum_fusion.metrics._docs import documented
from captum_fusion.metrics._maps import input_maps, nan_where_undefined, pixel_masks, pixel_ranks

#: The weight of each neighbour of a pixel, by its offset (down, right).
_NEIGHBOURS = {
    (down, right): 1 / 6 if 0 in (down, right) else 1 / 12
    for down in (-1, 0, 1)
    for right in (-1, 0, 1)
    if (down, right) != (0, 0)
}


class Road(NamedTuple):
    """Scores after increasing shares of the pixels have been imputed.

    Attributes:
        combined: Mean over the percentiles of ``(lerf - morf) / 2``, (N,). Higher is better.
        morf: Scores with the most relevant pixels imputed, (N, percentiles). Lower is better.
        lerf: Scores with the least relevant pixels imputed, (N, percentiles). Higher is better.
        percentiles: Shares of imputed pixels, in percent, (percentiles,).
    """

    combined: Tensor
    morf: Tensor
    lerf: Tensor
    percentiles: Tensor


@documented
def road(
    forward_func: Callable[..., Any],
    inputs: TensorOrTupleOfTensors,
    attributions: Tensor,
    target: Target = None,
    additional_forward_args: Any = None,
    *,
    percentiles: Sequence[float] = (10, 20, 30, 40, 50, 60, 70, 80, 90),
    noise: float = 0.01,
    seed: int = 0,
    mask_inputs: Sequence[int] | None = None,
    score_fn: str | ScoreFn = "softmax",
    perturbations_per_eval: int | None = None,
) -> Road:
    """ROAD: pixels are imputed from their neighbours, either the most relevant first (MoRF) or the least (LeRF).

    Each imputed pixel is the weighted mean of its neighbours, known or imputed, plus noise. Neighbours that share an
    edge have weight 1/6, those that share a corner 1/12, and those outside the picture 0. An image without known pixels
    becomes its mean colour. Pixels of equal value are imputed in reading order, so a constant map gets 0; a map that is
    not finite gets NaN. For inputs with two spatial dimensions. From the paper: Y. Rong, T. Leemann, V. Borisov, G.
    Kasneci, E. Kasneci, "A Consistent and Efficient Evaluation Strategy for Attribution Methods", ICML 2022,
    https://arxiv.org/abs/2202.00449

    Args:
        {args}
        percentiles (sequence of float, optional): Shares of imputed pixels, in percent, from 0 to 100.
            Default: 10, 20, ... 90
        noise (float, optional): Standard deviation of the noise on imputed pixels, in units of the (normalised) input.
            Default: 0.01
        seed (int, optional): The seed of the noise, which is the same for every example.
            Default: 0
        {mask_inputs}
        {score_fn}
        {perturbations_per_eval}

    Returns:
        Road: The combined score, both curves and the percentiles.

    Raises:
        {raises}

    Examples::

        >>> left = lambda x: x[..., :2].mean((1, 2, 3))
        >>> image = torch.tensor([[[[4.0, 4.0, 0.0, 0.0], [4.0, 4.0, 0.0, 0.0]]]])
        >>> result = road(left, image, image, percentiles=[50], noise=0.0)
        >>> result.morf, result.lerf, result.combined
        (tensor([[0.]], dtype=torch.float64), tensor([[4.]], dtype=torch.float64), tensor([2.], dtype=torch.float64))
    """
    shares = _percentiles(percentiles)
    deviation = positive("noise", noise, or_zero=True)
    count("seed", seed, 0)
    function = formulas.score_function(score_fn)
    passes = Passes.without_layer(
        forward_func,
        inputs,
        target,
        additional_forward_args,
        mask_inputs=mask_inputs,
        perturbations_per_eval=perturbations_per_eval,
    )
    if len(passes.spatial_size) != 2:
        raise ValueError(f"inputs: road needs two spatial dimensions, not {len(passes.spatial_size)}")
    with own_arithmetic():
        flat = input_maps(attributions, passes.masking).flatten(1)
        ranks = torch.stack([pixel_ranks(flat, descending=True), pixel_ranks(flat, descending=False)])
        counts = torch.tensor([round(share / 100 * flat.shape[1]) for share in shares], device=flat.device)
        examples = passes.examples
        owners = torch.arange(examples, device=flat.device).repeat(2 * len(shares))
        order = torch.arange(2, device=flat.device).repeat_interleave(examples * len(shares))
        imputed = counts.repeat_interleave(examples).repeat(2)

        def masks(chunk: slice, wanted: Sequence[int]) -> Tensor:
            known = ranks[order[chunk], owners[chunk]] >= imputed[chunk, None]
            return pixel_masks(known, passes.spatial_size, wanted, flat.dtype)

        def compose(x: Tensor, base: float | Tensor, mask: Tensor, chunk: slice) -> Tensor:
            return impute(x, mask[:, 0] > 0.5, deviation, seed)

        scores = passes.masked_scores(masks, owners, function, compose).reshape(2, len(shares), examples)
        morf, lerf = (nan_where_undefined(part, flat) for part in scores.to(passes.output.device).mT)
    combined = ((lerf - morf) / 2).mean(1)
    return Road(combined, morf, lerf, torch.tensor(shares, dtype=combined.dtype, device=combined.device))


def impute(x: Tensor, known: Tensor, noise: float = 0.01, seed: int = 0) -> Tensor:
    """Noisy linear imputation of pixels.

    Args:
        x (Tensor): Images of shape (N, C, H, W).
        known (Tensor): bool, of shape (N, H, W): the pixels that keep their values.
        noise (float, optional): Standard deviation of the noise on imputed pixels.
            Default: 0.01
        seed (int, optional): The seed of the noise, which is the same for every example.
            Default: 0

    Returns:
        Tensor: Of the shape, dtype and device of ``x``.

    Examples::

        >>> x, known = torch.tensor([[[[2.0, 7.0, 4.0]]]]), torch.tensor([[[True, False, True]]])
        >>> impute(x, known, noise=0.0)
        tensor([[[[2., 3., 4.]]]])
    """
    extra = torch.zeros(x.shape[1:], dtype=torch.float64)
    if noise:
        extra.normal_(0, noise, generator=torch.Generator().manual_seed(seed))
    filled = x.detach().cpu().double()
    for image, kept in zip(filled, known.cpu(), strict=True):
        missing = ~kept
        if missing.all():
            image += image.mean((1, 2), keepdim=True) - image + extra
        elif missing.any():
            solved = _solve(image.numpy(), missing.numpy())
            image[:, missing] = torch.from_numpy(solved).T + extra[:, missing]
    changed = filled.to(device=x.device, dtype=x.dtype)
    return torch.where(known[:, None].to(x.device), x.detach(), changed)


def _solve(image: NDArray[np.float64], missing: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Values of the missing pixels, (missing pixels, C), of an image (C, H, W), without noise."""
    from scipy.sparse import csc_matrix
    from scipy.sparse.linalg import splu

    height, width = missing.shape
    ys, xs = np.nonzero(missing)
    unknowns = np.arange(len(ys))
    number = np.full(missing.shape, -1)  # of each missing pixel
    number[ys, xs] = unknowns
    diagonal, right = np.zeros(len(ys)), np.zeros((len(ys), len(image)))
    entries, equations, variables = [], [], []
    for (down, across), weight in _NEIGHBOURS.items():
        y, x = ys + down, xs + across
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        mine, y, x = unknowns[inside], y[inside], x[inside]
        diagonal[mine] += weight
        neighbour = number[y, x]
        known = neighbour < 0
        right[mine[known]] += weight * image[:, y[known], x[known]].T
        entries.append(np.full((~known).sum(), -weight))
        equations.append(mine[~known])
        variables.append(neighbour[~known])
    entries, equations, variables = [*entries, diagonal], [*equations, unknowns], [*variables, unknowns]
    system = csc_matrix(
        (np.concatenate(entries), (np.concatenate(equations), np.concatenate(variables))), shape=(len(ys), len(ys))
    )
    # Symmetric and positive definite, so it needs no pivoting, which takes at most half the time of other orderings.
    factors = splu(system, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
    solution: NDArray[np.float64] = factors.solve(right)
    return solution


def _percentiles(percentiles: Sequence[float]) -> list[float]:
    if not isinstance(percentiles, (tuple, list)) or not percentiles:
        raise ValueError(f"percentiles must be a list of at least one number, not {percentiles!r:.80}")
    return [percentage("percentiles", share) for share in percentiles]
