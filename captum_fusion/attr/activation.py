"""Activation methods: maps computed from a layer's activations, without gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from captum_fusion import functional as formulas
from captum_fusion._types import Layer, Reshape
from captum_fusion.attr._bases import (
    ActivationCAM,
    LayerTensor,
)
from captum_fusion.attr._docs import documented
from captum_fusion.attr._info import MethodInfo

__all__ = ["LayerEigenCAM", "LayerLinearCAM"]


class LayerLinearCAM(ActivationCAM):
    r"""CAM, the original class activation map: channels weighted by the weights of the final linear layer.

    The map is ``sum_k W[c, k] A^k``, signed (the paper has no ReLU), in the layer's space, not normalised. Its mean is
    the score minus the bias. The output must be a single linear layer applied to the layer's global average,
    ``W GAP(A) + b``, as in ResNet, MobileNetV2, EfficientNet, GoogLeNet and Inception, or a 1 x 1 convolution whose
    maps are averaged. Every call checks this on its inputs and raises a ValueError for other networks.
    Cost per example: one forward sample.

    More details in the paper: B. Zhou, A. Khosla, A. Lapedriza, A. Oliva, A. Torralba, "Learning Deep Features for
    Discriminative Localization", CVPR 2016, https://arxiv.org/abs/1512.04150

    Examples::

        >>> from captum_fusion import LayerLinearCAM
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)).eval()
        >>> LayerLinearCAM(net, net[0]).attribute(torch.rand(2, 3, 8, 8), target=[3, 7]).shape
        torch.Size([2, 1, 6, 6])
    """

    info = MethodInfo(
        "cam", "activation", "1", "Zhou et al., CVPR 2016", "https://arxiv.org/abs/1512.04150", signed=True
    )

    @documented
    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer,
        device_ids: list[int] | None = None,
        *,
        classifier: nn.Module | None = None,
        reshape: Reshape | None = None,
    ) -> None:
        """Args:
        {constructor_args}
        classifier (Module, optional): Linear layer or 1 x 1 convolution that computes the output from the layer's
            average.
            Default: None (searched among the modules of ``forward_func``, which must then be a module)
        {reshape_arg}
        """
        ActivationCAM.__init__(self, forward_func, layer, device_ids, reshape=reshape)
        if classifier is not None and not _is_linear(classifier):
            raise TypeError(f"classifier must be a linear layer or a 1 x 1 convolution, not {classifier!r:.80}")
        if classifier is None and not isinstance(forward_func, nn.Module):
            raise ValueError("classifier must be given if forward_func is not a module whose layers can be searched")
        self.classifier = classifier

    def _map(self, tensor: LayerTensor) -> Tensor:
        activations = tensor.activations
        raw = tensor.output
        output = raw.reshape(len(raw), -1)
        if raw.dim() > 2:
            raise ValueError(f"layer: CAM needs an output of shape (N, classes), not {tuple(raw.shape)}")
        full = {activations.dtype, output.dtype} <= {torch.float32, torch.float64}
        weight = self._weight(activations, formulas.precise(output), 1e-3 if full else 3e-2)
        number = torch.arange(len(weight), device=output.device).expand(output.shape)
        chosen = tensor.passes.select(number.reshape(raw.shape))
        weight = weight.to(activations.device)
        return (weight[chosen.to(weight.device)].unsqueeze(1) @ formulas.precise(activations).flatten(2)).reshape(
            len(activations), 1, *activations.shape[2:]
        )

    def _weight(self, activations: Tensor, output: Tensor, tolerance: float) -> Tensor:
        """The weights (classes, K) of the classifier that computes this output from the activations' means."""
        means = formulas.precise(activations).flatten(2).mean(2)
        root = self.forward_func
        modules: list[Any] = list(getattr(root, "modules", list)()) if self.classifier is None else [self.classifier]
        shape, mismatches = (output.shape[1], means.shape[1]), []
        for module in modules:
            if not _is_linear(module) or module.weight.shape[:2] != shape:
                continue
            weight = formulas.precise(module.weight.detach()).reshape(shape)
            expected = means.to(weight.device) @ weight.T
            expected = expected if module.bias is None else expected + formulas.precise(module.bias.detach())
            differences = (expected - output.to(expected)).abs().amax(1)
            fits = differences <= tolerance * output.abs().amax(1).clamp(min=1e-6).to(expected)
            if (fits | differences.isnan()).all():  # the map of an example that is NaN is NaN
                return weight
            mismatches.append(type(module).__name__)
        why = (
            f"its {mismatches[0]} of that size does not give the output when applied to the layer's mean activations"
            if mismatches
            else f"there is no linear layer from the layer's {shape[1]} channels to the {shape[0]} outputs"
        )
        raise ValueError(
            "layer: CAM needs a network that ends in global average pooling of this layer and one linear layer, and "
            f"{why}; choose the last layer before the pooling, or use LayerGradCam, which generalises CAM"
        )


def _is_linear(module: Any) -> bool:
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.groups == 1 and all(n == 1 for n in module.kernel_size)
    return isinstance(module, nn.Linear)


class LayerEigenCAM(ActivationCAM):
    r"""Eigen-CAM: the projection of a layer's activations on their first singular vector, independent of the class.

    With the activations as a matrix of positions by channels, ``A = U S V^T``, the map is ``A v_1``, signed, in the
    layer's space, not normalised. The decomposition does not determine the sign of the map; it is chosen so that the
    sum of the map is positive. The map is the same for every target, so the target is optional.
    Cost per example: one forward sample.

    More details in the paper: M. B. Muhammad, M. Yeasin, "Eigen-CAM: Class Activation Map using Principal Components",
    IJCNN 2020, https://arxiv.org/abs/2008.00299

    Examples::

        >>> from captum_fusion import LayerEigenCAM
        >>> from captum_fusion.demo import digits
        >>> model, scene = digits.load_model(), digits.load_scenes()[0]
        >>> LayerEigenCAM(model, model.stage4).attribute(digits.preprocess(scene.image)).shape
        torch.Size([1, 1, 12, 12])
    """

    info = MethodInfo(
        "eigen-cam",
        "activation",
        "1",
        "Muhammad and Yeasin, IJCNN 2020",
        "https://arxiv.org/abs/2008.00299",
        signed=True,
    )

    needs_target = False

    @documented
    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer,
        device_ids: list[int] | None = None,
        *,
        center: bool = False,
        reshape: Reshape | None = None,
    ) -> None:
        """Args:
        {constructor_args}
        center (bool, optional): Whether to subtract each channel's mean first, as pytorch-grad-cam does.
            Default: False
        {reshape_arg}
        """
        ActivationCAM.__init__(self, forward_func, layer, device_ids, reshape=reshape)
        self.center = center

    def _map(self, tensor: LayerTensor) -> Tensor:
        return formulas.principal_component(tensor.activations, self.center)
