"""Wrappers for captum's private functions, the only module that a new captum release can break."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from captum._utils.common import (
    _format_additional_forward_args,
    _format_output,
    _run_forward,
    _select_targets,
)
from captum._utils.gradient import (
    _extract_device_ids,
    _forward_layer_distributed_eval,
    _gather_distributed_tensors,
    _sort_key_list,
)
from captum._utils.progress import NullProgress, progress
from captum.attr._utils.approximation_methods import approximation_parameters
from captum.log import log_usage as captum_log_usage
from torch import Tensor, nn

__all__ = [
    "device_order",
    "format_arguments",
    "format_result",
    "forward_with_layers",
    "gather_devices",
    "log_usage",
    "path_steps",
    "progress_bar",
    "run_forward",
    "select_target",
]

F = TypeVar("F", bound=Callable[..., Any])

#: The tensors of the layers in a forward pass: a tuple for each layer and device.
LayerTensors = dict[nn.Module, dict[torch.device, tuple[Tensor, ...]]]


def log_usage() -> Callable[[F], F]:
    """Captum's decorator for ``attribute`` methods, typed to preserve their signatures. NoiseTunnel relies on it."""
    decorator: Callable[[F], F] = captum_log_usage()
    return decorator


def format_arguments(additional_forward_args: Any) -> tuple[Any, ...] | None:
    """Captum's additional forward arguments as a tuple, or None."""
    arguments: tuple[Any, ...] | None = _format_additional_forward_args(additional_forward_args)
    return arguments


def format_result(results: tuple[Any, ...]) -> Any:
    """The result itself if there is only one, otherwise the tuple, as in captum."""
    return _format_output(len(results) > 1, results)


def run_forward(forward_func: Callable[..., Any], inputs: Any, arguments: tuple[Any, ...] | None) -> Any:
    """The output of ``forward_func``, before target selection."""
    return _run_forward(forward_func, inputs, None, arguments)


def select_target(output: Tensor, target: Any) -> Tensor:
    """The target's entries of an output; the whole output if the target is None.

    Raises:
        AssertionError: If the target is a name, or a tensor that does not hold indices.
    """
    if isinstance(target, Tensor) and (target.is_floating_point() or target.dtype == torch.bool):
        raise AssertionError(f"target must hold the indices of classes, not a tensor of {target.dtype}")
    for index in target if isinstance(target, list) else [target]:
        if isinstance(index, str):
            raise AssertionError(
                f"target must be the index of a class, not {index!r}; with a list of class names: "
                f"class_names.index({index!r})"
            )
    selected: Tensor = _select_targets(output, target)
    return selected


def forward_with_layers(
    forward_func: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    layers: list[nn.Module],
    arguments: tuple[Any, ...] | None,
    at_input: bool,
    gradients: bool,
) -> tuple[LayerTensors, Any]:
    """Run one forward pass; return the tensors of the layers and the raw output.

    Layers that the pass does not use are missing from the result. If it uses none of them, the output is None.
    """
    try:
        saved, output = _forward_layer_distributed_eval(
            forward_func,
            inputs,
            layers,
            additional_forward_args=arguments,
            attribute_to_layer_input=at_input,
            forward_hook_with_return=True,
            require_layer_grads=gradients,
        )
    except AssertionError as error:
        if "did not obtain any outputs" not in str(error):
            raise
        return {}, None
    return saved, output


def device_order(
    forward_func: Callable[..., Any], saved: LayerTensors, layer: nn.Module, device_ids: list[int] | None
) -> list[torch.device]:
    """The devices on which a layer ran, in batch order."""
    order: list[torch.device] = _sort_key_list(list(saved[layer]), _extract_device_ids(forward_func, saved, device_ids))
    return order


def gather_devices(by_device: dict[torch.device, tuple[Tensor, ...]], order: list[torch.device]) -> tuple[Tensor, ...]:
    """The tensors of several devices, concatenated along the batch dimension."""
    gathered: tuple[Tensor, ...] = _gather_distributed_tensors(by_device, key_list=order)
    return gathered


def progress_bar(show: bool, name: str) -> Any:
    """Captum's progress bar, or its silent replacement, as a context manager. Do not test its truth value."""
    return progress(desc=f"{name} attribution", total=0) if show else NullProgress()


def path_steps(n_steps: int, rule: str) -> tuple[Sequence[float], Sequence[float]]:
    """Step sizes and positions in [0, 1] of captum's approximation ``rule`` of an integral."""
    step_sizes, positions = approximation_parameters(rule)
    with torch.device("cpu"):  # captum creates them with torch on the default device
        return list(step_sizes(n_steps)), list(positions(n_steps))
