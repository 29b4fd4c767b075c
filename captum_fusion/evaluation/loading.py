"""Loading the networks of an evaluation: by name, or as objects that exist already."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from captum_fusion import models


class NetworkSource(NamedTuple):
    """A network that is to be loaded.

    Attributes:
        name: What tables call it.
        load: Loads it.
        layer: The dotted name of the layer to explain; None for the default.
        reshape: As of :func:`captum_fusion.layers.parse_reshape`; None if it is found by itself.
        is_moved: Whether it is moved to the run's device; a network of the user's stays where it is.
    """

    name: str
    load: Callable[[], models.LoadedModel]
    layer: str | None
    reshape: str | None
    is_moved: bool


def sources_of(
    given: Any,
    weights: str | Sequence[str] | None,
    classes: str | None,
    layer: str | Sequence[str] | None,
    reshape: str | Sequence[str] | None,
    whole_image: bool,
    device: str | None,
) -> list[NetworkSource]:
    """The networks that :func:`captum_fusion.evaluation.evaluate` is given, each with its weights, layer and reshape.

    Raises:
        ValueError: If the numbers of networks, weights, layers and reshapes differ, two networks have the same name, or
            options of networks by name are given for one that is loaded already.
    """
    networks = as_list(given)
    files = [weights] * len(networks) if weights is None or isinstance(weights, str) else list(weights)
    if len(files) != len(networks) or (isinstance(weights, str) and len(networks) > 1):
        number = 1 if isinstance(weights, str) else len(files)
        raise ValueError(f"weights: there are {number} for {len(networks)} models")
    layers = _for_each(layer, len(networks), "layer: there are {} names")
    reshapes = _for_each(reshape, len(networks), "reshape: there are {}")
    sources: dict[str, NetworkSource] = {}
    for network, file, layer_name, grid in zip(networks, files, layers, reshapes, strict=True):
        is_moved = isinstance(network, str)
        if is_moved:
            name = network.rpartition(":")[2]
            name = name if name not in sources else f"{network} ({file})"
            load: Callable[[], models.LoadedModel] = partial(models.load_model, network, file, classes, whole_image)
        elif isinstance(network, (models.LoadedModel, nn.Module)):
            if file is not None or classes is not None or device is not None:
                raise ValueError("weights, classes and device belong to models of a name; this one is loaded already")
            name = network.name if isinstance(network, models.LoadedModel) else type(network).__name__
            load = partial(_loaded, network, name, whole_image)
        else:
            raise ValueError(f"model must be a name, a torch.nn.Module or a LoadedModel, not {type(network).__name__}")
        if name in sources:
            raise ValueError(f"model: there are two called {name!r}; give LoadedModels with names of their own")
        sources[name] = NetworkSource(name, load, layer_name, grid, is_moved)
    return list(sources.values())


def _for_each(given: str | Sequence[str] | None, networks: int, message: str) -> list[str | None]:
    """One value for all networks, or one for each."""
    if given is None or isinstance(given, str):
        return [given] * networks
    if len(given) != networks:
        raise ValueError(f"{message.format(len(given))} for {networks} models")
    return list(given)


def as_list(given: Any) -> list[Any]:
    """One network or several, as a list; a :class:`LoadedModel` is a tuple, but one network."""
    return list(given) if isinstance(given, (list, tuple)) and not isinstance(given, models.LoadedModel) else [given]


def _loaded(network: Any, name: str, whole_image: bool) -> models.LoadedModel:
    return models.from_module(name, network, whole_image) if isinstance(network, nn.Module) else network


def device_of(given: Any) -> str:
    """The device of the user's own network; for networks by name CUDA where it is available."""
    for network in as_list(given):
        module = network.model if isinstance(network, models.LoadedModel) else network
        if isinstance(module, nn.Module):
            return next((str(parameter.device) for parameter in module.parameters()), "cpu")
    return "cuda" if torch.cuda.is_available() else "cpu"


def load(source: NetworkSource, device: str) -> models.LoadedModel:
    """Load a network and move it to the device.

    Raises:
        ValueError: If that fails; the message names the network or the device.
    """
    try:
        loaded = source.load()._replace(name=source.name)
    except (ValueError, TypeError):
        raise
    except Exception as error:  # a function of the user's may raise anything
        raise ValueError(f"model: {source.name} could not be made ({models.first_line(error)})") from error
    if source.is_moved:
        try:
            loaded.model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device: {device} is not available here ({models.first_line(error)})") from error
    return loaded


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a network into eval mode for a while: masked samples would move batch-norm statistics in train mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
