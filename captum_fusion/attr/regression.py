"""Cell regression: the importance of each cell of a grid, from the scores of randomly masked inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_fusion import functional as formulas
from captum_fusion._arguments import count
from captum_fusion._types import Layer, Reshape
from captum_fusion.attr._bases import DetailedCAM, LayerTensor, checked_score_fn
from captum_fusion.attr._docs import documented
from captum_fusion.attr._info import MethodInfo
from captum_fusion.functional import ScoreFn

__all__ = ["LayerRegressionCAM", "RegressionDetails"]


class RegressionDetails(NamedTuple):
    """The linear model that was fitted to the scores of each example.

    Attributes:
        weights: Change in score when a cell is shown, in the units of the score, of shape ``(N, 1, *grid)``, float64,
            on the CPU.
        standard_errors: Their standard errors, of the same shape.
    """

    weights: Tensor
    standard_errors: Tensor


class LayerRegressionCAM(DetailedCAM):
    """Regression of the score on the cells of a grid: where the input must be shown for the score to rise.

    In random smooth masks, each cell of a coarse grid shows the input with probability 1/2. Masks are pairs of
    complements. A Bayesian linear regression of the differences of the pairs' scores on the cells gives each cell a
    weight, with Grad-CAM's map as the first guess (:func:`captum_fusion.functional.cell_regression`). The map is the
    ReLU of the weights, upsampled to the layer's size, not normalised. The number of masked samples does not depend on
    the number of channels, and the layer enters only through Grad-CAM's map. All examples share the same masks.
    Cost per example: one forward and one backward sample, and ``n_masks`` masked samples.

    The masks are those of RISE without shifts, in complementary pairs: V. Petsiuk, A. Das, K. Saenko, "RISE: Randomized
    Input Sampling for Explanation of Black-box Models", BMVC 2018, https://arxiv.org/abs/1806.07421. LIME also fits a
    linear model to masked scores: M. T. Ribeiro, S. Singh, C. Guestrin, KDD 2016, https://arxiv.org/abs/1602.04938. The
    design and the prior are this package's.

    Examples::

        >>> from captum_fusion import LayerRegressionCAM
        >>> from captum_fusion.demo import digits
        >>> model, scene = digits.load_model(), digits.load_scenes()[0]
        >>> method = LayerRegressionCAM(model, model.stage4, n_masks=64)
        >>> images = digits.preprocess(scene.image)
        >>> attribution, details = method.attribute(images, scene.labels[0], return_details=True)
        >>> attribution.shape, details.standard_errors.shape
        (torch.Size([1, 1, 12, 12]), torch.Size([1, 1, 7, 7]))
    """

    info = MethodInfo(
        "regression-cam",
        "region",
        "513, 1 b",
        "this package; masks of Petsiuk et al., BMVC 2018",
        "https://arxiv.org/abs/1806.07421",
    )
    masks_depend_on = ("n_masks", "grid_size", "seed")
    uses_gradients = True

    @documented
    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer,
        device_ids: list[int] | None = None,
        *,
        n_masks: int = 512,
        grid_size: int = 7,
        score_fn: str | ScoreFn = "softmax",
        seed: int = 0,
        reshape: Reshape | None = None,
    ) -> None:
        """Args:
        {constructor_args}
        n_masks (int, optional): Number of masks, even.
            Default: 512
        grid_size (int, optional): Number of cells along each spatial dimension; fewer if the layer has fewer
            positions.
            Default: 7
        {score_fn}
            Default: ``"softmax"``
        seed (int, optional): Seed of the masks. The global random generator is not used.
            Default: 0
        {reshape_arg}
        """
        DetailedCAM.__init__(self, forward_func, layer, device_ids, reshape=reshape)
        self.n_masks, self.grid_size = count("n_masks", n_masks, 2), count("grid_size", grid_size)
        if self.n_masks % 2:
            raise ValueError(f"n_masks must be even, since masks are pairs of complements, not {n_masks}")
        self.score_fn = checked_score_fn(score_fn)
        self.seed = count("seed", seed, 0)

    def _map_and_details(self, tensor: LayerTensor) -> tuple[Tensor, RegressionDetails]:
        activations = tensor.activations
        examples, spatial = activations.shape[0], activations.shape[2:]
        grid = tuple(min(self.grid_size, size) for size in spatial)
        cells = formulas.antithetic_cells(self.n_masks, math.prod(grid), self.seed)
        owners = torch.arange(examples, device=activations.device).repeat(self.n_masks)
        numbers = torch.arange(self.n_masks, device="cpu").repeat_interleave(examples)

        def masks(chunk: slice, size: Sequence[int]) -> Tensor:
            shown = cells[numbers[chunk]].reshape(-1, 1, *grid).to(activations.device)
            return formulas.upsample(shown, size)

        scores = tensor.masked_scores(masks, owners, formulas.score_function(self.score_fn))
        pairs = self._differences(scores.reshape(self.n_masks, examples).T)
        first_guess = formulas.grid_means(formulas.grad_cam(activations, tensor.gradients).relu(), grid)
        weights, errors = (
            result.reshape(examples, 1, *grid)
            for result in formulas.cell_regression(
                cells[0::2] - cells[1::2], pairs, first_guess.flatten(1), intercept=False
            )
        )
        attribution = formulas.upsample(weights.relu().to(scores), spatial)
        return attribution.to(activations), RegressionDetails(weights, errors)

    @staticmethod
    def _differences(scores: Tensor) -> Tensor:
        """Differences of the pairs' scores (N, pairs); 0 if the scores (N, n_masks) are constant up to rounding."""
        span = scores.amax(1) - scores.amin(1)
        varies = ~(span <= formulas.FLOOR * scores.abs().amax(1)) | ~scores.isfinite().all(1)
        return torch.where(varies[:, None], scores[:, 0::2] - scores[:, 1::2], 0.0)
