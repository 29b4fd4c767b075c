"""Whether a map depends on what the network has learned: its likeness to maps of ever more randomised networks."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from contextvars import Context
from functools import partial
from typing import Any, NamedTuple

import torch
from captum.attr import Attribution
from torch import Tensor, nn

from captum_fusion import functional as formulas
from captum_fusion._arguments import choice, count
from captum_fusion._passes.modes import no_inference_mode
from captum_fusion._types import Target
from captum_fusion.metrics._common import Tensors, correlation

Similarity = Callable[[Tensor, Tensor], Tensor]


class Randomization(NamedTuple):
    """How a map changes while a network is randomised from its output downwards.

    Attributes:
        layers: Names of the modules in the order in which they are randomised.
        similarities: To the map of the untouched network, (steps + 1, N): the first row with nothing randomised, each
            further row with one more of ``layers``.
    """

    layers: list[str]
    similarities: Tensor


def cascading_randomization(
    method: Attribution,
    inputs: Tensors,
    target: Target = None,
    additional_forward_args: Any = None,
    *,
    similarity: str | Similarity = "spearman",
    seed: int = 0,
    **attribute_kwargs: Any,
) -> Randomization:
    """Cascading randomisation: a method that explains the network gives another map as soon as its weights are random.

    A copy of the network is randomised, one module after another, from the output downwards, in the reverse order of
    their (last) calls in a forward pass; what is random stays so. Modules with ``reset_parameters()`` are initialised
    anew with it, other parameters are drawn from a normal distribution of their own mean and standard deviation.
    Neither the network nor the global random generator is touched. From the paper: J. Adebayo et al., "Sanity Checks
    for Saliency Maps", NeurIPS 2018, https://arxiv.org/abs/1810.03292

    Args:
        method (Attribution): The method, of this package or of captum; its ``forward_func`` must be a
            ``torch.nn.Module``.
        inputs (Tensor or tuple[Tensor, ...]): What to explain, with dimension 0 counting the N examples.
        target (int, tuple, Tensor or list, optional): Which output to explain, with captum's meaning.
            Default: None
        additional_forward_args (Any, optional): Further arguments of the network.
            Default: None
        similarity (str or callable, optional): ``"spearman"`` (ranks, ties averaged), ``"pearson"``, ``"ssim"`` (of two
            spatial dimensions, each map stretched to [0, 1], windows of at most 7 x 7), or a function of two maps
            ``(N, 1, *spatial)`` that gives a value for each example. The similarity to a constant map is 0.
            Default: ``"spearman"``
        seed (int, optional): Of the random weights.
            Default: 0
        attribute_kwargs (Any, optional): Further arguments of ``method.attribute``.

    Returns:
        Randomization: Names of the randomised modules, and similarities of shape (steps + 1, N).

    Raises:
        TypeError: If ``method`` is no attribution of a ``torch.nn.Module``, or does not give one tensor.
        ValueError: If an option has a bad value, or the network has no parameters.

    Examples::

        >>> from captum_fusion import LayerFusionCAM, demo
        >>> model, scene = demo.load_model(), demo.load_scenes()[0]
        >>> method = LayerFusionCAM(model, model.stage4)
        >>> found = cascading_randomization(method, demo.preprocess(scene.image), scene.labels[0])
        >>> found.layers[0], found.similarities.shape[0] == len(found.layers) + 1
        ('classifier', True)
    """
    alike = _similarity(similarity)
    count("seed", seed, 0)
    if not isinstance(method, Attribution):
        raise TypeError(f"method must be an attribution such as LayerFusionCAM(model, layer), not {_kind(method)}")
    if not isinstance(getattr(method, "forward_func", None), nn.Module):
        raise TypeError(
            "method: its forward_func must be a torch.nn.Module, a copy of which can be randomised, not "
            f"{_kind(getattr(method, 'forward_func', None))}"
        )
    arguments = {"target": target, **attribute_kwargs}
    if additional_forward_args is not None:
        arguments["additional_forward_args"] = additional_forward_args

    def cascade() -> Randomization:
        mine = copy.deepcopy(method)  # its layers are those of its copy of the network
        network: nn.Module = mine.forward_func

        def explain() -> Tensor:
            with _local_draws(network, seed):  # a method that draws at random draws the same for every network
                return _explain(mine, inputs, arguments)

        with _recorded(network) as calls:
            clean = explain()
        units = _units(network, calls)
        if not units:
            raise ValueError("method: its forward_func uses no module with parameters, so nothing can be randomised")
        found = [alike(clean, clean)]
        for step, unit in enumerate(units.values(), 1):
            with _local_draws(network, seed + step):
                for module in unit:
                    _randomize(module)
            found.append(alike(clean, explain()))
        return Randomization(list(units), torch.stack(found))

    # In a context of its own: captum_fusion.shared_work does not notice that weights change.
    with no_inference_mode():
        return Context().run(cascade)


def _kind(value: Any) -> str:
    return type(value).__name__


def _explain(method: Any, inputs: Tensors, arguments: dict[str, Any]) -> Tensor:
    """One map for each example, channels summed."""
    found = method.attribute(inputs, **arguments)
    if isinstance(found, tuple) and len(found) == 1:
        found = found[0]
    if not isinstance(found, Tensor):
        raise TypeError(f"method must give one tensor, not {_kind(found)}: one layer, and one input for an input's map")
    found = formulas.at_least_float32(found.detach())
    return found.sum(1, keepdim=True) if found.dim() > 2 else found


# ------------------------------------------------------------------------------------------------------ the network


@contextlib.contextmanager
def _recorded(network: nn.Module) -> Iterator[dict[nn.Module, None]]:
    """The modules that are called, in the order of their last calls."""
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
    """What is randomised together, from the output downwards: a called module's own parameters.

    With them come those of modules that belong to it and are not called, as the last projection of an attention. What
    belongs to the network itself and is not called is not used, as auxiliary heads are not.
    """
    names = {module: name for name, module in network.named_modules()}
    units: dict[str, list[nn.Module]] = {}
    for module in reversed(calls):
        unit = [module, *_uncalled(module, calls)]
        if module is network and len(calls) > 1:
            unit = [module]
        unit = [each for each in unit if next(each.parameters(recurse=False), None) is not None]
        if unit:
            units[names[module] or _kind(network)] = unit
    return units


def _uncalled(module: nn.Module, called: dict[nn.Module, None]) -> Iterator[nn.Module]:
    for child in module.children():
        if child not in called:
            yield child
            yield from _uncalled(child, called)


@contextlib.contextmanager
def _local_draws(network: nn.Module, seed: int) -> Iterator[None]:
    """Draws from a seed, the states of the global generators put back afterwards."""
    devices = {parameter.device for parameter in network.parameters()}
    cuda = sorted(device.index for device in devices if device.type == "cuda")
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for index in cuda:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


def _randomize(module: nn.Module) -> None:
    """New random values of a module's own parameters, drawn on the CPU, so that they are the same on any device."""
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


# ---------------------------------------------------------------------------------------------------- similarities


def _similarity(similarity: str | Similarity) -> Similarity:
    if not isinstance(similarity, str):
        if callable(similarity):
            return _checked(similarity)
        raise TypeError(f"similarity must be a word or a callable, not {_kind(similarity)}")
    return _SIMILARITIES[choice("similarity", similarity, tuple(_SIMILARITIES))]


def _checked(similarity: Similarity) -> Similarity:
    def alike(first: Tensor, second: Tensor) -> Tensor:
        found = similarity(first, second)
        if not isinstance(found, Tensor) or found.shape != first.shape[:1]:
            raise ValueError(f"similarity must give a tensor with a value for each of the {len(first)} examples")
        defined = (_varies(first) & _varies(second) & found.isfinite()).to(found.device)
        return torch.where(defined, found, 0.0)

    return alike


def _varies(maps: Tensor) -> Tensor:
    return formulas.normalize(maps).flatten(1).any(1)


def pearson(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation of two maps of each example, 0 where one of them is constant."""
    return correlation(first.flatten(1), second.flatten(1))[0]


def spearman(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's correlation: Pearson's of the ranks, where equal values share the mean of theirs."""
    from scipy.stats import rankdata

    defined = _varies(first) & _varies(second)
    ranks = [
        torch.from_numpy(rankdata(torch.where(_varies(each)[:, None], each.flatten(1), 0.0).cpu().numpy(), axis=1))
        for each in (first, second)
    ]
    found = correlation(*ranks)[0].to(formulas.precise(first.new_zeros(0)))
    return torch.where(defined, found, 0.0)


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Structural similarity: the mean over all windows of at most 7 x 7 of maps that are stretched to [0, 1].

    From the paper: Z. Wang, A. C. Bovik, H. R. Sheikh, E. P. Simoncelli, "Image Quality Assessment", IEEE TIP 2004,
    with constants 0.01 and 0.03, and windows of equal weights with the sample covariance.
    """
    if first.dim() != 4:
        raise ValueError(f'similarity="ssim" needs maps of two spatial dimensions, not of shape {tuple(first.shape)}')
    side = min(7, *(edge - 1 + edge % 2 for edge in first.shape[2:]))
    x, y = (formulas.precise(formulas.normalize(each)) for each in (first, second))

    def mean(values: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(values, side, stride=1)

    sample = side**2 / max(side**2 - 1, 1)
    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = sample * (mean(x * x) - mean_x**2), sample * (mean(y * y) - mean_y**2)
    covariance = sample * (mean(x * y) - mean_x * mean_y)
    small, large = 0.01**2, 0.03**2
    windows = ((2 * mean_x * mean_y + small) * (2 * covariance + large)) / (
        (mean_x**2 + mean_y**2 + small) * (var_x + var_y + large)
    )
    return torch.where(_varies(first) & _varies(second), windows.flatten(1).mean(1), 0.0)


_SIMILARITIES: dict[str, Similarity] = {"spearman": spearman, "pearson": pearson, "ssim": ssim}
