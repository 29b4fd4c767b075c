"""Finding the layer to explain: by its dotted name, or a sensible default."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor, nn


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """The submodule with a dotted name.

    Args:
        model (Module): The network.
        name (str): As in ``model.named_modules()``, for example ``"layer4.1.conv2"``.

    Returns:
        Module: The submodule.

    Raises:
        ValueError: If there is none of that name; the message lists the nearest ones.

    Examples::

        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        >>> find_layer(net, "1")
        ReLU()
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if name and name in modules:
        return modules[name]
    names = [each for each in modules if each]
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.5) or [n for n, _ in model.named_children()]
    raise ValueError(f"the model has no layer {name!r}; did you mean {', '.join(near)}?")


def default_layer(model: nn.Module, *inputs: Tensor) -> tuple[str, nn.Module]:
    """The last convolutional stage: what most papers explain.

    Of the modules that hold a convolution and return a map with more than one position, the last to finish in a
    forward pass; in ties the outermost. A convolution that only makes class scores (as in SqueezeNet) does not count.

    Args:
        model (Module): The network; it is run once, without gradients.
        inputs (Tensor): What it takes, the first of shape ``(N, channels, *spatial)``.

    Returns:
        tuple[str, Module]: Dotted name and module, for example ``("layer4", ...)`` for a ResNet, ``("features", ...)``
        for VGG, MobileNet and SqueezeNet.

    Raises:
        ValueError: If no such layer exists, as in a pure transformer.

    Examples::

        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> default_layer(net, torch.rand(1, 3, 8, 8))
        ('0', Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1)))
    """
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    names = {
        module: name
        for name, module in model.named_modules()
        if name and any(isinstance(each, convolutions) for each in module.modules())
    }
    finished: list[tuple[nn.Module, int]] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        rank = inputs[0].dim()
        if isinstance(output, Tensor) and output.dim() == rank and min(output.shape[2:], default=0) > 1:
            finished.append((module, output.shape[1]))

    handles = [module.register_forward_hook(note) for module in names]
    try:
        with torch.no_grad():
            result = model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    classes = result.shape[1] if isinstance(result, Tensor) and result.dim() == 2 else None
    stages = [module for module, channels in finished if channels != classes]
    if not stages or any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
        raise ValueError("no convolutional stage with a spatial output was found; name the layer to explain")
    return names[stages[-1]], stages[-1]
