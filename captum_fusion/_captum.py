"""The bridge to captum and to the user's network: the layer pass and the masked passes of one ``attribute`` call.

This is the only module that imports captum's private names, so that a new captum release can break one file at most.
"""

from __future__ import annotations

import bisect
import contextlib
import copy
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

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
from captum.log import log_usage
from torch import Tensor, nn

from captum_fusion.functional import ScoreFn

__all__ = ["Baselines", "Call", "Layer", "LayerEvaluation", "Target", "format_result", "log_usage", "progress_bar"]

Layer = nn.Module | list[nn.Module]
Target = int | tuple[int, ...] | Tensor | list[int] | list[tuple[int, ...]] | None
Baselines = float | Tensor | tuple[float | Tensor, ...] | None
#: Maps for some rows at a spatial size: ``masks(rows, size)`` is (len(rows), 1, *size).
Masks = Callable[[slice, Sequence[int]], Tensor]


def format_result(tensors: tuple[Any, ...]) -> Any:
    """The only tensor itself, or the tuple: tuple-ness follows the layer, as in captum."""
    return _format_output(len(tensors) > 1, tensors)


def progress_bar(show: bool, name: str) -> Any:
    """Captum's progress bar, or its silent stand-in. A context manager; never test its truth value."""
    return progress(desc=f"{name} attribution", total=0) if show else NullProgress()


@contextlib.contextmanager
def _grad_mode(enabled: bool) -> Iterator[None]:
    """``set_grad_enabled``, also under a caller's inference_mode, whose tensors autograd could never use again."""
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(enabled))
        yield


def _detach(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.detach() for tensor in tensors)


def _usable(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


class LayerEvaluation(NamedTuple):
    """What one layer (or its input) held in the layer pass, a tensor for each that the layer returns."""

    activations: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...] | None


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
        training: bool = False,
        bar: Any = None,
    ) -> None:
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        if not given or not all(isinstance(x, Tensor) and x.dim() > 0 for x in given):
            kinds = ", ".join(type(x).__name__ for x in given) or "nothing"
            raise TypeError(f"inputs must be a tensor or a tuple of tensors with a batch dimension, not {kinds}")
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
        self.bar = NullProgress() if bar is None else bar
        self._check_options()
        self._least_rows = min(2, self.examples) if training else 1
        self._output: Tensor | None = None
        self._rank = 0
        self._masked: dict[int, _Masked] | None = None
        self._baseline_outputs: list[Tensor] = []
        self._pace: _TimedPace | None = None

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
        other._pace = None
        if not options.keys() <= {"perturbations_per_eval"}:
            other._masked, other._baseline_outputs = None, []
        return other

    def attribute_with(self, component: Any, differentiates: bool, **kwargs: Any) -> Any:
        """``component.attribute`` on this call's inputs, of which captum changes no flag: it is given twins of them."""
        with _grad_mode(torch.is_grad_enabled()):
            twins = tuple(x.detach().requires_grad_(differentiates and x.is_floating_point()) for x in self.inputs)
            return component.attribute(twins if len(twins) > 1 else twins[0], **kwargs)

    @property
    def examples(self) -> int:
        """The number of examples."""
        return self.inputs[0].shape[0]

    # -------------------------------------------------------------------------------------------------- layer pass

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
        detach = not (grad_kwargs or {}).get("create_graph", False)
        with _grad_mode(gradients), _check_hooks(layers, self.attribute_to_layer_input):
            saved, output = self._forward_with_layers(layers, gradients)
            selected = self._select(output, self.target)
            order = {single: self._device_order(saved, single, device_ids) for single in layers}
            evaluations = [
                LayerEvaluation(_gather_distributed_tensors(saved[single], key_list=order[single]), None)
                for single in layers
            ]
            for single, (activations, _) in zip(layers, evaluations, strict=True):
                self._check_activations(activations, single)
            if gradients:
                found = self._gradients(selected, saved, layers, order, grad_kwargs or {})
                evaluations = [LayerEvaluation(a, g) for (a, _), g in zip(evaluations, found, strict=True)]
            if detach:
                evaluations = [LayerEvaluation(_detach(a), g if g is None else _detach(g)) for a, g in evaluations]
        self._output = output.detach().clone()  # the network may reuse the memory in its next call
        self._rank = evaluations[0].activations[0].dim()
        return evaluations

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

    def _check_activations(self, activations: tuple[Tensor, ...], layer: nn.Module) -> None:
        where = f"the {'input' if self.attribute_to_layer_input else 'output'} of {type(layer).__name__}"
        for tensor in activations:
            if not 3 <= tensor.dim() <= 5:
                raise ValueError(
                    f"layer: {where} must be (N, channels, *spatial) with 1 to 3 spatial dimensions, not of shape "
                    f"{tuple(tensor.shape)}; choose a convolutional layer"
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
        if not self._baseline_outputs:
            some = self._masked_inputs()[self.first_masked].difference

            def nothing(rows: slice, size: Sequence[int]) -> Tensor:
                return some.new_zeros(rows.stop - rows.start, 1, *size)

            each = torch.arange(self.examples, device=some.device)
            parts = self._masked_outputs(nothing, each, lambda output, rows: output)
            self._baseline_outputs.append(torch.cat(list(parts)))
        return self._scores(self._baseline_outputs[0], None, score_fn)

    def masked_scores(self, masks: Masks, rows: Tensor, score_fn: ScoreFn) -> Tensor:
        """Scores of ``baseline + mask * (input - baseline)``.

        Args:
            masks (callable): ``masks(some, size)`` gives the masks of the rows in the slice ``some``, of shape
                (len(some), 1, *size), in [0, 1]. It is asked for few rows at a time, so that masks need not all
                be in memory.
            rows (Tensor): int64, of shape (R,): which example each row masks, in perturbation-major order.
            score_fn (callable): From raw output to scores.

        Returns:
            Tensor: Of shape (R,), float64 (float32 on devices without it).
        """
        if not len(rows):
            return torch.empty(0, device=rows.device)
        parts = self._masked_outputs(masks, rows, lambda output, some: self._scores(output, some, score_fn))
        return torch.cat([part.to(rows.device) for part in parts])

    # ------------------------------------------------------------------------------------------------- masked rows

    @property
    def first_masked(self) -> int:
        """Index of the first masked input, whose spatial size is the output's."""
        return next(iter(self._masked_inputs()))

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
        self, masks: Masks, rows: Tensor, reduce: Callable[[Tensor, Tensor], Tensor]
    ) -> Iterator[Tensor]:
        """Run the network on masked rows, chunk by chunk, under no_grad; yields ``reduce(raw output, rows)``."""
        pace = self._pace_for(rows)
        if isinstance(getattr(self.bar, "total", None), int):
            self.bar.total += len(rows)
        start = 0
        while start < len(rows):
            stop, layout = pace.next(start)
            stop = min(stop, len(rows))
            if len(rows) - stop < self._least_rows:
                stop = len(rows)
            some = rows[start:stop]
            before = pace.now()
            try:
                with _grad_mode(False):
                    inputs = self._masked_rows(masks, slice(start, stop), some, layout)
                    arguments = self.arguments and tuple(_take(a, some, self.examples) for a in self.arguments)
                    output = _run_forward(self.forward_func, inputs, None, arguments)
                    result = reduce(self._check_output(output, len(some)), some).clone()
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                if not pace.recover(error, stop - start, layout):
                    raise
                continue
            pace.record(stop - start, layout, pace.now() - before)
            self.bar.update(len(some))
            start = stop
            yield result

    def _masked_rows(self, masks: Masks, these: slice, rows: Tensor, layout: torch.memory_format) -> tuple[Tensor, ...]:
        masked = self._masked_inputs()
        inputs = []
        for i, x in enumerate(self.inputs):
            if i not in masked:
                inputs.append(_take(x.detach(), rows, self.examples))
                continue
            difference, base = masked[i].difference, masked[i].base
            mask = masks(these, x.shape[2:]).to(device=x.device, dtype=x.dtype)
            picked = difference.expand(len(rows), *x.shape[1:]) if self.examples == 1 else _take(difference, rows)
            row = torch.empty(picked.shape, dtype=x.dtype, device=x.device, memory_format=layout)
            torch.mul(picked, mask, out=row)
            if isinstance(base, Tensor):
                row.add_(_take(base, rows))
            elif base:
                row.add_(base)
            inputs.append(row)
        return tuple(inputs)

    def _pace_for(self, rows: Tensor) -> _TimedPace | _FixedPace:
        x = self.inputs[self.first_masked]
        if self.perturbations_per_eval is not None:
            return _FixedPace(rows, self.examples, self.perturbations_per_eval, _layout_of(x))
        if self._pace is None:
            self._pace = _TimedPace(x, self._least_rows)
        return self._pace


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


# ---------------------------------------------------------------------------------------------------------------- pace


def _channels_last(x: Tensor) -> torch.memory_format | None:
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())


def _layout_of(x: Tensor) -> torch.memory_format:
    """The memory layout that the user gave the input."""
    other = _channels_last(x)
    if other is not None and x.is_contiguous(memory_format=other) and not x.is_contiguous():
        return other
    return torch.contiguous_format


class _FixedPace:
    """At most ``limit`` rows per example in one call of the network, in the input's own layout.

    Nothing is timed, so that results repeat to the last digit.
    """

    def __init__(self, rows: Tensor, examples: int, limit: int, layout: torch.memory_format) -> None:
        self._layout = layout
        rank = torch.zeros_like(rows)
        for example in range(examples):
            mine = rows == example
            rank[mine] = torch.arange(int(mine.sum()), device=rows.device)
        _, counts = torch.unique_consecutive(rank // limit, return_counts=True)
        self._stops = counts.cumsum(0).tolist()

    def next(self, start: int) -> tuple[int, torch.memory_format]:
        return self._stops[bisect.bisect_right(self._stops, start)], self._layout

    def record(self, rows: int, layout: torch.memory_format, seconds: float) -> None:
        pass

    def recover(self, error: RuntimeError, rows: int, layout: torch.memory_format) -> bool:
        return False

    @staticmethod
    def now() -> float:
        return 0.0


class _TimedPace:
    """Finds rows per call and memory layout by timing the rows that have to be run anyway.

    Sizes double as long as that makes a row cheaper; every size is tried twice in each layout that is still in the
    running, and the better time counts. A layout that the model cannot take is dropped, and running out of memory
    halves the size for good.
    """

    _ENOUGH = 0.97  # a larger chunk has to make a row at least this much cheaper
    _HOPELESS = 1.25  # a layout this much slower than the best is not tried at larger sizes
    _PATIENCE = 2  # sizes in a row without a gain before the search ends

    def __init__(self, x: Tensor, least: int = 1) -> None:
        self._device = x.device
        row_bytes = max(1, x[0].numel() * x.element_size())
        if x.device.type == "cpu":
            first, memory = least, 16 * 2**20  # bytes of masked rows: past the cache they only get slower
        else:
            free = torch.cuda.mem_get_info(x.device)[0] if x.device.type == "cuda" else 2**32
            first, memory = 8, free // 64  # a network needs some fifty times its input for activations
        self._limit = max(least, min(memory // row_bytes, 1024))
        self._size = min(first, self._limit)
        other = _channels_last(x)
        self._layouts = [torch.contiguous_format] + ([other] if other is not None and x.shape[1] > 1 else [])
        self._trials = self._layouts * 2
        self._times: dict[torch.memory_format, float] = {}
        self._best = (float("inf"), self._size, self._layouts[0])
        self._misses = 0

    def now(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()

    def next(self, start: int) -> tuple[int, torch.memory_format]:
        if self._trials:
            return start + self._size, self._trials[0]
        return start + min(self._best[1], self._limit), self._best[2]

    def record(self, rows: int, layout: torch.memory_format, seconds: float) -> None:
        if not self._trials or rows != self._size:
            return
        self._trials.pop(0)
        self._times[layout] = min(self._times.get(layout, float("inf")), seconds / rows)
        if not self._trials:
            self._settle()

    def _settle(self) -> None:
        layout = min(self._times, key=lambda each: self._times[each])
        fastest = self._times[layout]
        self._misses = 0 if fastest < self._best[0] * self._ENOUGH else self._misses + 1
        self._best = min(self._best, (fastest, self._size, layout), key=lambda each: each[0])
        if self._misses < self._PATIENCE and self._size * 2 <= self._limit:
            self._layouts = [each for each in self._layouts if self._times[each] <= self._HOPELESS * fastest]
            self._size *= 2
            self._trials = self._layouts * 2
        self._times = {}

    def recover(self, error: RuntimeError, rows: int, layout: torch.memory_format) -> bool:
        """Whether the same rows can be tried again, smaller or in the plain layout."""
        if isinstance(error, torch.OutOfMemoryError):
            if rows == 1:
                return False
            self._limit = self._size = max(1, rows // 2)
            self._best = (float("inf"), self._size, self._layouts[0]) if self._best[1] > self._limit else self._best
            self._trials, self._times = [], {}
            return True
        if layout is not torch.contiguous_format:
            self._layouts = [torch.contiguous_format]
            self._trials = [each for each in self._trials if each is torch.contiguous_format]
            self._times.pop(layout, None)
            if self._best[2] is layout:
                self._best = (float("inf"), self._best[1], torch.contiguous_format)
            if self._times and not self._trials:
                self._settle()
            return True
        return False
