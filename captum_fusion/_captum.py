"""The bridge to captum and to the user's network: the layer pass and the masked passes of one ``attribute`` call.

This is the only module that imports captum's private names, so that a new captum release can break one file at most.
"""

from __future__ import annotations

import contextlib
import copy
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple, TypeVar

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
from captum.log import log_usage
from torch import Tensor, nn

from captum_fusion._pace import FixedPace, TimedPace, layout_of
from captum_fusion.functional import ScoreFn, gaussian_blur

__all__ = [
    "Baselines",
    "Call",
    "Layer",
    "LayerEvaluation",
    "Reshape",
    "Target",
    "format_result",
    "log_usage",
    "no_inference_mode",
    "path_steps",
    "progress_bar",
    "shared_work",
]

Layer = nn.Module | list[nn.Module]
Target = int | tuple[int, ...] | Tensor | list[int] | list[tuple[int, ...]] | None
Baselines = float | Tensor | tuple[float | Tensor, ...] | None
#: Turns what a layer returns, tokens for example, into (N, channels, *spatial).
Reshape = Callable[[Tensor], Tensor]
#: Maps for some rows at a spatial size: ``masks(rows, size)`` is (len(rows), 1, *size).
Masks = Callable[[slice, Sequence[int]], Tensor]
#: How a row is made of the rows of an input, of its baseline, the masks, and the slice of rows that they are.
Compose = Callable[[Tensor, float | Tensor, Tensor, slice], Tensor]
#: ``perturb(index, x, base, copies)``: rows of input number ``index`` changed, each in the way of its copy.
Perturb = Callable[[int, Tensor, "float | Tensor", Tensor], Tensor]
Result = TypeVar("Result")


def format_result(tensors: tuple[Any, ...]) -> Any:
    """The only tensor itself, or the tuple: tuple-ness follows the layer, as in captum."""
    return _format_output(len(tensors) > 1, tensors)


def progress_bar(show: bool, name: str) -> Any:
    """Captum's progress bar, or its silent stand-in. A context manager; never test its truth value."""
    return progress(desc=f"{name} attribution", total=0) if show else NullProgress()


def path_steps(n_steps: int, method: str) -> tuple[list[float], list[float]]:
    """Step sizes and positions in [0, 1] of captum's approximation ``method`` of an integral."""
    step_sizes, alphas = approximation_parameters(method)
    with torch.device("cpu"):  # they are made with torch, on the default device
        return list(step_sizes(n_steps)), list(alphas(n_steps))


@contextlib.contextmanager
def _grad_mode(enabled: bool) -> Iterator[None]:
    """``set_grad_enabled``, also under a caller's inference_mode, whose tensors autograd could never use again."""
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(enabled))
        yield


def no_inference_mode() -> contextlib.AbstractContextManager[None]:
    """Leave a caller's inference_mode, as a context manager; whether gradients are recorded stays as it is."""
    return _grad_mode(torch.is_grad_enabled())


def _detach(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.detach() for tensor in tensors)


def _usable(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


@dataclass
class Spared:
    """What calls within :func:`shared_work` would have cost beyond what they did, had they not shared.

    Attributes:
        rows: Forward rows of the network.
        backward_rows: Backward rows.
        seconds: What these took the call that ran them.
    """

    rows: int = 0
    backward_rows: int = 0
    seconds: float = 0.0


class _Work:
    """What calls within one :func:`shared_work` have found, by what it depends on."""

    #: The largest outputs of masked rows that are kept, in numbers.
    LARGEST = 2**25

    def __init__(self) -> None:
        self.spared = Spared()
        self._found: dict[Hashable, tuple[Any, Spared]] = {}
        self._kept: list[Any] = []

    def put(self, key: Hashable, value: Any, rows: int, since: float, backward: bool = False) -> None:
        """Keep what ``rows`` have found since a moment of ``time.perf_counter()``."""
        cost = Spared(rows, rows if backward else 0, time.perf_counter() - since)
        self._found[key] = value, cost

    def get(self, key: Hashable) -> Any:
        """What was found, or None; counts what it spares."""
        value, cost = self._found.get(key, (None, Spared()))
        self.spared.rows += cost.rows
        self.spared.backward_rows += cost.backward_rows
        self.spared.seconds += cost.seconds
        return value

    def key(self, value: Any) -> Hashable:
        """A value by its identity and version, or by itself if it is a number or a string; it is kept alive."""
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (tuple, list)):
            return tuple(self.key(each) for each in value)
        self._kept.append(value)
        return id(value), value._version if isinstance(value, Tensor) and not value.is_inference() else 0


_WORK: ContextVar[_Work | None] = ContextVar("captum_fusion_shared_work", default=None)


@contextlib.contextmanager
def shared_work() -> Iterator[Spared]:
    """Within it, calls of ``attribute`` on the same inputs do not run again what another one has run.

    Shared are layer passes, baseline rows, and the masked rows of Score-CAM, SS-CAM and IS-CAM (whose masks do not
    depend on the target), on their own and inside of fusions, for any target. What counts as the same are the very
    objects: the network, the inputs, the arguments, the baselines. Tensors that are changed in place are noticed; a
    network whose weights are changed within the block is not. Networks in train mode share nothing. The outputs of
    masked rows are kept until the end of the block, up to 128 MiB for each method.

    Yields:
        Spared: Counts what the calls would have cost beyond what they did.

    Examples::

        >>> from captum_fusion import LayerFusionCAM, LayerScoreCAM, demo, shared_work
        >>> model, scene = demo.load_model(), demo.load_scenes()[0]
        >>> image = demo.preprocess(scene.image)
        >>> with shared_work() as spared:
        ...     fused = LayerFusionCAM(model, model.stage4).attribute(image, scene.labels[0])
        ...     other = LayerFusionCAM(model, model.stage4).attribute(image, scene.labels[1])
        ...     region = LayerScoreCAM(model, model.stage4).attribute(image, scene.labels[0])  # no further masked row
    """
    work = _WORK.get()
    if work is not None:
        yield work.spared
        return
    work = _Work()
    token = _WORK.set(work)
    try:
        yield work.spared
    finally:
        _WORK.reset(token)


class LayerEvaluation(NamedTuple):
    """What one layer (or its input) held in the layer pass, a tensor for each that the layer returns.

    Attributes:
        activations: Of shape (N, K, *spatial), after ``reshape`` where there is one.
        gradients: Of the same shape, or None if none were asked for.
        outputs: The layer's tensors before ``reshape``.
    """

    activations: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...] | None
    outputs: tuple[Tensor, ...]


@dataclass
class _Masked:
    """An input that is masked: rows are ``base + mask * difference``."""

    difference: Tensor
    base: float | Tensor


class Call:
    """One call of ``attribute``: the network, its inputs and target, and every pass that is run for it.

    Args:
        forward_func (callable): The model or any function of the inputs.
        inputs (Tensor or tuple[Tensor, ...]): As given by the user; dimension 0 counts the examples.
        target: Captum's target.
        additional_forward_args: Captum's additional arguments.
        attribute_to_layer_input (bool): Whether layers are evaluated at their input.
        baselines: What shows where a mask is 0: a number, a tensor, or a tuple with one of these for each input.
        mask_inputs (sequence of int, optional): Which inputs are masked. Default: those with the layer's rank.
        perturbations_per_eval (int, optional): Rows per example in one call of the network. Default: timed.
        reshape (callable, optional): Turns the layer's tensors, tokens for example, into (N, channels, *spatial).
        needs_target (bool): Whether the target must select one output; False accepts None for any output.
        training (bool): Whether the network is in train mode, where a batch norm may refuse a single row.
        bar: A progress bar that counts the masked rows.

    Raises:
        TypeError, ValueError: For a bad argument, naming it. What depends on the layer is checked after its pass.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        *,
        baselines: Baselines = 0,
        mask_inputs: Sequence[int] | None = None,
        perturbations_per_eval: int | None = None,
        reshape: Reshape | None = None,
        needs_target: bool = True,
        training: bool = False,
        bar: Any = None,
    ) -> None:
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        if not given or not all(isinstance(x, Tensor) and x.dim() > 0 for x in given):
            kinds = ", ".join(type(x).__name__ for x in given) or "nothing"
            raise TypeError(f"inputs must be a tensor or a tuple of tensors with a batch dimension, not {kinds}")
        if not given[0].shape[0]:
            raise ValueError("inputs: the batch is empty")
        self.forward_func = forward_func
        with _grad_mode(torch.is_grad_enabled()):
            self.inputs: tuple[Tensor, ...] = tuple(_usable(x) for x in given)
            arguments = _format_additional_forward_args(additional_forward_args)
            self.arguments = None if arguments is None else tuple(_usable(x) for x in arguments)
            self.target: Target = _usable(target)
        self.attribute_to_layer_input = attribute_to_layer_input
        self.baselines = baselines
        self.mask_inputs = mask_inputs
        self.perturbations_per_eval = perturbations_per_eval
        self.reshape = reshape
        self._needs_target = needs_target
        self.bar = NullProgress() if bar is None else bar
        self._check_options()
        self._least_rows = min(2, self.examples) if training else 1
        self._output: Tensor | None = None
        self._rank = 0
        self._masked: dict[int, _Masked] | None = None
        self._baseline_outputs: list[Tensor] = []
        self._pace: list[TimedPace] = []
        self._work = None if training or any(x.is_inference() for x in given) else _WORK.get()
        self._identity: Hashable = None
        if self._work is not None:
            owner = (forward_func, given, arguments, attribute_to_layer_input)
            self._identity = self._work.key(owner)
        self.place: Hashable = None

    def _check_options(self) -> None:
        chunk = self.perturbations_per_eval
        if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1):
            raise ValueError(f"perturbations_per_eval must be None or an int of at least 1, not {chunk!r}")
        indices = [] if self.mask_inputs is None else self.mask_inputs
        if not isinstance(indices, Sequence) or not all(
            isinstance(index, int) and 0 <= index < len(self.inputs) for index in indices
        ):
            raise ValueError(f"mask_inputs must be a list of indices of the {len(self.inputs)} inputs, not {indices!r}")
        bases = self.baselines
        if isinstance(bases, tuple) and len(bases) != len(self.inputs):
            raise ValueError(
                f"baselines must have one entry for each of the {len(self.inputs)} inputs, not {len(bases)}"
            )
        if isinstance(bases, Tensor) and len(self.inputs) > 1:
            raise ValueError(
                f"baselines must be a number or a tuple with an entry for each of {len(self.inputs)} inputs"
            )

    def with_options(self, **options: Any) -> Call:
        """This call with other ``baselines``, ``mask_inputs`` or ``perturbations_per_eval``, sharing its layer pass."""
        other = copy.copy(self)
        for name, value in options.items():
            setattr(other, name, value)
        other._check_options()
        other._pace = []
        if not options.keys() <= {"perturbations_per_eval"}:
            other._masked, other._baseline_outputs = None, []
        return other

    def blurred(self, kernel_size: int, sigma: float) -> Call:
        """This call with the masked inputs under a Gaussian as its baselines."""
        which = self._masked_inputs()
        return self.with_options(
            baselines=tuple(
                gaussian_blur(x.detach(), kernel_size, sigma).to(x.dtype) if i in which else 0
                for i, x in enumerate(self.inputs)
            )
        )

    def at(self, *place: Any) -> Call:
        """This call, sharing masked rows under the name of a place: the layer, its tensor, and what the masks are."""
        if self._work is None or None in place:
            return self
        other = copy.copy(self)
        other.place = self._work.key((place, self.reshape))
        return other

    def _masking_key(self) -> Hashable:
        assert self._work is not None
        return self._identity, self._work.key((self.baselines, self.mask_inputs, self._rank))

    def attribute_with(self, component: Any, differentiates: bool, ours: bool = False, **kwargs: Any) -> Any:
        """``component.attribute`` on this call's inputs.

        Captum's methods change flags of what they are given, so they are given twins; ``ours`` change nothing, and can
        share work on the very inputs.
        """
        with _grad_mode(torch.is_grad_enabled()):
            given = self.inputs
            if not ours:
                given = tuple(x.detach().requires_grad_(differentiates and x.is_floating_point()) for x in given)
            return component.attribute(given if len(given) > 1 else given[0], **kwargs)

    @property
    def examples(self) -> int:
        """The number of examples."""
        return self.inputs[0].shape[0]

    # -------------------------------------------------------------------------------------------------- layer pass

    @classmethod
    def without_layer(cls, forward_func: Callable[..., Any], *arguments: Any, **options: Any) -> Call:
        """A call whose clean pass has been run, for what needs no layer; arguments as of the class."""
        training = isinstance(forward_func, nn.Module) and warn_if_training(forward_func, [])
        with no_inference_mode():
            call = cls(forward_func, *arguments, training=training, **options)
            call._clean_pass()
        return call

    def _clean_pass(self) -> None:
        """A forward pass without a layer, which checks the target; what is masked, the inputs' own rank decides."""
        ranks = [x.dim() for x in self.inputs if x.dim() > 2 and x.is_floating_point()]
        if self.mask_inputs:
            ranks = [self.inputs[self.mask_inputs[0]].dim()]
        if not ranks or not 3 <= ranks[0] <= 5:
            shapes = ", ".join(str(tuple(x.shape)) for x in self.inputs)
            raise ValueError(
                "inputs: there is nothing to mask, because none of them is floating point and of shape "
                f"(N, channels, *spatial) with 1 to 3 spatial dimensions: {shapes}"
            )
        self._rank = ranks[0]
        known = None if self._work is None else self._work.get(("clean", self._identity))
        if known is not None:
            self._select(known, self.target)
            self._output = known
            return
        start = time.perf_counter()
        with _grad_mode(False):
            output = _run_forward(self.forward_func, tuple(x.detach() for x in self.inputs), None, self.arguments)
            output = self._check_output(output, self.examples)
            self._select(output, self.target)
            self._output = output.clone()
        if self._work is not None:
            self._work.put(("clean", self._identity), self._output, self.examples, start)

    def layer_pass(
        self,
        layer: Layer,
        device_ids: list[int] | None = None,
        gradients: bool = False,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> list[LayerEvaluation]:
        """One forward pass, and one backward pass to all layers where ``gradients`` are wanted.

        Args:
            layer (Module or list of Modules): The layers.
            device_ids (list of int, optional): The order of devices, for a function that wraps a DataParallel model.
            gradients (bool): Whether to differentiate the target's raw output. Default: False
            grad_kwargs (dict, optional): For ``torch.autograd.grad``. With ``create_graph=True`` the result stays in
                the graph; otherwise it is detached.

        Returns:
            list[LayerEvaluation]: One for each layer, with tensors of shape (N, K, *spatial).

        Raises:
            AssertionError: For a wrong target, as captum.
            ValueError: For a layer that the pass does not use, or without spatial dimensions.
            TypeError: For a layer that returns anything but tensors, or a forward_func that does not return one.
        """
        layers = [layer] if isinstance(layer, nn.Module) else list(layer)
        known = self._known_pass(layers, gradients, grad_kwargs)
        if known is not None:
            return known
        start = time.perf_counter()
        detach = not (grad_kwargs or {}).get("create_graph", False)
        with _grad_mode(gradients), _check_hooks(layers, self.attribute_to_layer_input):
            saved, output = self._forward_with_layers(layers, gradients)
            if self._needs_target or self.target is not None:
                selected = self._select(output, self.target)
            order = {single: self._device_order(saved, single, device_ids) for single in layers}
            outputs = [_gather_distributed_tensors(saved[single], key_list=order[single]) for single in layers]
            activations = [self._as_maps(tensors) for tensors in outputs]
            for single, tensors in zip(layers, activations, strict=True):
                self._check_activations(tensors, single)
            differentials: list[Any] = [None] * len(layers)
            if gradients:
                differentials = [
                    self._as_maps(g) for g in self._gradients(selected, saved, layers, order, grad_kwargs or {})
                ]
            evaluations = [LayerEvaluation(*each) for each in zip(activations, differentials, outputs, strict=True)]
            if detach:
                evaluations = [LayerEvaluation(_detach(a), g and _detach(g), _detach(o)) for a, g, o in evaluations]
        self._output = output.detach().clone()  # the network may reuse the memory in its next call
        self._rank = evaluations[0].activations[0].dim()
        if self._work is not None and not grad_kwargs:
            plain, differentiated = self._pass_keys(layers)
            found = evaluations, self._output, self._rank
            self._work.put(plain, found, self.examples, start)
            if gradients:
                self._work.put(differentiated, found, self.examples, start, backward=True)
        return evaluations

    def _pass_keys(self, layers: list[nn.Module]) -> list[Hashable]:
        """What a pass without and one with gradients are shared under."""
        assert self._work is not None
        plain = ("layers", self._identity, self._work.key((layers, self.reshape)))
        return [plain, (plain, self._work.key((self.target,)))]

    def _known_pass(
        self, layers: list[nn.Module], gradients: bool, grad_kwargs: dict[str, Any] | None
    ) -> list[LayerEvaluation] | None:
        """What another call has found in its pass."""
        if self._work is None or grad_kwargs:
            return None
        known = self._work.get(self._pass_keys(layers)[1 if gradients else 0])
        if known is None:
            return None
        evaluations, self._output, self._rank = known
        if self._needs_target or self.target is not None:
            self._select(self.output, self.target)
        found: list[LayerEvaluation] = evaluations
        return found

    def _forward_with_layers(self, layers: list[nn.Module], gradients: bool) -> tuple[Any, Tensor]:
        try:
            saved, output = _forward_layer_distributed_eval(
                self.forward_func,
                self.inputs,
                layers,
                additional_forward_args=self.arguments,
                attribute_to_layer_input=self.attribute_to_layer_input,
                forward_hook_with_return=True,
                require_layer_grads=gradients,
            )
        except AssertionError as error:
            if "did not obtain any outputs" not in str(error):
                raise
            saved, output = {}, None
        unused = [type(single).__name__ for single in layers if single not in saved]
        if unused:
            raise ValueError(
                f"layer: the forward pass does not use {', '.join(unused)}; give a module of the very object that "
                "forward_func calls (scripted and traced models run no hooks)"
            )
        return saved, self._check_output(output, self.examples)

    def _device_order(self, saved: Any, layer: nn.Module, device_ids: list[int] | None) -> list[torch.device]:
        ids = _extract_device_ids(self.forward_func, saved, device_ids)
        order: list[torch.device] = _sort_key_list(list(saved[layer]), ids)
        return order

    def _as_maps(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tensors if self.reshape is None else tuple(map(self.reshape, tensors))

    def _check_activations(self, activations: tuple[Tensor, ...], layer: nn.Module) -> None:
        where = f"the {'input' if self.attribute_to_layer_input else 'output'} of {type(layer).__name__}"
        for tensor in activations:
            if not 3 <= tensor.dim() <= 5:
                raise ValueError(
                    f"layer: {where} must be (N, channels, *spatial) with 1 to 3 spatial dimensions, not of shape "
                    f"{tuple(tensor.shape)}; choose a convolutional layer, or give reshape= for tokens"
                )
            if tensor.shape[0] != self.examples:
                raise ValueError(
                    f"layer: {where} holds {tensor.shape[0]} rows for {self.examples} examples; choose a layer that "
                    "keeps the batch dimension"
                )
            if not tensor.is_floating_point():
                raise TypeError(f"layer: {where} must be floating point, not {tensor.dtype}")

    @staticmethod
    def _gradients(
        selected: Tensor,
        saved: Any,
        layers: list[nn.Module],
        order: dict[nn.Module, list[torch.device]],
        grad_kwargs: dict[str, Any],
    ) -> list[tuple[Tensor, ...]]:
        """Gradients of each layer's tensors, from one backward pass that ends at the layers."""
        if not selected.requires_grad:
            raise ValueError(
                "layer: the output of forward_func carries no gradient to it (is the model wrapped in no_grad, or is "
                "something detached on the way?)"
            )
        tensors = [tensor for layer in layers for device in order[layer] for tensor in saved[layer][device]]
        found = torch.autograd.grad(selected.sum(), tensors, **{"allow_unused": True, **grad_kwargs})
        if all(gradient is None for gradient in found):
            raise ValueError("layer: the target's output does not depend on it")
        pairs = zip(found, tensors, strict=True)
        each = iter([torch.zeros_like(tensor) if gradient is None else gradient for gradient, tensor in pairs])
        gathered = []
        for layer in layers:
            by_device = {device: tuple(next(each) for _ in saved[layer][device]) for device in order[layer]}
            gathered.append(_gather_distributed_tensors(by_device, key_list=order[layer]))
        return gathered

    # ------------------------------------------------------------------------------------------------------ scores

    def _check_output(self, output: Any, rows: int) -> Tensor:
        if not isinstance(output, Tensor):
            raise TypeError(
                f"forward_func must return a tensor, not {type(output).__name__}; wrap the model in a function that "
                "picks the tensor to explain"
            )
        if rows == 1 and output.dim() == (0 if self._output is None else self._output.dim() - 1):
            output = output.reshape(1, *output.shape)  # a head that ends in squeeze()
        assert output.shape[:1] == (rows,), (
            f"forward_func must return one row for each of the {rows} examples it is given, not {tuple(output.shape)}"
        )
        checked: Tensor = output
        return checked

    def _select(self, output: Tensor, target: Target) -> Tensor:
        selected: Tensor = _select_targets(output, target)
        assert selected.numel() == output.shape[0], (
            "Target not provided when necessary: an output of shape "
            f"{tuple(output.shape)} with target={target!r:.80} is not one score for each example"
        )
        return selected.reshape(-1)

    def _scores(self, output: Tensor, rows: Tensor | None, score_fn: ScoreFn) -> Tensor:
        """One score for each row of a raw output, ``rows`` saying which example a row belongs to."""
        scores = score_fn(output)
        return self._select(scores, self.target if rows is None else _take_target(self.target, rows, self.examples))

    def clean_scores(self, score_fn: ScoreFn) -> Tensor:
        """Scores of the unmasked inputs, of shape (N,): no pass of their own, the layer pass has them."""
        assert self._output is not None, "layer_pass comes first"
        return self._scores(self._output, None, score_fn)

    def baseline_scores(self, score_fn: ScoreFn) -> Tensor:
        """Scores of the baselines, of shape (N,). One row for each example, run once however often this is asked."""
        if not self._baseline_outputs and self._work is not None:
            self._baseline_outputs.extend(self._work.get(("baseline", self._masking_key())) or ())
        if not self._baseline_outputs:
            start = time.perf_counter()
            some = self._masked_inputs()[self.first_masked].difference

            def nothing(rows: slice, size: Sequence[int]) -> Tensor:
                return some.new_zeros(rows.stop - rows.start, 1, *size)

            each = torch.arange(self.examples, device=some.device)
            parts = self._masked_outputs(nothing, each, lambda output, rows: output)
            self._baseline_outputs.append(torch.cat([part for _, part in parts]))
            if self._work is not None:
                key = ("baseline", self._masking_key())
                self._work.put(key, tuple(self._baseline_outputs), self.examples, start)
        return self._scores(self._baseline_outputs[0], None, score_fn)

    def masked_scores(self, masks: Masks, rows: Tensor, score_fn: ScoreFn, compose: Compose | None = None) -> Tensor:
        """Scores of ``baseline + mask * (input - baseline)``.

        Args:
            masks (callable): ``masks(some, size)`` gives the masks of the rows in the slice ``some``, of shape
                (len(some), 1, *size), in [0, 1]. It is asked for few rows at a time, so that masks need not all
                be in memory.
            rows (Tensor): int64, of shape (R,): which example each row masks, in perturbation-major order.
            score_fn (callable): From raw output to scores.
            compose (callable, optional): Makes a row of input, baseline and mask in another way.

        Returns:
            Tensor: Of shape (R,), float64 (float32 on devices without it).
        """
        if not len(rows):
            return torch.empty(0, device=rows.device)
        if self._work is None or self.place is None:
            parts = self.iterate_scores(masks, rows, score_fn, compose)
            return torch.cat([part.to(rows.device) for _, part in parts])
        key = ("rows", self._masking_key(), self.place)
        known: tuple[Tensor | None, list[tuple[Tensor, Tensor]]] = self._work.get((key, len(rows))) or (None, [])
        known_rows, outputs = known
        if known_rows is None or not torch.equal(known_rows, rows):
            outputs, start = [], time.perf_counter()

            def scores(output: Tensor, some: Tensor) -> Tensor:
                if output[0].numel() * len(rows) <= _Work.LARGEST:
                    outputs.append((some, output.detach().clone()))
                return self._scores(output, some, score_fn)

            found = [part.to(rows.device) for _, part in self._masked_outputs(masks, rows, scores, compose)]
            if outputs:
                self._work.put((key, len(rows)), (rows, outputs), len(rows), start)
            return torch.cat(found)
        return torch.cat([self._scores(output, some, score_fn).to(rows.device) for some, output in outputs])

    def iterate_scores(
        self, masks: Masks, rows: Tensor, score_fn: ScoreFn, compose: Compose | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """:meth:`masked_scores` as they come, with the slice of ``rows`` that they belong to."""
        return self._masked_outputs(masks, rows, lambda output, some: self._scores(output, some, score_fn), compose)

    def select(self, table: Tensor) -> Tensor:
        """The target's entry of each example in a table of shape (N, ...), as captum selects outputs; (N,)."""
        return self._select(table, self.target)

    @property
    def output(self) -> Tensor:
        """The raw output for the inputs as they are."""
        assert self._output is not None, "layer_pass comes first"
        return self._output

    # ---------------------------------------------------------------------------------------------- perturbed passes

    def perturbed_passes(
        self,
        layer: Layer,
        device_ids: list[int] | None,
        perturb: Perturb,
        copies: int,
        gradients: bool = True,
        grad_kwargs: dict[str, Any] | None = None,
        targets: Tensor | None = None,
    ) -> Iterator[tuple[Tensor, Tensor, list[LayerEvaluation]]]:
        """Layer passes with gradients on changed copies of the inputs, a few at a time.

        Args:
            layer (Module or list of Modules): As for :meth:`layer_pass`.
            device_ids (list of int, optional): As for :meth:`layer_pass`.
            perturb (callable): ``perturb(index, x, base, copies)`` changes rows of masked input number ``index``,
                given its baseline and the number of the copy that each row is, int64 (len(x),).
            copies (int): How many copies of each example are made.
            gradients (bool): Whether to differentiate. Default: True
            grad_kwargs (dict, optional): For ``torch.autograd.grad``.
            targets (Tensor, optional): int64, of shape (copies, N): a target of its own for each row.

        Yields:
            tuple: For R rows: their examples, int64 (R,), their copies, int64 (R,), and their evaluations.
        """
        device = self.inputs[0].device
        rows = torch.arange(self.examples, device=device).repeat(copies)
        which = torch.arange(copies, device=device).repeat_interleave(self.examples)

        def evaluate(these: slice, some: Tensor, layout: torch.memory_format) -> Any:
            call = copy.copy(self)
            call._work = None
            call.inputs = tuple(self._perturbed(i, perturb, some, which[these]) for i in range(len(self.inputs)))
            call.arguments = self._arguments_of(some)
            call.target = _take_target(self.target, some, self.examples)
            if targets is not None:
                call.target = targets.to(device)[which[these], some]
            return some, which[these], call.layer_pass(layer, device_ids, gradients, grad_kwargs)

        x = self.inputs[self.first_masked]
        pace = self._fixed_pace(rows, layout_of(x)) or TimedPace(x, self._least_rows, scale=0.25, both_layouts=False)
        return self._run(rows, pace, evaluate)

    def _perturbed(self, index: int, perturb: Perturb, rows: Tensor, copies: Tensor) -> Tensor:
        x = self.inputs[index].detach()
        masked = self._masked_inputs().get(index)
        if masked is None:
            taken: Tensor = _take(x, rows, self.examples)
            return taken
        base = _take(masked.base, rows) if isinstance(masked.base, Tensor) else masked.base
        return perturb(index, _take(x, rows), base, copies).to(x)

    # ----------------------------------------------------------------------------------------------- replaced passes

    def replaced_scores(
        self,
        layer: nn.Module,
        evaluation: LayerEvaluation,
        index: int,
        replace: Callable[[slice], Tensor],
        rows: Tensor,
        score_fn: ScoreFn,
        device_ids: list[int] | None = None,
    ) -> Tensor:
        """Scores of the network with one of the layer's tensors replaced.

        The network below the layer is run once for each chunk, which is therefore as large as memory allows: it is
        given one row, and the layer's hook returns all rows of the chunk. Where the network does not allow that, its
        input is repeated for every row.

        Args:
            layer (Module): The layer.
            evaluation (LayerEvaluation): What the layer pass found there.
            index (int): Which of the layer's tensors is replaced.
            replace (callable): ``replace(some)`` gives the rows of the slice ``some``, of shape
                (len(some), K, *spatial). It is asked for few rows at a time.
            rows (Tensor): int64, of shape (R,): which example each row belongs to, in ascending order.
            score_fn (callable): From raw output to scores.
            device_ids (list of int, optional): As for :meth:`layer_pass`.

        Returns:
            Tensor: Of shape (R,), float64 (float32 on devices without it).
        """
        if not len(rows):
            return torch.empty(0, device=rows.device)
        original = evaluation.outputs[index]
        devices = device_ids or getattr(self.forward_func, "device_ids", None) or []
        grow = [len(devices) < 2]

        def evaluate(these: slice, some: Tensor, layout: torch.memory_format) -> Tensor:
            with _grad_mode(False):
                tensor = self._as_output(replace(these), original, some)

                def replaced(fed: Tensor) -> Tensor:
                    output = self._replaced_output(layer, index, tensor, fed, devices)
                    return self._check_output(output, len(some))

                if grow[0]:
                    try:
                        return self._scores(replaced(some[:1]), some, score_fn).clone()
                    except torch.OutOfMemoryError:
                        raise
                    except Exception:  # whatever a network may raise whose batch grows on its way
                        grow[0] = False
                return self._scores(replaced(some), some, score_fn).clone()

        pace = self._fixed_pace(rows, torch.contiguous_format) or TimedPace(
            original, self._least_rows, first=1024, scale=2, both_layouts=False
        )
        return torch.cat([part.to(rows.device) for part in self._run(rows, pace, evaluate, single_example=True)])

    def _as_output(self, maps: Tensor, original: Tensor, rows: Tensor) -> Tensor:
        """Maps (R, K, *spatial) as the layer returned them, before ``reshape``."""
        if self.reshape is None:
            return maps.to(original.dtype)
        inverse = getattr(self.reshape, "inverse", None)
        if inverse is None:
            raise ValueError(
                "reshape must have a method inverse(maps, tokens) for a method that replaces what the layer returns, "
                "as captum_fusion.layers.TokenGrid has"
            )
        whole: Tensor = inverse(maps, _take(original, rows)).to(original.dtype)
        return whole

    def _replaced_output(
        self,
        layer: nn.Module,
        index: int,
        tensor: Tensor,
        fed: Tensor,
        devices: Sequence[int],
    ) -> Any:
        """The network's output for the inputs of the examples ``fed``, with the layer's tensor replaced."""
        inputs = tuple(_take(x.detach(), fed, self.examples) for x in self.inputs)
        parts = {tensor.device: tensor}
        if len(devices) > 1:
            parts = {part.device: part for part in nn.parallel.scatter_gather.scatter(tensor, list(devices))}
        with _replacing(layer, index, self.attribute_to_layer_input, parts):
            return _run_forward(self.forward_func, inputs, None, self._arguments_of(fed))

    # ------------------------------------------------------------------------------------------------- masked rows

    @property
    def first_masked(self) -> int:
        """Index of the first masked input, whose spatial size is the output's."""
        return next(iter(self._masked_inputs()))

    @property
    def masked_indices(self) -> list[int]:
        """Indices of the masked inputs."""
        return list(self._masked_inputs())

    @property
    def spatial_size(self) -> tuple[int, ...]:
        """Spatial size of the first masked input, in pixels."""
        return tuple(self.inputs[self.first_masked].shape[2:])

    def _masked_inputs(self) -> dict[int, _Masked]:
        if self._masked is None:
            with _grad_mode(False):
                self._masked = {i: _Masked(*self._difference(i)) for i in self._which()}
        return self._masked

    def _which(self) -> list[int]:
        ranks = [x.dim() for x in self.inputs]
        if self.mask_inputs is None:
            which = [i for i, x in enumerate(self.inputs) if x.dim() == self._rank and x.is_floating_point()]
            if not which:
                raise ValueError(
                    f"inputs: none has the layer's {self._rank - 2} spatial dimensions and a floating point type "
                    f"(their ranks are {ranks}), so there is nothing that a map of this layer could mask"
                )
            return which
        which = list(self.mask_inputs)
        if not which or any(ranks[i] != self._rank or not self.inputs[i].is_floating_point() for i in which):
            raise ValueError(
                f"mask_inputs must name floating point inputs of the layer's rank {self._rank}, not {which} "
                f"(ranks {ranks})"
            )
        return which

    def _difference(self, index: int) -> tuple[Tensor, float | Tensor]:
        x = self.inputs[index].detach()
        if x.shape[0] != self.examples:
            raise ValueError(
                f"inputs: number {index} holds {x.shape[0]} examples and the first {self.examples}; name those to mask "
                "in mask_inputs"
            )
        base: Any = self.baselines[index] if isinstance(self.baselines, tuple) else self.baselines
        base = 0 if base is None else base
        if isinstance(base, Tensor):
            if base.dim() not in (0, x.dim()) or any(
                b not in (1, n) for b, n in zip(base.shape, x.shape, strict=False)
            ):
                raise ValueError(f"baselines: shape {tuple(base.shape)} does not fit the input's {tuple(x.shape)}")
            base = base.detach().to(x).expand_as(x)
            return x - base, base
        if not isinstance(base, Real):
            raise TypeError(f"baselines must be numbers or tensors, not {type(base).__name__}")
        return (x - float(base), float(base)) if base else (x, 0)

    def _masked_outputs(
        self,
        masks: Masks,
        rows: Tensor,
        reduce: Callable[[Tensor, Tensor], Tensor],
        compose: Compose | None = None,
    ) -> Iterator[tuple[slice, Tensor]]:
        """Run the network on masked rows under no_grad; yields ``reduce(raw output, rows)`` chunk by chunk."""

        def evaluate(these: slice, some: Tensor, layout: torch.memory_format) -> tuple[slice, Tensor]:
            with _grad_mode(False):
                inputs = self._masked_rows(masks, these, some, layout, compose)
                output = _run_forward(self.forward_func, inputs, None, self._arguments_of(some))
                return these, reduce(self._check_output(output, len(some)), some).clone()

        return self._run(rows, self._pace_for(rows), evaluate)

    def _run(
        self,
        rows: Tensor,
        pace: TimedPace | FixedPace,
        evaluate: Callable[[slice, Tensor, torch.memory_format], Result],
        single_example: bool = False,
    ) -> Iterator[Result]:
        """Evaluate rows in chunks of the pace's choice, each of a ``single_example`` if wanted."""
        if isinstance(getattr(self.bar, "total", None), int):
            self.bar.total += len(rows)
        start = 0
        while start < len(rows):
            stop, layout = pace.next(start)
            stop = min(stop, len(rows))
            if len(rows) - stop < self._least_rows:
                stop = len(rows)
            if single_example:
                stop = min(stop, start + int((rows[start:] == rows[start]).sum()))
            some = rows[start:stop]
            before = pace.now()
            try:
                result = evaluate(slice(start, stop), some, layout)
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                if not pace.recover(error, stop - start, layout):
                    raise
                continue
            pace.record(stop - start, layout, pace.now() - before)
            self.bar.update(len(some))
            start = stop
            yield result

    def _masked_rows(
        self, masks: Masks, these: slice, rows: Tensor, layout: torch.memory_format, compose: Compose | None
    ) -> tuple[Tensor, ...]:
        masked = self._masked_inputs()
        inputs = []
        for i, x in enumerate(self.inputs):
            if i not in masked:
                inputs.append(_take(x.detach(), rows, self.examples))
                continue
            difference, base = masked[i].difference, masked[i].base
            mask = masks(these, x.shape[2:]).to(device=x.device, dtype=x.dtype)
            if compose is not None:
                bases = _take(base, rows) if isinstance(base, Tensor) else base
                row = compose(_take(x.detach(), rows), bases, mask, these)
                inputs.append(row.to(x.dtype).contiguous(memory_format=layout))
                continue
            picked = difference.expand(len(rows), *x.shape[1:]) if self.examples == 1 else _take(difference, rows)
            row = torch.empty(picked.shape, dtype=x.dtype, device=x.device, memory_format=layout)
            torch.mul(picked, mask, out=row)
            if isinstance(base, Tensor):
                row.add_(_take(base, rows))
            elif base:
                row.add_(base)
            inputs.append(row)
        return tuple(inputs)

    def _pace_for(self, rows: Tensor) -> TimedPace | FixedPace:
        x = self.inputs[self.first_masked]
        fixed = self._fixed_pace(rows, layout_of(x))
        if fixed is None and not self._pace:
            self._pace.append(TimedPace(x, self._least_rows, expected=len(rows)))
        return fixed or self._pace[0]

    def _fixed_pace(self, rows: Tensor, layout: torch.memory_format) -> FixedPace | None:
        """The pace that the user asked for, if any."""
        limit = self.perturbations_per_eval
        return None if limit is None else FixedPace(rows, self.examples, limit, layout)

    def _arguments_of(self, rows: Tensor) -> tuple[Any, ...] | None:
        """The additional arguments of some rows' examples."""
        return self.arguments and tuple(_take(a, rows, self.examples) for a in self.arguments)


def warn_if_training(forward_func: Any, layer: Layer) -> bool:
    """Whether the model is in train mode; if so, say once that this is not what anybody wants explained."""
    known = forward_func if isinstance(forward_func, nn.Module) else layer
    roots = [known] if isinstance(known, nn.Module) else known
    # Leaves only: a DataParallel around a model in eval mode is itself in train mode.
    training = any(module.training for root in roots for module in root.modules() if not any(module.children()))
    if training:
        warnings.warn(
            "the model is in train mode: masked passes move its batch-norm statistics and dropout makes its scores "
            "random; call model.eval() before attribute()",
            stacklevel=5,
        )
    return training


@contextlib.contextmanager
def _replacing(layer: nn.Module, index: int, at_input: bool, parts: dict[torch.device, Tensor]) -> Iterator[None]:
    """Let a layer hand on another tensor in the place of its ``index``-th, and rows of the others to match."""

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


def _take(value: Any, rows: Tensor, examples: int | None = None) -> Any:
    """Rows of a tensor whose first dimension counts examples; anything else as it is, as captum passes it on."""
    if isinstance(value, Tensor) and value.dim() and examples in (None, value.shape[0]):
        return value.index_select(0, rows.to(value.device))
    return value


def _take_target(target: Target, rows: Tensor, examples: int) -> Target:
    if isinstance(target, list) and len(target) == examples:
        return [target[i] for i in rows.tolist()]
    if isinstance(target, Tensor) and target.numel() == 1:
        return target
    taken: Target = _take(target, rows, examples)
    return taken
