"""The passes that a method can run after the clean pass."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_fusion._passes.call import Call, copied
from captum_fusion._passes.layer_pass import LayerEvaluation, layer_pass
from captum_fusion._passes.masking import Compose, Masking, MaskingOptions, Masks, Perturb, maskable_rank
from captum_fusion._passes.modes import grad_mode, own_arithmetic, warn_if_training
from captum_fusion._passes.replacing import replaced_scores
from captum_fusion._passes.sharing import WorkCache
from captum_fusion._types import Baselines, Target
from captum_fusion.functional import ScoreFn


class PerturbedPass(NamedTuple):
    """Values of the layers for some perturbed copies of the inputs.

    Attributes:
        owners: Example that each copy comes from, int64, (S,).
        copies: Number of each copy, int64, (S,).
        evaluations: Values of each layer for the S copies.
    """

    owners: Tensor
    copies: Tensor
    evaluations: list[LayerEvaluation]


class Passes:
    """A call after its clean pass, with methods that run further passes.

    Args:
        call (Call): Network and inputs.
        output (Tensor): Raw output for the original inputs.
        options (MaskingOptions): How inputs are masked.
        rank (int): Number of dimensions of the masked inputs.
        baseline (list of Tensor, optional): Holds the output for the baselines once it is known. Passes with the same
            baselines share the list.
    """

    def __init__(
        self, call: Call, output: Tensor, options: MaskingOptions, rank: int, baseline: list[Tensor] | None = None
    ) -> None:
        self.call, self.output, self.options = call, output, options
        self._rank = rank
        self._baseline: list[Tensor] = [] if baseline is None else baseline

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
        """Run a clean pass that reads no layer. The rank of the inputs decides which of them are masked.

        Raises:
            AssertionError: If the target does not select one output per example.
            TypeError, ValueError: If an argument is invalid. The message names it.
        """
        training = isinstance(forward_func, nn.Module) and warn_if_training(forward_func, [])
        with own_arithmetic():
            call = Call.checked(forward_func, inputs, target, additional_forward_args, training=training, bar=bar)
            options = MaskingOptions(baselines, mask_inputs, perturbations_per_eval).check(call.inputs)
            rank = maskable_rank(call.inputs, mask_inputs)

            def clean() -> Tensor:
                with grad_mode(False), call.hinting():
                    return call.forward(copied(tuple(x.detach() for x in call.inputs))).clone()

            output = call.remember("clean", clean, call.examples)
            call.select(output, call.target)
            return cls(call, output, options, rank)

    def with_options(self, **options: Any) -> Passes:
        """These passes with other ``baselines``, ``mask_inputs`` or ``perturbations_per_eval``."""
        changed = self.options._replace(**options).check(self.call.inputs)
        baseline = self._baseline if options.keys() <= {"perturbations_per_eval"} else None
        return Passes(self.call, self.output, changed, self._rank, baseline)

    def blurred(self, blur: Callable[[Tensor], Tensor]) -> Passes:
        """These passes with the blurred inputs as baselines."""
        return self.with_options(baselines=self.masking.blurred_inputs(blur))

    @property
    def examples(self) -> int:
        """Number of examples."""
        return self.call.examples

    @property
    def spatial_size(self) -> tuple[int, ...]:
        """Spatial size of the first masked input and of fused maps, in pixels."""
        return self.masking.spatial_size

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first masked input and of fused maps."""
        return self.masking.first.dtype

    @property
    def device(self) -> torch.device:
        """Device of the first masked input."""
        return self.masking.device

    @cached_property
    def masking(self) -> Masking:
        """The inputs and their baselines."""
        with grad_mode(False):
            return Masking(self.call.inputs, self.options, self._rank)

    # ---- clean and baseline

    def clean_scores(self, score_fn: ScoreFn) -> Tensor:
        """Scores of the original inputs, (N,), from the clean pass."""
        return self.call.scores(self.output, None, score_fn)

    def baseline_scores(self, score_fn: ScoreFn) -> Tensor:
        """Scores of the baselines, (N,). The baselines run once, with one sample per example."""
        if not self._baseline:
            self._baseline.append(self._baseline_output())
        return self.call.scores(self._baseline[0], None, score_fn)

    def _baseline_output(self) -> Tensor:
        first = self.masking.first

        def run() -> Tensor:
            def nothing(chunk: slice, size: Sequence[int]) -> Tensor:
                return first.new_zeros(chunk.stop - chunk.start, 1, *size)

            owners = torch.arange(self.examples, device=first.device)
            return torch.cat([part for _, part in self._masked_outputs(nothing, owners, lambda output, _: output)])

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
                [0, 1]. It is called for few samples at a time, which limits the memory for masks.
            owners (Tensor): Example that each sample comes from, int64, (S,), in perturbation-major order.
            score_fn (callable): Function from raw output to scores.
            compose (callable, optional): Function that combines input, baseline and mask in another way.
                Default: None
            shared_as (optional): Key of everything that the masks depend on, if calls may share outputs. Default: None

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
            return list(self._masked_outputs(masks, owners, lambda output, _: output.detach(), compose))

        outputs = self.call.remember(self._masking_key("masked", shared_as, owners.tolist()), run, len(owners))
        parts = [self.call.scores(output, owners[chunk], score_fn) for chunk, output in outputs]
        return torch.cat([part.to(owners.device) for part in parts])

    def iterate_scores(
        self, masks: Masks, owners: Tensor, score_fn: ScoreFn, compose: Compose | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """:meth:`masked_scores` chunk by chunk, with the slice of the samples in each."""
        return self._masked_outputs(
            masks, owners, lambda output, chunk_owners: self.call.scores(output, chunk_owners, score_fn), compose
        )

    def _masked_outputs(
        self,
        masks: Masks,
        owners: Tensor,
        reduce: Callable[[Tensor, Tensor], Tensor],
        compose: Compose | None = None,
    ) -> Iterator[tuple[slice, Tensor]]:
        """Run the network on masked samples and yield ``reduce(raw output, owners)`` chunk by chunk."""

        def evaluate(chunk: slice, chunk_owners: Tensor, layout: torch.memory_format) -> tuple[slice, Tensor]:
            with grad_mode(False):
                samples = self.masking.masked(masks, chunk_owners, chunk, layout, compose)
                output = self.call.forward(samples, chunk_owners, self.output.dim())
                return chunk, reduce(output, chunk_owners).clone()

        pace = self.call.pace(owners, self.options.perturbations_per_eval, self.masking.first)
        return self.call.in_chunks(owners, pace, evaluate)

    def _masking_key(self, kind: str, *parts: Any) -> Hashable:
        """The cache key of masked samples; None if nothing is shared."""
        cache = self.call.cache
        if cache is None:
            return None
        return kind, cache.key((self.options.baselines, self.options.mask_inputs, self._rank, parts))

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
        """Run layer passes on perturbed copies of the inputs, chunk by chunk.

        Args:
            layers (list of Modules): Layers to read.
            device_ids (list of int, optional): Order of the devices, for a function that wraps a DataParallel model.
            perturb (callable): ``perturb(index, x, base, copies)``: perturbed samples of input ``index``, given the
                baseline and the number of each copy, int64 (len(x),).
            copies (int): Number of copies of each example.
            gradients (bool): Whether to compute gradients. Default: True
            grad_kwargs (dict, optional): Arguments of ``torch.autograd.grad``. Default: None
            targets (Tensor, optional): Target of each copy, int64, (copies, N). Default: None (the call's target)

        Yields:
            PerturbedPass: Some copies, and the values of the layers for them.
        """
        owners = torch.arange(self.examples, device=self.call.device).repeat(copies)
        numbers = torch.arange(copies, device=self.call.device).repeat_interleave(self.examples)
        targets = None if targets is None else targets.to(self.call.device)

        def evaluate(chunk: slice, chunk_owners: Tensor, layout: torch.memory_format) -> PerturbedPass:
            inputs = self.masking.perturbed(perturb, chunk_owners, numbers[chunk])
            target = None if targets is None else targets[numbers[chunk], chunk_owners]
            samples = self.call.of_samples(inputs, chunk_owners, target)
            result = layer_pass(samples, layers, device_ids, gradients, grad_kwargs, self.output.dim())
            return PerturbedPass(chunk_owners, numbers[chunk], result.evaluations)

        limit = self.options.perturbations_per_eval
        pace = self.call.pace(owners, limit, self.masking.first, scale=0.25, both_layouts=False)
        return self.call.in_chunks(owners, pace, evaluate)

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
