"""Components of a fusion: any captum attribution, as normalised maps in the input's space."""

from __future__ import annotations

import inspect
from typing import Any

from captum.attr import Attribution, GradientAttribution, LayerAttribution, LayerGradCam, NoiseTunnel
from torch import Tensor

from captum_fusion import functional as formulas
from captum_fusion._passes.layer_pass import LayerEvaluation
from captum_fusion._passes.passes import Passes
from captum_fusion.attr._bases import CAM


class Component:
    """A component of a fusion, in one call.

    Args:
        name (str): The argument that it was given as, for messages.
        method (Attribution): The attribution.
        kwargs (dict, optional): Further arguments of its ``attribute``.
        fusion (CAM): The fusion.
    """

    def __init__(self, name: str, method: Attribution, kwargs: dict[str, Any] | None, fusion: CAM) -> None:
        self._name, self._method, self._kwargs, self._fusion = name, method, kwargs or {}, fusion

    @property
    def shares_pass(self) -> bool:
        """Whether it can be computed from the fusion's layer pass instead of its own passes."""
        method, kwargs = self._method, self._kwargs
        if not isinstance(method, LayerAttribution) or method.forward_func != self._fusion.forward_func:
            return False
        ours, theirs = self._fusion.layers, method.layer if isinstance(method.layer, list) else [method.layer]
        if len(ours) != len(theirs) or any(a is not b for a, b in zip(ours, theirs, strict=True)):
            return False
        if isinstance(method, CAM):
            return kwargs.keys() <= method.call_options and method.reshape is self._fusion.reshape
        if type(method) is not LayerGradCam or not kwargs.keys() <= {"relu_attributions", "attr_dim_summation"}:
            return False
        if self._fusion.reshape is not None:  # captum's LayerGradCam would average over the wrong dimensions
            return not kwargs
        # The result is summed over channels and rectified later, so only a ReLU before the sum makes a difference.
        return kwargs.get("attr_dim_summation", True) or not kwargs.get("relu_attributions", False)

    @property
    def shares_gradients(self) -> bool:
        """Whether it needs gradients from the fusion's layer pass."""
        return self.shares_pass and (self._method.uses_gradients if isinstance(self._method, CAM) else True)

    def maps(self, passes: Passes, evaluations: list[LayerEvaluation]) -> list[list[Tensor]]:
        """Non-negative, normalised maps in the input's space, one per tensor of each layer."""
        method, kwargs = self._method, self._kwargs
        if not self.shares_pass:
            raw = self._public_maps(passes, evaluations)
        elif isinstance(method, CAM):
            raw = method._maps(passes.with_options(**kwargs) if kwargs else passes, evaluations)
            counts = [len(evaluation.activations) for evaluation in evaluations]
            if [len(maps) for maps in raw] != counts:
                raw = [raw[0][:1] * count for count in counts]  # the component fuses its layers into one map
        else:
            raw = [tuple(map(formulas.grad_cam, e.activations, e.gradients or ())) for e in evaluations]
        return [[in_input_space(self._name, tensor, passes) for tensor in tensors] for tensors in raw]

    def _public_maps(self, passes: Passes, evaluations: list[LayerEvaluation]) -> list[tuple[Tensor, ...]]:
        """What its public ``attribute`` returns, one tensor per tensor of each layer."""
        options: dict[str, Any] = {
            "target": passes.call.target,
            "additional_forward_args": passes.call.arguments,
            "attribute_to_layer_input": passes.call.attribute_to_layer_input,
        }
        method = inner(self._method)
        if isinstance(method, CAM):  # the masked inputs must be the same whether or not passes are shared
            options.update({option: getattr(passes.options, option) for option in method.call_options})
        accepted = inspect.signature(method.attribute).parameters
        result = passes.call.attribute_with(
            self._method,
            isinstance(method, GradientAttribution),
            isinstance(self._method, CAM),
            **{**{key: value for key, value in options.items() if key in accepted}, **self._kwargs},
        )
        per_layer = result if isinstance(result, list) else [result] * len(evaluations)
        if len(per_layer) != len(evaluations):
            raise ValueError(f"{self._name} returned {len(per_layer)} maps for {len(evaluations)} layers")
        maps = []
        for tensors, evaluation in zip(per_layer, evaluations, strict=True):
            count = len(evaluation.activations)
            if isinstance(tensors, tuple) and not isinstance(method, LayerAttribution):
                tensors = tensors[passes.masking.indices[0]]
            tensors = tensors if isinstance(tensors, tuple) else (tensors,) * count
            if len(tensors) != count:
                raise ValueError(f"{self._name} returned {len(tensors)} maps for a layer with {count} tensors")
            maps.append(tuple(t.detach() if isinstance(t, Tensor) else t for t in tensors))
        return maps


def checked_component(name: str, method: Attribution) -> Attribution:
    """``method`` if it can be a component.

    Raises:
        TypeError: If it has no ``attribute`` method, or is a class.
    """
    if isinstance(method, type) or not callable(getattr(method, "attribute", None)):
        raise TypeError(f"{name} must be an object with an attribute method, such as captum's, not {method!r:.80}")
    return method


def in_input_space(name: str, raw: Any, passes: Passes) -> Tensor:
    """A map summed over its channels, rectified, upsampled to the input's size and normalised, (N, 1, *spatial)."""
    size = passes.spatial_size
    if not isinstance(raw, Tensor) or raw.dim() != len(size) + 2 or raw.shape[0] != passes.examples:
        shape = tuple(raw.shape) if isinstance(raw, Tensor) else type(raw).__name__
        raise ValueError(
            f"{name} must return a map of shape ({passes.examples}, channels, {len(size)} spatial dimensions), "
            f"not {shape}"
        )
    raw = raw.to(formulas.at_least_float32(passes.masking.first[:0]))  # some captum methods return float64
    return formulas.normalize(formulas.upsample(raw.sum(1, keepdim=True).relu(), size))


def inner(component: Attribution) -> Attribution:
    """The method inside a NoiseTunnel, or inside nested ones."""
    while isinstance(component, NoiseTunnel):
        component = component.attribution_method
    return component
