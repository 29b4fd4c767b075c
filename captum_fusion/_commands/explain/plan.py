"""What is explained to which network, checked and built before the first picture."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_fusion import layers, models
from captum_fusion._commands.common import CommandError, layer_names
from captum_fusion._commands.explain import inputs
from captum_fusion._types import Reshape
from captum_fusion.evaluation import methods
from captum_fusion.evaluation.methods import BuiltMethod, ExplainedLayers


class PlannedMethod(NamedTuple):
    """A method on its layers.

    Attributes:
        spec: The spec.
        built: The method.
        layers: The names of the layers that it explains.
        file: Its part of file names.
    """

    spec: str
    built: BuiltMethod
    layers: tuple[str, ...]
    file: str


class Plan(NamedTuple):
    """What is explained to which network.

    Attributes:
        loaded: The network.
        device: Where it is.
        methods: The methods by their titles.
        layers: The names of all layers.
        targets: Output indices, None for the prediction.
        top: How many of the most probable classes are explained instead, or None.
        score_fn: The user's choice, or None.
        sizes: Live channels and positions of the output of each layer, for the first picture.
    """

    loaded: models.LoadedModel
    device: torch.device
    methods: Mapping[str, PlannedMethod]
    layers: Sequence[str]
    targets: Sequence[int | None]
    top: int | None
    score_fn: str | None
    sizes: Mapping[str, tuple[int, int]]

    @property
    def specs(self) -> list[str]:
        """The specs, each once."""
        return list(dict.fromkeys(method.spec for method in self.methods.values()))

    def title(self, index: int) -> str:
        """The name of a class, or its index."""
        names = self.loaded.class_names
        return str(index) if names is None else names[index]

    @property
    def is_probability(self) -> bool:
        """Whether scores are from 0 to 1."""
        return self.score_fn != "identity"


def make(specs: Sequence[str], options: argparse.Namespace, first: Path) -> Plan:
    """Load the network and build the methods.

    Raises:
        CommandError: For an option that does not fit; the message names it.
    """
    device = _device(options.device)
    if options.top is not None and options.top < 1:
        raise CommandError(f"top: it must be at least 1, not {options.top}")
    try:
        loaded = models.load_model(options.model, options.weights, options.classes, options.whole_image)
        loaded.model.to(device)
        probe = loaded.preprocess(inputs.open_image(first)).to(device)
        outputs = models.output_of(options.model, loaded.model, probe).shape[1]
        if loaded.class_names is None and outputs == 1000:
            print("1000 outputs: ImageNet's class names are assumed (--classes gives others)")
        loaded = loaded._replace(class_names=models.class_names_of(loaded, outputs))
        targets = [inputs.target(text, outputs, loaded.class_names) for text in options.target or ["auto"]]
        built, reshapes = _methods(loaded.model, probe, specs, options)
        sizes = _sizes(loaded.model, reshapes, probe)
    except ValueError as error:
        raise CommandError(str(error)) from error
    top = None if options.top is None else min(options.top, outputs)
    return Plan(loaded, device, built, list(reshapes), targets, top, options.score_fn, sizes)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"device: {name} is not available here ({models.first_line(error)})") from error
    return device


def _methods(
    model: nn.Module, probe: Tensor, specs: Sequence[str], options: argparse.Namespace
) -> tuple[dict[str, PlannedMethod], dict[str, Reshape | None]]:
    """Every method on its layers, and the layers' names and reshapes.

    A method that does not fuse layers is built once for each.
    """
    wanted, fuses = layer_names(options.layers), any(map(methods.fuses_stages, specs))
    reshapes, explained = methods.explained_layers(model, probe, wanted, options.reshape, fuses)
    names = list(reshapes)
    if wanted is None:
        print(f"layer: {names[0]} (--layers names others)")
        if explained.stages:
            name_of = {module: name for name, module in model.named_modules()}
            print(f"layers of integrative-cam: {','.join(name_of[stage] for stage in explained.stages)}")
    given = {} if options.score_fn is None else {"score_fn": options.score_fn}
    built: dict[str, PlannedMethod] = {}
    single = [
        ExplainedLayers(model, [layer], reshape=reshape)
        for layer, reshape in zip(explained.layers, reshapes.values(), strict=True)
    ]
    for spec, file in zip(specs, inputs.distinct(map(inputs.file_name, specs)), strict=True):
        if methods.fuses_layers(spec) or len(names) == 1:
            method = methods.build(spec, explained, given, {})
            fused = methods.fuses_layers(spec) and len(explained.layers) > 1
            built[spec] = PlannedMethod(spec, method, tuple(names) if fused else (names[-1],), file)
            continue
        for name, one in zip(names, single, strict=True):
            method = methods.build(spec, one, given, {})
            built[f"{spec} on {name}"] = PlannedMethod(spec, method, (name,), f"{file}_{inputs.file_name(name)}")
    return built, reshapes


def _sizes(model: nn.Module, reshapes: Mapping[str, Reshape | None], probe: Tensor) -> dict[str, tuple[int, int]]:
    """The live channels and the positions of each layer."""
    sizes: dict[str, tuple[int, int]] = {}

    def note(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() >= 3:
            reshape = reshapes[name]
            flat = (output if reshape is None else reshape(output))[0].flatten(1)
            sizes[name] = int((flat.amax(1) > flat.amin(1)).sum()), flat.shape[1]

    handles = []
    for name in reshapes:
        module = layers.find_layer(model, name)
        handles.append(module.register_forward_hook(lambda _, args, output, name=name: note(name, output)))
    try:
        with torch.no_grad():
            model(probe)
    finally:
        for handle in handles:
            handle.remove()
    return sizes
