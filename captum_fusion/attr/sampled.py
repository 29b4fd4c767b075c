"""Gradient methods that compute gradients at several perturbed copies of the input."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_fusion import functional as formulas
from captum_fusion._arguments import choice, count, positive
from captum_fusion._captum import log_usage, path_steps
from captum_fusion._passes.layer_pass import LayerEvaluation
from captum_fusion._passes.passes import Passes
from captum_fusion._types import Attributions, Baselines, Layer, Reshape, Target
from captum_fusion.attr._bases import (
    MASKING_OPTIONS,
    SampledCAM,
)
from captum_fusion.attr._docs import documented
from captum_fusion.attr._info import MethodInfo
from captum_fusion.functional.maps import seeded

__all__ = ["LayerAugmentedGradCAM", "LayerIntegratedGradCAM", "LayerSmoothGradCAMPlusPlus"]


class LayerSmoothGradCAMPlusPlus(SampledCAM):
    r"""Smooth Grad-CAM++: Grad-CAM++ with derivatives averaged over noisy copies of the input.

    With ``D1, D2, D3`` the means over copies of ``g, g**2, g**3``, the pixel weights are
    ``alpha = D2 / (2 D2 + D3 sum_ab A_ab)`` and the channel weights ``w_k = sum alpha ReLU(D1)``. The paper prints
    ``D1`` in the numerator of ``alpha``, which does not reduce to Grad-CAM++. The map is ``ReLU(sum_k w_k A^k)`` with
    the activations of the original input, in the layer's space, not normalised. All examples share the same noise.
    Cost per example: one forward sample, and ``n_samples`` forward and backward samples.

    More details in the paper: D. Omeiza, S. Speakman, C. Cintas, K. Weldemariam, "Smooth Grad-CAM++: An Enhanced
    Inference Level Visualization Technique for Deep Convolutional Neural Network Models", 2019,
    https://arxiv.org/abs/1908.01224

    Examples::

        >>> from captum_fusion import LayerSmoothGradCAMPlusPlus
        >>> from captum_fusion.demo import digits
        >>> model, scene = digits.load_model(), digits.load_scenes()[0]
        >>> method = LayerSmoothGradCAMPlusPlus(model, model.stage4, stdevs=0.1)
        >>> method.attribute(digits.preprocess(scene.image), scene.labels[0]).shape
        torch.Size([1, 1, 12, 12])
    """

    info = MethodInfo(
        "smooth-grad-cam++", "gradient", "5, 4 b", "Omeiza et al., 2019", "https://arxiv.org/abs/1908.01224"
    )

    @documented
    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer,
        device_ids: list[int] | None = None,
        *,
        n_samples: int = 4,
        stdevs: float = 0.3,
        seed: int = 0,
        reshape: Reshape | None = None,
    ) -> None:
        """Args:
        {constructor_args}
        n_samples (int, optional): Number of noisy copies.
            Default: 4
        stdevs (float, optional): Standard deviation of the noise, in units of the input as given.
            Default: 0.3
        seed (int, optional): Seed of the noise. The global random generator is not used.
            Default: 0
        {reshape_arg}
        """
        SampledCAM.__init__(self, forward_func, layer, device_ids, reshape=reshape)
        self.n_samples, self.stdevs = count("n_samples", n_samples), positive("stdevs", stdevs, or_zero=True)
        self.seed = count("seed", seed, 0)

    def _maps(
        self, passes: Passes, evaluations: list[LayerEvaluation], grad_kwargs: dict[str, Any] | None = None
    ) -> list[tuple[Tensor, ...]]:
        noises: dict[int, Tensor] = {}

        def noisy(index: int, x: Tensor, base: float | Tensor, copies: Tensor) -> Tensor:
            if index not in noises:
                noises[index] = torch.randn(self.n_samples, *x.shape[1:], **seeded(self.seed + index)).to(x)
            return x + self.stdevs * noises[index][copies]

        sums = [[formulas.precise(t).new_zeros(3, *t.shape) for t in layer.activations] for layer in evaluations]
        copies = passes.perturbed(self.layers, self.device_ids, noisy, self.n_samples, grad_kwargs=grad_kwargs)
        for examples, _, perturbed in copies:
            for layer_sums, evaluation in zip(sums, perturbed, strict=True):
                for powers, gradient in zip(layer_sums, evaluation.gradients or (), strict=True):
                    precise = formulas.precise(gradient)
                    for exponent in (1, 2, 3):
                        powers[exponent - 1].index_add_(0, examples.to(precise.device), precise**exponent)
        return [
            tuple(_smooth_map(a, p / self.n_samples) for a, p in zip(layer.activations, layer_sums, strict=True))
            for layer, layer_sums in zip(evaluations, sums, strict=True)
        ]


def _smooth_map(activations: Tensor, means: Tensor) -> Tensor:
    first, second, third = means
    alphas = formulas.pixel_alphas(second, third, formulas.precise(activations))
    return formulas.weighted_activations(activations, formulas.sum_of_alphas(alphas, first)).to(activations.dtype)


class LayerIntegratedGradCAM(SampledCAM):
    r"""Integrated Grad-CAM: Grad-CAM averaged along the straight path from a baseline to the input.

    With ``x_t = X_b + t (x - X_b)`` the map is the integral over ``t`` from 0 to 1 of
    ``ReLU(sum_k GAP(g^k(x_t)) (A^k(x_t) - A^k(X_b)))``, in the layer's space, not normalised.
    Cost per example: two forward samples, and ``n_steps`` forward and backward samples.

    More details in the paper: S. Sattarzadeh et al., "Integrated Grad-CAM: Sensitivity-Aware Visual Explanation of
    Deep Convolutional Networks via Integrated Gradient-Based Scoring", ICASSP 2021, https://arxiv.org/abs/2102.07805.
    The authors' code sums over ``t = 0, ..., m - 1`` and uses 0 as the baseline's activations.

    Examples::

        >>> from captum_fusion import LayerIntegratedGradCAM
        >>> from captum_fusion.demo import digits
        >>> model, scene = digits.load_model(), digits.load_scenes()[0]
        >>> method = LayerIntegratedGradCAM(model, model.stage4, n_steps=10)
        >>> method.attribute(digits.preprocess(scene.image), scene.labels[0]).shape
        torch.Size([1, 1, 12, 12])
    """

    info = MethodInfo(
        "integrated-grad-cam",
        "gradient",
        "52, 50 b",
        "Sattarzadeh et al., ICASSP 2021",
        "https://arxiv.org/abs/2102.07805",
    )

    call_options = MASKING_OPTIONS

    @documented
    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer,
        device_ids: list[int] | None = None,
        *,
        n_steps: int = 50,
        rule: str = "riemann_middle",
        reshape: Reshape | None = None,
    ) -> None:
        """Args:
        {constructor_args}
        n_steps (int, optional): Number of points on the path.
            Default: 50
        rule (str, optional): Captum's rule for approximating the integral: ``"riemann_left"``, ``"riemann_right"``,
            ``"riemann_middle"``, ``"riemann_trapezoid"`` or ``"gausslegendre"``.
            Default: ``"riemann_middle"``
        {reshape_arg}
        """
        SampledCAM.__init__(self, forward_func, layer, device_ids, reshape=reshape)
        rules = ("riemann_left", "riemann_right", "riemann_middle", "riemann_trapezoid", "gausslegendre")
        self.rule = choice("rule", rule, rules)
        self.n_steps = count("n_steps", n_steps, 2 if rule == "riemann_trapezoid" else 1)

    @log_usage()
    @documented
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        *,
        baselines: Baselines = 0,
        mask_inputs: Sequence[int] | None = None,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> Attributions:
        """Explain a batch.

        Args:
            {shared_args}
            baselines (float, Tensor, tuple or None, optional): Start of the path: a number, a tensor of an
                input's shape (or with first dimension 1), or a tuple with one of these for each input.
                Default: 0
            {sampled_args}
            {grad_kwargs}

        Returns:
            {layer_returns}

        Raises:
            {raises}

        Examples::

            >>> import torch
            >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.LazyLinear(10)).eval()
            >>> LayerIntegratedGradCAM(net, net[0]).attribute(torch.rand(2, 3, 8, 8), target=[3, 7]).shape
            torch.Size([2, 1, 6, 6])
        """
        maps = self._explain(
            lambda passes, evaluations: self._maps(passes, evaluations, grad_kwargs),
            inputs,
            target,
            additional_forward_args,
            attribute_to_layer_input,
            baselines=baselines,
            mask_inputs=mask_inputs,
            perturbations_per_eval=perturbations_per_eval,
            show_progress=show_progress,
        )
        return self._result(maps)

    def _maps(
        self, passes: Passes, evaluations: list[LayerEvaluation], grad_kwargs: dict[str, Any] | None = None
    ) -> list[tuple[Tensor, ...]]:
        step_sizes, positions = path_steps(self.n_steps, self.rule)

        def on_path(index: int, x: Tensor, base: float | Tensor, copies: Tensor) -> Tensor:
            share = x.new_tensor(positions)[copies].reshape(-1, *[1] * (x.dim() - 1))
            return base + share * (x - base)

        def at_base(index: int, x: Tensor, base: float | Tensor, copies: Tensor) -> Tensor:
            return torch.zeros_like(x) + base

        starts = [[formulas.at_least_float32(t).new_zeros(t.shape) for t in layer.activations] for layer in evaluations]
        for examples, _, at_start in passes.perturbed(self.layers, self.device_ids, at_base, 1, gradients=False):
            for start, evaluation in zip(starts, at_start, strict=True):
                for base, activations in zip(start, evaluation.activations, strict=True):
                    base[examples.to(base.device)] = activations.to(base)
        sums = [[t.new_zeros(t.shape[0], 1, *t.shape[2:]) for t in start] for start in starts]
        perturbed = passes.perturbed(self.layers, self.device_ids, on_path, self.n_steps, grad_kwargs=grad_kwargs)
        for examples, copies, on_path_pass in perturbed:
            for total, start, evaluation in zip(sums, starts, on_path_pass, strict=True):
                for into, base, activations, gradients in zip(
                    total, start, evaluation.activations, evaluation.gradients or (), strict=True
                ):
                    owners = examples.to(base.device)
                    step = base.new_tensor(step_sizes)[copies.to(base.device)].reshape(-1, *[1] * (base.dim() - 1))
                    difference = formulas.at_least_float32(activations) - base[owners]
                    into.index_add_(0, owners, step * formulas.grad_cam(difference, gradients).relu())
        return [
            tuple(t.to(a.dtype) for t, a in zip(total, layer.activations, strict=True))
            for total, layer in zip(sums, evaluations, strict=True)
        ]


class LayerAugmentedGradCAM(SampledCAM):
    r"""Augmented Grad-CAM: a high-resolution map from the Grad-CAMs of rotated and shifted copies of the image.

    The image is rotated and shifted at random to give ``n_samples`` copies; the first copy is the image itself. All
    examples share the same transformations, and pixels from outside the image are zero. The Grad-CAMs of the copies
    sample the object at slightly different positions.

    ``combination="super_resolution"`` divides each Grad-CAM by its maximum, leaves out those that are all zero, and
    computes the map that fits the others best,
    ``argmin_h sum_l |D T_l h - g_l|^2 + 0.002 L TV(h) + 0.0001 L |h|^2``
    (:func:`captum_fusion.functional.super_resolve`). Here ``D`` averages over the cells of the coarse map; in the
    authors' code it picks single pixels. ``"mean"`` and ``"max"`` upsample the Grad-CAMs, transform them back and
    combine them pixel by pixel.

    The map is in the input's space, in [0, 1], and never part of a graph. The method supports images only (two spatial
    dimensions).
    Cost per example: one forward sample, and ``n_samples`` forward and backward samples. The super-resolution takes
    seconds per image on a CPU.

    More details in the paper: P. Morbidelli, D. Carrera, B. Rossi, P. Fragneto, G. Boracchi, "Augmented Grad-CAM:
    Heat-Maps Super Resolution Through Augmentation", ICASSP 2020, https://doi.org/10.1109/ICASSP40776.2020.9054416

    Examples::

        >>> from captum_fusion import LayerAugmentedGradCAM
        >>> from captum_fusion.demo import digits
        >>> model, scene = digits.load_model(), digits.load_scenes()[0]
        >>> method = LayerAugmentedGradCAM(model, model.stage4, n_samples=8)
        >>> method.attribute(digits.preprocess(scene.image), scene.labels[0]).shape
        torch.Size([1, 1, 96, 96])
    """

    info = MethodInfo(
        "augmented-grad-cam",
        "gradient",
        "101, 100 b",
        "Morbidelli et al., ICASSP 2020",
        "https://doi.org/10.1109/ICASSP40776.2020.9054416",
        space="input",
    )

    @documented
    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer,
        device_ids: list[int] | None = None,
        *,
        n_samples: int = 100,
        rotation: float = 0.5,
        shift: float = 30 / 224,
        combination: str = "super_resolution",
        n_iterations: int = 200,
        seed: int = 0,
        reshape: Reshape | None = None,
    ) -> None:
        """Args:
        {constructor_args}
        n_samples (int, optional): Number of copies, including the image itself.
            Default: 100
        rotation (float, optional): Maximum rotation, in radians.
            Default: 0.5
        shift (float, optional): Maximum shift, as a fraction of the width and height.
            Default: 30 / 224
        combination (str, optional): How the Grad-CAMs are combined: ``"super_resolution"``, ``"mean"`` or ``"max"``.
            Default: ``"super_resolution"``
        n_iterations (int, optional): Number of Adam steps of the super-resolution. The learning rate is 0.001.
            Default: 200
        seed (int, optional): Seed of the transformations. The global random generator is not used.
            Default: 0
        {reshape_arg}
        """
        SampledCAM.__init__(self, forward_func, layer, device_ids, reshape=reshape)
        self.n_samples, self.seed = count("n_samples", n_samples), count("seed", seed, 0)
        self.rotation, self.shift = positive("rotation", rotation, or_zero=True), positive("shift", shift, or_zero=True)
        self.combination = choice("combination", combination, ("super_resolution", "mean", "max"))
        self.n_iterations = count("n_iterations", n_iterations)

    def _maps(
        self, passes: Passes, evaluations: list[LayerEvaluation], grad_kwargs: dict[str, Any] | None = None
    ) -> list[tuple[Tensor, ...]]:
        size = passes.spatial_size
        if len(size) != 2:
            raise ValueError(f"layer: Augmented Grad-CAM needs inputs with two spatial dimensions, not {len(size)}")
        draws = 2 * torch.rand(self.n_samples, 3, **seeded(self.seed)) - 1
        draws[0] = 0
        angles, moves = self.rotation * draws[:, 0], self.shift * draws[:, 1:]

        def moved(index: int, x: Tensor, base: float | Tensor, copies: Tensor) -> Tensor:
            which = copies.to("cpu")
            grid = formulas.affine_grids(angles[which], moves[which], x.shape[2:]).to(formulas.at_least_float32(x))
            return F.grid_sample(formulas.at_least_float32(x), grid, mode="bilinear", align_corners=False)

        coarse = [
            [
                formulas.at_least_float32(t).new_zeros(t.shape[0], self.n_samples, *t.shape[2:])
                for t in layer.activations
            ]
            for layer in evaluations
        ]
        perturbed = passes.perturbed(self.layers, self.device_ids, moved, self.n_samples, grad_kwargs=grad_kwargs)
        for examples, copies, moved_pass in perturbed:
            for into, evaluation in zip(coarse, moved_pass, strict=True):
                for maps, activations, gradients in zip(
                    into, evaluation.activations, evaluation.gradients or (), strict=True
                ):
                    maps[examples.to(maps.device), copies.to(maps.device)] = (
                        formulas.grad_cam(activations, gradients).relu()[:, 0].detach()
                    )
        dtype = passes.dtype
        return [
            tuple(self._combine(maps, angles, moves, size).to(dtype).contiguous() for maps in layer) for layer in coarse
        ]

    def _combine(self, maps: Tensor, angles: Tensor, moves: Tensor, size: Sequence[int]) -> Tensor:
        """One map (N, 1, *size) in [0, 1] from the coarse maps (N, n_samples, h, w) of the copies."""
        broken = ~maps.flatten(1).isfinite().all(1)[:, None, None, None]
        maps = maps.masked_fill(broken, 0.0)  # NaN marks what is unknown of a map
        return self._combined(maps, angles, moves, size).masked_fill(broken, math.nan)

    def _combined(self, maps: Tensor, angles: Tensor, moves: Tensor, size: Sequence[int]) -> Tensor:
        """The same for finite maps."""
        if self.combination == "super_resolution":
            largest = maps.flatten(2).amax(2)[..., None, None]
            shares = torch.where(largest > 0, maps / torch.where(largest > 0, largest, 1.0), math.nan)
            grids = formulas.affine_grids(angles, moves, size).to(maps.device)
            weights = 0.002 * self.n_samples, 0.0001 * self.n_samples
            return formulas.normalize(formulas.super_resolve(shares, grids, *weights, self.n_iterations))
        # The inverse of "rotate, then shift" in sampling coordinates: the rotated negative shift, and a rotation back.
        cos, sin, aspect = angles.cos(), angles.sin(), size[0] / size[1]
        back = -torch.stack(
            [cos * moves[:, 0] + sin * aspect * moves[:, 1], -sin / aspect * moves[:, 0] + cos * moves[:, 1]], 1
        )
        grids = formulas.affine_grids(-angles, back, size).to(maps)
        raised = formulas.upsample(maps.transpose(0, 1), size)
        aligned = F.grid_sample(raised, grids, mode="bilinear", align_corners=False).transpose(0, 1)
        combined = aligned.mean(1, keepdim=True) if self.combination == "mean" else aligned.amax(1, keepdim=True)
        return formulas.normalize(combined)
