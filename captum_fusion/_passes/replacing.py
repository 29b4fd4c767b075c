"""Passes in which a layer returns other activations than its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from captum_fusion._captum import run_forward
from captum_fusion._passes.call import Call
from captum_fusion._passes.layer_pass import LayerEvaluation
from captum_fusion._passes.masking import take
from captum_fusion._passes.modes import grad_mode
from captum_fusion._passes.pace import TimedPace
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
    """Scores of the network with one of the layer's tensors replaced.

    The network below the layer runs once for each chunk, which is therefore as large as memory allows: it is given one
    sample, and the layer's hook returns all samples of the chunk. Where the network does not allow that, its input is
    repeated for every sample.

    Args:
        call (Call): The network and its inputs.
        layer (Module): The layer.
        evaluation (LayerEvaluation): Its values in the layer pass.
        index (int): Which of the layer's tensors is replaced.
        replace (callable): ``replace(chunk)``: the activations of the samples in a slice, (len(chunk), K, *spatial). It
            is asked for few samples at a time.
        owners (Tensor): int64, (S,): the example that each sample is made from, in ascending order.
        score_fn (callable): From raw output to scores.
        limit (int, optional): The most samples of an example in one call of the network. Default: None (timed)
        output_dims (int): The number of dimensions of the network's output. Default: 1
        device_ids (list of int, optional): The order of devices, for a function that wraps a DataParallel model.

    Returns:
        Tensor: (S,), float64 (float32 on devices without it).
    """
    if not len(owners):
        return torch.empty(0, device=owners.device)
    original = evaluation.outputs[index]
    devices = device_ids or getattr(call.forward_func, "device_ids", None) or []
    grow = [len(devices) < 2]

    def evaluate(chunk: slice, some: Tensor, layout: torch.memory_format) -> Tensor:
        with grad_mode(False):
            tensor = _as_output(call, replace(chunk), original, some)

            def replaced(fed: Tensor) -> Tensor:
                inputs = tuple(take(x.detach(), fed, call.examples) for x in call.inputs)
                with _replacing(layer, index, call.attribute_to_layer_input, _on_devices(tensor, devices)):
                    output = run_forward(call.forward_func, inputs, call.arguments_of(fed))
                return call.check_output(output, len(some), output_dims)

            if grow[0]:
                try:
                    return call.scores(replaced(some[:1]), some, score_fn).clone()
                except torch.OutOfMemoryError:
                    raise
                except Exception:  # whatever a network may raise whose batch grows on its way
                    grow[0] = False
            return call.scores(replaced(some), some, score_fn).clone()

    pace = call.fixed_pace(owners, limit) or TimedPace(
        original, call.least_samples, first=1024, scale=2, both_layouts=False
    )
    parts = call.in_chunks(owners, pace, evaluate, single_example=True)
    return torch.cat([part.to(owners.device) for part in parts])


def _as_output(call: Call, maps: Tensor, original: Tensor, owners: Tensor) -> Tensor:
    """Maps (S, K, *spatial) as the layer returned them, before ``reshape``."""
    if call.reshape is None:
        return maps.to(original.dtype)
    inverse = getattr(call.reshape, "inverse", None)
    if inverse is None:
        raise ValueError(
            "reshape must have a method inverse(maps, tokens) for a method that replaces what the layer returns, "
            "as captum_fusion.layers.TokenGrid has"
        )
    whole: Tensor = inverse(maps, take(original, owners)).to(original.dtype)
    return whole


def _on_devices(tensor: Tensor, devices: Sequence[int]) -> dict[torch.device, Tensor]:
    """The part of a tensor for each of several devices."""
    if len(devices) < 2:
        return {tensor.device: tensor}
    return {part.device: part for part in nn.parallel.scatter_gather.scatter(tensor, list(devices))}


@contextlib.contextmanager
def _replacing(layer: nn.Module, index: int, at_input: bool, parts: dict[torch.device, Tensor]) -> Iterator[None]:
    """Let a layer hand on another tensor in place of its ``index``-th, and as many samples of its others."""

    def put(value: Any) -> Any:
        tensors = list(value) if isinstance(value, (tuple, list)) else [value]
        # A copy, because the network may change it in place, and may call the layer twice.
        mine = parts[tensors[index].device].clone()
        tensors = [t.expand(len(mine), *t.shape[1:]) if t.shape[0] == 1 else t for t in tensors]
        tensors[index] = mine
        if isinstance(value, Tensor):
            return mine
        return type(value)(*tensors) if hasattr(value, "_fields") else type(value)(tensors)

    if at_input:
        handle = layer.register_forward_pre_hook(lambda module, inputs: put(inputs))
    else:
        handle = layer.register_forward_hook(lambda module, inputs, output: put(output))
    try:
        yield
    finally:
        handle.remove()
