"""What the metrics share: the words of their arguments, and attributions as maps of the input."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_fusion import functional as formulas
from captum_fusion._captum import Call
from captum_fusion.attr._base import F, fill_docstring

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
