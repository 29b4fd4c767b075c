"""Adapters of layer attributions for ``captum.metrics`` and for Quantus, which expect maps of the inputs' shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import numpy as np
import torch
from captum.attr import Attribution
from numpy.typing import NDArray
from torch import Tensor, nn

from captum_fusion._passes.masking import checked_inputs
from captum_fusion._types import TensorOrTupleOfTensors
from captum_fusion.functional import upsample
from captum_fusion.metrics._maps import channel_sum, single_tensor

__all__ = ["explanation_func", "quantus_explain_func", "to_input_shape"]


@overload
def to_input_shape(attributions: Tensor, inputs: Tensor) -> Tensor: ...
@overload
def to_input_shape(attributions: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]: ...
def to_input_shape(attributions: Tensor, inputs: TensorOrTupleOfTensors) -> TensorOrTupleOfTensors:
    """Upsample a map to the inputs' size and repeat it over their channels, as ``captum.metrics.infidelity`` needs it.

    Args:
        attributions (Tensor): Of shape ``(N, C, *spatial)``. Channels are summed.
        inputs (Tensor or tuple[Tensor, ...]): The explained inputs.

    Returns:
        Tensor or tuple[Tensor, ...]: A contiguous tensor of the shape and dtype of each input. It is 0 for inputs with
        another number of dimensions than the map.

    Raises:
        TypeError: If ``attributions`` is not a tensor, or ``inputs`` not a tensor or a tuple of tensors.
        ValueError: If the map does not fit any of the inputs.

    Examples::

        >>> import torch
        >>> from captum.attr import LayerGradCam
        >>> from captum.metrics import infidelity
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.LazyLinear(10)).eval()
        >>> images = torch.rand(2, 3, 8, 8)
        >>> attributions = to_input_shape(LayerGradCam(net, net[0]).attribute(images, 1), images)
        >>> perturb = lambda inputs: (torch.full_like(inputs, 0.01), inputs - 0.01)
        >>> infidelity(net, perturb, images, attributions, target=1).shape
        torch.Size([2])
    """
    if not isinstance(attributions, Tensor):
        raise TypeError(f"attributions must be a tensor, not {type(attributions).__name__}")
    tensors = checked_inputs(inputs)
    fits = [x.dim() == attributions.dim() and x.shape[0] == attributions.shape[0] for x in tensors]
    if not any(fits):
        raise ValueError(
            f"attributions of shape {tuple(attributions.shape)} do not fit any of the inputs of shapes "
            f"{[tuple(x.shape) for x in tensors]}"
        )
    summed = channel_sum(attributions)
    shaped = tuple(
        upsample(summed, x.shape[2:]).to(x.dtype).expand_as(x).contiguous() if fit else x.new_zeros(x.shape)
        for x, fit in zip(tensors, fits, strict=True)
    )
    return shaped if isinstance(inputs, tuple) else shaped[0]


def explanation_func(
    method: Attribution, *, input_shape: bool = False, **attribute_kwargs: Any
) -> Callable[..., TensorOrTupleOfTensors]:
    """A method as the ``explanation_func`` of ``captum.metrics.sensitivity_max``.

    ``sensitivity_max`` calls it with a tuple first and with a tensor later, and expects a result of the same form. A
    layer method returns a tensor for both, and then a batch fails.

    Args:
        method (Attribution): Any attribution that returns a single tensor for a single layer or input.
        input_shape (bool, optional): Bring the maps to the inputs' shape with :func:`to_input_shape`.
            Default: False
        attribute_kwargs (Any): Further arguments for every call of ``method.attribute``.

    Returns:
        callable: ``explain(inputs, **kwargs)``, which returns a tuple of contiguous tensors for a tuple of inputs, and
        a tensor for a tensor.

    Raises:
        TypeError: If ``method`` is not an attribution. When called: if it does not return a tensor or a tuple of
            tensors, or returns several with ``input_shape``.

    Examples::

        >>> import torch
        >>> from captum.metrics import sensitivity_max
        >>> from captum_fusion import LayerFusionCAM
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.LazyLinear(10)).eval()
        >>> images = torch.rand(2, 3, 8, 8)
        >>> explain = explanation_func(LayerFusionCAM(net, net[0]))
        >>> sensitivity_max(explain, images, target=torch.tensor([1, 2]), n_perturb_samples=2).shape
        torch.Size([2])
    """
    if not isinstance(method, Attribution):
        raise TypeError(
            f"method must be an attribution such as LayerFusionCAM(model, layer), not {type(method).__name__}"
        )

    def explain(inputs: TensorOrTupleOfTensors, **kwargs: Any) -> TensorOrTupleOfTensors:
        result = method.attribute(inputs, **{**attribute_kwargs, **kwargs})
        if input_shape:
            return to_input_shape(single_tensor(result, "method"), inputs)
        several = result if isinstance(result, tuple) else (result,)
        if not all(isinstance(tensor, Tensor) for tensor in several):
            kinds = ", ".join(type(tensor).__name__ for tensor in several)
            raise TypeError(f"method must return a tensor or a tuple of tensors (of one layer), not {kinds}")
        tensors = tuple(tensor.contiguous() for tensor in several)
        return tensors if isinstance(inputs, tuple) or len(tensors) > 1 else tensors[0]

    return explain


def quantus_explain_func(
    method: Callable[[Any], Attribution], **attribute_kwargs: Any
) -> Callable[..., NDArray[np.floating[Any]]]:
    """A method as the ``explain_func`` of Quantus (https://github.com/understandable-machine-intelligence-lab/Quantus).

    Quantus also explains networks that it makes itself, such as randomised copies. It therefore needs a function that
    makes the method for a network. Maps are returned at the inputs' size, with one channel. Quantus itself rejects a
    batch whose maps are all zero.

    Args:
        method (callable): ``method(model)`` returns the attribution, for example ``lambda model:
            LayerFusionCAM(model, model.layer4)``.
        attribute_kwargs (Any): Further arguments for every call of ``attribute``.

    Returns:
        callable: ``explain(model, inputs, targets, **kwargs)``, which takes arrays or tensors and returns a float32 (or
        float64) array of shape ``(N, 1, *spatial)``. Its inputs are moved to the device and dtype of the model's
        parameters. ``device`` and ``method``, which Quantus adds to ``kwargs``, are ignored; the others go to
        ``attribute``.

    Raises:
        TypeError: If ``method`` is an attribution itself, does not return one, or returns one without a single tensor.

    Examples::

        >>> import numpy as np, torch
        >>> from captum_fusion import LayerFusionCAM
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.LazyLinear(10)).eval()
        >>> explain = quantus_explain_func(lambda model: LayerFusionCAM(model, model[0]))
        >>> explain(net, np.random.rand(2, 3, 8, 8), np.array([1, 2]), device="cpu").shape
        (2, 1, 8, 8)
    """
    if isinstance(method, Attribution) or not callable(method):
        raise TypeError(
            "method must be a function that makes an attribution for a model, such as "
            f"lambda model: LayerFusionCAM(model, model.layer4), not {type(method).__name__}"
        )

    def explain(model: nn.Module, inputs: Any, targets: Any, **kwargs: Any) -> NDArray[np.floating[Any]]:
        attribution = method(model)
        if not isinstance(attribution, Attribution):
            raise TypeError(f"method must return an attribution, not {type(attribution).__name__}")
        options = {key: value for key, value in kwargs.items() if key not in ("device", "method")}
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        x = torch.as_tensor(np.asarray(inputs)) if not isinstance(inputs, Tensor) else inputs
        x = x.to(like.device, like.dtype)
        target = targets if targets is None else torch.as_tensor(targets, device=x.device).long().reshape(-1)
        attributions = single_tensor(
            attribution.attribute(x, target=target, **{**attribute_kwargs, **options}), "method"
        )
        maps = channel_sum(attributions)
        if maps.dim() != x.dim():
            raise ValueError(
                f"inputs of shape {tuple(x.shape)} do not fit attributions of shape {tuple(attributions.shape)}"
            )
        array: NDArray[np.floating[Any]] = upsample(maps, x.shape[2:]).cpu().numpy()
        return array

    return explain
