"""Passes in which the activations of a layer are replaced."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from captum_fusion._captum import run_forward
from captum_fusion._passes.call import Call
from captum_fusion._passes.layer_pass import LayerEvaluation
from captum_fusion._passes.masking import take
from captum_fusion._passes.modes import as_called, grad_mode, hooks_enabled
from captum_fusion.functional import ScoreFn


def replaced_scores(
    call: Call,
    layer: nn.Module,
    evaluation: LayerEvaluation,
    index: int,
    replace: Callable[[slice], Tensor],
    owners: Tensor,
    score_fn: ScoreFn,
    *,
    limit: int | None = None,
    output_dims: int = 1,
    device_ids: list[int] | None = None,
) -> Tensor:
    """Scores of the network with one of the layer's tensors replaced, in the last call of the layer.

    The part of the network below the layer runs once per chunk: the network gets a single sample, and a hook on the
    layer returns all samples of the chunk. Chunks are therefore as large as memory allows. If the network does not
    support this, its input is repeated for every sample.

    Args:
        call (Call): Network and inputs.
        layer (Module): Layer whose activations are replaced.
        evaluation (LayerEvaluation): Values of the layer in the layer pass.
        index (int): Index of the replaced tensor among the layer's tensors.
        replace (callable): ``replace(chunk)``: the activations of the samples in a slice, (len(chunk), K, *spatial). It
            is called for few samples at a time.
        owners (Tensor): Example that each sample comes from, int64, (S,), in ascending order.
        score_fn (callable): Function from raw output to scores.
        limit (int, optional): Maximum number of samples per example in one call of the network. Default: None (timed)
        output_dims (int): Number of dimensions of the network's output. Default: 1
        device_ids (list of int, optional): Order of the devices, for a function that wraps a DataParallel model.

    Returns:
        Tensor: (S,), float64 (float32 on devices without it).
    """
    if not len(owners):
        return torch.empty(0, device=owners.device)
    original = evaluation.outputs[index]
    devices = device_ids or getattr(call.forward_func, "device_ids", None) or []
    one_input = [len(devices) < 2]  # a list, because evaluate() changes it

    def evaluate(chunk: slice, chunk_owners: Tensor, layout: torch.memory_format) -> Tensor:
        with grad_mode(False):
            parts = _on_devices(_as_output(call, replace(chunk), original, chunk_owners), devices)

            def replaced(input_owners: Tensor) -> Tensor:
                inputs = tuple(take(x.detach(), input_owners, call.examples) for x in call.inputs)
                with (
                    as_called(),
                    hooks_enabled(),
                    _replacing(layer, index, call.attribute_to_layer_input, parts, evaluation.calls),
                ):
                    output = run_forward(call.forward_func, inputs, call.arguments_of(input_owners))
                return call.check_output(output, len(chunk_owners), output_dims)

            if one_input[0]:
                try:
                    return call.scores(replaced(chunk_owners[:1]), chunk_owners, score_fn).clone()
                except torch.OutOfMemoryError:
                    raise
                except Exception:  # a network whose batch size changes at the layer can raise anything
                    one_input[0] = False
            return call.scores(replaced(chunk_owners), chunk_owners, score_fn).clone()

    pace = call.pace(owners, limit, original, first=1024, scale=2, both_layouts=False)
    parts = call.in_chunks(owners, pace, evaluate, single_example=True)
    return torch.cat([part.to(owners.device) for part in parts])


def _as_output(call: Call, maps: Tensor, original: Tensor, owners: Tensor) -> Tensor:
    """Convert maps (S, K, *spatial) to the format of the layer's output, before ``reshape``."""
    if call.reshape is None:
        return maps.to(original.dtype)
    inverse = getattr(call.reshape, "inverse", None)
    if inverse is None:
        raise ValueError(
            "reshape must have a method inverse(maps, tokens) for methods that replace activations, such as that of "
            "captum_fusion.layers.TokenGrid"
        )
    whole: Tensor = inverse(maps, take(original, owners)).to(original.dtype)
    return whole


def _on_devices(tensor: Tensor, devices: Sequence[int]) -> dict[torch.device, Tensor]:
    """The part of a tensor for each of several devices."""
    if len(devices) < 2:
        return {tensor.device: tensor}
    return {part.device: part for part in nn.parallel.scatter_gather.scatter(tensor, list(devices))}


@contextlib.contextmanager
def _replacing(
    layer: nn.Module, index: int, at_input: bool, parts: dict[torch.device, Tensor], calls: int
) -> Iterator[None]:
    """Replace the ``index``-th tensor of a layer's output or input, and expand its other tensors to as many samples.

    Of several ``calls`` of the layer only the last, which is explained, is changed.
    """
    seen: collections.Counter[torch.device] = collections.Counter()

    def put(value: Any) -> Any:
        tensors = list(value) if isinstance(value, (tuple, list)) else [value]
        device = tensors[index].device
        seen[device] += 1
        if seen[device] < calls:
            return value
        part = parts[device].clone()  # the network may change the tensor in place
        tensors = [t.expand(len(part), *t.shape[1:]) if t.shape[0] == 1 else t for t in tensors]
        tensors[index] = part
        if isinstance(value, Tensor):
            return part
        return type(value)(*tensors) if hasattr(value, "_fields") else type(value)(tensors)

    if at_input:
        handle = layer.register_forward_pre_hook(lambda module, inputs: put(inputs))
    else:
        handle = layer.register_forward_hook(lambda module, inputs, output: put(output))
    try:
        yield
    finally:
        handle.remove()
