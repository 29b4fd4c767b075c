"""``captum-fusion explain``: maps of pictures and a network of the user's."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from captum_fusion import FusionDetails, LayerFusionCAM, LayerUnionCAM, functional, layers, models, shared_work
from captum_fusion._arguments import near_misses
from captum_fusion._commands.common import (
    CommandError,
    add_layers,
    add_methods,
    add_network,
    add_output,
    add_score_fn,
    check_folder,
    layer_names,
    scores,
    write,
    write_figure,
)
from captum_fusion.attr.catalog import METHODS
from captum_fusion.attr.fusion import single
from captum_fusion.evaluation import methods
from captum_fusion.evaluation.data import load_image
from captum_fusion.evaluation.methods import BuiltMethod, ExplainedLayers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Panels in a row of a figure of several methods.
_COLUMNS = 5


def add(commands: Any, epilog: str) -> None:
    """Add the command to the parser's commands."""
    parser = commands.add_parser(
        "explain",
        help="explain pictures of your own to any network",
        description="Explain pictures to the bundled model, a torchvision model, or one that a function of yours "
        "returns. Weight files are read without executing code.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture files")
    add_network(parser)
    what = parser.add_argument_group("the explanation")
    add_methods(what, "fusion-cam", ["fusion-cam"])
    add_layers(
        what,
        "integrative-cam and layer-cam fuse several, other methods explain the last (default: the last convolutional "
        "stage; for integrative-cam the last stage of every resolution)",
    )
    what.add_argument(
        "--target",
        default=["auto"],
        nargs="+",
        metavar="CLASS",
        help="'auto' (the predicted class), an index or a class name; several are explained side by side, for less "
        "than the cost of as many runs",
    )
    add_score_fn(what)
    add_output(parser)
    parser.add_argument("--save-map", action="store_true", help="also write the map, (H, W) float32, as .npy")
    parser.set_defaults(run=run)


class _Setup(NamedTuple):
    """What is explained to which network: ``targets`` are output indices, None for the prediction."""

    loaded: models.LoadedModel
    methods: Mapping[str, BuiltMethod]
    layers: Sequence[str]
    targets: Sequence[int | None]
    score_fn: str | None


class _Map(NamedTuple):
    """A map, (1, 1, H, W) in [0, 1], the details of a fusion, and the score of the highlighted part alone."""

    heat: Tensor
    details: FusionDetails | None
    kept: float


class _Explained(NamedTuple):
    """One class of a picture with the maps of the methods by name."""

    target: int
    label: str
    score: float
    maps: Mapping[str, _Map]


def run(options: argparse.Namespace) -> None:
    """Explain each picture; write its figure and maps."""
    specs = methods.split(options.methods, METHODS)
    if not specs:
        raise CommandError("methods: there is none")
    try:
        for spec in specs:
            methods.check(spec)
    except ValueError as error:
        raise CommandError(str(error)) from error
    for file in options.images:
        open_image(Path(file))
    check_folder(options.output)
    setup = _set_up(specs, options)
    files = dict(zip(specs, _distinct(map(_file_name, specs)), strict=True))
    name = files[specs[0]] if len(specs) == 1 else "methods"
    stems = _distinct(Path(file).stem for file in options.images)
    for file, stem in tqdm(list(zip(options.images, stems, strict=True)), desc="images", disable=None):
        inputs = setup.loaded.preprocess(open_image(Path(file))).to(options.device)
        try:
            explained = _explain(setup, inputs)
            figure = _figure(explained, setup.loaded.restore(inputs).cpu(), len(specs) > 1)
        except (ValueError, TypeError, AssertionError) as error:  # a layer without spatial dimensions, say
            where = f"{specs[0] if len(specs) == 1 else name} on layer {','.join(setup.layers)}"
            raise CommandError(f"{where}: {models.first_line(error)}") from error
        path = options.output / f"{stem}_{name}.png"
        write_figure(path, figure)
        for one in explained if options.save_map else ():
            suffix = "" if len(setup.targets) == 1 else f"_{one.target}"
            for spec, found in one.maps.items():
                heat = found.heat[0, 0].float().cpu().numpy()
                write(options.output / f"{stem}_{files[spec]}{suffix}.npy", partial(np.save, arr=heat))
        tqdm.write(f"{file}: {_sentence(explained, len(specs) > 1)}; wrote {path}")


# --------------------------------------------------------------------------------------------------------------- set up


def _set_up(specs: Sequence[str], options: argparse.Namespace) -> _Setup:
    device = _device(options.device)
    try:
        loaded = models.load_model(options.model, options.weights, options.classes, options.whole_image)
        loaded.model.to(device)
        first = loaded.preprocess(open_image(Path(options.images[0]))).to(device)
        outputs = models.output_of(options.model, loaded.model, first).shape[1]
        if loaded.class_names is None and outputs == 1000:
            print("1000 outputs: ImageNet's class names are assumed (--classes gives others)")
        loaded = loaded._replace(class_names=models.class_names_of(loaded, outputs))
        targets = [_target(text, outputs, loaded.class_names) for text in options.target]
        names, explained = _explained_layers(loaded.model, first, specs, layer_names(options.layers))
        given = {} if options.score_fn is None else {"score_fn": options.score_fn}
        built = {spec: methods.build(spec, explained, given, {}) for spec in specs}
    except ValueError as error:
        raise CommandError(str(error)) from error
    return _Setup(loaded, built, names, targets, options.score_fn)


def _explained_layers(
    model: nn.Module, inputs: Tensor, specs: Sequence[str], names: list[str] | None
) -> tuple[list[str], ExplainedLayers]:
    """The wanted layers, or the default ones, which are printed."""
    try:
        if names is None:
            name, layer = layers.default_layer(model, inputs)
            print(f"layer: {name} (--layers names others)")
            stages = layers.resolution_layers(model, inputs) if any(map(methods.fuses_stages, specs)) else []
            if stages:
                print(f"layers of integrative-cam: {','.join(name for name, _ in stages)}")
            return [name], ExplainedLayers(model, [layer], [module for _, module in stages])
        chosen = [layers.find_layer(model, name) for name in names]
    except ValueError as error:
        raise CommandError(f"layer: {error}") from error
    single = [spec for spec in specs if not methods.fuses_layers(spec)]
    if len(chosen) > 1 and single:
        print(f"layer of {', '.join(single)}: {names[-1]}")
    return names, ExplainedLayers(model, chosen)


def _target(wanted: str, outputs: int, names: Sequence[str] | None) -> int | None:
    if wanted == "auto":
        return None
    if re.fullmatch("-?[0-9]+", wanted):
        if not 0 <= int(wanted) < outputs:
            raise CommandError(f"target: {wanted} is not one of the classes 0 to {outputs - 1}")
        return int(wanted)
    if names is None:
        raise CommandError(f"target: the class names are not known, so {wanted!r} must be an index (or give --classes)")
    matching = [i for i, name in enumerate(names) if name.casefold() == wanted.casefold()]
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise CommandError(f"target: {len(matching)} classes are called {wanted!r}; give the index: {matching}")
    near = ", ".join(map(repr, near_misses(wanted, names)))
    raise CommandError(f"target: there is no class {wanted!r}" + (f"; did you mean {near}?" if near else ""))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"device: {name} is not available here ({models.first_line(error)})") from error
    return device


def open_image(path: Path) -> Image.Image:
    """Open a picture.

    Raises:
        CommandError: If it cannot be opened.
    """
    try:
        image = load_image(path)
    except ValueError as error:
        raise CommandError(str(error)) from error
    assert isinstance(image, Image.Image)
    return image


def _file_name(spec: str) -> str:
    """A spec as a part of a file name on any system."""
    return re.sub(r"[^\w+=.,-]+", "_", spec)


def _distinct(names: Iterable[str]) -> list[str]:
    """The names, those that repeat with a number."""
    distinct: list[str] = []
    for name in names:
        other, number = name, 2
        while other in distinct:
            other, number = f"{name}_{number}", number + 1
        distinct.append(other)
    return distinct


# ------------------------------------------------------------------------------------------------------------- explain


def _explain(setup: _Setup, inputs: Tensor) -> list[_Explained]:
    """Explain every target of one picture.

    Raises:
        ValueError: If no method fits.
    """
    model, names = setup.loaded.model, setup.loaded.class_names
    targets = dict.fromkeys(_predicted(model, inputs) if index is None else index for index in setup.targets)
    explained = []
    with shared_work():
        for target in targets:
            score = scores(model, inputs, [target], setup.score_fn)[0]
            maps = {}
            for name, heat, details in _maps(setup.methods, inputs, target):
                maps[name] = _Map(heat, details, scores(model, inputs * heat, [target], setup.score_fn)[0])
            explained.append(_Explained(target, str(target) if names is None else names[target], score, maps))
    if not any(one.maps for one in explained):
        raise ValueError("none of the methods fits")
    return explained


def _predicted(model: nn.Module, inputs: Tensor) -> int:
    with torch.no_grad():
        return int(model(inputs).argmax(1))


def _maps(
    built: Mapping[str, BuiltMethod], inputs: Tensor, target: int
) -> Iterator[tuple[str, Tensor, FusionDetails | None]]:
    """Each method's map and details; if several methods are compared, one that fails is left out with a message."""
    bar = tqdm(built.items(), desc="methods", leave=False, disable=None if len(built) > 1 else True)
    for name, method in bar:
        try:
            yield name, *_map(method, inputs, target)
        except (ValueError, TypeError, AssertionError, RuntimeError) as error:
            if len(built) == 1:
                raise
            tqdm.write(f"{name} is left out: {models.first_line(error)}")


def _map(method: BuiltMethod, inputs: Tensor, target: int) -> tuple[Tensor, FusionDetails | None]:
    """A method's map in the picture's size, (1, 1, H, W) in [0, 1], and the details of a fusion."""
    if isinstance(method.attribution, (LayerFusionCAM, LayerUnionCAM)):
        return single(method.attribution.attribute(inputs, target, return_details=True))
    raw = method(inputs, target)
    if raw.dim() != inputs.dim():
        raise ValueError("the layer must return one tensor (N, channels, height, width)")
    heat = raw.sum(1, keepdim=True).relu()
    return functional.normalize(functional.upsample(heat, inputs.shape[2:])), None


# -------------------------------------------------------------------------------------------------------------- results


def _figure(explained: Sequence[_Explained], picture: Tensor, several: bool) -> Figure:
    """A figure of all targets and methods; of one fusion alone, how it came about."""
    from captum_fusion.visualization import visualize_fusion, visualize_grid

    titles = [f"{one.label}: p = {one.score:.2f}" for one in explained]
    fused = [found for one in explained for found in one.maps.values() if found.details is not None]
    if several or not fused:
        rows: list[tuple[Tensor, list[tuple[Tensor | None, str]]]] = []
        for one, title in zip(explained, titles, strict=True):
            panels: list[tuple[Tensor | None, str]] = [(None, title)]
            panels += [(m.heat, f"{name}\nthis part alone: p = {m.kept:.2f}") for name, m in one.maps.items()]
            rows += [(picture[0], panels[i : i + _COLUMNS]) for i in range(0, len(panels), _COLUMNS)]
        return visualize_grid(rows)
    columns: list[Any] = list(zip(*(found.details for found in fused if found.details), strict=True))
    fields: list[Any] = [None if column[0] is None else torch.cat(column) for column in columns]
    name = next(iter(explained[0].maps))
    if len(explained) == 1:
        name = f"{name} alone: p = {fused[0].kept:.2f}"
    pictures, heats = picture.expand(len(fused), -1, -1, -1), torch.cat([found.heat for found in fused])
    return visualize_fusion(pictures, heats, FusionDetails(*fields), titles=titles, name=name)


def _sentence(explained: Sequence[_Explained], several: bool) -> str:
    """What was found, in a line."""
    parts = []
    for one in explained:
        result = f"{len(one.maps)} methods"
        if not several:
            result = f"with only the highlighted part shown {next(iter(one.maps.values())).kept:.3f}"
        parts.append(f"{one.label} ({one.target}), probability {one.score:.3f}, {result}")
    return "; ".join(parts)
