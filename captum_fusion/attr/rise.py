"""RISE: random masks of the input, without a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from captum.attr import PerturbationAttribution
from torch import Tensor

from captum_fusion import functional as formulas
from captum_fusion._arguments import count, share
from captum_fusion._captum import log_usage, progress_bar
from captum_fusion._passes.modes import own_arithmetic
from captum_fusion._passes.passes import Passes
from captum_fusion._types import Attributions, Baselines, Target
from captum_fusion.attr._bases import (
    SeveralTargets,
    checked_score_fn,
)
from captum_fusion.attr._docs import documented
from captum_fusion.attr._info import MethodInfo
from captum_fusion.functional import ScoreFn
from captum_fusion.functional.maps import seeded

__all__ = ["RISE"]


class RISE(PerturbationAttribution, SeveralTargets):
    r"""RISE: each pixel's value is the mean score of the randomly masked inputs that show it. Needs no layer.

    The map is ``L = sum_i p(x * m_i) m_i / (n_masks E[m])``. A mask is a random grid of zeros and ones, upsampled to
    slightly more than the input's size and cropped at a random shift. All examples share the same masks, which are
    created a chunk at a time.
    Cost per example: one forward sample and ``n_masks`` masked samples.

    More details in the paper: V. Petsiuk, A. Das, K. Saenko, "RISE: Randomized Input Sampling for Explanation of
    Black-box Models", BMVC 2018, https://arxiv.org/abs/1806.07421

    Examples::

        >>> from captum_fusion import RISE
        >>> from captum_fusion.demo import digits
        >>> model, scene = digits.load_model(), digits.load_scenes()[0]
        >>> RISE(model, n_masks=100).attribute(digits.preprocess(scene.image), scene.labels[0]).shape
        torch.Size([1, 3, 96, 96])
    """

    info = MethodInfo(
        "rise", "region", "4001", "Petsiuk et al., BMVC 2018", "https://arxiv.org/abs/1806.07421", space="input"
    )

    @documented
    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        n_masks: int = 4000,
        grid_size: int = 7,
        probability: float = 0.5,
        score_fn: str | ScoreFn = "softmax",
        seed: int = 0,
    ) -> None:
        """Args:
        forward_func (callable): Model, or function of the inputs.
        n_masks (int, optional): Number of masks. The paper uses 4000 for VGG-16 and 8000 for ResNet-50.
            Default: 4000
        grid_size (int, optional): Number of grid cells along each spatial dimension.
            Default: 7
        probability (float, optional): Probability that a cell shows the input.
            Default: 0.5
        {score_fn}
            Default: ``"softmax"``
        seed (int, optional): Seed of the masks. The global random generator is not used.
            Default: 0
        """
        if not callable(forward_func):
            raise TypeError(f"forward_func must be callable, not {type(forward_func).__name__}")
        PerturbationAttribution.__init__(self, forward_func)
        self.n_masks, self.grid_size = count("n_masks", n_masks), count("grid_size", grid_size)
        self.probability, self.seed = share("probability", probability, or_zero=False), count("seed", seed, 0)
        self.score_fn = checked_score_fn(score_fn)

    @classmethod
    def get_name(cls) -> str:
        """The class's name."""
        return cls.__name__

    @log_usage()
    @documented
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        baselines: Baselines = 0,
        mask_inputs: Sequence[int] | None = None,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
    ) -> Attributions:
        """Explain a batch.

        Args:
            inputs (Tensor or tuple[Tensor, ...]): Inputs to explain. Dimension 0 is the batch of N examples. A tuple if
                the network takes several tensors, which are aligned along dimension 0.
            target (int, tuple, Tensor or list, optional): Output to explain, in captum's format.
                Default: None
            additional_forward_args (Any, optional): Further arguments of ``forward_func``: a tuple or a single value.
                Tensors whose first dimension is N belong to the examples, and every masked sample gets the entry of
                its example.
                Default: None
            baselines (float, Tensor, tuple or None, optional): Replacement values where a mask is 0: a number, a tensor
                of an input's shape (or with first dimension 1), or a tuple with one of these for each input.
                Default: 0
            mask_inputs (sequence of int, optional): Indices of the inputs to mask. All get the same masks.
                Default: None (the first floating point input with spatial dimensions, and those of its rank)
            perturbations_per_eval (int, optional): Maximum number of masked samples per example in one call of the
                network. None chooses a fast number and layout by timing the first samples. The result is the same up to
                rounding. Nothing is timed if a number is given or ``torch.use_deterministic_algorithms(True)`` is set.
                Default: None
            show_progress (bool, optional): Show a progress bar that counts masked samples.
                Default: False

        Returns:
            *Tensor* or *tuple[Tensor, ...]* of **attributions**:
            - **attributions** (*Tensor* or *tuple[Tensor, ...]*): Of the inputs' shapes and dtypes, detached,
                identical in all channels; zeros for inputs that are not masked. A tuple if ``inputs`` is one.

        Raises:
            AssertionError: If the target does not select one output per example.
            ValueError: If an argument has an invalid value, or no input has spatial dimensions.
            TypeError: If an argument has an invalid type, or ``forward_func`` does not return a tensor.

        Examples::

            >>> import torch
            >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(10)).eval()
            >>> RISE(net, n_masks=50, grid_size=3).attribute(torch.rand(2, 3, 8, 8), target=[3, 7]).shape
            torch.Size([2, 3, 8, 8])
        """
        with progress_bar(show_progress, self.get_name()) as bar, own_arithmetic():
            passes = Passes.without_layer(
                self.forward_func,
                inputs,
                target,
                additional_forward_args,
                baselines=baselines,
                mask_inputs=mask_inputs,
                perturbations_per_eval=perturbations_per_eval,
                bar=bar,
            )
            maps = self._maps(passes)
        attributions = tuple(
            maps[i].to(x.dtype).expand_as(x).contiguous() if i in maps else torch.zeros_like(x)
            for i, x in enumerate(passes.call.inputs)
        )
        return attributions if isinstance(inputs, tuple) else attributions[0]

    def _maps(self, passes: Passes) -> dict[int, Tensor]:
        """The map of each masked input, (N, 1, *spatial), by the index of the input."""
        inputs = passes.call.inputs
        sizes = {i: tuple(inputs[i].shape[2:]) for i in passes.masking.indices}
        device, number = passes.device, passes.examples
        grids, shifts = self._draw(len(passes.spatial_size))
        totals = {i: formulas.precise(inputs[i].new_zeros(0)).new_zeros(number, 1, *size) for i, size in sizes.items()}
        owners = torch.arange(number, device=device).repeat(self.n_masks)
        numbers = torch.arange(self.n_masks, device="cpu").repeat_interleave(number)

        # The masks of the current chunk, which are needed twice: to mask the inputs and to sum the weighted masks.
        newest: dict[tuple[int, int, tuple[int, ...]], Tensor] = {}

        def masks(chunk: slice, size: Sequence[int]) -> Tensor:
            key = chunk.start, chunk.stop, tuple(size)
            if key not in newest:
                for old in [old for old in newest if old[:2] != key[:2]]:
                    del newest[old]
                picked, inverse = torch.unique_consecutive(numbers[chunk], return_inverse=True)
                newest[key] = formulas.rise_masks(grids[picked].to(device), shifts[picked], size)[inverse.to(device)]
            return newest[key]

        for chunk, scores in passes.iterate_scores(masks, owners, formulas.score_function(self.score_fn)):
            for i, size in sizes.items():
                total = totals[i]
                shape = (-1, *[1] * (total.dim() - 1))
                weighted = masks(chunk, size).to(total) * scores.to(total).reshape(shape)
                total.index_add_(0, owners[chunk].to(total.device), weighted)
        return {i: total / (self.n_masks * self.probability) for i, total in totals.items()}

    def _draw(self, dims: int) -> tuple[Tensor, Tensor]:
        """Grids (n_masks, 1, *cells) of zeros and ones, and shifts (n_masks, dims) as fractions of a cell."""
        shape, options = (self.n_masks, 1, *[self.grid_size] * dims), seeded(self.seed)
        grids = (torch.rand(shape, **options) < self.probability).float()
        return grids, torch.rand(self.n_masks, dims, **options)
