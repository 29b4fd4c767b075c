"""Whether a method repeats its map when it explains only what the map highlights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_fusion import functional as formulas
from captum_fusion._passes.masking import Masking, MaskingOptions, checked_inputs, usable
from captum_fusion._passes.modes import as_called, own_arithmetic
from captum_fusion._passes.passes import Passes
from captum_fusion._types import Attributions, Baselines, Target, TensorOrTupleOfTensors
from captum_fusion.functional import ScoreFn
from captum_fusion.metrics._docs import documented
from captum_fusion.metrics._maps import as_masks, input_maps, single_tensor
from captum_fusion.metrics.confidence import scores_under
from captum_fusion.metrics.similarity import correlation

__all__ = ["ADCC", "adcc", "coherency"]


@documented
def coherency(
    inputs: TensorOrTupleOfTensors,
    attributions: Tensor,
    target: Target = None,
    additional_forward_args: Any = None,
    *,
    explanation_func: Callable[..., Attributions],
    explanation_kwargs: Mapping[str, Any] | None = None,
    baselines: Baselines = 0,
    mask_inputs: Sequence[int] | None = None,
    normalize: bool = True,
) -> Tensor:
    """Coherency: how closely the map of the highlighted region matches the original map. Higher is better.

    The highlighted part of each input is explained again, and the result is ``(1 + r) / 2`` with Pearson's correlation
    ``r`` of the two maps. No other pass runs, so there is no ``forward_func``; the other positional arguments are those
    of every metric, and ``explanation_func`` is a keyword argument as in :func:`adcc`. The correlation with a map that
    is constant is undefined and counts as coherency 0; a map that is not finite gives NaN. From the paper: S. Poppi, M.
    Cornia, L. Baraldi, R. Cucchiara, "Revisiting The Evaluation of Class Activation Mapping for Explainability", CVPRW
    2021, https://arxiv.org/abs/2104.10252

    Args:
        {args_without_network}
        {explanation}
        {explanation_kwargs}
        baselines (float, Tensor, tuple or None, optional): What shows where the map is 0. None stands for 0.
            Default: 0
        mask_inputs (sequence of int, optional): The indices of the inputs that are masked.
            Default: None (the first floating point input with spatial dimensions, and those of its rank)
        normalize (bool, optional): Compare the positive parts of both maps, and stretch the first to [0, 1] to mask
            with it. Otherwise both are taken as they are, and the first must be in [0, 1] already.
            Default: True

    Returns:
        Tensor: Of shape (N,), in [0, 1], float64 (float32 on devices without it).

    Raises:
        TypeError: If ``explanation_func`` is not callable, or does not return one tensor.
        ValueError: If the attributions, or what ``explanation_func`` returns, do not fit the inputs.

    Examples::

        >>> from captum_fusion import LayerFusionCAM
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.LazyLinear(10)).eval()
        >>> images, method = torch.rand(2, 3, 8, 8), LayerFusionCAM(net, net[0])
        >>> attributions = method.attribute(images, [3, 7])
        >>> coherency(images, attributions, [3, 7], explanation_func=method.attribute).shape
        torch.Size([2])
    """
    with own_arithmetic():
        masking = Masking(tuple(map(usable, checked_inputs(inputs))), MaskingOptions(baselines, mask_inputs))
        maps = input_maps(attributions, masking)
        masked = _masked(masking, as_masks(maps, normalize), isinstance(inputs, tuple))
        again = _explain(explanation_func, masked, target, additional_forward_args, explanation_kwargs)
        return _likeness(maps, again, masking, normalize)


class ADCC(NamedTuple):
    """Average DCC and its three parts, for each example.

    Attributes:
        adcc: Harmonic mean of ``coherency``, ``1 - complexity`` and ``1 - average_drop``, (N,), in [0, 1].
        coherency: As in :func:`coherency`, (N,), in [0, 1].
        complexity: Mean of the mask at the input's size, i.e. its area, (N,), in [0, 1].
        average_drop: As in :func:`~captum_fusion.metrics.confidence.average_drop`, but as a share instead of in
            percent, (N,), in [0, 1].
    """

    adcc: Tensor
    coherency: Tensor
    complexity: Tensor
    average_drop: Tensor


@documented
def adcc(
    forward_func: Callable[..., Any],
    inputs: TensorOrTupleOfTensors,
    attributions: Tensor,
    target: Target = None,
    additional_forward_args: Any = None,
    *,
    explanation_func: Callable[..., Attributions],
    explanation_kwargs: Mapping[str, Any] | None = None,
    baselines: Baselines = 0,
    mask_inputs: Sequence[int] | None = None,
    normalize: bool = True,
    score_fn: str | ScoreFn = "softmax",
    perturbations_per_eval: int | None = None,
) -> ADCC:
    """ADCC: drop, coherency and complexity in one number. Higher is better.

    ``3 / (1 / coherency + 1 / (1 - complexity) + 1 / (1 - drop))`` for each example, and 0 where one of the three terms
    is 0. The published number is the mean over a dataset. The harmonic mean of the three means, which others report,
    is not the same. From the paper: S. Poppi, M. Cornia, L. Baraldi, R. Cucchiara, "Revisiting The Evaluation of Class
    Activation Mapping for Explainability", CVPRW 2021, https://arxiv.org/abs/2104.10252

    Args:
        {args}
        {explanation}
        {explanation_kwargs}
        {masking}
        score_fn (str or callable, optional): Turns the raw output into probabilities: ``"softmax"``, ``"sigmoid"``,
            ``"identity"`` or a function. A drop of more than the whole score counts as the whole score.
            Default: ``"softmax"``
        {perturbations_per_eval}

    Returns:
        ADCC: The number and its three parts.

    Raises:
        AssertionError: If the target does not select one output for each example.
        TypeError: If ``explanation_func`` is not callable, or does not return one tensor.
        ValueError: If the attributions, or what ``explanation_func`` returns, do not fit the inputs.

    Examples::

        >>> from captum_fusion import LayerFusionCAM
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.LazyLinear(10)).eval()
        >>> images, method = torch.rand(2, 3, 8, 8), LayerFusionCAM(net, net[0])
        >>> attributions = method.attribute(images, [3, 7])
        >>> result = adcc(net, images, attributions, [3, 7], explanation_func=method.attribute)
        >>> result.adcc.shape, result.coherency.shape
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
    with own_arithmetic():
        maps = input_maps(attributions, passes.masking)
        masks = as_masks(maps, normalize)
        whole = passes.clean_scores(function)
        drop = (formulas.drop(whole, scores_under(masks, passes, function)) / 100).clamp(0, 1)
        masked = _masked(passes.masking, masks, isinstance(inputs, tuple))
        again = _explain(explanation_func, masked, target, additional_forward_args, explanation_kwargs)
        coherent = _likeness(maps, again, passes.masking, normalize).to(whole)
        area = masks.to(whole).flatten(1).mean(1).clamp(0, 1)
        terms = torch.stack([coherent, 1 - area, 1 - drop])
        nothing = (terms <= 0).any(0) & ~terms.isnan().any(0)
        mean = torch.where(nothing, 0.0, 3 / torch.where(nothing, 1.0, terms).reciprocal().sum(0))
    return ADCC(mean, coherent, area, drop)


def _masked(masking: Masking, masks: Tensor, as_tuple: bool) -> TensorOrTupleOfTensors:
    """The inputs, each under one mask (N, 1, *input spatial); a tuple where the user gave one."""
    owners = torch.arange(masking.examples, device=masks.device)
    masked = masking.masked(lambda chunk, size: formulas.upsample(masks[chunk], size), owners)
    return masked if as_tuple else masked[0]


def _explain(
    explanation_func: Callable[..., Attributions],
    inputs: TensorOrTupleOfTensors,
    target: Target,
    additional_forward_args: Any,
    kwargs: Mapping[str, Any] | None,
) -> Tensor:
    """The method's map of other inputs."""
    if not callable(explanation_func):
        raise TypeError(
            "explanation_func must be a callable such as LayerFusionCAM(model, layer).attribute, not "
            f"{type(explanation_func).__name__}"
        )
    arguments = {} if additional_forward_args is None else {"additional_forward_args": additional_forward_args}
    with as_called():
        result = explanation_func(inputs, **{"target": target, **arguments, **(kwargs or {})})
    return single_tensor(result, "explanation_func")


def _likeness(maps: Tensor, again: Tensor, masking: Masking, normalize: bool) -> Tensor:
    """``(1 + r) / 2`` of the original maps and what the method returned for the masked inputs, (N,)."""
    others = input_maps(again, masking, "the map of explanation_func")
    first, second = (values.relu() if normalize else values for values in (maps, others))
    coefficients, defined = correlation(first.flatten(1), second.flatten(1).to(first.device))
    return torch.where(defined | coefficients.isnan(), (1 + coefficients) / 2, 0.0)
