"""Guided Fusion-CAM: guided backpropagation in the region that a fused map highlights."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from captum.attr import GradientAttribution, GuidedBackprop, LayerAttribution
from torch import Tensor, nn

from captum_fusion import functional as formulas
from captum_fusion._captum import log_usage
from captum_fusion._passes.call import Call
from captum_fusion._passes.modes import exclusive
from captum_fusion._types import Target, TensorOrTupleOfTensors
from captum_fusion.attr._bases import CAM, SeveralTargets
from captum_fusion.attr._components import inner
from captum_fusion.attr._docs import documented
from captum_fusion.attr._info import MethodInfo
from captum_fusion.attr.fusion import LayerFusionCAM
from captum_fusion.functional import ScoreFn

__all__ = ["GuidedFusionCAM"]


class GuidedFusionCAM(GradientAttribution, SeveralTargets):
    """Guided Fusion-CAM: guided backpropagation multiplied by a fused map, for fine detail in the highlighted region.

    The attribution is ``GuidedBackprop * Up(ReLU(map))``, in the input's space, signed. Captum's ``GuidedGradCam``
    computes the same with Grad-CAM. Any layer attribution can replace the fusion.
    Cost per example: that of the map, and one forward and one backward sample.

    More details in the paper on guided Grad-CAM: R. R. Selvaraju et al., "Grad-CAM: Visual Explanations from Deep
    Networks via Gradient-based Localization", ICCV 2017, https://arxiv.org/abs/1610.02391

    Examples::

        >>> from captum_fusion import GuidedFusionCAM
        >>> from captum_fusion.demo import digits
        >>> model, scene = digits.load_model(), digits.load_scenes()[0]
        >>> guided = GuidedFusionCAM(model, model.stage4)
        >>> guided.attribute(digits.preprocess(scene.image), scene.labels[0]).shape
        torch.Size([1, 3, 96, 96])
    """

    info = MethodInfo(
        "guided-fusion-cam",
        "fusion",
        "K + 6, 2 b",
        "after Selvaraju et al., ICCV 2017",
        "https://arxiv.org/abs/1610.02391",
        signed=True,
        space="input",
    )

    @documented
    def __init__(
        self,
        model: nn.Module,
        layer: nn.Module,
        device_ids: list[int] | None = None,
        layer_method: LayerAttribution | None = None,
        *,
        score_fn: str | ScoreFn = "softmax",
    ) -> None:
        """Args:
        model (Module): Network. Guided backpropagation requires its ReLUs to be modules.
        layer (Module): Layer to explain, usually the last convolutional stage.
        device_ids (list of int, optional): Order of the devices.
            Default: None
        layer_method (LayerAttribution, optional): Method that computes the map: any attribution to that layer.
            Default: None (:class:`LayerFusionCAM` on ``layer``)
        {score_fn}
            Used by the default ``layer_method`` only.
            Default: ``"softmax"``
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
        GradientAttribution.__init__(self, model)
        if layer_method is None:
            layer_method = LayerFusionCAM(model, layer, device_ids, score_fn=score_fn)
        self.layer_method = layer_method
        if not isinstance(self.layer_method, LayerAttribution):
            raise TypeError(f"layer_method must be a layer attribution, not {layer_method!r:.80}")
        if self.layer_method.layer is not layer:
            raise ValueError("layer must be the layer that layer_method explains")
        self.guided_backprop = GuidedBackprop(model)

    @classmethod
    def get_name(cls) -> str:
        """The class's name."""
        return cls.__name__

    @log_usage()
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        *,
        layer_kwargs: dict[str, Any] | None = None,
    ) -> TensorOrTupleOfTensors:
        """Explain a batch.

        Args:
            inputs (Tensor or tuple[Tensor, ...]): Inputs to explain. Dimension 0 is the batch of N examples.
            target (int, tuple, Tensor or list, optional): Output to explain, in captum's format.
                Default: None
            additional_forward_args (Any, optional): Further arguments of the model.
                Default: None
            attribute_to_layer_input (bool, optional): Explain at the layer's input instead of its output.
                Default: False
            layer_kwargs (dict, optional): Further arguments of ``layer_method.attribute``.
                Default: None

        Returns:
            *Tensor* or *tuple[Tensor, ...]* of **attributions**:
            - **attributions** (*Tensor* or *tuple[Tensor, ...]*): Of the inputs' shapes, detached; zeros for inputs
                with another number of spatial dimensions than the map. A tuple if ``inputs`` is one.

        Raises:
            AssertionError: If the target does not select one output per example.
            ValueError: If the layer returns several tensors, or an input is not floating point.

        Examples::

            >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)).eval()
            >>> guided = GuidedFusionCAM(net, net[1])
            >>> guided.attribute(torch.rand(2, 3, 8, 8), target=[3, 7]).shape
            torch.Size([2, 3, 8, 8])
        """
        call = Call.checked(self.forward_func, inputs, target, additional_forward_args, attribute_to_layer_input)
        if not all(x.is_floating_point() for x in call.inputs):
            raise ValueError(
                "inputs must be floating point, because gradients are computed; pass other tensors in "
                "additional_forward_args"
            )
        shared: dict[str, Any] = {"target": call.target, "additional_forward_args": call.arguments}
        maps = call.attribute_with(
            self.layer_method,
            isinstance(inner(self.layer_method), GradientAttribution),
            isinstance(self.layer_method, CAM),
            **{"attribute_to_layer_input": attribute_to_layer_input, **shared, **(layer_kwargs or {})},
        )
        if not isinstance(maps, Tensor):
            raise ValueError(
                f"layer_method must return one tensor, not a {type(maps).__name__}; choose a layer that returns one "
                "tensor, and request no further results in layer_kwargs"
            )
        with exclusive(), warnings.catch_warnings():  # filters of warnings are those of all threads
            warnings.filterwarnings("ignore", "Setting backward hooks")  # captum removes them again
            guided = call.attribute_with(self.guided_backprop, True, **shared)
        weights = maps.detach().sum(1, keepdim=True).relu()
        attributions = tuple(
            (g.detach() * formulas.upsample(weights, x.shape[2:]).to(x)).to(x.dtype)
            if x.dim() == weights.dim()
            else torch.zeros_like(x)
            for g, x in zip(guided if isinstance(guided, tuple) else (guided,), call.inputs, strict=True)
        )
        return attributions if isinstance(inputs, tuple) else attributions[0]
