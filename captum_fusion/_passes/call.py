"""One call of ``attribute``: its checked arguments and the network."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, TypeVar

import torch
from torch import Tensor

from captum_fusion._captum import format_arguments, progress_bar, run_forward, select_target
from captum_fusion._passes.masking import checked_inputs, take, usable
from captum_fusion._passes.modes import as_called, callers_autocast, exclusive, grad_mode, hooks_enabled
from captum_fusion._passes.pace import FixedPace, TimedPace, layout_of, timed_pace
from captum_fusion._passes.sharing import WorkCache, current_cache, is_data, weights_of
from captum_fusion._types import Reshape, Target
from captum_fusion.functional import ScoreFn

Result = TypeVar("Result")


@dataclass(frozen=True)
class Call:
    """The network, inputs and target of one call of ``attribute``. Created by :meth:`checked`.

    Attributes:
        forward_func: Model or function of the inputs.
        inputs: Inputs. Dimension 0 is the batch of N examples.
        target: Target, in captum's format.
        arguments: Additional forward arguments.
        attribute_to_layer_input: Whether layers are evaluated at their input.
        reshape: Function that converts the layer's tensors, for example tokens, to (N, channels, *spatial).
        needs_target: Whether the target must select one output. If False, None is valid for any output.
        least_samples: Minimum number of samples in one call of the network: 2 in train mode, because batch
            normalisation can reject a single sample.
        bar: Progress bar that counts samples.
        cache: Results shared with other calls, if any.
        identity: Cache key of everything that a forward pass of this call depends on.
    """

    forward_func: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    target: Target
    arguments: tuple[Any, ...] | None
    attribute_to_layer_input: bool
    reshape: Reshape | None
    needs_target: bool
    least_samples: int
    bar: Any
    cache: WorkCache | None
    identity: Hashable

    @classmethod
    def checked(
        cls,
        forward_func: Callable[..., Any],
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        *,
        reshape: Reshape | None = None,
        needs_target: bool = True,
        training: bool = False,
        bar: Any = None,
    ) -> Call:
        """Check the inputs and create a call.

        Raises:
            TypeError: If ``inputs`` are not tensors with a batch dimension.
            ValueError: If the batch is empty.
            AssertionError: If a target is negative.
        """
        given = checked_inputs(inputs)
        arguments = format_arguments(additional_forward_args)
        _check_sign(target)
        cache = None if training or any(x.is_inference() for x in given) else current_cache()
        weights = None if cache is None or not is_data((given, arguments)) else weights_of(forward_func)
        identity: Hashable = None
        if cache is not None and weights is not None:
            called = cache.key((forward_func, given, arguments, attribute_to_layer_input)), callers_autocast()
            identity = called, cache.key_of_weights(weights)
        with grad_mode(torch.is_grad_enabled()):
            return cls(
                forward_func=forward_func,
                inputs=tuple(usable(x) for x in given),
                target=usable(target),
                arguments=None if arguments is None else tuple(usable(x) for x in arguments),
                attribute_to_layer_input=attribute_to_layer_input,
                reshape=reshape,
                needs_target=needs_target,
                least_samples=min(2, len(given[0])) if training else 1,
                bar=progress_bar(False, "") if bar is None else bar,
                cache=None if identity is None else cache,
                identity=identity,
            )

    @property
    def examples(self) -> int:
        """Number of examples."""
        return self.inputs[0].shape[0]

    @property
    def device(self) -> torch.device:
        """Device of the first input."""
        return self.inputs[0].device

    def of_samples(self, inputs: tuple[Tensor, ...], owners: Tensor, target: Target = None) -> Call:
        """This call for other samples made from its examples, with their targets and arguments.

        Args:
            inputs (tuple[Tensor, ...]): S samples.
            owners (Tensor): Example that each sample comes from, int64, (S,).
            target (optional): Target of the samples. Default: None (the targets of their examples)
        """
        return replace(
            self,
            inputs=inputs,
            target=self.target_of(owners) if target is None else target,
            arguments=self.arguments_of(owners),
            cache=None,
            identity=None,
        )

    def remember(self, key: Hashable, compute: Callable[[], Result], samples: int, **options: Any) -> Result:
        """The result cached under ``key`` in the :func:`shared_work` block, or the result of ``compute``."""
        if self.cache is None or key is None:
            return compute()
        return self.cache.remember((self.identity, key), compute, self.device, samples, **options)

    # ---- the network

    def forward(self, inputs: tuple[Tensor, ...], owners: Tensor | None = None, dims: int = 1) -> Tensor:
        """The checked output of the network for some samples.

        Args:
            inputs (tuple[Tensor, ...]): S samples.
            owners (Tensor, optional): Example that each sample comes from, int64, (S,).
                Default: None (the samples are the examples)
            dims (int): Known number of dimensions of the output. Default: 1
        """
        arguments = copied(self.arguments) if owners is None else self.arguments_of(owners)
        samples = self.examples if owners is None else len(owners)
        with exclusive(), as_called():
            return self.check_output(run_forward(self.forward_func, inputs, arguments), samples, dims)

    def check_output(self, output: Any, samples: int, dims: int = 1) -> Tensor:
        """Check that an output has one entry per sample, and return it.

        Raises:
            TypeError: If it is not a tensor.
            AssertionError: If its first dimension is not the number of samples.
        """
        if not isinstance(output, Tensor):
            raise TypeError(
                f"forward_func must return a tensor, not {type(output).__name__}; wrap the model in a function that "
                "picks the tensor to explain"
            )
        if samples == 1 and output.dim() == dims - 1:
            output = output.reshape(1, *output.shape)  # for models that end in squeeze()
        assert output.shape[:1] == (samples,), (
            f"forward_func must return one output for each of the {samples} examples of its input, not a tensor of "
            f"shape {tuple(output.shape)}{self.batch_hint()}"
        )
        checked: Tensor = output
        return checked

    def batch_hint(self) -> str:
        """A remark for error messages if the input may be one picture without a batch dimension, else nothing."""
        x = self.inputs[0]
        if len(self.inputs) > 1 or x.dim() != 3 or x.shape[0] not in (1, 3):
            return ""
        return f"; if the input of shape {tuple(x.shape)} is one picture, add a batch dimension: inputs.unsqueeze(0)"

    @contextlib.contextmanager
    def hinting(self) -> Iterator[None]:
        """Add :meth:`batch_hint` to an error of the network in its first pass.

        Raises:
            ValueError: Instead of a RuntimeError, if there is a hint.
        """
        try:
            yield
        except RuntimeError as error:
            if not self.batch_hint() or isinstance(error, torch.OutOfMemoryError):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"inputs: {reason}{self.batch_hint()}") from error

    def in_chunks(
        self,
        owners: Tensor,
        pace: TimedPace | FixedPace,
        evaluate: Callable[[slice, Tensor, torch.memory_format], Result],
        single_example: bool = False,
    ) -> Iterator[Result]:
        """Evaluate samples in chunks.

        Args:
            owners (Tensor): Example that each sample comes from, int64, (S,).
            pace (TimedPace or FixedPace): Chooses the size and memory layout of chunks.
            evaluate (callable): ``evaluate(chunk, owners of the chunk, layout)``.
            single_example (bool): Whether all samples of a chunk must come from one example. Default: False
        """
        if isinstance(getattr(self.bar, "total", None), int):
            self.bar.total += len(owners)
        start = 0
        while start < len(owners):
            stop, layout = pace.next(start)
            stop = min(stop, len(owners))
            if len(owners) - stop < self.least_samples:
                stop = len(owners)
            if single_example:
                stop = min(stop, start + int((owners[start:] == owners[start]).sum()))
            before = pace.now()
            try:
                result = evaluate(slice(start, stop), owners[start:stop], layout)
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                if not pace.recover(error, stop - start, layout):
                    raise
                continue
            pace.record(stop - start, layout, pace.now() - before)
            self.bar.update(stop - start)
            start = stop
            yield result

    def pace(self, owners: Tensor, limit: int | None, x: Tensor, **search: Any) -> TimedPace | FixedPace:
        """The chunks of samples that are made from ``x``.

        Args:
            owners (Tensor): Example that each sample comes from, int64, (S,).
            limit (int, optional): The user's limit. None chooses a size: by timing, with the options ``search`` of
                :class:`TimedPace`, or a default size if PyTorch must be deterministic.
            x (Tensor): Batch that the samples are created from.
        """
        if limit is not None:
            return FixedPace(owners, self.examples, limit, layout_of(x))
        if not torch.are_deterministic_algorithms_enabled():
            return timed_pace(self.forward_func, x, self.least_samples, **search)
        samples = FixedPace.DEFAULT_ON_CPU if self.device.type == "cpu" else FixedPace.DEFAULT_ELSEWHERE
        return FixedPace(owners, self.examples, max(1, samples // self.examples), layout_of(x), may_halve=True)

    def attribute_with(self, component: Any, differentiates: bool, ours: bool = False, **kwargs: Any) -> Any:
        """``component.attribute`` on this call's inputs.

        Captum's methods change flags of their inputs, and let the network change their values, so they get copies.
        Methods of this package (``ours``) do neither.
        """
        with grad_mode(torch.is_grad_enabled()), as_called(), hooks_enabled():
            inputs = self.inputs
            if not ours:
                inputs = copied(tuple(x.detach() for x in inputs))
                inputs = tuple(x.requires_grad_(differentiates and x.is_floating_point()) for x in inputs)
                if "additional_forward_args" in kwargs:
                    kwargs["additional_forward_args"] = copied(kwargs["additional_forward_args"])
            return component.attribute(inputs if len(inputs) > 1 else inputs[0], **kwargs)

    # ---- target and scores

    def select(self, output: Tensor, target: Target) -> Tensor:
        """The target's entry for each sample of an output, (S,).

        Raises:
            AssertionError: If the target does not select one entry per sample.
        """
        selected = select_target(output, target)
        assert selected.numel() == output.shape[0], (
            "Target not provided when necessary: an output of shape "
            f"{tuple(output.shape)} with target={target!r:.80} does not give one score per example"
        )
        return selected.reshape(-1)

    def check_target(self, output: Tensor) -> None:
        """Raise an AssertionError if a target is needed and does not select one entry per example of an output."""
        if self.needs_target or self.target is not None:
            self.select(output, self.target)

    def scores(self, output: Tensor, owners: Tensor | None, score_fn: ScoreFn) -> Tensor:
        """The scores of the samples of a raw output, (S,); ``owners`` as in :meth:`forward`."""
        return self.select(score_fn(output), self.target if owners is None else self.target_of(owners))

    def target_of(self, owners: Tensor) -> Target:
        """The targets of some examples."""
        if isinstance(self.target, list) and len(self.target) == self.examples:
            return [self.target[i] for i in owners.tolist()]
        if isinstance(self.target, Tensor) and self.target.numel() == 1:
            return self.target
        taken: Target = take(self.target, owners, self.examples)
        return taken

    def arguments_of(self, owners: Tensor) -> tuple[Any, ...] | None:
        """The additional arguments of some examples."""
        arguments = self.arguments and tuple(take(argument, owners, self.examples) for argument in self.arguments)
        result: tuple[Any, ...] | None = copied(arguments)
        return result


def copied(values: tuple[Any, ...] | None) -> Any:
    """A tuple with copies of the tensors, for a network that may change them in place; None for None."""
    return values and tuple(value.clone() if isinstance(value, Tensor) else value for value in values)


def _check_sign(target: Target) -> None:
    """Refuse negative targets, which an output would count from its end or refuse, depending on their form."""
    if isinstance(target, Tensor):
        negative = bool((target < 0).any())
    else:
        numbers: Any = target if isinstance(target, (tuple, list)) else (target,)
        nested = [number for part in numbers for number in (part if isinstance(part, (tuple, list)) else (part,))]
        negative = any(isinstance(number, Integral) and number < 0 for number in nested)
    assert not negative, f"Target must not be negative: {target!r:.80}"
