"""How fast the score falls when the most highlighted pixels are taken away, and rises when they are shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_fusion import functional as formulas
from captum_fusion._arguments import choice
from captum_fusion._passes.modes import no_inference_mode
from captum_fusion._passes.passes import Passes
from captum_fusion._types import Baselines, Target
from captum_fusion.functional import ScoreFn
from captum_fusion.metrics._common import Tensors, documented, input_maps


class Preset(NamedTuple):
    """How a paper takes its curves: the number of steps, and the Gaussian behind insertion.

    Attributes:
        steps: Of which all but the last have the same number of pixels, ``ceil(pixels / steps)``.
        kernel_size: Of the blur, in pixels.
        sigma: Of the blur, in pixels.
    """

    steps: int
    kernel_size: int
    sigma: float


#: RISE (steps of 224 of 224 x 224 pixels), Group-CAM (of 224 * 8) and its later code (of 224 * 2).
PRESETS = {
    "rise": Preset(224, 11, 5.0),
    "groupcam": Preset(28, 51, 50.0),
    "groupcam_head": Preset(112, 51, 50.0),
}


class Curve(NamedTuple):
    """A score at growing shares of changed pixels.

    Attributes:
        auc: Area under each example's curve, by trapezoids of their true widths, (N,).
        shares: Shares of pixels changed, from 0 to 1, (steps + 1,).
        scores: The score at each share, (N, steps + 1).
    """

    auc: Tensor
    shares: Tensor
    scores: Tensor


@documented
def deletion(
    forward_func: Callable[..., Any],
    inputs: Tensors,
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

    Pixels of the same value are taken in the order of the picture. From the paper: V. Petsiuk, A. Das, K. Saenko,
    "RISE", BMVC 2018, https://arxiv.org/abs/1806.07421

    Args:
        {args}
        preset (str, optional): ``"rise"``, ``"groupcam"`` or ``"groupcam_head"``: the number of steps, and the blur of
            :func:`insertion`.
            Default: ``"groupcam_head"`` (112 steps)
        steps (int, optional): The number of steps, instead of the preset's.
            Default: None
        baselines (float, Tensor, tuple or None, optional): What replaces pixels.
            Default: 0
        mask_inputs (sequence of int, optional): Which of several inputs are changed, at the same places.
            Default: None (the first floating point input with spatial dimensions, and those of its rank)
        score_fn (str or callable, optional): What is called a score: ``"softmax"``, ``"sigmoid"``, ``"identity"`` or a
            function of the raw output.
            Default: ``"softmax"``
        perturbations_per_eval (int, optional): At most this many rows per example in one call of the network.
            Default: None (timed)

    Returns:
        Curve: Areas, shares and scores.

    Raises:
        AssertionError: If the target does not select one output for each example.
        ValueError: If the attributions do not fit the inputs, or an option has a bad value.

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
    with no_inference_mode():
        return _curve(passes, attributions, chosen, score_fn, shown_first=True)


@documented
def insertion(
    forward_func: Callable[..., Any],
    inputs: Tensors,
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
    """Insertion: pixels of a blurred input are replaced by the true ones, the most highlighted first. Higher is better.

    The blur is a Gaussian with reflected borders, of the (normalised) input. Otherwise as :func:`deletion`.

    Args:
        {args}
        preset (str, optional): ``"rise"``, ``"groupcam"`` or ``"groupcam_head"``: the number of steps and the blur.
            Default: ``"groupcam_head"`` (112 steps; 51 pixels, standard deviation 50)
        steps (int, optional): The number of steps, instead of the preset's.
            Default: None
        baselines (str, float, Tensor, tuple or None, optional): Where the curve begins: ``"blur"``, or a baseline.
            Default: ``"blur"``
        mask_inputs (sequence of int, optional): Which of several inputs are changed, at the same places.
            Default: None (the first floating point input with spatial dimensions, and those of its rank)
        score_fn (str or callable, optional): What is called a score.
            Default: ``"softmax"``
        perturbations_per_eval (int, optional): At most this many rows per example in one call of the network.
            Default: None (timed)

    Returns:
        Curve: Areas, shares and scores.

    Raises:
        AssertionError: If the target does not select one output for each example.
        ValueError: If the attributions do not fit the inputs, or an option has a bad value.

    Examples::

        >>> brightness = lambda x: x.mean((1, 2, 3))
        >>> image, attribution = torch.tensor([[[[4.0, 0.0]]]]), torch.tensor([[[[1.0, 0.0]]]])
        >>> insertion(brightness, image, attribution, steps=2, baselines=0).scores
        tensor([[0., 2., 2.]], dtype=torch.float64)
    """
    chosen = _preset(preset, steps)
    start_at = _start(baselines, "baselines")
    passes = Passes.without_layer(
        forward_func,
        inputs,
        target,
        additional_forward_args,
        baselines=start_at,
        mask_inputs=mask_inputs,
        perturbations_per_eval=perturbations_per_eval,
    )
    with no_inference_mode():
        if isinstance(baselines, str):
            passes = passes.blurred(chosen.kernel_size, chosen.sigma)
        return _curve(passes, attributions, chosen, score_fn, shown_first=False)


@documented
def overall(
    forward_func: Callable[..., Any],
    inputs: Tensors,
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
    """Over-all: the area under :func:`insertion` minus that under :func:`deletion`. Higher is better.

    The unchanged inputs are run once for both. From the paper: Q. Zhang, L. Rao, Y. Yang, "Group-CAM",
    https://arxiv.org/abs/2103.13859

    Args:
        {args}
        preset (str, optional): ``"rise"``, ``"groupcam"`` or ``"groupcam_head"``: the number of steps and the blur.
            Default: ``"groupcam_head"`` (112 steps; 51 pixels, standard deviation 50)
        steps (int, optional): The number of steps, instead of the preset's.
            Default: None
        insertion_baselines (str, float, Tensor, tuple or None, optional): Where insertion begins, its ``baselines``.
            Default: ``"blur"``
        deletion_baselines (float, Tensor, tuple or None, optional): What replaces deleted pixels, its ``baselines``.
            Default: 0
        mask_inputs (sequence of int, optional): Which of several inputs are changed, at the same places.
            Default: None (the first floating point input with spatial dimensions, and those of its rank)
        score_fn (str or callable, optional): What is called a score.
            Default: ``"softmax"``
        perturbations_per_eval (int, optional): At most this many rows per example in one call of the network.
            Default: None (timed)

    Returns:
        Tensor: Of shape (N,).

    Raises:
        AssertionError: If the target does not select one output for each example.
        ValueError: If the attributions do not fit the inputs, or an option has a bad value.

    Examples::

        >>> brightness = lambda x: x.mean((1, 2, 3))
        >>> image, attribution = torch.tensor([[[[4.0, 0.0]]]]), torch.tensor([[[[1.0, 0.0]]]])
        >>> overall(brightness, image, attribution, steps=2, insertion_baselines=0)
        tensor([1.], dtype=torch.float64)
    """
    chosen = _preset(preset, steps)
    start_at = _start(insertion_baselines, "insertion_baselines")
    passes = Passes.without_layer(
        forward_func,
        inputs,
        target,
        additional_forward_args,
        baselines=deletion_baselines,
        mask_inputs=mask_inputs,
        perturbations_per_eval=perturbations_per_eval,
    )
    with no_inference_mode():
        gone = _curve(passes, attributions, chosen, score_fn, shown_first=True)
        passes = passes.with_options(baselines=start_at)
        if isinstance(insertion_baselines, str):
            passes = passes.blurred(chosen.kernel_size, chosen.sigma)
        return _curve(passes, attributions, chosen, score_fn, shown_first=False).auc - gone.auc


def _start(baselines: Baselines | str, name: str) -> Baselines:
    """Where insertion begins, or 0 if at a blur."""
    if not isinstance(baselines, str):
        return baselines
    if baselines != "blur":
        raise ValueError(f'{name} must be "blur", a number or a tensor, not {baselines!r}')
    return 0


def _preset(name: str, steps: int | None) -> Preset:
    preset = PRESETS[choice("preset", name, tuple(PRESETS))]
    if steps is None:
        return preset
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an int of at least 1, not {steps!r}")
    return preset._replace(steps=steps)


def _curve(passes: Passes, attributions: Tensor, preset: Preset, score_fn: str | ScoreFn, shown_first: bool) -> Curve:
    """Scores while pixels are taken from the inputs (``shown_first``), or brought to the baselines."""
    function = formulas.score_function(score_fn)
    flat = input_maps(attributions, passes).flatten(1)
    order = flat.argsort(dim=1, descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(flat.shape[1], device=flat.device).expand_as(order))
    pixels, size = flat.shape[1], passes.spatial_size
    width = math.ceil(pixels / min(preset.steps, pixels))
    counts = list(range(width, pixels, width))  # of changed pixels; the curve's ends are known
    number = passes.examples
    rows = torch.arange(number, device=flat.device).repeat(len(counts))
    changed = torch.tensor(counts, device=flat.device, dtype=torch.long).repeat_interleave(number)

    def masks(some: slice, wanted: Sequence[int]) -> Tensor:
        taken = (ranks[rows[some]] < changed[some, None]).reshape(-1, 1, *size)
        shown = (~taken if shown_first else taken).to(flat.dtype)
        return shown if tuple(wanted) == size else (formulas.upsample(shown, wanted) > 0.5).to(flat.dtype)

    between = passes.masked_scores(masks, rows, function).reshape(len(counts), number).T
    clean, base = passes.clean_scores(function), passes.baseline_scores(function)
    first, last = (clean, base) if shown_first else (base, clean)
    scores = torch.cat([first[:, None], between.to(first), last[:, None].to(first)], 1)
    shares = torch.tensor([0, *counts, pixels], device=scores.device, dtype=scores.dtype) / pixels
    return Curve(torch.trapezoid(scores, shares, dim=1), shares, scores)
