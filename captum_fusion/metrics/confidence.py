"""How much of its confidence a network keeps when it is shown only what a map highlights.

A map that highlights everything keeps all of it: report :func:`complexity`, the mask's area, beside these, and
insertion and deletion (:mod:`captum_fusion.metrics.causal`). Differences of at most 3e-5 of a score are rounding
errors and count as none (:func:`captum_fusion.functional.contribution`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_fusion import functional as formulas
from captum_fusion._captum import Baselines, Call, Target, no_inference_mode
from captum_fusion.functional import ScoreFn
from captum_fusion.metrics._common import Tensors, as_masks, documented, input_maps, scores_under


@documented
def confidences(
    forward_func: Callable[..., Any],
    inputs: Tensors,
    attributions: Tensor,
    target: Target = None,
    additional_forward_args: Any = None,
    *,
    baselines: Baselines = 0,
    mask_inputs: Sequence[int] | None = None,
    normalize: bool = True,
    score_fn: str | ScoreFn = "softmax",
    perturbations_per_eval: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores of the whole inputs and of the parts that their maps highlight: ``Y`` and ``O``, what the others are of.

    Args:
        {args}
        baselines (float, Tensor, tuple or None, optional): What shows where the map is 0.
            Default: 0
        mask_inputs (sequence of int, optional): Which of several inputs are masked.
            Default: None (the first floating point input with spatial dimensions, and those of its rank)
        normalize (bool, optional): Take the positive part of each map and stretch it to [0, 1]. Otherwise it must be in
            [0, 1] already.
            Default: True
        score_fn (str or callable, optional): What is called a score: ``"softmax"``, ``"sigmoid"``, ``"identity"`` or a
            function of the raw output.
            Default: ``"softmax"``
        perturbations_per_eval (int, optional): At most this many rows per example in one call of the network.
            Default: None (timed)

    Returns:
        tuple[Tensor, Tensor]: ``Y`` and ``O``, each of shape (N,), float64 (float32 on devices without it).

    Raises:
        AssertionError: If the target does not select one output for each example.
        ValueError: If the attributions do not fit the inputs; the message says how.

    Examples::

        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(10)).eval()
        >>> whole, part = confidences(net, torch.rand(2, 3, 8, 8), torch.rand(2, 1, 4, 4), target=[3, 7])
        >>> whole.shape, part.shape
        (torch.Size([2]), torch.Size([2]))
    """
    function = formulas.score_function(score_fn)
    call = Call.without_layer(
        forward_func,
        inputs,
        target,
        additional_forward_args,
        baselines=baselines,
        mask_inputs=mask_inputs,
        perturbations_per_eval=perturbations_per_eval,
    )
    with no_inference_mode():
        maps = as_masks(input_maps(attributions, call), normalize)
        return call.clean_scores(function), scores_under(maps, call, function).to(call.output.device)


def _like_confidences(metric: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Show the signature that the arguments are handed on to."""
    signature = inspect.signature(confidences).replace(return_annotation=Tensor)
    metric.__signature__ = signature  # type: ignore[attr-defined]
    return metric


@_like_confidences
def average_drop(*arguments: Any, **options: Any) -> Tensor:
    """Average Drop, example by example, in percent: ``100 max(0, Y - O) / Y``. Lower is better.

    Takes the arguments of :func:`confidences`. An example with ``Y = 0`` has nothing to lose and gets 0.

    Returns:
        Tensor: Of shape (N,), in [0, 100] for probabilities; the mean over a dataset is the published figure.

    Examples::

        >>> half = lambda x: x.mean((1, 2, 3))
        >>> average_drop(half, torch.ones(1, 1, 2, 2), torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]]))
        tensor([75.], dtype=torch.float64)
    """
    whole, part = confidences(*arguments, **options)
    return torch.where(
        whole != 0, 100 * formulas.contribution(whole, part).relu() / torch.where(whole != 0, whole, 1.0), 0.0
    )


@_like_confidences
def average_increase(*arguments: Any, **options: Any) -> Tensor:
    """Average Increase, or increase in confidence, in percent: 100 where ``O > Y``, else 0. Higher is better.

    Takes the arguments of :func:`confidences`.

    Returns:
        Tensor: Of shape (N,), 0 or 100; the mean over a dataset is the published figure.

    Examples::

        >>> average_increase(lambda x: -x.mean((1, 2, 3)), torch.ones(1, 1, 2, 2), torch.rand(1, 1, 2, 2))
        tensor([100.], dtype=torch.float64)
    """
    whole, part = confidences(*arguments, **options)
    increased: Tensor = 100 * (formulas.contribution(part, whole) > 0).to(whole.dtype)
    return increased


@_like_confidences
def average_gain(*arguments: Any, **options: Any) -> Tensor:
    """Average Gain, in percent: ``100 max(0, O - Y) / (1 - Y)``. Higher is better. For probabilities.

    Takes the arguments of :func:`confidences`. An example with ``Y = 1`` has nothing to gain and gets 0. From the
    paper: H. Zhang, F. Torres, R. Sicre, Y. Avrithis, S. Ayache, "Opti-CAM", https://arxiv.org/abs/2301.07002

    Returns:
        Tensor: Of shape (N,), in [0, 100].

    Examples::

        >>> dark = lambda x: 0.5 - 0.5 * x.mean((1, 2, 3))
        >>> average_gain(dark, torch.ones(1, 1, 1, 2), torch.tensor([[[[1.0, 0.0]]]]))
        tensor([25.], dtype=torch.float64)
    """
    whole, part = confidences(*arguments, **options)
    room = 1 - whole
    return torch.where(
        room > 0, 100 * formulas.contribution(part, whole).relu() / torch.where(room > 0, room, 1.0), 0.0
    )


def complexity(attributions: Tensor, *, normalize: bool = True) -> Tensor:
    """The mean of a map in [0, 1]: the area of the mask that it is. Lower is better; report it with Average Drop.

    Args:
        attributions (Tensor): Of shape ``(N, C, *spatial)``; channels are summed.
        normalize (bool, optional): Take the positive part and stretch it to [0, 1].
            Default: True

    Returns:
        Tensor: Of shape (N,), in [0, 1].

    Examples::

        >>> complexity(torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]]))
        tensor([0.2500])
    """
    maps = formulas.at_least_float32(attributions.detach()).sum(1, keepdim=True)
    return as_masks(maps, normalize).flatten(1).mean(1)
