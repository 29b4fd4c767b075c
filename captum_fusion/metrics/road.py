"""ROAD: how the score falls when pixels are replaced by what their neighbours suggest, so that nothing stands out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from captum_fusion import functional as formulas
from captum_fusion._arguments import count, percentage, positive
from captum_fusion._passes.modes import no_inference_mode
from captum_fusion._passes.passes import Passes
from captum_fusion._types import Target
from captum_fusion.functional import ScoreFn
from captum_fusion.metrics._common import Tensors, documented, input_maps

#: Steps to a pixel's neighbours (down, right), and how much each counts.
_NEIGHBOURS = {
    (down, right): 1 / 6 if 0 in (down, right) else 1 / 12
    for down in (-1, 0, 1)
    for right in (-1, 0, 1)
    if (down, right) != (0, 0)
}


class Road(NamedTuple):
    """Scores after the imputation of growing shares of pixels.

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
    inputs: Tensors,
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
    """ROAD: pixels are imputed from their neighbours, the most relevant first (MoRF), or the least relevant (LeRF).

    Every imputed pixel is the weighted mean of its neighbours, known or imputed: 1/6 for those that share an edge and
    1/12 for those that share a corner, where neighbours outside of the picture do not count; then noise is added. An
    image without a known pixel becomes its mean colour. Pixels of the same value are taken in the order of the picture,
    so that a constant map gets 0. For two spatial dimensions. From the paper: Y. Rong, T. Leemann, V. Borisov, G.
    Kasneci, E. Kasneci, "A Consistent and Efficient Evaluation Strategy for Attribution Methods", ICML 2022,
    https://arxiv.org/abs/2202.00449

    Args:
        {args}
        percentiles (sequence of float, optional): How many of the pixels are imputed, in percent, from 0 to 100.
            Default: 10, 20, ... 90
        noise (float, optional): Standard deviation of the noise on imputed pixels, in the units of the (normalised)
            input.
            Default: 0.01
        seed (int, optional): Of the noise, which is the same for every example.
            Default: 0
        mask_inputs (sequence of int, optional): Which of several inputs are changed, at the same places.
            Default: None (the first floating point input with spatial dimensions, and those of its rank)
        score_fn (str or callable, optional): What is called a score: ``"softmax"``, ``"sigmoid"``, ``"identity"`` or a
            function of the raw output.
            Default: ``"softmax"``
        perturbations_per_eval (int, optional): At most this many rows per example in one call of the network.
            Default: None (timed)

    Returns:
        Road: The combined figure, both curves, and the percentiles.

    Raises:
        AssertionError: If the target does not select one output for each example.
        ValueError: If the attributions do not fit the inputs, or an option has a bad value.

    Examples::

        >>> left = lambda x: x[..., :2].mean((1, 2, 3))
        >>> image = torch.tensor([[[[4.0, 4.0, 0.0, 0.0], [4.0, 4.0, 0.0, 0.0]]]])
        >>> found = road(left, image, image, percentiles=[50], noise=0.0)
        >>> found.morf, found.lerf, found.combined
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
    size = passes.spatial_size
    if len(size) != 2:
        raise ValueError(f"inputs: road needs two spatial dimensions, not {len(size)}")
    with no_inference_mode():
        flat = input_maps(attributions, passes).flatten(1)
        ranks = torch.stack([_ranks(flat, descending=True), _ranks(flat, descending=False)])
        gone = torch.tensor([round(share / 100 * flat.shape[1]) for share in shares], device=flat.device)
        number = passes.examples
        rows = torch.arange(number, device=flat.device).repeat(2 * len(shares))
        order = torch.arange(2, device=flat.device).repeat_interleave(number * len(shares))
        removed = gone.repeat_interleave(number).repeat(2)

        def masks(some: slice, wanted: Sequence[int]) -> Tensor:
            known = (ranks[order[some], rows[some]] >= removed[some, None]).reshape(-1, 1, *size).to(flat.dtype)
            return known if tuple(wanted) == size else (formulas.upsample(known, wanted) > 0.5).to(flat.dtype)

        def imputed(x: Tensor, base: float | Tensor, mask: Tensor, some: slice) -> Tensor:
            return impute(x, mask[:, 0] > 0.5, deviation, seed)

        scores = passes.masked_scores(masks, rows, function, imputed).reshape(2, len(shares), number)
        morf, lerf = scores.to(passes.output.device).mT
    combined = ((lerf - morf) / 2).mean(1)
    return Road(combined, morf, lerf, torch.tensor(shares, dtype=combined.dtype, device=combined.device))


def impute(x: Tensor, known: Tensor, noise: float = 0.01, seed: int = 0) -> Tensor:
    """Noisy linear imputation of pixels.

    Args:
        x (Tensor): Of shape (N, C, H, W).
        known (Tensor): bool, of shape (N, H, W): the pixels that stay as they are.
        noise (float, optional): Standard deviation of what is added to imputed pixels.
            Default: 0.01
        seed (int, optional): Of the noise, which is the same for every example.
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


def _solve(image: Any, missing: Any) -> Any:
    """Values of the missing pixels, (missing pixels, C), of an image (C, H, W) without noise."""
    from scipy.sparse import csc_matrix
    from scipy.sparse.linalg import splu

    height, width = missing.shape
    rows, columns = np.nonzero(missing)
    each = np.arange(len(rows))
    number = np.full(missing.shape, -1)
    number[rows, columns] = each
    diagonal, right = np.zeros(len(rows)), np.zeros((len(rows), len(image)))
    entries, at_rows, at_columns = [], [], []
    for (down, across), weight in _NEIGHBOURS.items():
        y, x = rows + down, columns + across
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        mine, y, x = each[inside], y[inside], x[inside]
        diagonal[mine] += weight
        other = number[y, x]
        known = other < 0
        right[mine[known]] += weight * image[:, y[known], x[known]].T
        entries.append(np.full((~known).sum(), -weight))
        at_rows.append(mine[~known])
        at_columns.append(other[~known])
    entries, at_rows, at_columns = [*entries, diagonal], [*at_rows, each], [*at_columns, each]
    system = csc_matrix(
        (np.concatenate(entries), (np.concatenate(at_rows), np.concatenate(at_columns))), shape=(len(rows), len(rows))
    )
    # Symmetric and positive definite, so that no pivoting is needed: half the time of the other orderings or less.
    factors = splu(system, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
    return factors.solve(right)


def _ranks(flat: Tensor, descending: bool) -> Tensor:
    """The place of each pixel in the order of its map (N, pixels)."""
    order = flat.argsort(dim=1, descending=descending, stable=True)
    places = torch.arange(flat.shape[1], device=flat.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def _percentiles(percentiles: Any) -> list[float]:
    if not isinstance(percentiles, (tuple, list)) or not percentiles:
        raise ValueError(f"percentiles must be a list of at least one number, not {percentiles!r:.80}")
    return [percentage("percentiles", each) for each in percentiles]
