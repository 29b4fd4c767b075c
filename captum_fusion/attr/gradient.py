"""Gradient methods: maps computed from a layer's activations and the gradients of the score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from captum_fusion import functional as formulas
from captum_fusion._arguments import positive
from captum_fusion._captum import format_result
from captum_fusion._passes.layer_pass import LayerEvaluation
from captum_fusion._passes.passes import Passes
from captum_fusion._types import Attributions, Layer, Reshape
from captum_fusion.attr._bases import (
    GradientCAM,
    LayerTensor,
)
from captum_fusion.attr._docs import documented
from captum_fusion.attr._info import MethodInfo

__all__ = ["LayerGradCAMPlusPlus", "LayerHiResCAM", "LayerLayerCAM", "LayerXGradCAM"]


class LayerHiResCAM(GradientCAM):
    r"""HiResCAM: activations weighted elementwise by their gradients.

    The map is ``ReLU(sum_k g^k * A^k)``, pixel by pixel, in the layer's space, not normalised. If the network is
    piecewise linear from the layer on, the sum over space of the map before the ReLU is the score, up to the biases.
    Cost per example: one forward and one backward sample.

    More details in the paper: R. L. Draelos, L. Carin, "Use HiResCAM instead of Grad-CAM for faithful explanations of
    convolutional neural networks", 2020, https://arxiv.org/abs/2011.08891

    Examples::

        >>> from captum_fusion import LayerHiResCAM
        >>> from captum_fusion.demo import digits
        >>> model, scene = digits.load_model(), digits.load_scenes()[0]
        >>> LayerHiResCAM(model, model.stage4).attribute(digits.preprocess(scene.image), scene.labels[0]).shape
        torch.Size([1, 1, 12, 12])
    """

    info = MethodInfo("hires-cam", "gradient", "1, 1 b", "Draelos and Carin, 2020", "https://arxiv.org/abs/2011.08891")

    def _map(self, tensor: LayerTensor) -> Tensor:
        return formulas.hires_cam(tensor.activations, tensor.gradients).relu()


class LayerGradCAMPlusPlus(GradientCAM):
    r"""Grad-CAM++: positive gradients, weighted so that small areas of a class have as much influence as large ones.

    With ``alpha = g**2 / (2 g**2 + g**3 sum_ab A_ab)`` (eq. 19; the sum over the channel is of its activations alone)
    the channel weights are ``w_k = sum alpha ReLU(g)`` and the map is ``ReLU(sum_k w_k A^k)``, in the layer's space,
    not normalised. With ``authors_code=True`` the alphas sum to 1 over a channel's positive gradients.
    Cost per example: one forward and one backward sample.

    More details in the paper: A. Chattopadhay, A. Sarkar, P. Howlader, V. N. Balasubramanian, "Grad-CAM++: Improved
    Visual Explanations for Deep Convolutional Networks", WACV 2018, https://arxiv.org/abs/1710.11063

    Examples::

        >>> from captum_fusion import LayerGradCAMPlusPlus
        >>> from captum_fusion.demo import digits
        >>> model, scene = digits.load_model(), digits.load_scenes()[0]
        >>> LayerGradCAMPlusPlus(model, model.stage4).attribute(digits.preprocess(scene.image), scene.labels[0]).shape
        torch.Size([1, 1, 12, 12])
    """

    info = MethodInfo(
        "grad-cam++", "gradient", "1, 1 b", "Chattopadhay et al., WACV 2018", "https://arxiv.org/abs/1710.11063"
    )

    @documented
    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer,
        device_ids: list[int] | None = None,
        *,
        authors_code: bool = False,
        reshape: Reshape | None = None,
    ) -> None:
        """Args:
        {constructor_args}
        {authors_code}
        {reshape_arg}
        """
        GradientCAM.__init__(self, forward_func, layer, device_ids, reshape=reshape)
        self.authors_code = authors_code

    def _map(self, tensor: LayerTensor) -> Tensor:
        weights = formulas.grad_cam_plus_plus_weights(tensor.activations, tensor.gradients, self.authors_code)
        return formulas.weighted_activations(tensor.activations, weights)


class LayerXGradCAM(GradientCAM):
    r"""XGrad-CAM: channels weighted by their gradients, averaged over space with the activations as weights.

    The weights are ``w_k = sum(A^k g^k) / sum(A^k)``, with sums over space, and the map is ``ReLU(sum_k w_k A^k)``, in
    the layer's space, not normalised. If the activations of a channel sum to 0 up to rounding, its weight is 0. If the
    network is piecewise linear from the layer on, the sum of the map before the ReLU is the score, up to the biases.
    Cost per example: one forward and one backward sample.

    More details in the paper: R. Fu et al., "Axiom-based Grad-CAM: Towards Accurate Visualization and Explanation of
    CNNs", BMVC 2020, https://arxiv.org/abs/2008.02312

    Examples::

        >>> from captum_fusion import LayerXGradCAM
        >>> from captum_fusion.demo import digits
        >>> model, scene = digits.load_model(), digits.load_scenes()[0]
        >>> LayerXGradCAM(model, model.stage4).attribute(digits.preprocess(scene.image), scene.labels[0]).shape
        torch.Size([1, 1, 12, 12])
    """

    info = MethodInfo("xgrad-cam", "gradient", "1, 1 b", "Fu et al., BMVC 2020", "https://arxiv.org/abs/2008.02312")

    def _map(self, tensor: LayerTensor) -> Tensor:
        weights = formulas.xgrad_cam_weights(tensor.activations, tensor.gradients)
        return formulas.weighted_activations(tensor.activations, weights)


class LayerLayerCAM(GradientCAM):
    r"""LayerCAM: activations weighted elementwise by their positive gradients; also suited to early layers.

    For one layer the map is ``ReLU(sum_k ReLU(g^k) * A^k)``, pixel by pixel, in the layer's space, not normalised. For
    a list of layers, given in the order of the network, the maps are fused into one map in the input's space, in
    [0, 1]. Each map is scaled to ``M / max M``, and those of all layers but the last to ``tanh(gamma M / max M)``,
    because maps of early layers are faint. The result is their pixelwise maximum, normalised.
    Cost per example: one forward and one backward sample, for any number of layers.

    More details in the paper: P.-T. Jiang, C.-B. Zhang, Q. Hou, M.-M. Cheng, Y. Wei, "LayerCAM: Exploring Hierarchical
    Class Activation Maps for Localization", IEEE Transactions on Image Processing 30, 2021,
    https://doi.org/10.1109/TIP.2021.3089943

    Examples::

        >>> from captum_fusion import LayerLayerCAM
        >>> from captum_fusion.demo import digits
        >>> model, scene = digits.load_model(), digits.load_scenes()[0]
        >>> image = digits.preprocess(scene.image)
        >>> LayerLayerCAM(model, model.stage4).attribute(image, scene.labels[0]).shape
        torch.Size([1, 1, 12, 12])
        >>> LayerLayerCAM(model, [model.stage2, model.stage4]).attribute(image, scene.labels[0]).shape
        torch.Size([1, 1, 96, 96])
    """

    info = MethodInfo(
        "layer-cam",
        "gradient",
        "1, 1 b",
        "Jiang et al., IEEE TIP 2021",
        "https://doi.org/10.1109/TIP.2021.3089943",
        fuses_layers=True,
    )

    @documented
    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer,
        device_ids: list[int] | None = None,
        *,
        gamma: float = 2.0,
        reshape: Reshape | None = None,
    ) -> None:
        """Args:
        {constructor_args}
            This method fuses their maps into one.
        gamma (float, optional): Scale of the maps of early layers in a fusion of several layers.
            Default: 2.0
        {reshape_arg}
        """
        GradientCAM.__init__(self, forward_func, layer, device_ids, reshape=reshape)
        self.gamma = positive("gamma", gamma)

    def _map(self, tensor: LayerTensor) -> Tensor:
        return formulas.layer_cam(tensor.activations, tensor.gradients)

    def _maps(self, passes: Passes, evaluations: list[LayerEvaluation]) -> list[tuple[Tensor, ...]]:
        maps = GradientCAM._maps(self, passes, evaluations)
        if not isinstance(self.layer, list):
            return maps
        fused = formulas.fuse_layer_cams([m for tensors in maps for m in tensors], passes.spatial_size, self.gamma)
        return [(fused.to(passes.dtype),)]

    def _result(self, maps: list[tuple[Tensor, ...]]) -> Attributions:
        result: Attributions = format_result(maps[0])
        return result
