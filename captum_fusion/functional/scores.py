"""Scores: conversion of raw outputs to scores, and differences between scores."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from captum_fusion.functional.maps import at_least_float32, precise

#: A difference of scores below this fraction of the larger score is treated as 0. On real ImageNet networks in float32
#: the probability of the same image varies by up to a relative 2e-5 with the batch size and the memory layout.
SCORE_FLOOR = 3e-5


ScoreFn = Callable[[Tensor], Tensor]


def _identity(output: Tensor) -> Tensor:
    return output


def _softmax(output: Tensor) -> Tensor:
    if output.shape[1] == 1:
        raise ValueError(
            'score_fn="softmax" of a single output column is 1 for every input; '
            'use score_fn="sigmoid" for a binary head or score_fn="identity" for a regression'
        )
    return precise(output).softmax(1)


def _sigmoid(output: Tensor) -> Tensor:
    return precise(output).sigmoid()


_SCORE_FNS: dict[str, ScoreFn] = {"softmax": _softmax, "sigmoid": _sigmoid, "identity": _identity}


def score_function(score_fn: str | ScoreFn) -> ScoreFn:
    """The function that turns a model's raw output into scores, along dimension 1.

    Args:
        score_fn (str or callable): ``"softmax"``, ``"sigmoid"``, ``"identity"``, or a function from the raw output,
            of shape (N, ...) with two or more dimensions, to scores of a shape that the target can index.

    Returns:
        callable: Function that returns float64 scores (float32 on devices without float64), because contributions are
        differences of scores. A callable ``score_fn`` gets at least float32. An output of shape (N,) is returned as the
        score itself.

    Raises:
        ValueError: If the name is unknown. When called: if the softmax is over a single column.
        TypeError: If ``score_fn`` is neither a name nor callable. When called: if it does not return a tensor.

    Examples::

        >>> score_function("softmax")(torch.zeros(1, 4))
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]], dtype=torch.float64)
    """
    if isinstance(score_fn, str):
        if score_fn not in _SCORE_FNS:
            raise ValueError(f"score_fn must be one of {', '.join(_SCORE_FNS)} or a callable, not {score_fn!r}")
        function = _SCORE_FNS[score_fn]
    elif callable(score_fn):
        function = score_fn
    else:
        raise TypeError(f"score_fn must be a name or a callable, not {type(score_fn).__name__}")

    def scores(output: Tensor) -> Tensor:
        result = function(at_least_float32(output)) if output.dim() > 1 else output
        if not isinstance(result, Tensor):
            raise TypeError(f"score_fn must return a tensor, not {type(result).__name__}")
        return precise(result)

    return scores


def contribution(score: Tensor, baseline: Tensor) -> Tensor:
    """Score minus the baseline's score [1, 2]; a difference within rounding noise is 0.

    Args:
        score (Tensor): Score of a masked input.
        baseline (Tensor): Score of the baseline, broadcastable to ``score``.

    Returns:
        Tensor: The difference, 0 where it is at most 3e-5 of the larger score's magnitude.

    Examples::

        >>> contribution(torch.tensor([0.75, 0.25]), torch.tensor([0.25, 0.25 + 1e-8]))
        tensor([0.5000, 0.0000])
    """
    difference = score - baseline
    noise = SCORE_FLOOR * torch.maximum(score.abs(), baseline.abs())
    return torch.where(difference.abs() <= noise, 0.0, difference)


def drop(whole: Tensor, part: Tensor) -> Tensor:
    """Average Drop per example: ``100 max(0, Y - O) / Y``; 0 if ``Y = 0`` or the difference is within noise.

    As in :func:`increase` and :func:`gain`, a score that is NaN gives NaN.

    Args:
        whole (Tensor): ``Y``, the score of the original input.
        part (Tensor): ``O``, the score of the highlighted part.

    Returns:
        Tensor: In percent of ``Y``.

    Examples::

        >>> drop(torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.75, 0.5]))
        tensor([50.,  0.,  0.])
    """
    return _share(contribution(whole, part), whole)


def increase(whole: Tensor, part: Tensor) -> Tensor:
    """Average Increase per example: 100 if ``O > Y`` by more than noise, else 0.

    Args:
        whole (Tensor): ``Y``, the score of the original input.
        part (Tensor): ``O``, the score of the highlighted part.

    Returns:
        Tensor: 0 or 100.

    Examples::

        >>> increase(torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75]))
        tensor([  0., 100.])
    """
    gained = contribution(part, whole)
    return torch.where(gained.isnan(), torch.nan, 100 * (gained > 0).to(gained.dtype))


def gain(whole: Tensor, part: Tensor) -> Tensor:
    """Average Gain per example: ``100 max(0, O - Y) / (1 - Y)``; 0 if ``Y = 1``. For probabilities.

    Args:
        whole (Tensor): ``Y``, the score of the original input.
        part (Tensor): ``O``, the score of the highlighted part.

    Returns:
        Tensor: In percent of ``1 - Y``.

    Examples::

        >>> gain(torch.tensor([0.5, 1.0]), torch.tensor([0.75, 1.0]))
        tensor([50.,  0.])
    """
    return _share(contribution(part, whole), (1 - whole).relu())


def _share(difference: Tensor, whole: Tensor) -> Tensor:
    """The positive part of a difference in percent of the whole; 0 of a whole of 0, NaN if the difference is NaN."""
    nothing = whole == 0
    share = 100 * difference.relu() / torch.where(nothing, 1.0, whole)
    return torch.where(nothing & ~difference.isnan(), 0.0, share)
