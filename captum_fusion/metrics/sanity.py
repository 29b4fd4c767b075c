"""Whether a map depends on what the network has learned: its similarity to maps of increasingly random networks."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from captum.attr import Attribution
from torch import Tensor, nn

from captum_fusion import functional as formulas
from captum_fusion._arguments import count
from captum_fusion._passes.modes import as_called, own_arithmetic
from captum_fusion._types import Target, TensorOrTupleOfTensors
from captum_fusion.metrics._maps import channel_sum, single_tensor
from captum_fusion.metrics.similarity import Similarity, similarity_function

__all__ = ["Randomization", "cascading_randomization"]


class Randomization(NamedTuple):
    """How a map changes while a network is randomised from its output downwards.

    Attributes:
        layers: Names of the modules in the order in which they are randomised.
        similarities: Similarities to the map of the original network, (steps + 1, N): first with nothing randomised,
            then after each of ``layers``.
    """

    layers: list[str]
    similarities: Tensor


def cascading_randomization(
    method: Attribution,
    inputs: TensorOrTupleOfTensors,
    target: Target = None,
    additional_forward_args: Any = None,
    *,
    similarity: str | Similarity = "spearman",
    seed: int = 0,
    **attribute_kwargs: Any,
) -> Randomization:
    """Cascading randomisation: the map of a method that explains the network changes when its weights become random.

    The modules of a copy of the network are randomised one after another, in the reverse order of their (last) calls in
    a forward pass, and stay random. Modules with ``reset_parameters()`` are initialised with it; other parameters are
    drawn from a normal distribution with their own mean and standard deviation. The network and the global random
    generators do not change. From the paper: J. Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018,
    https://arxiv.org/abs/1810.03292

    Args:
        method (Attribution): The method, of this package or of captum. Its ``forward_func`` must be a
            ``torch.nn.Module``.
        inputs (Tensor or tuple[Tensor, ...]): What to explain, with dimension 0 counting the N examples.
        target (int, tuple, Tensor or list, optional): Which output to explain, with captum's meaning.
            Default: None
        additional_forward_args (Any, optional): Further arguments of the network.
            Default: None
        similarity (str or callable, optional): ``"spearman"`` (ranks, ties averaged), ``"pearson"``, ``"ssim"`` (for
            two spatial dimensions, each map stretched to [0, 1], windows of at most 7 x 7), or a function of two maps
            ``(N, 1, *spatial)`` that returns a value for each example. The similarity to a constant map is 0.
            Default: ``"spearman"``
        seed (int, optional): The seed of the random weights: the i-th module is randomised after
            ``torch.manual_seed(seed + i)``.
            Default: 0
        attribute_kwargs (Any, optional): Further arguments of ``method.attribute``.

    Returns:
        Randomization: Names of the randomised modules, and similarities of shape (steps + 1, N).

    Raises:
        TypeError: If ``method`` is not an attribution of a ``torch.nn.Module``, or does not return one tensor.
        ValueError: If an option has a bad value, or the network has no parameters.

    Examples::

        >>> from captum_fusion import LayerFusionCAM
        >>> from captum_fusion.demo import digits
        >>> model, scene = digits.load_model(), digits.load_scenes()[0]
        >>> method = LayerFusionCAM(model, model.stage4)
        >>> result = cascading_randomization(method, digits.preprocess(scene.image), scene.labels[0])
        >>> result.layers[0], result.similarities.shape[0] == len(result.layers) + 1
        ('classifier', True)
    """
    alike = similarity_function(similarity)
    count("seed", seed, 0)
    _check_method(method)
    arguments = {"target": target, **attribute_kwargs}
    if additional_forward_args is not None:
        arguments["additional_forward_args"] = additional_forward_args
    with own_arithmetic():
        method = copy.deepcopy(method)  # its layers are those of its copy of the network
        network: nn.Module = method.forward_func

        def explain() -> Tensor:
            # A method that draws at random draws the same for every network.
            with as_called(), _local_draws(network, seed):
                maps = single_tensor(method.attribute(inputs, **arguments), "method")
            return channel_sum(maps) if maps.dim() > 2 else formulas.at_least_float32(maps.detach())

        with _recorded(network) as calls:
            original = explain()
        units = _units(network, calls)
        if not units:
            raise ValueError("method: its forward_func uses no module with parameters, so nothing can be randomised")
        similarities = [alike(original, original)]
        for step, unit in enumerate(units.values(), 1):
            with _local_draws(network, seed + step):
                for module in unit:
                    _randomize(module)
            similarities.append(alike(original, explain()))
        return Randomization(list(units), torch.stack(similarities))


def _check_method(method: Attribution) -> None:
    if not isinstance(method, Attribution):
        raise TypeError(
            f"method must be an attribution such as LayerFusionCAM(model, layer), not {type(method).__name__}"
        )
    network = getattr(method, "forward_func", None)
    if not isinstance(network, nn.Module):
        raise TypeError(
            "method: its forward_func must be a torch.nn.Module, a copy of which can be randomised, not "
            f"{type(network).__name__}"
        )


@contextlib.contextmanager
def _recorded(network: nn.Module) -> Iterator[dict[nn.Module, None]]:
    """The modules that are called within the block, in the order of their last calls."""
    calls: dict[nn.Module, None] = {}

    def record(original: nn.Module, module: nn.Module, inputs: Any) -> None:
        calls.pop(original, None)
        calls[original] = None

    with contextlib.ExitStack() as stack:
        for module in network.modules():
            # Bound to the module itself, because the replicas of a DataParallel model carry its hooks.
            stack.callback(module.register_forward_pre_hook(partial(record, module)).remove)
        yield calls


def _units(network: nn.Module, calls: dict[nn.Module, None]) -> dict[str, list[nn.Module]]:
    """The modules that are randomised together, from the output downwards, by the name of the called module.

    A unit is a called module and those of its submodules that are not called, such as the output projection of an
    attention. Submodules of the network itself that are not called, such as auxiliary heads, are unused and left out.
    """
    names = {module: name for name, module in network.named_modules()}
    units: dict[str, list[nn.Module]] = {}
    for module in reversed(calls):
        unit = [module, *_uncalled(module, calls)]
        if module is network and len(calls) > 1:
            unit = [module]
        unit = [part for part in unit if next(part.parameters(recurse=False), None) is not None]
        if unit:
            units[names[module] or type(network).__name__] = unit
    return units


def _uncalled(module: nn.Module, called: dict[nn.Module, None]) -> Iterator[nn.Module]:
    for child in module.children():
        if child not in called:
            yield child
            yield from _uncalled(child, called)


@contextlib.contextmanager
def _local_draws(network: nn.Module, seed: int) -> Iterator[None]:
    """Seed the global generators within the block, and restore their states afterwards."""
    devices = {parameter.device for parameter in network.parameters()}
    cuda = sorted(device.index for device in devices if device.type == "cuda")
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for index in cuda:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


def _randomize(module: nn.Module) -> None:
    """New random values for a module's own parameters, drawn on the CPU so that they are the same on every device."""
    with torch.no_grad(), torch.device("cpu"):
        if callable(getattr(module, "reset_parameters", None)):
            fresh: Any = copy.deepcopy(module).cpu()
            fresh.reset_parameters()
            module.load_state_dict(fresh.state_dict())
            return
        for parameter in module.parameters(recurse=False):
            values = parameter.detach().cpu().double()
            drawn = torch.randn(values.shape, dtype=torch.float64) * values.std(correction=0) + values.mean()
            parameter.copy_(drawn)
