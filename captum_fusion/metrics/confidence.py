"""How much of its confidence a network keeps when it is shown only what a map highlights.

A map that highlights everything keeps all of it: report :func:`complexity`, the mask's area, beside these, and
insertion and deletion (:mod:`captum_fusion.metrics.causal`). :func:`adcc` holds both, and :func:`coherency`, in one
figure. Differences of at most 3e-5 of a score are rounding errors and count as none
(:func:`captum_fusion.functional.contribution`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_fusion import functional as formulas
from captum_fusion._passes.modes import no_inference_mode
from captum_fusion._passes.passes import Passes
from captum_fusion._types import Baselines, Target
from captum_fusion.functional import ScoreFn
from captum_fusion.metrics._common import (
    Tensors,
    as_masks,
    channel_sum,
    correlation,
    documented,
    explain_again,
    input_maps,
    masked_by,
    masking_of,
    scores_under,
)


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
    passes = Passes.without_layer(
        forward_func,
        inputs,
        target,
        additional_forward_args,
        baselines=baselines,
        mask_inputs=mask_inputs,
        perturbations_per_eval=perturbations_per_eval,
    )
    with no_inference_mode():
        maps = as_masks(input_maps(attributions, passes), normalize)
        return passes.clean_scores(function), scores_under(maps, passes, function).to(passes.output.device)


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
    return formulas.drop(*confidences(*arguments, **options))


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
    return formulas.increase(*confidences(*arguments, **options))


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
    return formulas.gain(*confidences(*arguments, **options))


@documented
def win_rate(
    forward_func: Callable[..., Any],
    inputs: Tensors,
    attributions: Tensor,
    target: Target = None,
    additional_forward_args: Any = None,
    *,
    other_attributions: Tensor,
    baselines: Baselines = 0,
    mask_inputs: Sequence[int] | None = None,
    normalize: bool = True,
    score_fn: str | ScoreFn = "softmax",
    perturbations_per_eval: int | None = None,
) -> Tensor:
    """Win %: 100 where the score drops less under one method's map than under another's, else 0. Higher is better.

    A tie is no win for either side: two maps that drop nothing give 0 in both directions. From the paper:
    A. Chattopadhay, A. Sarkar, P. Howlader, V. Balasubramanian, "Grad-CAM++", WACV 2018,
    https://arxiv.org/abs/1710.11063

    Args:
        {args}
        other_attributions (Tensor): The other method's map for each example, also of shape ``(N, C, *spatial)``.
        baselines (float, Tensor, tuple or None, optional): What shows where a map is 0.
            Default: 0
        mask_inputs (sequence of int, optional): Which of several inputs are masked.
            Default: None (the first floating point input with spatial dimensions, and those of its rank)
        normalize (bool, optional): Take the positive part of each map and stretch it to [0, 1]. Otherwise it must be in
            [0, 1] already.
            Default: True
        score_fn (str or callable, optional): What is called a score.
            Default: ``"softmax"``
        perturbations_per_eval (int, optional): At most this many rows per example in one call of the network.
            Default: None (timed)

    Returns:
        Tensor: Of shape (N,), 0 or 100; the mean over a dataset is the published figure.

    Raises:
        AssertionError: If the target does not select one output for each example.
        ValueError: If one of the attributions does not fit the inputs; the message says how.

    Examples::

        >>> brightness = lambda x: x.mean((1, 2, 3))
        >>> large, small = torch.tensor([[[[1.0, 0.0, 1.0]]]]), torch.tensor([[[[1.0, 0.0, 0.0]]]])
        >>> win_rate(brightness, torch.ones(1, 1, 1, 3), large, other_attributions=small)
        tensor([100.], dtype=torch.float64)
    """
    function = formulas.score_function(score_fn)
    passes = Passes.without_layer(
        forward_func,
        inputs,
        target,
        additional_forward_args,
        baselines=baselines,
        mask_inputs=mask_inputs,
        perturbations_per_eval=perturbations_per_eval,
    )
    with no_inference_mode():
        maps = (input_maps(attributions, passes), input_maps(other_attributions, passes, "other_attributions"))
        whole = passes.clean_scores(function)
        own, other = (
            formulas.drop(whole, scores_under(as_masks(each, normalize), passes, function).to(whole.device))
            for each in maps
        )
        return 100 * (formulas.contribution(other, own) > 0).to(whole.dtype)


@documented
def coherency(
    explanation_func: Callable[..., Any],
    inputs: Tensors,
    attributions: Tensor,
    target: Target = None,
    additional_forward_args: Any = None,
    *,
    baselines: Baselines = 0,
    mask_inputs: Sequence[int] | None = None,
    normalize: bool = True,
    explanation_kwargs: dict[str, Any] | None = None,
) -> Tensor:
    """Coherency: how much the map of what a map highlights is like that map, ``(1 + r) / 2`` with Pearson's ``r``.

    The highlighted part of each input is explained again; besides that, no pass is run. Higher is better. The
    correlation with a constant map, or with one that is not finite, is not defined and counts as coherency 0. From the
    paper: S. Poppi, M. Cornia, L. Baraldi, R. Cucchiara, "Revisiting The Evaluation of Class Activation Mapping for
    Explainability", CVPRW 2021, https://arxiv.org/abs/2104.10252

    Args:
        explanation_func (callable): The method that made the attributions, called as ``explanation_func(inputs,
            target=target)``, with ``additional_forward_args`` if there are any: ``LayerFusionCAM(model,
            layer).attribute`` for example.
        inputs (Tensor or tuple[Tensor, ...]): What was explained, with dimension 0 counting the N examples.
        attributions (Tensor): A map for each example, of shape ``(N, C, *spatial)``: channels are summed, and the map
            is brought to the input's size.
        target (int, tuple, Tensor or list, optional): Which output was explained, with captum's meaning.
            Default: None
        additional_forward_args (Any, optional): Further arguments of the network.
            Default: None
        baselines (float, Tensor, tuple or None, optional): What shows where the map is 0.
            Default: 0
        mask_inputs (sequence of int, optional): Which of several inputs are masked.
            Default: None (the first floating point input with spatial dimensions, and those of its rank)
        normalize (bool, optional): Take the positive part of both maps, and stretch the first to [0, 1] to mask with
            it. Otherwise both are taken as they are, and the first must be in [0, 1] already.
            Default: True
        explanation_kwargs (dict, optional): Further arguments of ``explanation_func``.
            Default: None

    Returns:
        Tensor: Of shape (N,), in [0, 1], float64 (float32 on devices without it).

    Raises:
        TypeError: If ``explanation_func`` is not callable, or does not return one tensor.
        ValueError: If the attributions, or what ``explanation_func`` returns, do not fit the inputs.

    Examples::

        >>> from captum_fusion import LayerFusionCAM
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.LazyLinear(10)).eval()
        >>> images, method = torch.rand(2, 3, 8, 8), LayerFusionCAM(net, net[0])
        >>> coherency(method.attribute, images, method.attribute(images, [3, 7]), target=[3, 7]).shape
        torch.Size([2])
    """
    masking = masking_of(inputs, baselines, mask_inputs)
    with no_inference_mode():
        maps = input_maps(attributions, masking)
        masked = masked_by(as_masks(maps, normalize), masking)
        given = masked if isinstance(inputs, tuple) else masked[0]
        again = explain_again(explanation_func, given, target, additional_forward_args, explanation_kwargs)
        return _coherency(maps, input_maps(again, masking, "the map of explanation_func"), normalize)


def _coherency(maps: Tensor, again: Tensor, normalize: bool) -> Tensor:
    """(1 + Pearson) / 2 of two maps of the same size, (N,)."""
    first, second = (each.relu() if normalize else each for each in (maps, again))
    found, defined = correlation(first.flatten(1), second.flatten(1).to(first.device))
    return torch.where(defined, (1 + found) / 2, 0.0)


class ADCC(NamedTuple):
    """Average DCC and its three parts, for each example.

    Attributes:
        adcc: Harmonic mean of ``coherency``, ``1 - complexity`` and ``1 - average_drop``, (N,), in [0, 1].
        coherency: As of :func:`coherency`, (N,), in [0, 1].
        complexity: Mean of the mask that the map is at the input's size, (N,), in [0, 1].
        average_drop: As of :func:`average_drop`, but as a share instead of in percent, (N,), in [0, 1].
    """

    adcc: Tensor
    coherency: Tensor
    complexity: Tensor
    average_drop: Tensor


@documented
def adcc(
    forward_func: Callable[..., Any],
    inputs: Tensors,
    attributions: Tensor,
    target: Target = None,
    additional_forward_args: Any = None,
    *,
    explanation_func: Callable[..., Any],
    baselines: Baselines = 0,
    mask_inputs: Sequence[int] | None = None,
    normalize: bool = True,
    explanation_kwargs: dict[str, Any] | None = None,
    score_fn: str | ScoreFn = "softmax",
    perturbations_per_eval: int | None = None,
) -> ADCC:
    """ADCC: one figure of how little a map highlights, how much of the score that keeps, and how coherent the map is.

    ``3 / (1 / coherency + 1 / (1 - complexity) + 1 / (1 - drop))`` for each example, 0 where one of the three is 0.
    The published figure is the mean over a dataset; the harmonic mean of the three means, which others report, is not
    the same. From the paper: S. Poppi, M. Cornia, L. Baraldi, R. Cucchiara, "Revisiting The Evaluation of Class
    Activation Mapping for Explainability", CVPRW 2021, https://arxiv.org/abs/2104.10252

    Args:
        {args}
        explanation_func (callable): The method that made the attributions, as of :func:`coherency`.
        baselines (float, Tensor, tuple or None, optional): What shows where the map is 0.
            Default: 0
        mask_inputs (sequence of int, optional): Which of several inputs are masked.
            Default: None (the first floating point input with spatial dimensions, and those of its rank)
        normalize (bool, optional): Take the positive part of each map and stretch it to [0, 1]. Otherwise it must be in
            [0, 1] already.
            Default: True
        explanation_kwargs (dict, optional): Further arguments of ``explanation_func``.
            Default: None
        score_fn (str or callable, optional): What is called a score: probabilities, because a drop of more than all of
            it counts as all of it.
            Default: ``"softmax"``
        perturbations_per_eval (int, optional): At most this many rows per example in one call of the network.
            Default: None (timed)

    Returns:
        ADCC: The figure and its three parts.

    Raises:
        AssertionError: If the target does not select one output for each example.
        TypeError: If ``explanation_func`` is not callable, or does not return one tensor.
        ValueError: If the attributions, or what ``explanation_func`` returns, do not fit the inputs.

    Examples::

        >>> from captum_fusion import LayerFusionCAM
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.LazyLinear(10)).eval()
        >>> images, method = torch.rand(2, 3, 8, 8), LayerFusionCAM(net, net[0])
        >>> found = adcc(net, images, method.attribute(images, 3), target=3, explanation_func=method.attribute)
        >>> found.adcc.shape, found.coherency.shape
        (torch.Size([2]), torch.Size([2]))
    """
    whole, part = confidences(
        forward_func,
        inputs,
        attributions,
        target,
        additional_forward_args,
        baselines=baselines,
        mask_inputs=mask_inputs,
        normalize=normalize,
        score_fn=score_fn,
        perturbations_per_eval=perturbations_per_eval,
    )
    dropped = (formulas.drop(whole, part) / 100).clamp(0, 1)
    coherent = coherency(
        explanation_func,
        inputs,
        attributions,
        target,
        additional_forward_args,
        baselines=baselines,
        mask_inputs=mask_inputs,
        normalize=normalize,
        explanation_kwargs=explanation_kwargs,
    ).to(whole)
    with no_inference_mode():
        maps = input_maps(attributions, masking_of(inputs, baselines, mask_inputs))
        area = as_masks(maps, normalize).to(whole).flatten(1).mean(1).clamp(0, 1)
        terms = torch.stack([coherent, 1 - area, 1 - dropped])
        good = (terms > 0).all(0)
        mean = torch.where(good, 3 / torch.where(good, terms, 1.0).reciprocal().sum(0), 0.0)
    return ADCC(mean, coherent, area, dropped)


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
    maps = channel_sum(attributions)
    return as_masks(maps, normalize).flatten(1).mean(1)
