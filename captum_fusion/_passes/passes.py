"""What a method can ask of the network once its clean pass has run."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_fusion._passes.call import Call
from captum_fusion._passes.layer_pass import LayerEvaluation, layer_pass
from captum_fusion._passes.masking import Compose, Masking, MaskingOptions, Masks, Perturb, maskable_rank
from captum_fusion._passes.modes import grad_mode, no_inference_mode, warn_if_training
from captum_fusion._passes.pace import FixedPace, TimedPace, layout_of
from captum_fusion._passes.replacing import replaced_scores
from captum_fusion._passes.sharing import WorkCache
from captum_fusion._types import Baselines, Target
from captum_fusion.functional import ScoreFn


class PerturbedPass(NamedTuple):
    """The layers on some changed copies of the inputs.

    Attributes:
        owners: int64, (S,): the example that each copy is made from.
        copies: int64, (S,): the number of each copy.
        evaluations: The values of each layer, for the S copies.
    """

    owners: Tensor
    copies: Tensor
    evaluations: list[LayerEvaluation]


class Passes:
    """A call after its clean pass, and every further pass that is run for it.

    Args:
        call (Call): The network and its inputs.
        output (Tensor): Its raw output for the inputs as they are.
        options (MaskingOptions): How inputs are masked.
        rank (int): The number of dimensions of the inputs that are masked.
        baseline (list of Tensor, optional): Holds the output for the baselines once it is known; passes with the same
            baselines share it.
    """

    def __init__(
        self, call: Call, output: Tensor, options: MaskingOptions, rank: int, baseline: list[Tensor] | None = None
    ) -> None:
        self.call, self.output, self.options = call, output, options
        self._rank = rank
        self._baseline: list[Tensor] = [] if baseline is None else baseline
        self._timed: TimedPace | None = None

    @classmethod
    def without_layer(
        cls,
        forward_func: Callable[..., Any],
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        baselines: Baselines = 0,
        mask_inputs: Sequence[int] | None = None,
        perturbations_per_eval: int | None = None,
        bar: Any = None,
    ) -> Passes:
        """A call whose clean pass reads no layer. The inputs' own rank decides which of them are masked.

        Raises:
            AssertionError: If the target does not select one output for each example.
            TypeError, ValueError: If an argument is bad; the message names it.
        """
        training = isinstance(forward_func, nn.Module) and warn_if_training(forward_func, [])
        with no_inference_mode():
            call = Call.checked(forward_func, inputs, target, additional_forward_args, training=training, bar=bar)
            options = MaskingOptions(baselines, mask_inputs, perturbations_per_eval).check(call.inputs)
            rank = maskable_rank(call.inputs, mask_inputs)

            def clean() -> Tensor:
                with grad_mode(False):
                    output = call.forward(tuple(x.detach() for x in call.inputs))
                    call.select(output, call.target)
                    return output.clone()

            output = call.remember("clean", clean, call.examples)
            call.select(output, call.target)
            return cls(call, output, options, rank)

    def with_options(self, **options: Any) -> Passes:
        """These passes with other ``baselines``, ``mask_inputs`` or ``perturbations_per_eval``."""
        changed = self.options._replace(**options).check(self.call.inputs)
        baseline = self._baseline if options.keys() <= {"perturbations_per_eval"} else None
        return Passes(self.call, self.output, changed, self._rank, baseline)

    def blurred(self, kernel_size: int, sigma: float) -> Passes:
        """These passes with the masked inputs under a Gaussian as their baselines."""
        return self.with_options(baselines=self.masking.blurred_inputs(kernel_size, sigma))

    @property
    def examples(self) -> int:
        """The number of examples."""
        return self.call.examples

    @property
    def spatial_size(self) -> tuple[int, ...]:
        """Spatial size of the first masked input, in pixels, which is that of fused maps."""
        return self.masking.spatial_size

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first masked input, which is that of fused maps."""
        return self.masking.first.dtype

    @property
    def device(self) -> torch.device:
        """The device of the first masked input."""
        return self.masking.device

    @cached_property
    def masking(self) -> Masking:
        """The inputs, and what shows where they are masked."""
        with grad_mode(False):
            return Masking(self.call.inputs, self.options, self._rank)

    # ---- clean and baseline

    def clean_scores(self, score_fn: ScoreFn) -> Tensor:
        """Scores of the unmasked inputs, (N,). They take no pass: the clean pass has them."""
        return self.call.scores(self.output, None, score_fn)

    def baseline_scores(self, score_fn: ScoreFn) -> Tensor:
        """Scores of the baselines, (N,). One sample for each example, run once however often this is asked."""
        if not self._baseline:
            self._baseline.append(self._baseline_output())
        return self.call.scores(self._baseline[0], None, score_fn)

    def _baseline_output(self) -> Tensor:
        first = self.masking.first

        def run() -> Tensor:
            def nothing(chunk: slice, size: Sequence[int]) -> Tensor:
                return first.new_zeros(chunk.stop - chunk.start, 1, *size)

            owners = torch.arange(self.examples, device=first.device)
            return torch.cat([part for _, part in self._masked_outputs(nothing, owners, lambda output, some: output)])

        return self.call.remember(self._masking_key("baseline"), run, self.examples)

    def select(self, table: Tensor) -> Tensor:
        """The target's entry of each example in a table of shape (N, ...), as captum selects outputs; (N,)."""
        return self.call.select(table, self.call.target)

    # ---- masked samples

    def masked_scores(
        self,
        masks: Masks,
        owners: Tensor,
        score_fn: ScoreFn,
        compose: Compose | None = None,
        shared_as: Any = None,
    ) -> Tensor:
        """Scores of ``baseline + mask * (input - baseline)``.

        Args:
            masks (callable): ``masks(chunk, size)``: the masks of the samples in a slice, (len(chunk), 1, *size), in
                [0, 1]. It is asked for few samples at a time, so that not all masks need be in memory.
            owners (Tensor): int64, (S,): the example that each sample masks, in perturbation-major order.
            score_fn (callable): From raw output to scores.
            compose (callable, optional): Makes samples of input, baseline and mask in another way.
            shared_as (optional): What the masks depend on, if other calls may share the outputs. Default: None

        Returns:
            Tensor: (S,), float64 (float32 on devices without it).
        """
        if not len(owners):
            return torch.empty(0, device=owners.device)
        small = self.output[0].numel() * len(owners) <= WorkCache.LARGEST_OUTPUT
        if shared_as is None or self.call.cache is None or not small:
            scores = self.iterate_scores(masks, owners, score_fn, compose)
            return torch.cat([part.to(owners.device) for _, part in scores])

        def run() -> list[tuple[slice, Tensor]]:
            return list(self._masked_outputs(masks, owners, lambda output, some: output.detach(), compose))

        outputs = self.call.remember(self._masking_key("masked", shared_as, owners.tolist()), run, len(owners))
        parts = [self.call.scores(output, owners[chunk], score_fn) for chunk, output in outputs]
        return torch.cat([part.to(owners.device) for part in parts])

    def iterate_scores(
        self, masks: Masks, owners: Tensor, score_fn: ScoreFn, compose: Compose | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """:meth:`masked_scores` chunk by chunk, with the slice of the samples in each."""
        return self._masked_outputs(
            masks, owners, lambda output, some: self.call.scores(output, some, score_fn), compose
        )

    def _masked_outputs(
        self,
        masks: Masks,
        owners: Tensor,
        reduce: Callable[[Tensor, Tensor], Tensor],
        compose: Compose | None = None,
    ) -> Iterator[tuple[slice, Tensor]]:
        """Run the network on masked samples; yields ``reduce(raw output, owners)`` chunk by chunk."""

        def evaluate(chunk: slice, some: Tensor, layout: torch.memory_format) -> tuple[slice, Tensor]:
            with grad_mode(False):
                samples = self.masking.masked(masks, some, chunk, layout, compose)
                output = self.call.forward(samples, some, self.output.dim())
                return chunk, reduce(output, some).clone()

        return self.call.in_chunks(owners, self._pace(owners), evaluate)

    def _masking_key(self, kind: str, *parts: Any) -> Hashable:
        """What masked samples are shared under; None where nothing is shared."""
        cache = self.call.cache
        if cache is None:
            return None
        return kind, cache.key((self.options.baselines, self.options.mask_inputs, self._rank, parts))

    def _pace(self, owners: Tensor) -> TimedPace | FixedPace:
        first = self.masking.first
        fixed = self.call.fixed_pace(owners, self.options.perturbations_per_eval, layout_of(first))
        if fixed is not None:
            return fixed
        if self._timed is None:
            self._timed = TimedPace(first, self.call.least_samples, expected=len(owners))
        return self._timed

    # ---- perturbed and replaced

    def perturbed(
        self,
        layers: list[nn.Module],
        device_ids: list[int] | None,
        perturb: Perturb,
        copies: int,
        gradients: bool = True,
        grad_kwargs: dict[str, Any] | None = None,
        targets: Tensor | None = None,
    ) -> Iterator[PerturbedPass]:
        """Layer passes on changed copies of the inputs, a few at a time.

        Args:
            layers (list of Modules): As for :func:`captum_fusion._passes.layer_pass.layer_pass`.
            device_ids (list of int, optional): As there.
            perturb (callable): ``perturb(index, x, base, copies)``: samples of masked input number ``index``, changed,
                given their baseline and the number of each copy, int64 (len(x),).
            copies (int): The number of copies of each example.
            gradients (bool): Whether to differentiate. Default: True
            grad_kwargs (dict, optional): For ``torch.autograd.grad``.
            targets (Tensor, optional): int64, (copies, N): a target of its own for each copy.

        Yields:
            PerturbedPass: Some copies, and the layers' values on them.
        """
        owners = torch.arange(self.examples, device=self.call.device).repeat(copies)
        numbers = torch.arange(copies, device=self.call.device).repeat_interleave(self.examples)
        targets = None if targets is None else targets.to(self.call.device)

        def evaluate(chunk: slice, some: Tensor, layout: torch.memory_format) -> PerturbedPass:
            inputs = self.masking.perturbed(perturb, some, numbers[chunk])
            target = None if targets is None else targets[numbers[chunk], some]
            copied = self.call.of_samples(inputs, some, target)
            found = layer_pass(copied, layers, device_ids, gradients, grad_kwargs)
            return PerturbedPass(some, numbers[chunk], found.evaluations)

        first = self.masking.first
        pace = self.call.fixed_pace(owners, self.options.perturbations_per_eval, layout_of(first))
        pace_or_timed = pace or TimedPace(first, self.call.least_samples, scale=0.25, both_layouts=False)
        return self.call.in_chunks(owners, pace_or_timed, evaluate)

    def replaced_scores(
        self,
        layer: nn.Module,
        evaluation: LayerEvaluation,
        index: int,
        replace: Callable[[slice], Tensor],
        owners: Tensor,
        score_fn: ScoreFn,
        device_ids: list[int] | None = None,
    ) -> Tensor:
        """:func:`captum_fusion._passes.replacing.replaced_scores` for this call."""
        return replaced_scores(
            self.call,
            layer,
            evaluation,
            index,
            replace,
            owners,
            score_fn,
            limit=self.options.perturbations_per_eval,
            output_dims=self.output.dim(),
            device_ids=device_ids,
        )
