"""Layer attributions for ``captum.metrics`` and for Quantus, which expect them to look like the inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from captum.attr import Attribution
from torch import Tensor

from captum_fusion.functional import upsample
from captum_fusion.metrics._common import channel_sum

Tensors = Tensor | tuple[Tensor, ...]


def to_input_shape(attributions: Tensor, inputs: Tensors) -> Any:
    """Upsample a map and repeat it over the channels, so that it has the shape that ``infidelity`` demands.

    Args:
        attributions (Tensor): Of shape ``(N, 1, *spatial)`` or ``(N, C, *spatial)``; channels are summed.
        inputs (Tensor or tuple[Tensor, ...]): What was explained.

    Returns:
        Tensor or tuple[Tensor, ...]: A contiguous tensor of the shape and dtype of each input; zeros for inputs with
        another number of dimensions than the map.

    Raises:
        ValueError: If the map fits none of the inputs.

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
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    fits = [x.dim() == attributions.dim() and x.shape[0] == attributions.shape[0] for x in given]
    if not any(fits):
        raise ValueError(
            f"attributions of shape {tuple(attributions.shape)} fit no input of shapes "
            f"{[tuple(x.shape) for x in given]}"
        )
    summed = channel_sum(attributions)
    shaped = tuple(
        upsample(summed, x.shape[2:]).to(x.dtype).expand_as(x).contiguous() if fit else x.new_zeros(x.shape)
        for x, fit in zip(given, fits, strict=True)
    )
    return shaped if isinstance(inputs, tuple) else shaped[0]


def explanation_func(method: Attribution, *, input_shape: bool = False, **fixed: Any) -> Callable[..., Any]:
    """A method as the ``explanation_func`` of ``captum.metrics.sensitivity_max``.

    ``sensitivity_max`` calls it with a tuple first and with a tensor later, and wants the form mirrored; a layer
    method returns a bare tensor for both, which makes a batch fail.

    Args:
        method (Attribution): Any attribution that returns a single tensor for a single layer or input.
        input_shape (bool, optional): Also bring the maps to the inputs' shape, with :func:`to_input_shape`.
            Default: False
        fixed (Any): Further arguments for every call of ``method.attribute``.

    Returns:
        callable: ``explain(inputs, **kwargs)``, which returns a tuple of contiguous tensors for a tuple of inputs and
        a tensor for a tensor.

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

    def explain(inputs: Tensors, **kwargs: Any) -> Any:
        result = method.attribute(inputs, **{**fixed, **kwargs})
        if input_shape:
            return to_input_shape(result, inputs)
        tensors = tuple(t.contiguous() for t in (result if isinstance(result, tuple) else (result,)))
        return tensors if isinstance(inputs, tuple) or len(tensors) > 1 else tensors[0]

    return explain


def quantus_explain_func(method: Callable[[Any], Attribution], **fixed: Any) -> Callable[..., Any]:
    """A method as the ``explain_func`` of Quantus (https://github.com/understandable-machine-intelligence-lab/Quantus).

    Quantus explains networks of its own making, too, such as randomised copies. Therefore it is given how a method is
    made of a network, not a method. Maps come back at the inputs' size, with one channel. Quantus itself refuses a
    batch whose maps are all zero.

    Args:
        method (callable): ``method(model)`` gives the attribution, for example ``lambda model: LayerFusionCAM(model,
            model.layer4)``.
        fixed (Any): Further arguments for every call of ``attribute``.

    Returns:
        callable: ``explain(model, inputs, targets, **kwargs)``, which takes arrays or tensors and returns a float32 (or
        float64) array of shape ``(N, 1, *spatial)``. Its inputs are brought to the device and the type of the model's
        parameters. Of ``kwargs``, ``device`` and ``method``, which Quantus adds by itself, are not needed; the others
        go to ``attribute``.

    Raises:
        TypeError: If ``method`` is an attribution already, or does not return one.

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
            "method must be a function that makes an attribution of a model, such as "
            f"lambda model: LayerFusionCAM(model, model.layer4), not {type(method).__name__}"
        )

    def explain(model: Any, inputs: Any, targets: Any, **kwargs: Any) -> Any:
        made = method(model)
        if not isinstance(made, Attribution):
            raise TypeError(f"method must return an attribution, not {type(made).__name__}")
        options = {key: value for key, value in kwargs.items() if key not in ("device", "method")}
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        x = torch.as_tensor(np.asarray(inputs)) if not isinstance(inputs, Tensor) else inputs
        x = x.to(like.device, like.dtype)
        target = targets if targets is None else torch.as_tensor(targets, device=x.device).long().reshape(-1)
        found = made.attribute(x, target=target, **{**fixed, **options})
        tensors = found if isinstance(found, tuple) else (found,)
        if len(tensors) != 1 or not isinstance(tensors[0], Tensor):
            raise TypeError("method must give one tensor: one layer that returns one")
        maps = channel_sum(tensors[0])
        if maps.dim() != x.dim():
            raise ValueError(f"inputs of shape {tuple(x.shape)} fit no map of shape {tuple(tensors[0].shape)}")
        return upsample(maps, x.shape[2:]).cpu().numpy()

    return explain
