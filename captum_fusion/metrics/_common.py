"""What the metrics share: the call of the network, and attributions as maps of its input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from captum_fusion import functional as formulas
from captum_fusion._captum import Baselines, Call, Target, no_inference_mode, warn_if_training

Tensors = Tensor | tuple[Tensor, ...]

#: The Args entries that every metric shares.
_ARGS = """\
forward_func (callable): The model, or any function of the inputs.
inputs (Tensor or tuple[Tensor, ...]): What was explained, with dimension 0 counting the N examples.
attributions (Tensor): A map for each example, of shape ``(N, C, *spatial)``: channels are summed, and the map is
    brought to the input's size.
target (int, tuple, Tensor or list, optional): Which output was explained, with captum's meaning.
    Default: None
additional_forward_args (Any, optional): Further arguments of ``forward_func``, a tuple or a single one.
    Default: None"""


def documented(function: Any) -> Any:
    """Fill the arguments that all metrics share into a docstring."""
    lines = []
    for line in (function.__doc__ or "").splitlines():
        if line.strip() == "{args}":
            indent = line[: len(line) - len(line.lstrip())]
            lines += [indent + part for part in _ARGS.splitlines()]
        else:
            lines.append(line)
    function.__doc__ = "\n".join(lines)
    return function


def start(
    forward_func: Callable[..., Any],
    inputs: Tensors,
    target: Target,
    additional_forward_args: Any,
    baselines: Baselines,
    mask_inputs: Sequence[int] | None,
    perturbations_per_eval: int | None,
) -> Call:
    """A call of the network whose clean pass has been run."""
    training = isinstance(forward_func, nn.Module) and warn_if_training(forward_func, [])
    with no_inference_mode():
        call = Call(
            forward_func,
            inputs,
            target,
            additional_forward_args,
            baselines=baselines,
            mask_inputs=mask_inputs,
            perturbations_per_eval=perturbations_per_eval,
            training=training,
        )
        call.clean_pass()
    return call


def input_maps(attributions: Tensor, call: Call) -> Tensor:
    """Attributions as (N, 1, *input spatial), signed as they are."""
    size = call.spatial_size
    shape = tuple(attributions.shape) if isinstance(attributions, Tensor) else type(attributions).__name__
    if (
        not isinstance(attributions, Tensor)
        or attributions.dim() != len(size) + 2
        or len(attributions) != call.examples
    ):
        raise ValueError(
            f"attributions must be of shape ({call.examples}, channels, {len(size)} spatial dimensions), not {shape}"
        )
    return formulas.upsample(attributions.detach().sum(1, keepdim=True), size)


def as_masks(maps: Tensor, normalize: bool) -> Tensor:
    """Maps in [0, 1]: their positive part stretched, or as they are if they are that already."""
    if normalize:
        return formulas.normalize(maps.relu())
    if maps.min() < 0 or maps.max() > 1 or not maps.isfinite().all():
        raise ValueError(
            "attributions must be in [0, 1] with normalize=False, not from "
            f"{float(maps.min()):.4g} to {float(maps.max()):.4g}"
        )
    return maps


def scores_under(maps: Tensor, call: Call, score_fn: formulas.ScoreFn) -> Tensor:
    """Scores of the inputs under one mask each, (N,)."""
    rows = torch.arange(call.examples, device=maps.device)
    return call.masked_scores(lambda some, size: formulas.upsample(maps[some], size), rows, score_fn)
