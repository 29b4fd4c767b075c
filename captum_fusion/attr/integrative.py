"""Integrative CAM: one map computed from several layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import torch
from captum.attr import GradientAttribution
from torch import Tensor, nn

from captum_fusion import functional as formulas
from captum_fusion._arguments import choice, count, positive, share
from captum_fusion._captum import log_usage
from captum_fusion._passes.layer_pass import LayerEvaluation
from captum_fusion._passes.passes import Passes
from captum_fusion._types import Layer, Reshape, Target
from captum_fusion.attr._bases import (
    CAM,
)
from captum_fusion.attr._docs import documented
from captum_fusion.attr._info import MethodInfo

__all__ = ["IntegrativeDetails", "LayerIntegrativeCAM"]

_BIASES = ("residual", "layer", "fullgrad", "none")
_LAYER_WEIGHTINGS = ("mean", "product", "uniform")


class IntegrativeDetails(NamedTuple):
    """Intermediate results of :class:`LayerIntegrativeCAM` for L maps, one per tensor of each layer.

    Attributes:
        layer_maps: Normalised map of each layer, ``(N, L, *input spatial)``, in [0, 1].
        layer_weights: Weight of each layer in the fusion, (N, L). The weights sum to 1, or are all 0.
        kept: Whether a layer is part of the fusion, bool, (N, L). False if it is redundant or its map is constant.
        clipped: Fraction of the positions with a positive gradient whose alpha was clipped to [0, 1], (N, L).
    """

    layer_maps: Tensor
    layer_weights: Tensor
    kept: Tensor
    clipped: Tensor


class LayerIntegrativeCAM(CAM, GradientAttribution):
    r"""Integrative CAM: maps of several layers, fused with a weight for each layer, in one pass.

    Only the abstract of the paper was available. It says that all layers are fused, that layer weights come from
    gradient and activation scores, that the map has a bias term, and that Grad-CAM++'s alpha is generalised to any
    smooth function. This implementation is the project's interpretation of the abstract. Only step 1 follows from the
    abstract and the derivation of Grad-CAM++:

    1. for a smooth function ``Y = phi(s)`` of the score, ``alpha = D2 / (2 D2 + D3 sum_ab A_ab)`` with the second and
       third derivatives of ``Y``, which are those of ``phi`` times ``g**2`` and ``g**3`` where the network is locally
       linear; ``phi="exp"`` gives Grad-CAM++ exactly. Alphas are clipped to [0, 1], and sum to 1 over a channel's
       positive gradients unless ``normalize_alpha=False``. The channel weights are ``w_k = sum alpha ReLU(g)``. The
       slope of ``phi`` is a common factor and is left out;
    2. the layer's map is ``M = ReLU(sum_k w_k A^k + bias)``. The default bias distributes the part of the score that
       the weighted activations do not explain evenly over the Z positions, ``(s - sum_k w_k sum A^k) / Z``, so that
       the map sums to the score before the ReLU;
    3. a layer's weight is the weighted mean of its shares of the mean absolute gradient ``G`` and activation ``Q``,
       ``balance G_l / sum G + (1 - balance) Q_l / sum Q``;
    4. of layers whose normalised maps differ by less than ``redundancy_threshold`` on average, only the one with the
       larger weight is kept;
    5. the result is ``N(sum_l omega_l N(Up(M_l)))``, in the input's space, in [0, 1].

    Cost per example: one forward and one backward sample, for any number of layers. ``phi="softmax"`` takes one more
    forward and backward sample for each of ``softmax_classes`` classes.

    More details in the paper: A. K. Singh, D. Chaudhuri, M. P. Singh, S. Chattopadhyay, "Integrative CAM: Adaptive
    Layer Fusion for Comprehensive Interpretation of CNNs", 2024, https://arxiv.org/abs/2412.01354

    Examples::

        >>> from captum_fusion import LayerIntegrativeCAM
        >>> from captum_fusion.demo import digits
        >>> model, scene = digits.load_model(), digits.load_scenes()[0]
        >>> method = LayerIntegrativeCAM(model, [model.stage2, model.stage3, model.stage4])
        >>> method.attribute(digits.preprocess(scene.image), scene.labels[0]).shape
        torch.Size([1, 1, 96, 96])
    """

    info = MethodInfo(
        "integrative-cam",
        "fusion",
        "1, 1 b",
        "Singh et al., 2024",
        "https://arxiv.org/abs/2412.01354",
        space="input",
        fuses_layers=True,
    )

    @documented
    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer,
        device_ids: list[int] | None = None,
        *,
        phi: str | Callable[[Tensor], Tensor] = "exp",
        normalize_alpha: bool = True,
        bias: str = "residual",
        layer_weighting: str = "mean",
        balance: float = 0.5,
        redundancy_threshold: float | None = None,
        softmax_classes: int = 10,
        reshape: Reshape | None = None,
    ) -> None:
        """Args:
        {constructor_args}
            This method fuses the layers into one map. A good choice is the last layer of each resolution.
        phi (str or callable, optional): Smooth function of the score: ``"exp"``, ``"softplus"``,
            ``"sigmoid"``, ``"square"``, ``"identity"`` (every alpha is 1/2), ``"softmax"`` over the classes,
            or any function from scores (N,) to (N,) that autograd can differentiate three times.
            Default: ``"exp"``
        normalize_alpha (bool, optional): Whether the alphas sum to 1 over a channel's positive gradients.
            Default: True
        bias (str, optional): Bias term of a layer's map: ``"residual"``, as in step 2; ``"layer"``, the bias of the
            layer's last convolution or batch norm with the channels' weights; ``"fullgrad"``, the same bias weighted
            by the gradients at each position; or ``"none"``.
            Default: ``"residual"``
        layer_weighting (str, optional): Weights of the layers: the ``"mean"`` of the gradient and activation shares,
            their normalised ``"product"``, or ``"uniform"``.
            Default: ``"mean"``
        balance (float, optional): Weight of the gradient share in the mean, 0 to 1.
            Default: 0.5
        redundancy_threshold (float or None, optional): Mean absolute difference of two layers' normalised maps below
            which the layer with the smaller weight is left out. None keeps all layers.
            Default: None
        softmax_classes (int, optional): Number of classes used by ``phi="softmax"``: the target and the most probable
            other ones.
            Default: 10
        {reshape_arg}
        """
        CAM.__init__(self, forward_func, layer, device_ids, reshape=reshape)
        if isinstance(phi, str):
            choice("phi", phi, (*formulas.SMOOTH_FUNCTIONS, "softmax"))
        elif not callable(phi):
            raise TypeError(f"phi must be a name or a callable, not {type(phi).__name__}")
        self.phi, self.normalize_alpha = phi, normalize_alpha
        self.bias = choice("bias", bias, _BIASES)
        self.layer_weighting = choice("layer_weighting", layer_weighting, _LAYER_WEIGHTINGS)
        self.balance = share("balance", balance)
        threshold = redundancy_threshold
        self.redundancy_threshold = None if threshold is None else positive("redundancy_threshold", threshold)
        self.softmax_classes = count("softmax_classes", softmax_classes, 2)

    uses_gradients = True

    @overload
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        *,
        return_details: Literal[False] = False,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> Tensor: ...

    @overload
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        *,
        return_details: Literal[True],
        grad_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, IntegrativeDetails]: ...

    @log_usage()
    @documented
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        *,
        return_details: bool = False,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> Tensor | tuple[Tensor, IntegrativeDetails]:
        """Explain a batch.

        Args:
            {shared_args}
            return_details (bool, optional): Whether to return the intermediate results as well.
                Default: False
            {grad_kwargs}

        Returns:
            *Tensor* of **attributions**, and **details** if requested:
            - **attributions** (*Tensor*): One map for all layers, of shape ``(N, 1, *input spatial)``, in [0, 1], in
                the dtype of the input, detached (unless ``grad_kwargs`` contains ``create_graph=True``).
            - **details** (:class:`IntegrativeDetails`): With ``return_details=True``.

        Raises:
            {raises}

        Examples::

            >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)).eval()
            >>> method = LayerIntegrativeCAM(net, [net[0], net[1]])
            >>> attribution, details = method.attribute(torch.rand(2, 3, 8, 8), [3, 7], return_details=True)
            >>> attribution.shape, details.layer_weights.shape
            (torch.Size([2, 1, 8, 8]), torch.Size([2, 2]))
        """
        fused = self._explain(
            lambda passes, evaluations: self._fuse(passes, evaluations),
            inputs,
            target,
            additional_forward_args,
            attribute_to_layer_input,
            grad_kwargs=grad_kwargs,
        )
        return fused if return_details else fused[0]

    def _maps(self, passes: Passes, evaluations: list[LayerEvaluation]) -> list[tuple[Tensor, ...]]:
        return [(self._fuse(passes, evaluations)[0],)]

    def _fuse(self, passes: Passes, evaluations: list[LayerEvaluation]) -> tuple[Tensor, IntegrativeDetails]:
        score = passes.clean_scores(formulas.score_function("identity"))
        others = self._class_gradients(passes, evaluations) if self.phi == "softmax" else None
        device = passes.device
        maps, gradient_scores, activation_scores, clipped = [], [], [], []
        for number, (module, evaluation) in enumerate(zip(self.layers, evaluations, strict=True)):
            pairs = zip(evaluation.activations, evaluation.gradients or (), strict=True)
            for index, (activations, gradients) in enumerate(pairs):
                classes = None if others is None else (others[0], others[1][number][index])
                raw, cut = self._layer_map(module, activations, gradients, score, classes)
                raised = formulas.upsample(raw.relu(), passes.spatial_size)
                maps.append(formulas.normalize(raised.to(formulas.at_least_float32(activations))).to(device))
                gradient_scores.append(formulas.at_least_float32(gradients).abs().flatten(1).mean(1).to(device))
                activation_scores.append(formulas.at_least_float32(activations).abs().flatten(1).mean(1).to(device))
                clipped.append(cut.to(device))
        stacked = torch.cat(maps, 1)
        weights = formulas.layer_weights(
            torch.stack(gradient_scores, 1), torch.stack(activation_scores, 1), self.layer_weighting, self.balance
        )
        kept = formulas.distinct_maps(stacked.detach(), weights.detach(), self.redundancy_threshold)
        weights = formulas.shares(torch.where(kept, weights, 0.0))
        shape = (*weights.shape, *[1] * (stacked.dim() - 2))
        fused = formulas.normalize((weights.to(stacked).reshape(shape) * stacked).sum(1, keepdim=True))
        details = IntegrativeDetails(stacked, weights, kept, torch.stack(clipped, 1))
        return fused.to(passes.dtype).contiguous(), details

    def _layer_map(
        self,
        module: nn.Module,
        activations: Tensor,
        gradients: Tensor,
        score: Tensor,
        classes: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """A layer's map before the ReLU, and the fraction of alphas that were clipped."""
        activations, gradients = formulas.precise(activations), formulas.precise(gradients)
        if classes is None:
            first, second, third = formulas.smooth_derivatives(self.phi, score, gradients)
        else:
            first, second, third = formulas.softmax_derivatives(*classes)
        alphas = formulas.pixel_alphas(second, third, activations)
        inside, rising = alphas.clamp(0, 1), first > 0
        cut, positive = (
            chosen.flatten(1).sum(1).to(activations.dtype) for chosen in ((alphas != inside) & rising, rising)
        )
        weights = formulas.sum_of_alphas(inside, first, self.normalize_alpha)
        shape = (*weights.shape, *[1] * (activations.dim() - 2))
        summed = (weights.reshape(shape) * activations).sum(1, keepdim=True)
        if self.bias == "residual":
            missing = (score.to(summed) - summed.flatten(1).sum(1)) / summed[0].numel()
            summed = summed + missing.reshape(-1, *[1] * (summed.dim() - 1))
        elif self.bias in ("layer", "fullgrad"):
            bias = _layer_bias(module, activations.shape[1]).to(summed).reshape(1, *shape[1:])
            factor = weights.reshape(shape) if self.bias == "layer" else gradients
            summed = summed + (bias * factor).sum(1, keepdim=True)
        return summed, cut / positive.clamp(min=1)

    def _class_gradients(self, passes: Passes, evaluations: list[LayerEvaluation]) -> tuple[Tensor, list[list[Tensor]]]:
        """Probabilities (N, m) of the target and the next most probable classes, and gradients (m, N, K, ...)."""
        output = formulas.precise(passes.output)
        if output.dim() != 2 or output.shape[1] < 2:
            raise ValueError(f'phi="softmax" needs an output of shape (N, classes), not {tuple(output.shape)}')
        number = min(self.softmax_classes, output.shape[1])
        chosen = passes.select(torch.arange(output.shape[1], device=output.device).expand(output.shape))[:, None]
        others = output.scatter(1, chosen, -torch.inf).topk(number - 1, dim=1).indices
        classes = torch.cat([chosen, others], 1)
        by_layer = [
            [formulas.precise(a).new_zeros(number, *a.shape) for a in evaluation.activations]
            for evaluation in evaluations
        ]
        for examples, copies, perturbed in passes.perturbed(
            self.layers, self.device_ids, lambda index, x, base, which: x, number, targets=classes.T
        ):
            for into, evaluation in zip(by_layer, perturbed, strict=True):
                for tensor, gradients in zip(into, evaluation.gradients or (), strict=True):
                    tensor[copies.to(tensor.device), examples.to(tensor.device)] = gradients.to(tensor)
        return output.gather(1, classes).softmax(1), by_layer


def _layer_bias(module: nn.Module, channels: int) -> Tensor:
    """The bias (channels,) of a layer's last convolution, including the batch norm after it."""
    bias: Any = None
    part: Any
    for part in module.modules():
        if isinstance(part, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and part.out_channels == channels:
            bias = part.weight.new_zeros(channels) if part.bias is None else part.bias
        is_norm = isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
        if is_norm and part.num_features == channels and part.running_mean is not None:
            scale = (part.running_var + part.eps).rsqrt() * (1 if part.weight is None else part.weight)
            bias = (-part.running_mean if bias is None else bias - part.running_mean) * scale
            bias = bias if part.bias is None else bias + part.bias
    if bias is None:
        raise ValueError(
            f"bias: {type(module).__name__} contains no convolution or batch norm with {channels} channels whose bias "
            'could be used; choose bias="residual"'
        )
    folded: Tensor = bias.detach()
    return folded
