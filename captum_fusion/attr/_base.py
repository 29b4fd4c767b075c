"""The calling protocol that every method here follows, so that a method's class holds its formula and little else."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from captum.attr import LayerAttribution
from torch import Tensor, nn

from captum_fusion._captum import Baselines, Call, Layer, LayerEvaluation, Target, progress_bar, warn_if_training

F = TypeVar("F", bound=Callable[..., Any])

#: The Args entries that every ``attribute`` shares, filled into ``{shared_args}`` of its docstring.
_SHARED_ARGS = """\
inputs (Tensor or tuple[Tensor, ...]): What to explain, with dimension 0 counting the N examples. A tuple
    where the network takes several tensors; its tensors are aligned along dimension 0.
target (int, tuple, Tensor or list, optional): Which output to explain, with captum's meaning. For an
    output of shape (N, classes): an int for all examples, or a list or 1-D tensor with one int for each.
    For an output of higher rank: a tuple of indices for all examples, or a list of such tuples. None only
    where the network returns one score for each example.
    Default: None
additional_forward_args (Any, optional): Further arguments of ``forward_func``, a tuple or a single one.
    Tensors whose first dimension is N belong to the examples and follow them into masked rows; anything
    else is passed on as it is.
    Default: None
attribute_to_layer_input (bool, optional): Explain at the layer's input instead of its output.
    Default: False"""

_MASKED_ARGS = """\
baselines (float, Tensor, tuple or None, optional): What shows where a mask is 0:
    ``baseline + mask * (input - baseline)``. A number, a tensor of an input's shape (or with first
    dimension 1), or a tuple with one of these for each input.
    Default: 0
mask_inputs (sequence of int, optional): Which of several inputs are masked.
    Default: None (the floating point inputs with as many spatial dimensions as the layer)
perturbations_per_eval (int, optional): At most this many masked rows per example in one call of the
    network, in the input's own memory layout. None times the first rows to find a fast chunk and layout.
    The result is the same up to rounding.
    Default: None
show_progress (bool, optional): Show a bar that counts masked rows.
    Default: False"""

_RAISES = """\
AssertionError: If the target does not select one output for each example (IndexError or RuntimeError from
    torch for an index out of range).
ValueError: If an argument has a bad value, the forward pass does not use the layer, or the layer has no
    spatial dimensions; the message names the argument.
TypeError: If an argument has a bad type, or ``forward_func`` does not return a tensor."""

_CONSTRUCTOR_ARGS = """\
forward_func (callable): The model, or any function of the inputs that calls it.
layer (Module or list of Modules): Where to explain, usually the last convolutional stage. A list gives a
    list of results, from one pass.
device_ids (list of int, optional): The order of devices; needed only if ``forward_func`` is a function
    around a DataParallel model.
    Default: None"""


def documented(function: F) -> F:
    """Fill the paragraphs that all methods share into a docstring, at the indentation of their placeholders."""
    text = inspect.cleandoc(function.__doc__ or "")
    parts = {
        "constructor_args": _CONSTRUCTOR_ARGS,
        "shared_args": _SHARED_ARGS,
        "masked_args": _MASKED_ARGS,
        "raises": _RAISES,
    }
    lines = []
    for line in text.splitlines():
        name = line.strip().strip("{}")
        if line.strip() == "{" + name + "}" and name in parts:
            indent = line[: len(line) - len(line.lstrip())]
            lines += [indent + part for part in parts[name].splitlines()]
        else:
            lines.append(line)
    function.__doc__ = "\n".join(lines)
    return function


def choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """``value`` if it is one of the allowed words, else a ValueError that names the argument."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}")
    return str(value)


def percentage(name: str, value: Any) -> float:
    """``value`` if it is a number from 0 to 100, else a ValueError that names the argument."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 100:
        raise ValueError(f"{name} must be a percentile from 0 to 100, not {value!r}")
    return float(value)


class CAM(LayerAttribution):
    """Base of the methods: checks the arguments, runs the layer pass, and hands its result to :meth:`_maps`.

    A method implements ``_maps(call, evaluations)``, which gives for each layer a tuple of maps, one for each
    tensor of that layer, and an ``attribute`` that names its options and calls :meth:`_explain`. A fusion calls
    ``_maps`` of its components with its own call, which is how they share one pass.
    """

    def __init__(self, forward_func: Callable[..., Any], layer: Layer, device_ids: list[int] | None = None) -> None:
        if not callable(forward_func):
            raise TypeError(f"forward_func must be callable, not {type(forward_func).__name__}")
        modules = layer if isinstance(layer, list) else [layer]
        if not modules or not all(isinstance(module, nn.Module) for module in modules):
            raise TypeError(f"layer must be a torch.nn.Module or a list of them, not {layer!r:.80}")
        if device_ids is not None and not isinstance(device_ids, (list, tuple)):
            raise TypeError(
                f"device_ids must be a list of device numbers, not {type(device_ids).__name__}; name other arguments"
            )
        LayerAttribution.__init__(self, forward_func, layer, device_ids)

    @classmethod
    def get_name(cls) -> str:
        """The class's name."""
        return cls.__name__

    @property
    def uses_gradients(self) -> bool:
        """Whether :meth:`_maps` needs the layer's gradients."""
        return False

    def _maps(self, call: Call, evaluations: list[LayerEvaluation]) -> list[tuple[Tensor, ...]]:
        raise NotImplementedError

    def _explain(
        self,
        compute: Callable[[Call, list[LayerEvaluation]], list[Any]],
        inputs: Tensor | tuple[Tensor, ...],
        target: Target,
        additional_forward_args: Any,
        attribute_to_layer_input: bool,
        *,
        baselines: Baselines = 0,
        mask_inputs: Sequence[int] | None = None,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        gradients: bool | None = None,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        """Run one call: the layer pass, then ``compute``, which gives a list with an entry for each layer.

        ``gradients`` says whether the pass differentiates, where a call's arguments overrule :attr:`uses_gradients`.
        """
        training = warn_if_training(self.forward_func, self.layer)
        with progress_bar(show_progress, self.get_name()) as bar:
            call = Call(
                self.forward_func,
                inputs,
                target,
                additional_forward_args,
                attribute_to_layer_input,
                baselines=baselines,
                mask_inputs=mask_inputs,
                perturbations_per_eval=perturbations_per_eval,
                training=training,
                bar=bar,
            )
            wanted = self.uses_gradients if gradients is None else gradients
            return compute(call, call.layer_pass(self.layer, self.device_ids, wanted, grad_kwargs))

    def _per_layer(self, results: list[Any]) -> Any:
        """The list for a list of layers, the only entry for a single layer."""
        return results if isinstance(self.layer, list) else results[0]
