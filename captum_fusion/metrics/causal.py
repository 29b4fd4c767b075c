"""How fast the score falls when the most highlighted pixels are removed, and rises when they are inserted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_fusion import functional as formulas
from captum_fusion._arguments import choice, count
from captum_fusion._passes.modes import own_arithmetic
from captum_fusion._passes.passes import Passes
from captum_fusion._types import Baselines, Target, TensorOrTupleOfTensors
from captum_fusion.functional import ScoreFn
from captum_fusion.metrics._docs import documented
from captum_fusion.metrics._maps import input_maps, nan_where_undefined, pixel_masks, pixel_ranks


class Preset(NamedTuple):
    """The steps of a paper's curves, and the blur that its insertion begins with.

    Attributes:
        steps: The number of steps. All but the last change the same number of pixels, ``ceil(pixels / steps)``.
        blur: The blur of an input.
    """

    steps: int
    blur: Callable[[Tensor], Tensor]


#: RISE (224 pixels a step of a picture of 224 x 224), Group-CAM (224 * 8) and its later code (224 * 2).
PRESETS = {
    "rise": Preset(224, formulas.rise_blur),
    "groupcam": Preset(28, formulas.gaussian_blur),
    "groupcam_head": Preset(112, formulas.gaussian_blur),
}


class Curve(NamedTuple):
    """The score as a function of the share of changed pixels.

    Attributes:
        auc: Area under each example's curve by the trapezoidal rule, with the steps' true widths, (N,).
        shares: Shares of changed pixels, from 0 to 1, (steps + 1,).
        scores: The score at each share, (N, steps + 1).
    """

    auc: Tensor
    shares: Tensor
    scores: Tensor


@documented
def deletion(
    forward_func: Callable[..., Any],
    inputs: TensorOrTupleOfTensors,
    attributions: Tensor,
    target: Target = None,
    additional_forward_args: Any = None,
    *,
    preset: str = "groupcam_head",
    steps: int | None = None,
    baselines: Baselines = 0,
    mask_inputs: Sequence[int] | None = None,
    score_fn: str | ScoreFn = "softmax",
    perturbations_per_eval: int | None = None,
) -> Curve:
    """Deletion: pixels are replaced by the baseline, the most highlighted first. A lower area is better.

    Pixels of equal value are replaced in reading order. A map that is not finite gives NaN. From the paper: V. Petsiuk,
    A. Das, K. Saenko, "RISE", BMVC 2018, https://arxiv.org/abs/1806.07421

    Args:
        {args}
        {preset}
        baselines (float, Tensor, tuple or None, optional): What replaces pixels. None stands for 0.
            Default: 0
        {mask_inputs}
        {score_fn}
        {perturbations_per_eval}

    Returns:
        Curve: Areas, shares and scores.

    Raises:
        {raises}

    Examples::

        >>> brightness = lambda x: x.mean((1, 2, 3))
        >>> image, attribution = torch.tensor([[[[4.0, 0.0]]]]), torch.tensor([[[[1.0, 0.0]]]])
        >>> curve = deletion(brightness, image, attribution, steps=2)
        >>> curve.scores, curve.auc
        (tensor([[2., 0., 0.]], dtype=torch.float64), tensor([0.5000], dtype=torch.float64))
    """
    chosen = _preset(preset, steps)
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
        return _curve(passes, attributions, chosen, score_fn, shown_first=True)


@documented
def insertion(
    forward_func: Callable[..., Any],
    inputs: TensorOrTupleOfTensors,
    attributions: Tensor,
    target: Target = None,
    additional_forward_args: Any = None,
    *,
    preset: str = "groupcam_head",
    steps: int | None = None,
    baselines: Baselines | str = "blur",
    mask_inputs: Sequence[int] | None = None,
    score_fn: str | ScoreFn = "softmax",
    perturbations_per_eval: int | None = None,
) -> Curve:
    """Insertion: pixels of the original replace those of a blurred input, the most highlighted first. Higher is better.

    The (normalised) input is blurred as in the preset's code: ``"rise"`` by
    :func:`captum_fusion.functional.rise_blur`, the others by :func:`captum_fusion.functional.gaussian_blur`. Any other
    blurred input can be given as ``baselines``. Otherwise as :func:`deletion`.

    Args:
        {args}
        {preset}
        baselines (str, float, Tensor, tuple or None, optional): Where the curve begins: ``"blur"`` or a baseline. None
            stands for 0.
            Default: ``"blur"``
        {mask_inputs}
        {score_fn}
        {perturbations_per_eval}

    Returns:
        Curve: Areas, shares and scores.

    Raises:
        {raises}

    Examples::

        >>> brightness = lambda x: x.mean((1, 2, 3))
        >>> image, attribution = torch.tensor([[[[4.0, 0.0]]]]), torch.tensor([[[[1.0, 0.0]]]])
        >>> insertion(brightness, image, attribution, steps=2, baselines=0).scores
        tensor([[0., 2., 2.]], dtype=torch.float64)
    """
    chosen = _preset(preset, steps)
    _check_start("baselines", baselines)
    passes = Passes.without_layer(
        forward_func,
        inputs,
        target,
        additional_forward_args,
        mask_inputs=mask_inputs,
        perturbations_per_eval=perturbations_per_eval,
    )
    with own_arithmetic():
        return _curve(_starting_at(passes, baselines, chosen), attributions, chosen, score_fn, shown_first=False)


@documented
def overall(
    forward_func: Callable[..., Any],
    inputs: TensorOrTupleOfTensors,
    attributions: Tensor,
    target: Target = None,
    additional_forward_args: Any = None,
    *,
    preset: str = "groupcam_head",
    steps: int | None = None,
    insertion_baselines: Baselines | str = "blur",
    deletion_baselines: Baselines = 0,
    mask_inputs: Sequence[int] | None = None,
    score_fn: str | ScoreFn = "softmax",
    perturbations_per_eval: int | None = None,
) -> Tensor:
    """Over-all: the area under :func:`insertion` minus the area under :func:`deletion`. Higher is better.

    The unchanged inputs go through the network once for both. From the paper: Q. Zhang, L. Rao, Y. Yang, "Group-CAM",
    https://arxiv.org/abs/2103.13859

    Args:
        {args}
        {preset}
        insertion_baselines (str, float, Tensor, tuple or None, optional): The ``baselines`` of :func:`insertion`.
            Default: ``"blur"``
        deletion_baselines (float, Tensor, tuple or None, optional): The ``baselines`` of :func:`deletion`.
            Default: 0
        {mask_inputs}
        {score_fn}
        {perturbations_per_eval}

    Returns:
        Tensor: Of shape (N,).

    Raises:
        {raises}

    Examples::

        >>> brightness = lambda x: x.mean((1, 2, 3))
        >>> image, attribution = torch.tensor([[[[4.0, 0.0]]]]), torch.tensor([[[[1.0, 0.0]]]])
        >>> overall(brightness, image, attribution, steps=2, insertion_baselines=0)
        tensor([1.], dtype=torch.float64)
    """
    chosen = _preset(preset, steps)
    _check_start("insertion_baselines", insertion_baselines)
    passes = Passes.without_layer(
        forward_func,
        inputs,
        target,
        additional_forward_args,
        baselines=deletion_baselines,
        mask_inputs=mask_inputs,
        perturbations_per_eval=perturbations_per_eval,
    )
    with own_arithmetic():
        deleted = _curve(passes, attributions, chosen, score_fn, shown_first=True)
        start = _starting_at(passes, insertion_baselines, chosen)
        inserted = _curve(start, attributions, chosen, score_fn, shown_first=False)
        return inserted.auc - deleted.auc


def _check_start(name: str, baselines: Baselines | str) -> None:
    if isinstance(baselines, str) and baselines != "blur":
        raise ValueError(f'{name} must be "blur", a number or a tensor, not {baselines!r}')


def _starting_at(passes: Passes, baselines: Baselines | str, preset: Preset) -> Passes:
    """The passes with baselines where insertion begins."""
    if isinstance(baselines, str):
        return passes.blurred(preset.blur)
    return passes.with_options(baselines=baselines)


def _preset(name: str, steps: int | None) -> Preset:
    preset = PRESETS[choice("preset", name, tuple(PRESETS))]
    return preset if steps is None else preset._replace(steps=count("steps", steps))


def _curve(passes: Passes, attributions: Tensor, preset: Preset, score_fn: str | ScoreFn, shown_first: bool) -> Curve:
    """Scores while pixels of the inputs are replaced by the baselines (``shown_first``), or the other way round."""
    function = formulas.score_function(score_fn)
    flat = input_maps(attributions, passes.masking).flatten(1)
    ranks = pixel_ranks(flat, descending=True)
    examples, pixels = flat.shape
    width = math.ceil(pixels / min(preset.steps, pixels))
    counts = list(range(width, pixels, width))  # of changed pixels; the scores at both ends are known
    owners = torch.arange(examples, device=flat.device).repeat(len(counts))
    changed = torch.tensor(counts, device=flat.device, dtype=torch.long).repeat_interleave(examples)

    def masks(chunk: slice, wanted: Sequence[int]) -> Tensor:
        is_changed = ranks[owners[chunk]] < changed[chunk, None]
        return pixel_masks(~is_changed if shown_first else is_changed, passes.spatial_size, wanted, flat.dtype)

    between = passes.masked_scores(masks, owners, function).reshape(len(counts), examples).T
    clean, base = passes.clean_scores(function), passes.baseline_scores(function)
    first, last = (clean, base) if shown_first else (base, clean)
    scores = torch.cat([first[:, None], between.to(first), last[:, None].to(first)], 1)
    scores = nan_where_undefined(scores, flat)
    shares = torch.tensor([0, *counts, pixels], device=scores.device, dtype=scores.dtype) / pixels
    return Curve(torch.trapezoid(scores, shares, dim=1), shares, scores)
