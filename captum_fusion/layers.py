"""Layer selection by dotted name or default, and conversion of transformer layers to maps."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_fusion._arguments import near_misses

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.LayerNorm, nn.RMSNorm)

#: A transformer has at most this many class, distillation and register tokens.
_MOST_PREFIX_TOKENS = 16


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """The submodule with a given dotted name.

    Args:
        model (Module): Network.
        name (str): Dotted name as in ``model.named_modules()``, for example ``"layer4.1.conv2"``.

    Returns:
        Module: The submodule.

    Raises:
        ValueError: If there is no submodule of that name. The message lists similar names.

    Examples::

        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        >>> find_layer(net, "1")
        ReLU()
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if name and name in modules:
        return modules[name]
    near = near_misses(name, filter(None, modules)) or [child for child, _ in model.named_children()]
    raise ValueError(f"the model has no layer {name!r}; did you mean {', '.join(near)}?")


class DefaultLayer(NamedTuple):
    """A layer to explain.

    Attributes:
        name: Dotted name.
        module: The module.
        reshape: Converts the layer's output to ``(N, channels, *spatial)``: pass it as ``reshape`` to the methods. None
            if the output has that shape.
    """

    name: str
    module: nn.Module
    reshape: TokenGrid | ChannelsLast | None = None


def default_layer(model: nn.Module, *inputs: Tensor) -> DefaultLayer:
    """The layer that most papers explain: the last convolutional stage, or the last tokens of a transformer.

    - In a convolutional network it is the last module to finish in a forward pass, among those that contain a
      convolution and return a map ``(N, channels, *spatial)`` with more than one position. Of nested modules it is the
      outermost. Convolutions that compute class scores (as in SqueezeNet) are excluded.
    - In a transformer it is the last normalisation layer whose spatial tokens influence the output. In a network that
      reads a class token this is the one before the last attention. ``reshape`` is :class:`TokenGrid` or
      :class:`ChannelsLast`. The grid is that of the convolution that splits the image into patches. All other tokens
      (class, distillation and register tokens) must stand before the grid.

    Args:
        model (Module): Network. It runs once, and a transformer twice, in its current mode.
        inputs (Tensor): Inputs of the network, the first of shape ``(N, channels, *spatial)``.

    Returns:
        DefaultLayer: Dotted name, module and reshape, for example ``("layer4", ..., None)`` for a ResNet,
        ``("features", ..., None)`` for VGG, MobileNet and SqueezeNet,
        ``("encoder.layers.encoder_layer_11.ln_1", ..., TokenGrid())`` for ViT-B.

    Raises:
        ValueError: If there is no such layer.

    Examples::

        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> name, module, reshape = default_layer(net, torch.rand(1, 3, 8, 8))
        >>> name, module, reshape
        ('0', Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1)), None)
    """
    stages = _stages(model, *inputs)
    if stages:
        return DefaultLayer(*stages[-1][:2])
    tokens = _token_layer(model, *inputs)
    if tokens is None:
        raise _no_stage()
    return tokens


def reshape_of(model: nn.Module, layer: nn.Module, *inputs: Tensor) -> TokenGrid | ChannelsLast | None:
    """How to convert a layer's output to maps: the ``reshape`` of a layer that was chosen by name.

    Args:
        model (Module): Network. It runs once, without gradients, in its current mode.
        layer (Module): A module of the network.
        inputs (Tensor): Inputs of the network, the first of shape ``(N, channels, *spatial)``.

    Returns:
        TokenGrid, ChannelsLast or None: None if the output is a map already, or no grid is recognised.

    Examples::

        >>> net = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(2), nn.LazyLinear(4)).eval()
        >>> net(torch.rand(1, 3, 8, 8)).shape, reshape_of(net, net[2], torch.rand(1, 3, 8, 8))
        (torch.Size([1, 8, 4]), None)
    """
    grids: list[tuple[int, ...]] = []
    channels_last: set[torch.Size] = set()
    outputs: list[Tensor] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, _CONVOLUTIONS) and not grids:
            grids.append(tuple(output.shape[2:]))
        if args and isinstance(module, _NORMS) and tuple(module.normalized_shape) == tuple(args[0].shape[-1:]):
            channels_last.add(args[0].shape)
        if module is layer and isinstance(output, Tensor):
            outputs[:] = [output]

    with _hooked(model, note), torch.no_grad():
        model(*(x.clone() for x in inputs))
    if not outputs or not grids or len(grids[0]) != 2 or outputs[0].shape not in channels_last:
        return None
    return _reshape_of(outputs[0], grids[0])


def resolution_layers(model: nn.Module, *inputs: Tensor) -> list[tuple[str, nn.Module]]:
    """The last convolutional stage of each resolution, in the order of the network. Suitable for fusions of layers.

    Args:
        model (Module): Network. It runs once, without gradients, in its current mode.
        inputs (Tensor): Inputs of the network, the first of shape ``(N, channels, *spatial)``.

    Returns:
        list[tuple[str, Module]]: Dotted names and modules, for example ``layer1`` to ``layer4`` for a ResNet. The last
        is the result of :func:`default_layer`.

    Raises:
        ValueError: If there is no convolutional stage, as in a transformer.

    Examples::

        >>> net = nn.Sequential(
        ...     nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)
        ... )
        >>> [name for name, _ in resolution_layers(net, torch.rand(1, 3, 8, 8))]
        ['0', '1']
    """
    last: dict[tuple[int, ...], tuple[str, nn.Module]] = {}
    stages = _stages(model, *inputs)
    if not stages:
        raise _no_stage()
    for name, module, size in stages:
        last.pop(size, None)
        last[size] = name, module
    return list(last.values())


def _stages(model: nn.Module, *inputs: Tensor) -> list[tuple[str, nn.Module, tuple[int, ...]]]:
    """Names and modules that contain a convolution and return a map, with its spatial size, in order of completion.

    Empty for transformers.
    """
    names = {
        module: name
        for name, module in model.named_modules()
        if name and any(isinstance(part, _CONVOLUTIONS) for part in module.modules())
    }
    stages: list[tuple[nn.Module, torch.Size]] = []
    channels_last: set[torch.Size] = set()
    linear_after: set[nn.Module] = set()

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if args and isinstance(module, nn.LayerNorm) and module.normalized_shape == tuple(args[0].shape[-1:]):
            channels_last.add(args[0].shape)
        if isinstance(module, nn.Linear):
            linear_after.update(stage for stage, _ in stages)
        if module in names and isinstance(output, Tensor) and output.dim() == inputs[0].dim() > 2:
            stages.append((module, output.shape))

    with _hooked(model, note), torch.no_grad():
        result = model(*(x.clone() for x in inputs))  # it may change its input in place
    classes = result.shape[1] if isinstance(result, Tensor) and result.dim() == 2 else None
    named = [
        (names[stage], stage, tuple(shape[2:]))
        for stage, shape in stages
        if min(shape[2:]) > 1 and shape not in channels_last and (shape[1] != classes or stage in linear_after)
    ]
    # The only convolution of a vision transformer splits the image into patches.
    patches_only = sum(isinstance(module, _CONVOLUTIONS) for module in model.modules()) == 1 and channels_last
    return [] if patches_only else named


@contextlib.contextmanager
def _hooked(model: nn.Module, note: Callable[[nn.Module, Any, Any], None]) -> Iterator[None]:
    """Call ``note(module, args, output)`` after every module of the network."""
    handles = [module.register_forward_hook(note) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _no_stage() -> ValueError:
    return ValueError(
        "no convolutional stage with a spatial output was found; give the layer to explain by name, and reshape if it "
        "returns tokens"
    )


def _token_layer(model: nn.Module, *inputs: Tensor) -> DefaultLayer | None:
    """The last normalisation layer whose spatial tokens influence the output, or None."""
    if not inputs[0].is_floating_point():
        return None
    names = {module: name for name, module in model.named_modules()}
    grids: list[tuple[int, ...]] = []  # of the first convolution, which splits the image into patches
    outputs: list[tuple[nn.Module, Tensor]] = []
    features: list[Tensor] = []  # what the linear layers read, the last of which is the head

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, _CONVOLUTIONS) and not grids:
            grids.append(tuple(output.shape[2:]))
        if args and isinstance(module, nn.Linear):
            features[:] = [args[0]]
        if isinstance(module, _NORMS) and isinstance(output, Tensor) and output.requires_grad:
            outputs.append((module, output))

    with torch.inference_mode(False), _hooked(model, note), torch.enable_grad():
        copies = [x.detach().clone() for x in inputs]
        model(copies[0].requires_grad_() * 1, *copies[1:])  # a network may change its input in place
    if not features or not features[0].requires_grad or not outputs or not grids or len(grids[0]) != 2:
        return None
    # Weights of both signs, since a normalised feature has a constant sum. The head itself may still be zero.
    flat = features[0].flatten()
    score = (flat * torch.arange(len(flat), device=flat.device).cos().to(flat)).sum()
    gradients = torch.autograd.grad(score, [output for _, output in outputs], allow_unused=True)
    for (module, output), gradient in reversed(list(zip(outputs, gradients, strict=True))):
        reshape = _reshape_of(output, grids[0])
        if reshape is not None and gradient is not None and reshape(gradient).abs().amax() > 0:
            return DefaultLayer(names[module], module, reshape)
    return None


def _reshape_of(output: Tensor, patches: tuple[int, ...]) -> TokenGrid | ChannelsLast | None:
    """How to convert a normalisation layer's output to maps, given the grid of patches; None if it has no grid."""
    if output.dim() == 4 and min(output.shape[1:3]) > 1:
        return ChannelsLast()
    if output.dim() != 3:
        return None
    height, width = patches
    while height * width > 1:  # later stages of a hierarchical transformer have a smaller grid
        prefix = output.shape[1] - height * width
        if 0 <= prefix <= _MOST_PREFIX_TOKENS:
            return TokenGrid(prefix=prefix) if height == width else TokenGrid(height, width, prefix)
        height, width = height // 2, width // 2
    return None


class TokenGrid:
    """A ``reshape`` for layers of vision transformers: converts tokens (N, prefix + h * w, C) to maps (N, C, h, w).

    Args:
        height (int, optional): Height of the token grid.
            Default: None (the grid is square)
        width (int, optional): Width of the token grid.
            Default: None (computed from ``height``)
        prefix (int, optional): Number of tokens before the grid, such as class tokens and registers.
            Default: 1 (the class token of ViT and DeiT)

    Raises:
        ValueError: When called, if the tokens do not fill the grid.

    Examples::

        >>> TokenGrid()(torch.zeros(2, 1 + 14 * 14, 768)).shape
        torch.Size([2, 768, 14, 14])
    """

    def __init__(self, height: int | None = None, width: int | None = None, prefix: int = 1) -> None:
        self.height, self.width, self.prefix = height, width, prefix

    def __repr__(self) -> str:
        given = {"height": self.height, "width": self.width, "prefix": self.prefix}
        usual = {"height": None, "width": None, "prefix": 1}
        return f"TokenGrid({', '.join(f'{key}={value}' for key, value in given.items() if value != usual[key])})"

    def _size(self, tokens: Tensor) -> tuple[int, int]:
        cells = tokens.shape[1] - self.prefix if tokens.dim() == 3 else 0
        side = math.isqrt(max(0, cells))
        height = self.height or (cells // self.width if self.width else side)
        width = self.width or (cells // self.height if self.height else side)
        if cells < 1 or height * width != cells:
            raise ValueError(
                f"reshape: a layer's output of shape {tuple(tokens.shape)} is not {self.prefix} tokens and a grid of "
                f"{self.height or 'n'} x {self.width or 'n'}; set height, width and prefix of TokenGrid"
            )
        return height, width

    def __call__(self, tokens: Tensor) -> Tensor:
        """Convert tokens (N, prefix + h * w, C) to maps (N, C, h, w)."""
        size = self._size(tokens)
        return tokens[:, self.prefix :].transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *size)

    def inverse(self, maps: Tensor, tokens: Tensor) -> Tensor:
        """Replace the grid in ``tokens`` by maps (N, C, h, w). The prefix tokens are kept."""
        return torch.cat([tokens[:, : self.prefix], maps.flatten(2).transpose(1, 2).to(tokens.dtype)], 1)


class ChannelsLast:
    """A ``reshape`` for layers that return ``(N, *spatial, C)``, such as those of Swin transformers.

    Examples::

        >>> ChannelsLast()(torch.zeros(2, 7, 7, 768)).shape
        torch.Size([2, 768, 7, 7])
    """

    def __repr__(self) -> str:
        return "ChannelsLast()"

    def __call__(self, features: Tensor) -> Tensor:
        """Convert ``(N, *spatial, C)`` to ``(N, C, *spatial)``."""
        return features.movedim(-1, 1)

    def inverse(self, maps: Tensor, features: Tensor) -> Tensor:
        """Convert ``(N, C, *spatial)`` to ``(N, *spatial, C)``."""
        return maps.movedim(1, -1)
