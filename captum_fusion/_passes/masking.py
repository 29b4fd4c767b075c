"""Masked and perturbed inputs. This module runs no network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_fusion._arguments import count
from captum_fusion._passes.pace import layout_of
from captum_fusion._types import Baselines

#: ``masks(chunk, size)``: the masks of the samples in a slice, (len(chunk), 1, *size), in [0, 1].
Masks = Callable[[slice, Sequence[int]], Tensor]
#: ``compose(inputs, baselines, masks, chunk)``: samples combined in another way than by blending.
Compose = Callable[[Tensor, "float | Tensor", Tensor, slice], Tensor]
#: ``perturb(index, inputs, baselines, copies)``: perturbed copies of input ``index``, given the number of each copy.
Perturb = Callable[[int, Tensor, "float | Tensor", Tensor], Tensor]


class MaskingOptions(NamedTuple):
    """How inputs are masked.

    Attributes:
        baselines: Replacement values where a mask is 0: a number, a tensor, or a tuple with one of these per input.
        mask_inputs: Indices of the inputs to mask; None for those of the layer's rank.
        perturbations_per_eval: Maximum number of samples per example in one call of the network; None to choose it by
            timing.
    """

    baselines: Baselines = 0
    mask_inputs: Sequence[int] | None = None
    perturbations_per_eval: int | None = None

    def check(self, inputs: tuple[Tensor, ...]) -> MaskingOptions:
        """Check the options against the inputs, as far as possible before the network runs, and return them.

        Raises:
            ValueError: If an option does not fit. The message names it.
        """
        if self.perturbations_per_eval is not None:
            count("perturbations_per_eval", self.perturbations_per_eval)
        indices = [] if self.mask_inputs is None else self.mask_inputs
        if not isinstance(indices, Sequence) or not all(
            isinstance(index, int) and 0 <= index < len(inputs) for index in indices
        ):
            raise ValueError(f"mask_inputs must be a list of indices of the {len(inputs)} inputs, not {indices!r}")
        if isinstance(self.baselines, tuple) and len(self.baselines) != len(inputs):
            raise ValueError(
                f"baselines must have one entry for each of the {len(inputs)} inputs, not {len(self.baselines)}"
            )
        if isinstance(self.baselines, Tensor) and len(inputs) > 1:
            raise ValueError(f"baselines must be a number or a tuple with an entry for each of {len(inputs)} inputs")
        return self


class _MaskedInput(NamedTuple):
    """A masked input. Its samples are ``base + mask * difference``."""

    difference: Tensor
    base: float | Tensor


class Masking:
    """Creates masked and perturbed samples of a batch of inputs.

    Args:
        inputs (tuple[Tensor, ...]): Inputs. Dimension 0 is the batch of N examples.
        options (MaskingOptions): Baselines and indices of the masked inputs.
        rank (int, optional): Number of dimensions of the masked inputs if ``mask_inputs`` is None.
            Default: None (the rank of the first floating point input with spatial dimensions)

    Raises:
        TypeError, ValueError: If inputs or options do not fit. The message names the argument.
    """

    def __init__(self, inputs: tuple[Tensor, ...], options: MaskingOptions, rank: int | None = None) -> None:
        self.inputs = inputs
        self._options = options.check(inputs)
        self._rank = maskable_rank(inputs, options.mask_inputs) if rank is None else rank
        with torch.no_grad():
            self._masked = {i: _MaskedInput(*self._difference(i)) for i in self._which()}

    @property
    def examples(self) -> int:
        """Number of examples."""
        return self.inputs[0].shape[0]

    @property
    def indices(self) -> list[int]:
        """Indices of the masked inputs."""
        return list(self._masked)

    @property
    def first(self) -> Tensor:
        """The first masked input."""
        return self.inputs[self.indices[0]]

    @property
    def spatial_size(self) -> tuple[int, ...]:
        """Spatial size of the first masked input, in pixels."""
        return tuple(self.first.shape[2:])

    @property
    def device(self) -> torch.device:
        """Device of the first masked input."""
        return self.first.device

    def masked(
        self,
        masks: Masks,
        owners: Tensor,
        chunk: slice | None = None,
        layout: torch.memory_format | None = None,
        compose: Compose | None = None,
    ) -> tuple[Tensor, ...]:
        """Masked samples: ``baseline + mask * (input - baseline)``.

        Args:
            masks (callable): Function of a slice of the samples and a spatial size that returns their masks.
            owners (Tensor): Example that each sample comes from, int64, (S,).
            chunk (slice, optional): Position of these samples among all samples. Default: None (the first S)
            layout (torch.memory_format, optional): Memory layout of the samples.
                Default: None (that of the first masked input)
            compose (callable, optional): Function that combines input, baseline and mask in another way. Default: None

        Returns:
            tuple[Tensor, ...]: One tensor of S samples per input. Inputs that are not masked are unchanged.
        """
        chunk = slice(0, len(owners)) if chunk is None else chunk
        layout = layout_of(self.first) if layout is None else layout
        samples = []
        for index, x in enumerate(self.inputs):
            if index not in self._masked:
                samples.append(take(x.detach(), owners, self.examples))
                continue
            difference, base = self._masked[index]
            mask = masks(chunk, x.shape[2:]).to(device=x.device, dtype=x.dtype)
            bases = take(base, owners) if isinstance(base, Tensor) else base
            if compose is not None:
                sample = compose(take(x.detach(), owners), bases, mask, chunk)
                samples.append(sample.to(x.dtype).contiguous(memory_format=layout))
                continue
            single = self.examples == 1
            picked = difference.expand(len(owners), *x.shape[1:]) if single else take(difference, owners)
            sample = torch.empty(picked.shape, dtype=x.dtype, device=x.device, memory_format=layout)
            torch.mul(picked, mask, out=sample)
            samples.append(sample if isinstance(bases, float) and not bases else sample.add_(bases))
        return tuple(samples)

    def perturbed(self, perturb: Perturb, owners: Tensor, copies: Tensor) -> tuple[Tensor, ...]:
        """Perturbed copies of the inputs.

        Args:
            perturb (callable): Function that perturbs copies of a masked input, given its baseline and their numbers.
            owners (Tensor): Example that each copy comes from, int64, (S,).
            copies (Tensor): Number of each copy, int64, (S,).

        Returns:
            tuple[Tensor, ...]: One tensor of S copies per input. Inputs that are not masked are unchanged.
        """
        samples = []
        for index, x in enumerate(self.inputs):
            if index not in self._masked:
                samples.append(take(x.detach(), owners, self.examples))
                continue
            base = self._masked[index].base
            bases = take(base, owners) if isinstance(base, Tensor) else base
            samples.append(perturb(index, take(x.detach(), owners), bases, copies).to(x))
        return tuple(samples)

    def blurred_inputs(self, blur: Callable[[Tensor], Tensor]) -> tuple[float | Tensor, ...]:
        """The masked inputs blurred, as baselines; 0 for inputs that are not masked."""
        return tuple(
            blur(x.detach()).to(x.dtype) if index in self._masked else 0 for index, x in enumerate(self.inputs)
        )

    def _which(self) -> list[int]:
        ranks = [x.dim() for x in self.inputs]
        if self._options.mask_inputs is None:
            which = [i for i, x in enumerate(self.inputs) if x.dim() == self._rank and x.is_floating_point()]
            if not which:
                raise ValueError(
                    f"inputs: none has the layer's {self._rank - 2} spatial dimensions and a floating point type "
                    f"(ranks {ranks}), so no input can be masked with a map of this layer"
                )
            return which
        which = list(self._options.mask_inputs)
        if not which or any(ranks[i] != self._rank or not self.inputs[i].is_floating_point() for i in which):
            raise ValueError(
                f"mask_inputs must be indices of floating point inputs of rank {self._rank}, not {which} "
                f"(ranks {ranks})"
            )
        return which

    def _difference(self, index: int) -> tuple[Tensor, float | Tensor]:
        x = self.inputs[index].detach()
        if x.shape[0] != self.examples:
            raise ValueError(
                f"inputs: input {index} has {x.shape[0]} examples and the first input {self.examples}; choose the "
                "inputs to mask with mask_inputs"
            )
        baselines = self._options.baselines
        base: Any = baselines[index] if isinstance(baselines, tuple) else baselines
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
        return (x - float(base), float(base)) if base else (x, 0.0)


def checked_inputs(inputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Check inputs and return them as a tuple.

    Raises:
        TypeError: If they are not tensors with a batch dimension.
        ValueError: If the batch is empty.
    """
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    if not tensors or not all(isinstance(x, Tensor) and x.dim() > 0 for x in tensors):
        kinds = ", ".join(type(x).__name__ for x in tensors) or "nothing"
        raise TypeError(f"inputs must be a tensor or a tuple of tensors with a batch dimension, not {kinds}")
    if not tensors[0].shape[0]:
        raise ValueError("inputs: the batch is empty")
    return tensors


def usable(value: Any) -> Any:
    """A copy that autograd can use if the tensor was created in inference mode; other values unchanged."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def maskable_rank(inputs: tuple[Tensor, ...], mask_inputs: Sequence[int] | None) -> int:
    """The rank of the masked inputs for methods without a layer.

    Raises:
        ValueError: If no input can be masked.
    """
    ranks = [x.dim() for x in inputs if x.dim() > 2 and x.is_floating_point()]
    if mask_inputs:
        ranks = [inputs[mask_inputs[0]].dim()]
    if not ranks or not 3 <= ranks[0] <= 5:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise ValueError(
            "inputs: there is nothing to mask, because no input is floating point and of shape (N, channels, *spatial) "
            f"with 1 to 3 spatial dimensions: {shapes}"
        )
    return ranks[0]


def take(value: Any, owners: Tensor, examples: int | None = None) -> Any:
    """The owners' entries of a tensor whose first dimension is the number of examples; other values unchanged."""
    if isinstance(value, Tensor) and value.dim() and examples in (None, value.shape[0]):
        return value.index_select(0, owners.to(value.device))
    return value
