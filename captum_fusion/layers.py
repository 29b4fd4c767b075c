"""Layer selection by dotted name or default, and conversion of transformer layers to maps."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_fusion._arguments import near_misses

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

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
    - In a transformer it is the last normalisation layer whose spatial tokens influence the output, if it follows the
      last convolutional stage. In a network that reads a class token this is the one before the last attention.
      ``reshape`` is :class:`TokenGrid` or :class:`ChannelsLast`. The grid is that of a convolution, such as the one
      that splits the image into patches, or a half, a quarter, ... of it in a hierarchical transformer. All other
      tokens (class, distillation and register tokens) must stand before the grid.

    Args:
        model (Module): Network. It runs once, and a transformer twice, in its current mode.
        inputs (Tensor): Inputs of the network, the first of shape ``(N, channels, *spatial)``.

    Returns:
        DefaultLayer: Dotted name, module and reshape, for example ``("layer4", ..., None)`` for a ResNet,
        ``("features", ..., None)`` for VGG, MobileNet and SqueezeNet,
        ``("encoder.layers.encoder_layer_11.ln_1", ..., TokenGrid(prefix=1))`` for ViT-B.

    Raises:
        ValueError: If there is no such layer. If a layer returns tokens without a known grid, the message shows how
            many.

    Examples::

        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> name, module, reshape = default_layer(net, torch.rand(1, 3, 8, 8))
        >>> name, module, reshape
        ('0', Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1)), None)
    """
    trace = _Trace(model, *inputs)
    stages = _stages(trace)
    tokens = _token_layer(trace, max((stage.number for stage in stages if not stage.is_in_tokens), default=-1))
    if tokens is not None:
        return tokens
    if not stages:
        raise _no_stage(trace)
    return DefaultLayer(trace.names[stages[-1].module], stages[-1].module, stages[-1].reshape)


def reshape_of(model: nn.Module, layer: nn.Module, *inputs: Tensor) -> TokenGrid | ChannelsLast | None:
    """How to convert a layer's output to maps: the ``reshape`` of a layer that was chosen by name.

    Args:
        model (Module): Network. It runs once, without gradients, in its current mode.
        layer (Module): A module of the network.
        inputs (Tensor): Inputs of the network, the first of shape ``(N, channels, *spatial)``.

    Returns:
        TokenGrid, ChannelsLast or None: None if the output is a map already, or no grid is recognised.

    Raises:
        ValueError: If the layer's tokens are known to be no grid in the order of the image's rows: windows, or the
            mask units of Hiera before its last stage.

    Examples::

        >>> net = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(2), nn.LazyLinear(4)).eval()
        >>> net(torch.rand(1, 3, 8, 8)).shape, reshape_of(net, net[2], torch.rand(1, 3, 8, 8))
        (torch.Size([1, 8, 4]), None)
    """
    trace = _Trace(model, *inputs)
    shape = next((step.shape for step in reversed(trace.steps) if step.module is layer), None)
    if shape is None or shape not in trace.channels_last or shape[0] != trace.examples:
        return None
    reshape = _reshape_of(shape, trace.grids)
    what = f"the output of {trace.names[layer]}, of shape {tuple(shape)},"
    if reshape is None and len(shape) == 4 and trace.grids:
        raise ValueError(f"{what} is no grid of the network (windows, perhaps); choose another layer, or set reshape")
    if len(shape) == 3 and any(type(module).__name__.startswith("Hiera") for module in model.modules()):
        tokens = min(step.shape[1] for step in trace.steps if len(step.shape) == 3)
        if shape[1] > tokens:
            raise ValueError(f"{what} has tokens in the order of Hiera's mask units; choose a layer of the last stage")
    return reshape


def resolution_layers(model: nn.Module, *inputs: Tensor) -> list[tuple[str, nn.Module]]:
    """The last convolutional stage of each resolution, in the order of the network. Suitable for fusions of layers.

    Args:
        model (Module): Network. It runs once, without gradients, in its current mode.
        inputs (Tensor): Inputs of the network, the first of shape ``(N, channels, *spatial)``.

    Returns:
        list[tuple[str, Module]]: Dotted names and modules, for example ``layer1`` to ``layer4`` for a ResNet. The last
        is the result of :func:`default_layer`, unless that needs a reshape.

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
    trace = _Trace(model, *inputs)
    stages = [stage for stage in _stages(trace) if stage.reshape is None]
    if not stages:
        raise _no_stage(trace)
    for stage in stages:
        last.pop(stage.size, None)
        last[stage.size] = trace.names[stage.module], stage.module
    return list(last.values())


# ---------------------------------------------------------------------------------------------------- one forward pass


class _Step(NamedTuple):
    """A module that has finished, and the shape of its output; () if that is no tensor."""

    module: nn.Module
    shape: torch.Size


class _Trace:
    """The modules of one forward pass in the order in which they finish.

    Attributes:
        model, inputs, examples: What ran, on how many examples.
        names: Dotted names of all modules.
        steps: The modules.
        heads: For each linear layer the number of steps before it.
        channels_last: Shapes ``(N, ..., channels)`` that a normalisation layer has normalised over the channels.
        grids: Spatial sizes of the outputs of two-dimensional convolutions, each once.
        classes: Number of outputs of a classifier, None for other networks.
    """

    def __init__(self, model: nn.Module, *inputs: Tensor) -> None:
        self.model, self.inputs, self.examples = model, inputs, inputs[0].shape[0]
        self.names = {module: name for name, module in model.named_modules()}
        self.steps: list[_Step] = []
        self.heads: list[int] = []
        self.channels_last: set[torch.Size] = set()
        sizes: list[tuple[int, int]] = []

        def note(module: nn.Module, args: Any, output: Any) -> None:
            shape = output.shape if isinstance(output, Tensor) else torch.Size()
            if _normalized(module) == tuple(shape[-1:]) != ():
                self.channels_last.add(shape)
            if isinstance(module, nn.Linear):
                self.heads.append(len(self.steps))
            if isinstance(module, nn.Conv2d) and len(shape) == 4 and shape[0] == self.examples:
                sizes.append((shape[2], shape[3]))
            self.steps.append(_Step(module, shape))

        with _hooked(model.modules(), note), torch.no_grad():
            result = model(*(x.clone() for x in inputs))  # it may change its input in place
        self.grids = list(dict.fromkeys(sizes))
        self.classes = result.shape[1] if isinstance(result, Tensor) and result.dim() == 2 else None


def _normalized(module: nn.Module) -> tuple[int, ...]:
    """The last dimensions that a norm with ``normalized_shape`` normalises; () for other modules."""
    shape = getattr(module, "normalized_shape", ())
    return tuple(shape) if isinstance(shape, (tuple, list)) else ()


@contextlib.contextmanager
def _hooked(modules: Iterable[nn.Module], note: Callable[[nn.Module, Any, Any], None]) -> Iterator[None]:
    """Call ``note(module, args, output)`` after every one of the modules."""
    handles = [module.register_forward_hook(note) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Stage(NamedTuple):
    """A module that contains a convolution and returns a map.

    Attributes:
        number: Number of steps before it.
        module: The module.
        size: Spatial size of the map.
        reshape: Converts the output to the map; None if it is the map.
        is_in_tokens: Whether it is part of a module that returns tokens, such as a block with convolutional attention.
    """

    number: int
    module: nn.Module
    size: tuple[int, ...]
    reshape: ChannelsLast | None
    is_in_tokens: bool


def _stages(trace: _Trace) -> list[_Stage]:
    """The convolutional stages in the order in which they finish. Empty for transformers without convolutions."""
    convolutional = {
        module
        for module in trace.names
        if module is not trace.model and any(isinstance(part, _CONVOLUTIONS) for part in module.modules())
    }
    # The only convolution of a vision transformer splits the image into patches.
    has_tokens = any(len(shape) > 2 for shape in trace.channels_last)
    if has_tokens and sum(isinstance(module, _CONVOLUTIONS) for module in convolutional) == 1:
        return []
    stages, shapes = [], {shape for _, shape in trace.steps}
    tokens = {shape for shape in shapes if len(shape) == 3 and _reshape_of(shape, trace.grids) is not None}
    # Tokens (N, n, h * c) that are split into h heads of attention, (N, h, n, c), are no map.
    heads = {shape for shape in shapes if len(shape) == 4 and (shape[0], shape[2], shape[1] * shape[3]) in shapes}
    blocks = tuple({f"{trace.names[module]}." for module, shape in trace.steps if shape in tokens | heads})
    for number, (module, shape) in enumerate(trace.steps):
        if module not in convolutional or not len(shape) == trace.inputs[0].dim() > 2 or shape[0] != trace.examples:
            continue
        is_last = shape in trace.channels_last
        channels, size = (shape[-1], shape[1:-1]) if is_last else (shape[1], shape[2:])
        is_head = channels == trace.classes and number > max(trace.heads, default=-1)
        if min(size) > 1 and not is_head and shape not in heads:
            is_in_tokens = trace.names[module].startswith(blocks)
            stages.append(_Stage(number, module, tuple(size), ChannelsLast() if is_last else None, is_in_tokens))
    return stages


def _no_stage(trace: _Trace) -> ValueError:
    for module, shape in reversed(trace.steps):
        if _normalized(module) and len(shape) == 3 and shape[0] == trace.examples:
            grids = ", ".join(f"{height} x {width}" for height, width in trace.grids) or "no grid"
            return ValueError(
                f"no grid was found for the {shape[1]} tokens of {trace.names[module]} (convolutions return {grids}); "
                "give the layer to explain by name, and its grid as reshape"
            )
    return ValueError(
        "no convolutional stage with a spatial output was found; give the layer to explain by name, and reshape if it "
        "returns tokens"
    )


# --------------------------------------------------------------------------------------------------------- transformers


def _token_layer(trace: _Trace, after: int) -> DefaultLayer | None:
    """The last normalisation layer after a step whose spatial tokens influence the output, or None."""
    wanted: dict[nn.Module, TokenGrid | ChannelsLast | None] = {}
    for module, shape in trace.steps[after + 1 :]:
        if not _normalized(module) or not shape or shape[0] != trace.examples:
            continue
        reshape = _reshape_of(shape, trace.grids) if shape in trace.channels_last else None
        is_map = shape not in trace.channels_last and len(shape) == 4 and min(shape[2:]) > 1 and after < 0
        if reshape is not None or is_map:
            wanted[module] = reshape
    if not wanted or not trace.inputs[0].is_floating_point():
        return None
    outputs, scores = _differentiable(trace, wanted)
    for score in scores if outputs else ():
        gradients = torch.autograd.grad(score, list(outputs.values()), allow_unused=True, retain_graph=True)
        for module, gradient in reversed(list(zip(outputs, gradients, strict=True))):
            reshape = wanted[module]
            if gradient is not None and (gradient if reshape is None else reshape(gradient)).abs().amax() > 0:
                return DefaultLayer(trace.names[module], module, reshape)
    return None


def _differentiable(trace: _Trace, modules: Iterable[nn.Module]) -> tuple[dict[nn.Module, Tensor], list[Tensor]]:
    """The last outputs of modules in the order in which they finish, and scalars to differentiate.

    The first scalar is of the network's output. The second is of the input of the last linear layer: the head's own
    weights may still be zero, and the output may be no tensor.
    """
    outputs: dict[nn.Module, Tensor] = {}
    features: list[Tensor] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if args and isinstance(module, nn.Linear):
            features[:] = [args[0]]
        if module in modules and isinstance(output, Tensor) and output.requires_grad:
            outputs.pop(module, None)
            outputs[module] = output

    with torch.inference_mode(False), _hooked(trace.model.modules(), note), torch.enable_grad():
        copies = [x.detach().clone() for x in trace.inputs]
        result = trace.model(copies[0].requires_grad_() * 1, *copies[1:])  # it may change its input in place
        flat = [x.flatten() for x in (result, *features) if isinstance(x, Tensor) and x.requires_grad]
        # Weights of both signs, since a normalised feature has a constant sum.
        return outputs, [(x * torch.arange(len(x), device=x.device).cos().to(x)).sum() for x in flat]


def _reshape_of(shape: Sequence[int], grids: Iterable[tuple[int, int]]) -> TokenGrid | ChannelsLast | None:
    """How to convert an output ``(N, ..., channels)`` to maps, given the grids of convolutions; None if it has no grid.

    Later stages of a hierarchical transformer have smaller grids: these have at most a class token before them.
    """
    sizes = dict.fromkeys(grids, _MOST_PREFIX_TOKENS)
    for grid in list(sizes):
        smaller = grid
        while min(smaller) > 2:
            smaller = (smaller[0] + 1) // 2, (smaller[1] + 1) // 2
            sizes.setdefault(smaller, 1)
    if len(shape) == 4:
        return ChannelsLast() if min(shape[1:3]) > 1 and tuple(shape[1:3]) in sizes else None
    prefixes = {grid: shape[1] - grid[0] * grid[1] for grid in sizes} if len(shape) == 3 else {}
    fitting = [grid for grid in sizes if grid in prefixes and 0 <= prefixes[grid] <= sizes[grid] and max(grid) > 1]
    if not fitting:
        return None
    (height, width), prefix = min(((grid, prefixes[grid]) for grid in fitting), key=lambda pair: pair[1])
    return TokenGrid(prefix=prefix) if height == width else TokenGrid(height, width, prefix)


def parse_reshape(text: str) -> TokenGrid | ChannelsLast | None:
    """Parse what ``--reshape`` says.

    Args:
        text (str): ``"14x14"``, a grid of tokens, height first; ``"14x14+1"``, a grid after one other token;
            ``"channels-last"`` for ``(N, *spatial, channels)``; ``"none"`` for maps.

    Returns:
        TokenGrid, ChannelsLast or None: The reshape; None for ``"none"``.

    Raises:
        ValueError: If it is none of these.

    Examples::

        >>> parse_reshape("14x14+5")
        TokenGrid(height=14, width=14, prefix=5)
    """
    if text == "none":
        return None
    if text == "channels-last":
        return ChannelsLast()
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(?:\+(\d+))?", text)
    if match is None:
        raise ValueError(
            f"reshape: {text!r} is not HEIGHTxWIDTH or HEIGHTxWIDTH+TOKENS (such as 14x14+1), channels-last or none"
        )
    return TokenGrid(int(match[1]), int(match[2]), int(match[3] or 0))


@dataclass(frozen=True)
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

    height: int | None = None
    width: int | None = None
    prefix: int = 1

    def __repr__(self) -> str:
        given = {"height": self.height, "width": self.width, "prefix": self.prefix}
        return f"TokenGrid({', '.join(f'{key}={value}' for key, value in given.items() if value is not None)})"

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


@dataclass(frozen=True)
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
