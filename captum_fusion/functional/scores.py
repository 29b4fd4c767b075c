"""Scores: from raw outputs to scores, and differences between scores."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from captum_fusion.functional.maps import at_least_float32, precise

#: The same for differences of scores. On real ImageNet networks in float32 the probability of one and the same image
#: moves by up to 2e-5 of itself with the batch size and the memory layout that it is computed in.
SCORE_FLOOR = 3e-5


ScoreFn = Callable[[Tensor], Tensor]


def _identity(output: Tensor) -> Tensor:
    return output


def _softmax(output: Tensor) -> Tensor:
    if output.shape[1] == 1:
        raise ValueError(
            'score_fn="softmax" over a single output column is 1 for every input; '
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
        callable: It returns float64 (float32 on devices without it): the contributions of masks are differences of
        scores. A function of your own is given at least float32. An output of shape (N,) is the score itself.

    Raises:
        ValueError: If the name is unknown; when called, for a softmax over a single column.
        TypeError: If ``score_fn`` is neither a name nor callable, or returns anything but a tensor.

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
        found = function(at_least_float32(output)) if output.dim() > 1 else output
        if not isinstance(found, Tensor):
            raise TypeError(f"score_fn must return a tensor, not {type(found).__name__}")
        return precise(found)

    return scores


def contribution(score: Tensor, baseline: Tensor) -> Tensor:
    """Score minus the baseline's score [1, 2]; a difference within float noise counts as 0.

    Args:
        score (Tensor): Score of a masked input.
        baseline (Tensor): Score of the baseline, of a shape that broadcasts.

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
    """Average Drop, example by example: ``100 max(0, Y - O) / Y``; 0 where ``Y = 0``, and for differences within noise.

    Args:
        whole (Tensor): ``Y``, the score of the input as it is.
        part (Tensor): ``O``, the score of its highlighted part.

    Returns:
        Tensor: In percent of ``Y``.

    Examples::

        >>> drop(torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.75, 0.5]))
        tensor([50.,  0.,  0.])
    """
    return torch.where(whole != 0, 100 * contribution(whole, part).relu() / torch.where(whole != 0, whole, 1.0), 0.0)


def increase(whole: Tensor, part: Tensor) -> Tensor:
    """Average Increase, example by example: 100 where ``O > Y`` by more than noise, else 0.

    Args:
        whole (Tensor): ``Y``, the score of the input as it is.
        part (Tensor): ``O``, the score of its highlighted part.

    Returns:
        Tensor: 0 or 100.

    Examples::

        >>> increase(torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75]))
        tensor([  0., 100.])
    """
    return 100 * (contribution(part, whole) > 0).to(whole.dtype)


def gain(whole: Tensor, part: Tensor) -> Tensor:
    """Average Gain, example by example: ``100 max(0, O - Y) / (1 - Y)``; 0 where ``Y = 1``. For probabilities.

    Args:
        whole (Tensor): ``Y``, the score of the input as it is.
        part (Tensor): ``O``, the score of its highlighted part.

    Returns:
        Tensor: In percent of ``1 - Y``.

    Examples::

        >>> gain(torch.tensor([0.5, 1.0]), torch.tensor([0.75, 1.0]))
        tensor([50.,  0.])
    """
    room = 1 - whole
    return torch.where(room > 0, 100 * contribution(part, whole).relu() / torch.where(room > 0, room, 1.0), 0.0)
