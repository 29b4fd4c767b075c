"""The layer pass: one forward pass, and one backward pass where gradients are wanted, that reads the layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_fusion._captum import LayerTensors, device_order, forward_with_layers, gather_devices
from captum_fusion._passes.call import Call
from captum_fusion._passes.modes import grad_mode


class LayerEvaluation(NamedTuple):
    """The values of one layer (or of its input) in the layer pass, a tensor for each that the layer returns.

    Attributes:
        activations: Of shape (N, K, *spatial), after ``reshape`` where there is one.
        gradients: Of the same shape, or None if none were asked for.
        outputs: The layer's tensors before ``reshape``.
    """

    activations: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...] | None
    outputs: tuple[Tensor, ...]

    def detached(self) -> LayerEvaluation:
        """These values, out of any graph."""
        gradients = None if self.gradients is None else tuple(g.detach() for g in self.gradients)
        return LayerEvaluation(
            tuple(a.detach() for a in self.activations), gradients, tuple(o.detach() for o in self.outputs)
        )


class LayerPass(NamedTuple):
    """The result of a layer pass.

    Attributes:
        evaluations: One for each layer.
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
) -> LayerPass:
    """One forward pass, and one backward pass to all layers where ``gradients`` are wanted.

    Args:
        call (Call): The network and its inputs.
        layers (list of Modules): The layers.
        device_ids (list of int, optional): The order of devices, for a function that wraps a DataParallel model.
        gradients (bool): Whether to differentiate the target's raw output. Default: False
        grad_kwargs (dict, optional): For ``torch.autograd.grad``. With ``create_graph=True`` the result stays in the
            graph; otherwise it is detached.

    Returns:
        LayerPass: Tensors of shape (N, K, *spatial) for each layer, and the output.

    Raises:
        AssertionError: If the target does not select one output for each example.
        ValueError: If the pass does not use a layer, or a layer has no spatial dimensions.
        TypeError: If a layer returns anything but tensors, or forward_func does not return a tensor.
    """

    def run() -> LayerPass:
        return _run(call, layers, device_ids, gradients, grad_kwargs or {})

    if call.cache is None or grad_kwargs:
        return run()
    plain = call.cache.key(("layers", layers, call.reshape))
    key, without_backward = plain, None
    if gradients:
        key, without_backward = (plain, call.cache.key(call.target)), (call.identity, plain)
    found = call.remember(key, run, call.examples, backward=gradients, without_backward=without_backward)
    call.check_target(found.output)  # another call's pass had another target
    return found


def _run(
    call: Call, layers: list[nn.Module], device_ids: list[int] | None, gradients: bool, grad_kwargs: dict[str, Any]
) -> LayerPass:
    with grad_mode(gradients), _check_hooks(layers, call.attribute_to_layer_input):
        saved, raw = forward_with_layers(
            call.forward_func, call.inputs, layers, call.arguments, call.attribute_to_layer_input, gradients
        )
        _check_used(layers, saved)
        output = call.check_output(raw, call.examples)
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
        evaluations = [LayerEvaluation(*values) for values in zip(activations, differentials, outputs, strict=True)]
        if not grad_kwargs.get("create_graph", False):
            evaluations = [evaluation.detached() for evaluation in evaluations]
    return LayerPass(evaluations, output.detach().clone())  # the network may reuse the memory in its next call


def _check_used(layers: list[nn.Module], saved: LayerTensors) -> None:
    unused = [type(layer).__name__ for layer in layers if layer not in saved]
    if unused:
        raise ValueError(
            f"layer: the forward pass does not use {', '.join(unused)}; give a module of the very object that "
            "forward_func calls (scripted and traced models run no hooks)"
        )


def _as_maps(call: Call, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tensors if call.reshape is None else tuple(map(call.reshape, tensors))


def _check_activations(call: Call, activations: tuple[Tensor, ...], layer: nn.Module) -> None:
    where = f"the {'input' if call.attribute_to_layer_input else 'output'} of {type(layer).__name__}"
    for tensor in activations:
        if not 3 <= tensor.dim() <= 5:
            raise ValueError(
                f"layer: {where} must be (N, channels, *spatial) with 1 to 3 spatial dimensions, not of shape "
                f"{tuple(tensor.shape)}; choose a convolutional layer, or give reshape= for tokens"
            )
        if tensor.shape[0] != call.examples:
            raise ValueError(
                f"layer: {where} holds {tensor.shape[0]} rows for {call.examples} examples; choose a layer that keeps "
                "the batch dimension"
            )
        if not tensor.is_floating_point():
            raise TypeError(f"layer: {where} must be floating point, not {tensor.dtype}")


def _gradients(
    selected: Tensor, saved: LayerTensors, order: dict[nn.Module, list[torch.device]], grad_kwargs: dict[str, Any]
) -> dict[nn.Module, tuple[Tensor, ...]]:
    """Gradients of each layer's tensors, from one backward pass that ends at the layers."""
    if not selected.requires_grad:
        raise ValueError(
            "layer: the output of forward_func carries no gradient to it (is the model wrapped in no_grad, or is "
            "something detached on the way?)"
        )
    tensors = [tensor for layer, devices in order.items() for device in devices for tensor in saved[layer][device]]
    found = torch.autograd.grad(selected.sum(), tensors, **{"allow_unused": True, **grad_kwargs})
    if all(gradient is None for gradient in found):
        raise ValueError("layer: the target's output does not depend on it")
    pairs = zip(found, tensors, strict=True)
    remaining = iter([torch.zeros_like(tensor) if gradient is None else gradient for gradient, tensor in pairs])
    gathered = {}
    for layer, devices in order.items():
        by_device = {device: tuple(next(remaining) for _ in saved[layer][device]) for device in devices}
        gathered[layer] = gather_devices(by_device, devices)
    return gathered


@contextlib.contextmanager
def _check_hooks(layers: list[nn.Module], at_input: bool) -> Iterator[None]:
    """Refuse layers that hand on anything but tensors, before captum's hook trips over it."""

    def check(module: nn.Module, inputs: Any, output: Any = None) -> None:
        value = inputs if at_input else output
        tensors = value if isinstance(value, (tuple, list)) else (value,)
        if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
            kinds = ", ".join(type(tensor).__name__ for tensor in tensors) or "nothing"
            raise TypeError(
                f"layer: {type(module).__name__} must {'take' if at_input else 'return'} a tensor or a tuple of "
                f"tensors to be explained, not {kinds}"
            )

    with contextlib.ExitStack() as stack:
        for layer in layers:
            handle = layer.register_forward_pre_hook(check) if at_input else layer.register_forward_hook(check)
            stack.callback(handle.remove)
        yield
