r"""Active evaluation of channels: the scores of all channels' masks from a few of them.

A masked score is a smooth function ``F`` of the mask, and a channel's mask is a point in a small space, with one
coordinate for each position of the layer. :class:`ChannelSearch` models ``F`` by a Gaussian process over masks. It
asks for the scores of the channels that lower the expected error of the map most, and predicts the others. This is
Bayesian A-optimal design for the map ``sum_k w_k A^k``.

With ``K`` live channels, ``n`` positions, activations ``A`` (K, n), masks ``X_k = N(A^k)`` and gradients ``g`` of the
raw output:

- ``h = sum_k g^k A^k`` is HiResCAM's map before any ReLU, and ``r = 1 - s + s |h| / mean |h|``, ``s = 1/2``, the
  relevance of each position. Masks are compared by ``d_ij = |sqrt(r) (X_i - X_j)|``, in units of the root mean square
  distance.
- ``z = X ReLU(h)``, standardised, is a first-order guess of the scores.
- ``F ~ GP(0, v C)``, ``C = k(d / l) + 10 + z z^T + nugget I``, where ``k`` is the Matern 5/2 kernel with one of six
  length scales ``l``, or the linear kernel ``2 <X_i, X_j>``. The kernel has the largest marginal likelihood, and
  ``v`` its maximum likelihood value. The nugget is part of ``F``: a measured score is exact, and channels with equal
  masks need not have equal scores.
- Scores that are probabilities are modelled on the logit scale.

A deviation ``e`` of ``F`` moves the map by ``J^T e`` with ``J_k = q_k A^k``, ``q_k`` the slope of the weight in the
score. (The denominator of softmax weights moves the map along itself.) Without the parts that a correlation cannot see
(a constant, and the map itself), and in units of the map's norm, ``1 - correlation`` is ``|J^T e|^2 / 2`` up to third
order. With the posterior covariance ``S`` its expectation is ``trace(J^T S J) / 2``. Evaluating channel ``k`` lowers it
by ``|J^T S_k|^2 / (2 S_kk)``. The next channel has the largest such gain; within a batch the covariance is updated
without new scores.

Everything is float64 on the CPU and deterministic. On a GPU the many small steps take as long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from captum_fusion.functional.maps import normalize

#: Length scales of the Matern kernel, in units of the root mean square distance; infinity stands for the linear kernel.
_LENGTHS = (0.5, 0.75, 1.0, 1.5, 2.5, 4.0, math.inf)
_SALIENCY, _SHIFT, _LINEAR = 0.5, 10.0, 2.0
_NUGGET, _LINEAR_NUGGET = 1e-3, 1e-7
#: Of the channels, those with the largest own error are candidates; the rest contribute their variances only. A batch
#: that is larger has as many candidates as channels.
_CANDIDATES = 256
#: A search with a tolerance stops when this multiple of the expected error is below it. On four ImageNet networks the
#: common logarithm of real over expected error has a standard deviation of about 0.45, so the factor covers two.
DOUBT = 10.0
#: The fewest evaluations before a tolerance can stop the search.
FEWEST = 32
_NODES, _SHARES = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(12))


class _Posterior(NamedTuple):
    """The scores of all channels given the measured ones, on the model's scale.

    Attributes:
        mean: (K,), the measured value where there is one.
        variance: (K,), 0 where measured.
        half: (K, m): the covariance is ``scale * (prior - half half^T)``.
        scale: The variance ``v``.
        length: The length scale of the kernel.
    """

    mean: Tensor
    variance: Tensor
    half: Tensor
    scale: float
    length: float


class ChannelSearch:
    """The search for the scores of one example's channels, by questions and answers.

    Args:
        activations (Tensor): Of shape ``(K, *spatial)``: the live channels.
        gradients (Tensor): Of the same shape: gradients of the raw output. Values that are not finite count as 0.
        budget (int): The most channels to evaluate.
        weighting (str, optional): How scores become weights: ``"softmax"`` over channels, ``"probability"`` (the score
            itself), or ``"increase"`` (its positive difference to the baseline's score).
            Default: ``"softmax"``
        baseline (float, optional): The score of the baseline, for ``"increase"``.
            Default: 0.0
        is_probability (bool, optional): Whether scores are probabilities.
            Default: False
        tolerance (float, optional): Stop when ``1 - correlation`` of the map with the full one is expected to be below
            this, with a margin (:data:`DOUBT`).
            Default: None (use the whole budget)
        rounds (int, optional): The number of rounds after the first, without a tolerance.
            Default: 6

    Examples::

        >>> activations = torch.rand(40, 3, 3, generator=torch.Generator().manual_seed(0))
        >>> masks = (activations - activations.amin((1, 2), keepdim=True)) / (
        ...     activations.amax((1, 2), keepdim=True) - activations.amin((1, 2), keepdim=True)
        ... )
        >>> scores = masks.flatten(1).double() @ torch.arange(9.0).double()  # a score that is linear in the mask
        >>> search = ChannelSearch(activations, torch.ones(40, 3, 3), budget=20)
        >>> while channels := search.ask():
        ...     search.tell(channels, scores[channels])
        >>> search.evaluations, torch.allclose(search.scores(), scores, rtol=1e-5)
        (20, True)
    """

    def __init__(
        self,
        activations: Tensor,
        gradients: Tensor,
        budget: int,
        *,
        weighting: str = "softmax",
        baseline: float = 0.0,
        is_probability: bool = False,
        tolerance: float | None = None,
        rounds: int = 6,
    ) -> None:
        self._maps = _flat(activations)
        self._number = len(self._maps)
        self._weighting, self._baseline, self._is_probability = weighting, baseline, is_probability
        self._tolerance = tolerance
        self._budget = min(budget, self._number)
        self._plan = _batches(self._budget, rounds)
        self._chosen = torch.zeros(0, dtype=torch.long, device="cpu")
        self._measured = torch.zeros(0, dtype=torch.double, device="cpu")
        self._posterior: _Posterior | None = None
        self._error = math.inf if self._number else 0.0
        if self._number:
            self._prepare(_flat(gradients).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))

    def _prepare(self, gradients: Tensor) -> None:
        """The metric of masks, the guess of their scores, and where large weights are expected."""
        masks = normalize(self._maps)
        first_order = (gradients * self._maps).sum(0)
        size = first_order.abs()
        flat = size.mean() == 0
        relevance = torch.ones_like(size) if flat else 1 - _SALIENCY + _SALIENCY * size / size.mean()
        points = (masks - masks.mean(0)) * relevance.sqrt()
        unit = (2 * points.square().sum() / max(self._number - 1, 1)).sqrt()
        self._points = points / unit if unit > 0 else points
        self._squares = self._points.square().sum(1)
        self._guess = _standardized(masks @ first_order.relu())
        contribution = _standardized(gradients.mean(1) * self._maps.sum(1))
        self._preference = _standardized(self._guess + contribution).clamp(-2, 2)

    # ---- questions and answers

    @property
    def evaluations(self) -> int:
        """The number of channels whose scores are known."""
        return len(self._chosen)

    @property
    def expected_error(self) -> float:
        """Expected ``1 - correlation`` of the map with the one from all scores.

        0 if all scores are known, infinity if fewer than two finite ones are.
        """
        return self._error

    def ask(self) -> list[int]:
        """The channels whose scores are wanted next; none when the search has ended."""
        left = self._budget - self.evaluations
        if not left:
            return []
        if self._budget == self._number and self._tolerance is None:
            return list(range(self._number))
        if self._posterior is None:
            return self._first(self._plan.pop(0) if self._tolerance is None else min(left, 12))
        if self._tolerance is None:
            return self._next(self._posterior, self._plan.pop(0))
        if self.evaluations >= FEWEST and DOUBT * self._error <= self._tolerance:
            return []
        return self._next(self._posterior, min(left, max(6, self.evaluations // 4)))

    def tell(self, channels: Sequence[int], scores: Tensor) -> None:
        """Learn the scores of some channels, in the order in which they were asked for."""
        self._chosen = torch.cat([self._chosen, torch.as_tensor(channels, dtype=torch.long, device="cpu")])
        self._measured = torch.cat([self._measured, scores.detach().to("cpu", torch.double)])
        if self.evaluations == self._number:
            self._error = 0.0
            return
        self._posterior = self._condition()
        if self._tolerance is not None or self.evaluations == self._budget:
            self._error = self._expected_error(self._posterior)

    def scores(self) -> Tensor:
        """The scores of all channels, (K,), float64: measured where they are known, else predicted."""
        scores = torch.zeros_like(self._maps[:, 0])
        if self._posterior is not None:
            scores = torch.sigmoid(self._posterior.mean) if self._is_probability else self._posterior.mean.clone()
            if not self._measured.isfinite().any():
                scores = torch.full_like(scores, math.nan)
        scores[self._chosen] = self._measured
        return scores

    # ---- the Gaussian process

    def _distances(self, rows: Tensor, columns: Tensor) -> Tensor:
        product = self._points[rows] @ self._points[columns].T
        return (self._squares[rows][:, None] + self._squares[columns] - 2 * product).clamp_min_(0).sqrt_()

    def _covariance(
        self, distance: Tensor, length: float, rows: Tensor, columns: Tensor, shift: float = _SHIFT
    ) -> Tensor:
        """Prior covariance of two sets of channels that are ``distance`` apart, in units of the scale."""
        same = rows[:, None] == columns
        if math.isinf(length):
            prior = _LINEAR * (self._points[rows] @ self._points[columns].T)
            nugget = _LINEAR_NUGGET
        else:
            scaled = distance * (math.sqrt(5) / length)
            prior = (1 + scaled + scaled.square() / 3) * (-scaled).exp()
            nugget = _NUGGET
        return prior + torch.outer(self._guess[rows], self._guess[columns]) + shift + nugget * same

    def _prior_variance(self, length: float, shift: float = _SHIFT) -> Tensor:
        kernel = _LINEAR * self._squares + _LINEAR_NUGGET if math.isinf(length) else 1 + _NUGGET
        return kernel + shift + self._guess.square()

    def _condition(self) -> _Posterior:
        """The posterior given the measured scores. Scores that are not finite are left out."""
        finite = self._measured.isfinite()
        kept, values = self._chosen[finite], self._modelled(self._measured[finite])
        if not len(kept):
            variance = torch.ones_like(self._maps[:, 0])
            variance[self._chosen] = 0
            return _Posterior(torch.zeros_like(variance), variance, variance.new_zeros(self._number, 0), 1.0, 1.0)
        everything, centre = torch.arange(self._number, device="cpu"), values.mean()
        apart = self._distances(everything, kept)
        priors = torch.stack([self._covariance(apart[kept], length, kept, kept) for length in _LENGTHS])
        factors = torch.linalg.cholesky(priors)
        solutions = torch.linalg.solve_triangular(factors, (values - centre)[:, None], upper=False)[..., 0]
        scales = solutions.square().sum(1) / max(len(kept) - 1, 1)
        fit = -0.5 * len(kept) * scales.clamp_min(1e-300).log()
        best = int((fit - factors.diagonal(dim1=1, dim2=2).log().sum(1)).argmax())
        length, factor, solved, scale = _LENGTHS[best], factors[best], solutions[best], float(scales[best])
        cross = self._covariance(apart, length, everything, kept)
        half = torch.linalg.solve_triangular(factor.T, cross, upper=True, left=False)
        mean, variance = centre + half @ solved, scale * (self._prior_variance(length) - half.square().sum(1))
        variance = variance.clamp_min(0)
        mean[kept], variance[self._chosen] = values, 0
        return _Posterior(mean, variance, half, scale, length)

    def _modelled(self, scores: Tensor) -> Tensor:
        """Scores on the model's scale: logits of probabilities, floored at a millionth of the largest one."""
        if not self._is_probability or not len(scores):
            return scores
        largest = scores.max().clamp(1e-300, 1 - 1e-12)
        return torch.logit(scores.clamp(min=float(largest) * 1e-6, max=1 - 1e-12))

    # ---- the error of the map

    def _weights(self, posterior: _Posterior) -> tuple[Tensor, Tensor]:
        """Expected weight of every channel, and its root mean square slope in the modelled score."""
        mean, variance = posterior.mean, posterior.variance
        if self._weighting == "softmax":
            weights = (mean + variance / 2).softmax(0)
            limited = variance.clamp(1e-9, 20)
            return weights, weights * (torch.expm1(limited) / limited).sqrt()
        deviation = variance.sqrt().clamp_min(1e-6)
        sampled = mean[:, None] + deviation[:, None] * _NODES
        sampled = torch.sigmoid(sampled) if self._is_probability else sampled
        sampled = (sampled - self._baseline).relu() if self._weighting == "increase" else sampled
        shares = _SHARES / _SHARES.sum()
        weights = sampled @ shares
        return weights, ((sampled - weights[:, None]).square() @ shares).sqrt() / deviation

    def _moves(self, weights: Tensor, slopes: Tensor) -> Tensor:
        """``J``: how the map moves with each channel's modelled score, as correlation sees it, (K, n)."""
        total = weights @ self._maps
        centred = total - total.mean()
        power = centred @ centred
        if not power > 0:
            return torch.zeros_like(self._maps)
        moves = self._maps - self._maps.mean(1, keepdim=True)
        moves = moves - torch.outer(moves @ centred / power, centred)
        return moves * (slopes / power.sqrt())[:, None]

    def _candidates(
        self, posterior: _Posterior, moves: Tensor, taken: Tensor, number: int = _CANDIDATES, shift: float = _SHIFT
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The channels with the largest own error, their prior covariance, and ``J^T S`` among them."""
        own = (moves.square().sum(1) * posterior.variance).masked_fill(taken, -1.0)
        rows = own.topk(min(max(_CANDIDATES, number), self._number)).indices
        prior = self._covariance(self._distances(rows, rows), posterior.length, rows, rows, shift)
        half = posterior.half[rows]
        cross = moves[rows].T @ prior - (moves[rows].T @ half) @ half.T
        return rows, prior, posterior.scale * cross

    def _taken(self) -> Tensor:
        taken = torch.zeros(self._number, dtype=torch.bool, device="cpu")
        taken[self._chosen] = True
        return taken

    def _choose(
        self, posterior: _Posterior, moves: Tensor, taken: Tensor, number: int, shift: float = _SHIFT
    ) -> list[int]:
        """The channels that lower the expected error most, one after the other."""
        rows, prior, cross = self._candidates(posterior, moves, taken, number, shift)
        half, variance, excluded = posterior.half[rows], posterior.variance[rows], taken[rows]
        moves, floor = moves[rows].T, 1e-9 * max(posterior.scale, 1e-300)
        picked: list[int] = []
        number = min(number, int((~excluded).sum()))
        columns = half.new_zeros(len(rows), number)  # the rows of a Cholesky factor of those picked
        for taking in range(number):
            gain = cross.square().sum(0) / variance.clamp_min(floor)
            index = int(gain.masked_fill_(excluded, -1.0).argmax())
            picked.append(index)
            excluded[index] = True
            column = posterior.scale * (prior[index] - half @ half[index]) - columns @ columns[index]
            column = column / variance[index].clamp_min(floor).sqrt()
            columns[:, taking] = column
            cross = torch.addr(cross, moves @ column, column, alpha=-1)
            variance = (variance - column.square()).clamp_min_(0)
        return rows[picked].tolist()

    def _first(self, number: int) -> list[int]:
        """The first batch: the same rule under the prior, with weights guessed from the gradients."""
        empty = self._maps.new_zeros(self._number, 0)
        prior = _Posterior(empty.sum(1), self._prior_variance(1.0, shift=0.0), empty, 1.0, 1.0)
        weights = self._preference.softmax(0)
        return self._choose(prior, self._moves(weights, weights), self._taken(), number, shift=0.0)

    def _next(self, posterior: _Posterior, number: int) -> list[int]:
        return self._choose(posterior, self._moves(*self._weights(posterior)), self._taken(), number)

    def _expected_error(self, posterior: _Posterior) -> float:
        """``trace(J^T S J) / 2``; outside of the candidates, covariances are left out."""
        if self._measured.isfinite().sum() < 2:
            return math.inf  # one score says nothing of the scale of the others
        if not (posterior.variance > 0).any():
            return 0.0
        moves = self._moves(*self._weights(posterior))
        rows, _, cross = self._candidates(posterior, moves, self._taken())
        own = moves.square().sum(1) * posterior.variance
        return float((cross * moves[rows].T).sum() + (own.sum() - own[rows].sum()).clamp_min(0)) / 2


def _flat(values: Tensor) -> Tensor:
    """(K, *spatial) as (K, n), float64 on the CPU."""
    return values.detach().to("cpu", torch.double).flatten(1)


def _standardized(values: Tensor) -> Tensor:
    """Zero mean and unit variance; a constant gives zeros."""
    values = values - values.mean()
    spread = values.square().mean().sqrt()
    return values / spread if spread > 0 else torch.zeros_like(values)


def _batches(budget: int, rounds: int) -> list[int]:
    """Two sevenths of the budget (at least 8) first, the rest in equal rounds."""
    first = min(budget, max(8, budget * 2 // 7))
    left = budget - first
    rest = [left // rounds + (i < left % rounds) for i in range(rounds)]
    return [first, *(size for size in rest if size)]
