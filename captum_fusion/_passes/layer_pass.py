"""The layer pass: one forward pass, and one backward pass if gradients are needed, that reads the layers."""

from __future__ import annotations

import collections
import contextlib
import functools
import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_fusion._captum import LayerTensors, device_order, forward_with_layers, gather_devices
from captum_fusion._passes.call import Call, copied
from captum_fusion._passes.modes import as_called, grad_mode, hooks_enabled, stack_level

_NO_GRADIENT = (
    "layer: no gradient of the target's output reaches it. Either the output does not depend on it, or a later part of "
    "the network is quantized, runs under no_grad or detaches a tensor. Methods without gradients, such as "
    "LayerScoreCAM, work on such a network."
)


class LayerEvaluation(NamedTuple):
    """Values of one layer (or of its input) in the layer pass, one tensor for each that the layer returns.

    Attributes:
        activations: Activations, of shape (N, K, *spatial), after ``reshape`` if there is one.
        gradients: Gradients, of the same shape, or None if they were not requested.
        outputs: The layer's tensors before ``reshape``.
        calls: How often the pass called the layer. The values are those of the last call.
    """

    activations: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...] | None
    outputs: tuple[Tensor, ...]
    calls: int

    def detached(self) -> LayerEvaluation:
        """The values, detached from the graph."""
        gradients = None if self.gradients is None else tuple(g.detach() for g in self.gradients)
        return LayerEvaluation(
            tuple(a.detach() for a in self.activations), gradients, tuple(o.detach() for o in self.outputs), self.calls
        )


class LayerPass(NamedTuple):
    """The result of a layer pass.

    Attributes:
        evaluations: Values of each layer.
        output: The network's raw output, detached.
    """

    evaluations: list[LayerEvaluation]
    output: Tensor


def layer_pass(
    call: Call,
    layers: list[nn.Module],
    device_ids: list[int] | None = None,
    gradients: bool = False,
    grad_kwargs: dict[str, Any] | None = None,
    dims: int = 1,
) -> LayerPass:
    """Run one forward pass and, if ``gradients`` is True, one backward pass to all layers.

    Args:
        call (Call): Network and inputs.
        layers (list of Modules): Layers to read.
        device_ids (list of int, optional): Order of the devices, for a function that wraps a DataParallel model.
        gradients (bool): Whether to compute the gradients of the target's raw output. Default: False
        grad_kwargs (dict, optional): Arguments of ``torch.autograd.grad``. With ``create_graph=True`` the result stays
            in the graph; otherwise it is detached.
        dims (int): Known number of dimensions of the output. Default: 1

    Returns:
        LayerPass: Tensors of shape (N, K, *spatial) for each layer, and the output.

    Raises:
        AssertionError: If the target does not select one output per example.
        ValueError: If the pass does not use a layer, or a layer has no spatial dimensions.
        TypeError: If a layer returns other objects than tensors, or forward_func does not return a tensor.
    """

    def run() -> LayerPass:
        return _run(call, layers, device_ids, gradients, grad_kwargs or {}, dims)

    if call.cache is None or grad_kwargs:
        return run()
    plain = call.cache.key(("layers", layers, call.reshape))
    key, without_backward = plain, None
    if gradients:
        key, without_backward = (plain, call.cache.key(call.target)), (call.identity, plain)
    result = call.remember(key, run, call.examples, backward=gradients, without_backward=without_backward)
    call.check_target(result.output)  # a shared pass was checked with another call's target
    return result


def _run(
    call: Call,
    layers: list[nn.Module],
    device_ids: list[int] | None,
    gradients: bool,
    grad_kwargs: dict[str, Any],
    dims: int,
) -> LayerPass:
    with grad_mode(gradients), hooks_enabled():
        inputs, arguments = copied(call.inputs), copied(call.arguments)
        with call.hinting(), as_called(), _checked_calls(layers, call.attribute_to_layer_input) as calls:
            saved, raw = forward_with_layers(
                call.forward_func, inputs, layers, arguments, call.attribute_to_layer_input, gradients
            )
        _check_used(layers, saved)
        output = call.check_output(raw, call.examples, dims)
        call.check_target(output)
        order = {layer: device_order(call.forward_func, saved, layer, device_ids) for layer in layers}
        outputs = [gather_devices(saved[layer], order[layer]) for layer in layers]
        activations = [_as_maps(call, tensors) for tensors in outputs]
        for layer, tensors in zip(layers, activations, strict=True):
            _check_activations(call, tensors, layer)
        differentials: list[Any] = [None] * len(layers)
        if gradients:
            selected = call.select(output, call.target)
            by_layer = _gradients(selected, saved, order, grad_kwargs)
            differentials = [_as_maps(call, by_layer[layer]) for layer in layers]
        numbers = [max(calls[layer].values()) for layer in layers]
        values = zip(activations, differentials, outputs, numbers, strict=True)
        evaluations = [LayerEvaluation(*of_layer) for of_layer in values]
        if not grad_kwargs.get("create_graph", False):
            evaluations = [evaluation.detached() for evaluation in evaluations]
    return LayerPass(evaluations, output.detach().clone())  # the network may reuse this memory in its next call


def _check_used(layers: list[nn.Module], saved: LayerTensors) -> None:
    unused = [type(layer).__name__ for layer in layers if layer not in saved]
    if unused:
        raise ValueError(
            f"layer: the forward pass does not use {', '.join(unused)}; give a module of the model that forward_func "
            "calls (scripted and traced models run no hooks)"
        )


def _as_maps(call: Call, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tensors if call.reshape is None else tuple(map(call.reshape, tensors))


def _check_activations(call: Call, activations: tuple[Tensor, ...], layer: nn.Module) -> None:
    for tensor in activations:
        if not 3 <= tensor.dim() <= 5:
            raise ValueError(
                f"layer: {_where(call, layer)} must be (N, channels, *spatial) with 1 to 3 spatial dimensions, not of "
                f"shape {tuple(tensor.shape)}; choose a convolutional layer, or set reshape for tokens"
            )
        ranks = sorted({x.dim() - 2 for x in call.inputs if x.dim() > 2 and x.is_floating_point()})
        if ranks and tensor.dim() - 2 < ranks[0] and call.reshape is None:
            raise ValueError(
                f"layer: {_where(call, layer)} is of shape {tuple(tensor.shape)}, with {tensor.dim() - 2} spatial "
                f"dimensions, but the inputs have {' or '.join(map(str, ranks))}; if these are tokens, set reshape, "
                "for example to layers.TokenGrid() (layers.default_layer(model, inputs) finds both); if it is the map "
                "that you want, set reshape=lambda x: x"
            )
        if tensor.shape[0] != call.examples:
            raise ValueError(
                f"layer: {_where(call, layer)} has a first dimension of {tensor.shape[0]} for {call.examples} "
                "examples; choose a layer that keeps the batch dimension"
            )
        if not tensor.is_floating_point():
            raise TypeError(f"layer: {_where(call, layer)} must be floating point, not {tensor.dtype}")


def warn_if_one_position(call: Call, layers: list[nn.Module], evaluations: list[LayerEvaluation]) -> None:
    """Warn of layers with a single position, for example after global pooling: their maps are flat."""
    if not any(math.prod(x.shape[2:]) > 1 for x in call.inputs):
        return
    for layer, evaluation in zip(layers, evaluations, strict=True):
        if all(math.prod(tensor.shape[2:]) == 1 for tensor in evaluation.activations):
            warnings.warn(
                f"layer: {_where(call, layer)} has a single position, so its map is flat and shows nothing; choose a "
                "layer before the pooling (layers.default_layer(model, inputs) finds one)",
                stacklevel=stack_level(),
            )


def _where(call: Call, layer: nn.Module) -> str:
    """What is explained, with the layer's name in the model where it is known."""
    modules = call.forward_func.named_modules() if isinstance(call.forward_func, nn.Module) else ()
    name = next((name for name, module in modules if module is layer), "")
    kind = type(layer).__name__
    return f"the {'input' if call.attribute_to_layer_input else 'output'} of {f'{name} ({kind})' if name else kind}"


def _gradients(
    selected: Tensor, saved: LayerTensors, order: dict[nn.Module, list[torch.device]], grad_kwargs: dict[str, Any]
) -> dict[nn.Module, tuple[Tensor, ...]]:
    """The gradients of each layer's tensors, from one backward pass that ends at the layers."""
    if not selected.requires_grad:
        raise ValueError(_NO_GRADIENT)
    tensors = [tensor for layer, devices in order.items() for device in devices for tensor in saved[layer][device]]
    gradients = torch.autograd.grad(selected.sum(), tensors, **{"allow_unused": True, **grad_kwargs})
    if all(gradient is None for gradient in gradients):
        raise ValueError(_NO_GRADIENT)
    pairs = zip(gradients, tensors, strict=True)
    remaining = iter([torch.zeros_like(tensor) if gradient is None else gradient for gradient, tensor in pairs])
    gathered = {}
    for layer, devices in order.items():
        by_device = {device: tuple(next(remaining) for _ in saved[layer][device]) for device in devices}
        gathered[layer] = gather_devices(by_device, devices)
    return gathered


@contextlib.contextmanager
def _checked_calls(
    layers: list[nn.Module], at_input: bool
) -> Iterator[dict[nn.Module, collections.Counter[torch.device]]]:
    """Count the calls of each layer on each device.

    Raises:
        TypeError: If a layer passes on other objects than tensors, before captum's hook fails on them.
    """
    calls: dict[nn.Module, collections.Counter[torch.device]] = {layer: collections.Counter() for layer in layers}

    def check(layer: nn.Module, module: nn.Module, inputs: Any, output: Any = None) -> None:
        value = inputs if at_input else output
        tensors = value if isinstance(value, (tuple, list)) else (value,)
        if not tensors or not all(isinstance(tensor, Tensor) and tensor.dim() for tensor in tensors):
            kinds = ["a single number" if isinstance(t, Tensor) and not t.dim() else type(t).__name__ for t in tensors]
            raise TypeError(
                f"layer: {type(module).__name__} must {'take' if at_input else 'return'} a tensor or a tuple of "
                f"tensors, not {', '.join(kinds) or 'nothing'}"
            )
        calls[layer][tensors[0].device] += 1

    with contextlib.ExitStack() as stack:
        for layer in layers:
            hook = functools.partial(check, layer)  # the replicas of a DataParallel model carry the hooks of the layer
            handle = layer.register_forward_pre_hook(hook) if at_input else layer.register_forward_hook(hook)
            stack.callback(handle.remove)
        yield calls
