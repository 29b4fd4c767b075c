"""What the metrics share: the words of their arguments, and attributions as maps of the input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from captum_fusion import functional as formulas
from captum_fusion._docstrings import F, fill_docstring
from captum_fusion._passes.masking import Masking, MaskingOptions, checked_inputs, usable
from captum_fusion._passes.modes import grad_mode
from captum_fusion._passes.passes import Passes
from captum_fusion._types import Baselines

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


def documented(function: F) -> F:
    """Fill the arguments that all metrics share into a docstring."""
    return fill_docstring(function, {"args": _ARGS})


def channel_sum(attributions: Tensor) -> Tensor:
    """Attributions summed over their channels, in single precision at least: (N, 1, *spatial), without gradients."""
    return formulas.at_least_float32(attributions.detach()).sum(1, keepdim=True)


def input_maps(attributions: Tensor, masked: Masking | Passes, name: str = "attributions") -> Tensor:
    """Attributions as (N, 1, *input spatial), signed as they are; ``name`` is what an error calls them."""
    size = masked.spatial_size
    shape = tuple(attributions.shape) if isinstance(attributions, Tensor) else type(attributions).__name__
    if (
        not isinstance(attributions, Tensor)
        or attributions.dim() != len(size) + 2
        or len(attributions) != masked.examples
    ):
        raise ValueError(
            f"{name} must be of shape ({masked.examples}, channels, {len(size)} spatial dimensions), not {shape}"
        )
    return formulas.upsample(channel_sum(attributions), size)


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


def scores_under(maps: Tensor, passes: Passes, score_fn: formulas.ScoreFn) -> Tensor:
    """Scores of the inputs under one mask each, (N,)."""
    owners = torch.arange(passes.examples, device=maps.device)
    return passes.masked_scores(lambda chunk, size: formulas.upsample(maps[chunk], size), owners, score_fn)


def correlation(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Pearson's correlation of rows (N, P), in [-1, 1], and where it is defined.

    It is 0 where it is not: for a row that is constant up to rounding errors, or not finite.
    """
    rows = [formulas.precise(formulas.normalize(each)) for each in (first, second)]  # constant and not finite: zeros
    defined = torch.stack([row.any(1) for row in rows]).all(0)
    centered = [row - row.mean(1, keepdim=True) for row in rows]
    scale = torch.stack([row.norm(dim=1) for row in centered]).prod(0)
    found = (centered[0] * centered[1]).sum(1) / torch.where(defined, scale, 1.0)
    return torch.where(defined, found, 0.0).clamp(-1, 1), defined


def explain_again(
    explanation_func: Any, inputs: Tensors, target: Any, additional_forward_args: Any, kwargs: dict[str, Any] | None
) -> Tensor:
    """The map that a method gives for other inputs, a single tensor."""
    if not callable(explanation_func):
        raise TypeError(
            "explanation_func must be a callable such as LayerFusionCAM(model, layer).attribute, not "
            f"{type(explanation_func).__name__}"
        )
    given = {} if additional_forward_args is None else {"additional_forward_args": additional_forward_args}
    found = explanation_func(inputs, **{"target": target, **given, **(kwargs or {})})
    if isinstance(found, tuple) and len(found) == 1:
        found = found[0]
    if not isinstance(found, Tensor):
        raise TypeError(f"explanation_func must return one tensor, not {type(found).__name__}")
    return found


def masking_of(inputs: Tensors, baselines: Baselines, mask_inputs: Sequence[int] | None) -> Masking:
    """The inputs, and what shows where they are masked.

    Raises:
        ValueError, TypeError: For a bad argument, naming it.
    """
    with grad_mode(False):
        return Masking(tuple(map(usable, checked_inputs(inputs))), MaskingOptions(baselines, mask_inputs))


def masked_by(maps: Tensor, masking: Masking) -> tuple[Tensor, ...]:
    """The inputs, each under a map of shape (N, 1, *input spatial), in [0, 1]."""
    owners = torch.arange(masking.examples, device=maps.device)
    with grad_mode(False):
        return masking.masked(lambda chunk, size: formulas.upsample(maps[chunk], size), owners)
