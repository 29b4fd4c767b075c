"""How much of its confidence a network keeps when it is shown only the highlighted part of an input.

A map that highlights everything keeps all of it. Report :func:`complexity`, the mask's area, beside these metrics, and
insertion and deletion (:mod:`captum_fusion.metrics.causal`). :func:`~captum_fusion.metrics.coherency.adcc` combines
area, confidence and coherency in one number. Score differences of at most 3e-5 of a score are rounding errors and count
as 0 (:func:`captum_fusion.functional.contribution`). A map or score that is not finite gives NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_fusion import functional as formulas
from captum_fusion._arguments import share
from captum_fusion._passes.modes import own_arithmetic
from captum_fusion._passes.passes import Passes
from captum_fusion._types import Baselines, Target, TensorOrTupleOfTensors
from captum_fusion.functional import ScoreFn
from captum_fusion.metrics._docs import documented
from captum_fusion.metrics._maps import as_masks, channel_sum, input_maps

__all__ = ["average_drop", "average_gain", "average_increase", "complexity", "confidences", "win_rate"]


@documented
def confidences(
    forward_func: Callable[..., Any],
    inputs: TensorOrTupleOfTensors,
    attributions: Tensor,
    target: Target = None,
    additional_forward_args: Any = None,
    *,
    baselines: Baselines = 0,
    mask_inputs: Sequence[int] | None = None,
    normalize: bool = True,
    area: float | None = None,
    score_fn: str | ScoreFn = "softmax",
    perturbations_per_eval: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores of the whole inputs, ``Y``, and of their highlighted parts, ``O``, on which the other metrics are based.

    Args:
        {args}
        {masking}
        {area}
        {score_fn}
        {perturbations_per_eval}

    Returns:
        tuple[Tensor, Tensor]: ``Y`` and ``O``, each of shape (N,), float64 (float32 on devices without it).

    Raises:
        {raises}

    Examples::

        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(10)).eval()
        >>> whole, part = confidences(net, torch.rand(2, 3, 8, 8), torch.rand(2, 1, 4, 4), target=[3, 7])
        >>> whole.shape, part.shape
        (torch.Size([2]), torch.Size([2]))
    """
    function = formulas.score_function(score_fn)
    if area is not None and not 0 < share("area", area) < 1:
        raise ValueError(f"area must be a number between 0 and 1, not {area!r}")
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
        masks = as_masks(input_maps(attributions, passes.masking), normalize)
        masks = masks if area is None else formulas.with_area(masks, area)
        return passes.clean_scores(function), scores_under(masks, passes, function)


@documented
def average_drop(
    forward_func: Callable[..., Any],
    inputs: TensorOrTupleOfTensors,
    attributions: Tensor,
    target: Target = None,
    additional_forward_args: Any = None,
    *,
    baselines: Baselines = 0,
    mask_inputs: Sequence[int] | None = None,
    normalize: bool = True,
    area: float | None = None,
    score_fn: str | ScoreFn = "softmax",
    perturbations_per_eval: int | None = None,
) -> Tensor:
    """Average Drop of each example, in percent: ``100 max(0, Y - O) / Y``. Lower is better.

    ``Y`` and ``O`` are the :func:`confidences`. An example with ``Y = 0`` has nothing to lose and gets 0. From the
    paper: A. Chattopadhay, A. Sarkar, P. Howlader, V. Balasubramanian, "Grad-CAM++", WACV 2018,
    https://arxiv.org/abs/1710.11063

    Args:
        {args}
        {masking}
        {area}
        {score_fn}
        {perturbations_per_eval}

    Returns:
        Tensor: Of shape (N,), in [0, 100] for probabilities. The published number is the mean over a dataset.

    Raises:
        {raises}

    Examples::

        >>> brightness = lambda x: x.mean((1, 2, 3))
        >>> average_drop(brightness, torch.ones(1, 1, 2, 2), torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]]))
        tensor([75.], dtype=torch.float64)
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
        area=area,
        score_fn=score_fn,
        perturbations_per_eval=perturbations_per_eval,
    )
    return formulas.drop(whole, part)


@documented
def average_increase(
    forward_func: Callable[..., Any],
    inputs: TensorOrTupleOfTensors,
    attributions: Tensor,
    target: Target = None,
    additional_forward_args: Any = None,
    *,
    baselines: Baselines = 0,
    mask_inputs: Sequence[int] | None = None,
    normalize: bool = True,
    area: float | None = None,
    score_fn: str | ScoreFn = "softmax",
    perturbations_per_eval: int | None = None,
) -> Tensor:
    """Average Increase, or increase in confidence, in percent: 100 where ``O > Y``, else 0. Higher is better.

    ``Y`` and ``O`` are the :func:`confidences`. From the paper: A. Chattopadhay, A. Sarkar, P. Howlader, V.
    Balasubramanian, "Grad-CAM++", WACV 2018, https://arxiv.org/abs/1710.11063

    Args:
        {args}
        {masking}
        {area}
        {score_fn}
        {perturbations_per_eval}

    Returns:
        Tensor: Of shape (N,), 0 or 100. The published number is the mean over a dataset.

    Raises:
        {raises}

    Examples::

        >>> darkness = lambda x: -x.mean((1, 2, 3))
        >>> average_increase(darkness, torch.ones(1, 1, 2, 2), torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]]))
        tensor([100.], dtype=torch.float64)
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
        area=area,
        score_fn=score_fn,
        perturbations_per_eval=perturbations_per_eval,
    )
    return formulas.increase(whole, part)


@documented
def average_gain(
    forward_func: Callable[..., Any],
    inputs: TensorOrTupleOfTensors,
    attributions: Tensor,
    target: Target = None,
    additional_forward_args: Any = None,
    *,
    baselines: Baselines = 0,
    mask_inputs: Sequence[int] | None = None,
    normalize: bool = True,
    area: float | None = None,
    score_fn: str | ScoreFn = "softmax",
    perturbations_per_eval: int | None = None,
) -> Tensor:
    """Average Gain of each example, in percent: ``100 max(0, O - Y) / (1 - Y)``. Higher is better.

    ``Y`` and ``O`` are the :func:`confidences`, which must be probabilities. An example with ``Y = 1`` has nothing to
    gain and gets 0. From the paper: H. Zhang, F. Torres, R. Sicre, Y. Avrithis, S. Ayache, "Opti-CAM",
    https://arxiv.org/abs/2301.07002

    Args:
        {args}
        {masking}
        {area}
        {score_fn}
        {perturbations_per_eval}

    Returns:
        Tensor: Of shape (N,), in [0, 100]. The published number is the mean over a dataset.

    Raises:
        {raises}

    Examples::

        >>> darkness = lambda x: 0.5 - 0.5 * x.mean((1, 2, 3))
        >>> average_gain(darkness, torch.ones(1, 1, 1, 2), torch.tensor([[[[1.0, 0.0]]]]))
        tensor([25.], dtype=torch.float64)
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
        area=area,
        score_fn=score_fn,
        perturbations_per_eval=perturbations_per_eval,
    )
    return formulas.gain(whole, part)


@documented
def win_rate(
    forward_func: Callable[..., Any],
    inputs: TensorOrTupleOfTensors,
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

    A tie is a win for neither side: two maps without a drop give 0 in both directions. From the paper:
    A. Chattopadhay, A. Sarkar, P. Howlader, V. Balasubramanian, "Grad-CAM++", WACV 2018,
    https://arxiv.org/abs/1710.11063

    Args:
        {args}
        other_attributions (Tensor): The other method's map for each example, also of shape ``(N, C, *spatial)``.
        {masking}
        {score_fn}
        {perturbations_per_eval}

    Returns:
        Tensor: Of shape (N,), 0 or 100. The published number is the mean over a dataset.

    Raises:
        {raises}

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
    with own_arithmetic():
        own_maps = input_maps(attributions, passes.masking)
        other_maps = input_maps(other_attributions, passes.masking, "other_attributions")
        whole = passes.clean_scores(function)
        own, other = (
            formulas.drop(whole, scores_under(as_masks(maps, normalize), passes, function))
            for maps in (own_maps, other_maps)
        )
        return formulas.increase(own, other)


def complexity(attributions: Tensor, *, normalize: bool = True) -> Tensor:
    """The mean of a map in [0, 1], i.e. the mask's area. Lower is better; report it beside Average Drop.

    Args:
        attributions (Tensor): Of shape ``(N, C, *spatial)``. Channels are summed.
        normalize (bool, optional): Stretch the positive part of each map to [0, 1]. Otherwise the map must be in [0, 1]
            already.
            Default: True

    Returns:
        Tensor: Of shape (N,), in [0, 1].

    Raises:
        ValueError: If the map must be in [0, 1] and is not, or if there are three dimensions and more than one channel.

    Examples::

        >>> complexity(torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]]))
        tensor([0.2500])
    """
    shape = tuple(attributions.shape)
    if not 3 <= len(shape) <= 5 or (len(shape) == 3 and shape[1] != 1):
        raise ValueError(
            f"attributions must be of shape (N, channels, *spatial), not {shape}; with one spatial dimension, sum the "
            "channels first, because (N, height, width) looks the same"
        )
    maps = channel_sum(attributions)
    return as_masks(maps, normalize).flatten(1).mean(1)


def scores_under(masks: Tensor, passes: Passes, score_fn: ScoreFn) -> Tensor:
    """Scores of the inputs, each under one mask (N, 1, *input spatial); (N,), on the device of the output."""
    owners = torch.arange(passes.examples, device=masks.device)
    scores = passes.masked_scores(lambda chunk, size: formulas.upsample(masks[chunk], size), owners, score_fn)
    return scores.to(passes.output.device)
