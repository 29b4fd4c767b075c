"""The command line: ``captum-fusion``, or ``python -m captum_fusion``."""

from __future__ import annotations

import argparse
import difflib
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from captum_fusion import (
    FusionDetails,
    LayerFusionCAM,
    LayerUnionCAM,
    __version__,
    demo,
    functional,
    layers,
    models,
    shared_work,
)
from captum_fusion.attr.catalog import METHODS
from captum_fusion.evaluation import METRICS as MEASURES
from captum_fusion.evaluation import PRESETS, evaluate, open_dataset
from captum_fusion.evaluation.data import load_image
from captum_fusion.evaluation.methods import split
from captum_fusion.evaluation.store import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DESCRIPTION = "See why a trained network decided: Fusion-CAM and its components, as Captum attributions."

_EPILOG = """\
examples:
  captum-fusion demo
  captum-fusion explain cat.jpg dog.jpg --model resnet50 --output maps
  captum-fusion explain cat.jpg --model squeezenet1_1 --weights squeezenet.safetensors --target "tiger cat"
  captum-fusion explain scan.png --model mypackage.models:build --weights best.pt --classes classes.txt \\
      --layer backbone.stage4 --method union-cam --save-map
  captum-fusion explain cat.jpg --model resnet18 --method grad-cam,score-cam,fusion-cam
  captum-fusion explain dog_and_cat.jpg --model resnet50 --target "bull mastiff" "tiger cat"
  captum-fusion evaluate bundled --model bundled --output table
  captum-fusion evaluate imagenet/val --model resnet50 --preset fusioncam-table --limit 100 --output table
  torchrun --nproc-per-node 4 -m captum_fusion evaluate imagenet/val --model resnet50 --output table
  captum-fusion methods
"""


#: Panels in a row of a figure of several methods.
_COLUMNS = 5


class CommandError(Exception):
    """What the user typed cannot be done; the message says why in one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments (sequence of str, optional): Default: None (those of the process)

    Returns:
        int: 0, or 2 after one line on standard error for a mistake in the arguments.

    Examples::

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     code = main(["demo", "--output", folder])  # doctest: +ELLIPSIS
        scene_...
        >>> code
        0
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(words)
    options.words = words
    try:
        options.run(options)
    except CommandError as error:
        print(f"captum-fusion: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="captum-fusion",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"captum-fusion {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    shown = commands.add_parser(
        "demo",
        help="explain both digits of a bundled scene, offline, in seconds",
        description="Explain a bundled picture with two digits to the bundled network, once for each of the two "
        "classes. Needs no network connection. Writes captum_fusion_demo.png.",
    )
    shown.add_argument("--scene", metavar="NAME", help="a bundled scene (default: the first with two digits)")
    _add_output(shown)
    shown.set_defaults(run=_demo)

    explain = commands.add_parser(
        "explain",
        help="explain pictures of your own to any network",
        description="Explain pictures to a torchvision model, the bundled model, or one that a function of yours "
        "returns. Weight files are read without executing code.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    explain.add_argument("images", nargs="+", metavar="IMAGE", help="picture files")
    _add_network(explain)
    what = explain.add_argument_group("the explanation")
    what.add_argument(
        "--method",
        default="fusion-cam",
        type=_methods,
        metavar="NAME[,NAME...]",
        help="one method, several side by side, or 'all'; 'captum-fusion methods' lists them (default: fusion-cam)",
    )
    what.add_argument(
        "--layer",
        metavar="NAME[,NAME...]",
        type=lambda text: [name.strip() for name in text.split(",")],
        help="dotted name of the layer (default: the last convolutional stage); integrative-cam and layer-cam fuse "
        "several (default for integrative-cam: the last stage of every resolution)",
    )
    what.add_argument(
        "--target",
        default=["auto"],
        nargs="+",
        metavar="CLASS",
        help="'auto' (the predicted class), an index or a class name; several are explained side by side, for less "
        "than the price of as many runs",
    )
    what.add_argument(
        "--score-fn",
        choices=["softmax", "sigmoid", "identity"],
        help="what makes scores of outputs: softmax over classes, sigmoid for binary and multi-label heads, identity "
        "for a network that returns scores (default: softmax, and what the method's paper has for its weights)",
    )
    _add_output(explain)
    explain.add_argument("--save-map", action="store_true", help="also write the map, (H, W) float32, as .npy")
    explain.set_defaults(run=_explain)

    _add_evaluate(commands)

    listed = commands.add_parser(
        "methods",
        help="list the methods and what they cost, and the metrics",
        description="List the methods, and the metrics of 'evaluate'. Rows of the network for each picture: K live "
        "channels and Z positions of the layer; '(layer)' are rows that begin at the layer, 'b' counts rows of the "
        "backward pass.",
    )
    listed.set_defaults(run=_list_methods)
    return parser


def _add_network(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """The options that say which network; ``several`` of them for the evaluation."""
    many: dict[str, Any] = {"nargs": "+"} if several else {}
    network = parser.add_argument_group("the network")
    network.add_argument(
        "--model",
        default=["resnet50"] if several else "resnet50",
        help="a torchvision classification model (default: resnet50), 'bundled', or package.module:function, a "
        "function without arguments that returns a torch.nn.Module (found in the current folder, too; it is shown "
        "224 x 224 RGB pictures with ImageNet's normalisation)" + ("; several are compared" if several else ""),
        **many,
    )
    network.add_argument(
        "--weights",
        metavar="NAME|FILE",
        help="torchvision's name of published weights, or a state dict in a .safetensors or .pt file (default: "
        "torchvision's DEFAULT, downloaded on first use)" + (", for each model" if several else ""),
        **many,
    )
    network.add_argument("--classes", metavar="FILE", help="class names, a JSON list or one a line")
    network.add_argument(
        "--device",
        default=None if several else "cpu",
        help=("cuda where there is one, else cpu (default)" if several else "cpu (default), cuda, cuda:1, mps, ..."),
    )
    network.add_argument(
        "--whole-image",
        action="store_true",
        help="squeeze the whole picture into the network's input instead of cropping its centre (the bundled network "
        "always does)",
    )


def _add_evaluate(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="compare methods on many pictures: the papers' tables on a network and pictures of your own",
        description="Compare explanation methods on a dataset. Rows go to disk as they are finished; the same command "
        "goes on where it was stopped. Under torchrun the processes divide the pictures between them. Writes rows/, "
        "tables/, figures/, maps/ and index.html.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "dataset",
        metavar="FOLDER_OR_CSV",
        help="a folder with a folder of pictures for each class, a folder of pictures, the root of ImageNet or "
        "PASCAL VOC, a CSV file (file, label, x0, y0, x1, y1, mask), a folder with labels.csv (and "
        "boxes.csv), or 'bundled'",
    )
    _add_network(parser, several=True)
    study = parser.add_argument_group("the study")
    study.add_argument(
        "--preset",
        choices=list(PRESETS),
        help="; ".join(f"{name}: {each.title}" for name, each in PRESETS.items()).replace("%", "%%"),
    )
    study.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME",
        help="of 'captum-fusion methods', with options (fusion-cam:theta=20), or your own: package.module:function, "
        "called with (model, layer, inputs, target)",
    )
    study.add_argument(
        "--metrics",
        nargs="+",
        metavar="NAME",
        help=f"{', '.join(MEASURES)}, with options (insertion:preset=rise), or your own: package.module:function, "
        "called with (forward_func, inputs, attributions, target)",
    )
    study.add_argument("--theta", nargs="+", type=float, metavar="X", help="run the fusions with each of these")
    study.add_argument(
        "--reference",
        metavar="NAME",
        help="the method that differences are taken against (default: the preset's, else the last)",
    )
    study.add_argument("--layer", nargs="+", metavar="NAME", help="for each model (default: the last stage)")
    study.add_argument(
        "--explain",
        choices=["prediction", "label"],
        default="prediction",
        help="the class that is explained (default: the prediction for the whole picture)",
    )
    study.add_argument("--score-fn", choices=["softmax", "sigmoid", "identity"], help="as of 'explain'")
    study.add_argument("--limit", type=int, metavar="N", help="only the first N pictures; folders of classes are mixed")
    study.add_argument("--year", help="of PASCAL VOC")
    study.add_argument("--image-set", default="val", metavar="NAME", help="of ImageNet and PASCAL VOC (default: val)")
    study.add_argument("--seed", type=int, default=0, help="of everything that is drawn at random (default: 0)")
    running = parser.add_argument_group("running")
    running.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes that read pictures (default: 0)"
    )
    running.add_argument(
        "--threads", type=int, default=1, metavar="N", help="of each process (default: 1; use torchrun for more cores)"
    )
    running.add_argument(
        "--perturbations-per-eval", type=int, metavar="N", help="masked rows at once (default: 4 on a CPU, else 64)"
    )
    running.add_argument(
        "--pictures", type=int, default=4, metavar="N", help="how many pictures' maps are drawn (default: 4)"
    )
    running.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="where everything goes")
    parser.set_defaults(run=_evaluate)


def _methods(text: str) -> list[str]:
    """The methods that ``--method`` names."""
    names = [name.strip() for name in text.split(",")]
    if "all" in names:
        return list(METHODS)
    for name in names:
        if name not in METHODS:
            near = difflib.get_close_matches(name, METHODS, n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(near)}?" if near else "'captum-fusion methods' lists them"
            raise argparse.ArgumentTypeError(f"there is no method {name!r}; {hint}")
    return list(dict.fromkeys(names))


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", default=".", type=Path, metavar="FOLDER", help="where figures go (default: the current folder)"
    )


# ------------------------------------------------------------------------------------------------------------ commands


def _demo(options: argparse.Namespace) -> None:
    scenes = {scene.name: scene for scene in demo.load_scenes() if len(scene.labels) == 2}
    name = options.scene or next(iter(scenes))
    if name not in scenes:
        raise CommandError(f"there is no scene {name!r} with two digits; there are {', '.join(scenes)}")
    scene, model = scenes[name], demo.load_model()
    _check_folder(options.output)
    inputs = demo.preprocess(scene.image).repeat(len(scene.labels), 1, 1, 1)
    target = list(scene.labels)
    maps, details = LayerFusionCAM(model, model.stage4).attribute(inputs, target, return_details=True)
    kept = _scores(model, inputs * maps, target)
    print(f"{scene.name}: {' and '.join(demo.CLASSES[label] for label in scene.labels)}")
    for i, label in enumerate(scene.labels):
        inside = [float((maps[i, 0] * mask).sum() / maps[i].sum()) for mask in scene.masks]
        other = inside[1 - i]
        print(
            f"  {demo.CLASSES[label]:<6} probability {details.score[i]:.2f}, with only the highlighted part shown "
            f"{kept[i]:.2f}; of the map {inside[i]:.0%} lies on its ink, {other:.0%} on the other digit's"
        )
    from captum_fusion.visualization import visualize_fusion

    titles = [f"{demo.CLASSES[label]}: p = {details.score[i]:.2f}" for i, label in enumerate(scene.labels)]
    figure = visualize_fusion(scene.image.expand(2, -1, -1, -1), maps, details, titles=titles)
    path = options.output / "captum_fusion_demo.png"
    _write_figure(path, figure)
    print(f"wrote {path}")


def _list_methods(options: argparse.Namespace) -> None:
    table = [("method", "family", "rows", "paper", "")]
    table += [(m.name, m.family, m.rows, m.citation, m.url) for m in METHODS.values()]
    _print_table(table)
    print()
    arrows = {"up": "higher is better", "down": "lower is better", "": ""}
    _print_table([("metric", "", "")] + [(m.name, arrows[m.better], m.meaning) for m in MEASURES.values()])


def _print_table(table: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _evaluate(options: argparse.Namespace) -> None:
    _check_folder(options.output)
    given = dict(vars(options))
    del given["run"]
    for name in ("methods", "metrics"):
        given[name] = None if given[name] is None else split(given[name])
    command = shlex.join(["captum-fusion", *given.pop("words")])
    chosen = {"year": given.pop("year"), "image_set": given.pop("image_set")}
    try:
        dataset = open_dataset(given.pop("dataset"), **chosen, for_each_label=options.explain == "label")
        found = evaluate(dataset, given.pop("model"), command=command, **given)
    except (ValueError, TypeError) as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"output: {options.output} could not be written ({error})") from error
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on from the rows in {options.output}", file=sys.stderr)
        raise SystemExit(130) from None
    for table in found.files:
        if table.suffix == ".md" and table.stem.endswith("_cost") == (options.preset == "time"):
            print(re.sub(r"\\(\W)", r"\1", table.read_text(encoding="utf-8")))  # escapes are for Markdown
    if found.files:
        print(f"wrote {options.output / 'index.html'} and {len(found.files) - 1} files beside it")
    asked, failed = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for row in found.rows:
        if row["metric"] == "rows":  # which every method has that gives a map
            asked[row["model"], row["method"]] += 1
            failed[row["model"], row["method"]] += "error" in row
    for (model, method), count in (+failed).items():
        print(f"{model}: {method} failed on {count} of {asked[model, method]} pictures", file=sys.stderr)
    if any(count == asked[key] for key, count in (+failed).items()):
        raise SystemExit(1)


def _explain(options: argparse.Namespace) -> None:
    for file in options.images:
        _open_image(Path(file))
    _check_folder(options.output)
    device = _device(options.device)
    try:
        loaded = models.load_model(options.model, options.weights, options.classes, options.whole_image)
    except ValueError as error:
        raise CommandError(str(error)) from error
    loaded.model.to(device)
    first = loaded.preprocess(_open_image(Path(options.images[0]))).to(device)
    loaded, output = _check_model(loaded, first, options.model)
    targets = [_target(each, output.shape[1], loaded.class_names) for each in options.target]
    methods = _build_methods(loaded.model, first, options)
    name = options.method[0] if len(options.method) == 1 else "methods"
    stems = _stems(options.images)
    for file, stem in tqdm(list(zip(options.images, stems, strict=True)), desc="images", disable=None):
        image = loaded.preprocess(_open_image(Path(file))).to(device)
        try:
            figure, maps, line = _explain_image(methods, image, targets, loaded, options)
        except (ValueError, TypeError, AssertionError) as error:  # a layer without spatial dimensions, say
            raise CommandError(f"{name} on layer {','.join(options.layer)}: {models.first_line(error)}") from error
        path = options.output / f"{stem}_{name}.png"
        _write_figure(path, figure)
        for method, heat in maps.items() if options.save_map else ():
            _write(options.output / f"{stem}_{method}.npy", partial(np.save, arr=heat))
        tqdm.write(f"{file}: {line}; wrote {path}")


def _check_model(loaded: models.LoadedModel, image: Tensor, name: str) -> tuple[models.LoadedModel, Tensor]:
    """The model with names for its classes, and its output for one picture."""
    try:
        output = models.output_of(name, loaded.model, image)
    except ValueError as error:
        raise CommandError(str(error)) from error
    if loaded.class_names is None and output.shape[1] == 1000:
        print("1000 outputs: ImageNet's class names are assumed (--classes gives others)")
        loaded = loaded._replace(class_names=models.imagenet_classes())
    if loaded.class_names is not None and len(loaded.class_names) != output.shape[1]:
        raise CommandError(f"classes: there are {len(loaded.class_names)} names for {output.shape[1]} outputs")
    return loaded, output


def _build_methods(model: nn.Module, image: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """The wanted methods on the wanted layers, or on sensible ones, which are named."""
    try:
        if options.layer is None:
            name, layer = layers.default_layer(model, image)
            print(f"layer: {name} (--layer names another)")
            options.layer, chosen, stages = [name], [layer], [layer]
            if "integrative-cam" in options.method:
                found = layers.resolution_layers(model, image)
                stages = [module for _, module in found]
                print(f"layers of integrative-cam: {','.join(name for name, _ in found)}")
        else:
            chosen = stages = [layers.find_layer(model, name) for name in options.layer]
            single = [name for name in options.method if not METHODS[name].fuses_layers]
            if len(chosen) > 1 and single:
                print(f"layer of {', '.join(single)}: {options.layer[-1]}")
    except ValueError as error:
        raise CommandError(f"layer: {error}") from error
    built, given = {}, {} if options.score_fn is None else {"score_fn": options.score_fn}
    for name in options.method:
        where = stages if name == "integrative-cam" else chosen
        built[name] = METHODS[name].build(model, where, **given)
    return built


def _explain_image(
    methods: dict[str, Any],
    image: Tensor,
    wanted: Sequence[int | None],
    loaded: models.LoadedModel,
    options: argparse.Namespace,
) -> tuple[Figure, dict[str, np.ndarray[Any, Any]], str]:
    """The figure of one picture, its maps by file name, and a line that says what was found."""
    from captum_fusion.visualization import visualize_fusion, visualize_grid

    picture = loaded.restore(image).cpu()
    targets = dict.fromkeys(_predicted(loaded.model, image) if each is None else each for each in wanted)
    lines: list[str] = []
    maps: dict[str, np.ndarray[Any, Any]] = {}
    rows: list[list[tuple[Tensor | None, str]]] = []
    fused: list[tuple[Tensor, FusionDetails]] = []
    with shared_work():
        for target in targets:
            before = _scores(loaded.model, image, [target], options.score_fn)[0]
            label = str(target) if loaded.class_names is None else loaded.class_names[target]
            panels: list[tuple[Tensor | None, str]] = [(None, f"{label}: p = {before:.2f}")]
            kept = 0.0
            for name, heat, details in _maps(methods, image, target):
                kept = _scores(loaded.model, image * heat, [target], options.score_fn)[0]
                maps[name if len(wanted) == 1 else f"{name}_{target}"] = heat[0, 0].float().cpu().numpy()
                panels.append((heat, f"{name}\nthis part alone: p = {kept:.2f}"))
                fused += [(heat, details)] if details is not None else []
            rows += [panels[i : i + _COLUMNS] for i in range(0, len(panels), _COLUMNS)]
            found = (
                f"{len(panels) - 1} methods" if len(methods) > 1 else f"with only the highlighted part shown {kept:.3f}"
            )
            lines.append(f"{label} ({target}), probability {before:.3f}, {found}")
    line = "; ".join(lines)
    if not maps:
        raise ValueError("none of the methods fits")
    if len(methods) > 1 or not fused:
        return visualize_grid([(picture[0], row) for row in rows]), maps, line
    columns: list[Any] = list(zip(*(details for _, details in fused), strict=True))
    fields: list[Any] = [None if column[0] is None else torch.cat(column) for column in columns]
    details = FusionDetails(*fields)
    titles, name = [row[0][1] for row in rows], next(iter(methods))
    pictures, heats = picture.expand(len(fused), -1, -1, -1), torch.cat([heat for heat, _ in fused])
    if len(rows) == 1:
        name = rows[0][1][1].replace("\nthis part", "")
    return visualize_fusion(pictures, heats, details, titles=titles, name=name), maps, line


def _maps(methods: dict[str, Any], image: Tensor, target: int) -> Iterator[tuple[str, Tensor, FusionDetails | None]]:
    """Each method's name, map and details; of several methods those that do not fit are left out, with a line."""
    bar = tqdm(methods.items(), desc="methods", leave=False, disable=None if len(methods) > 1 else True)
    for name, method in bar:
        try:
            yield name, *_map(method, image, target)
        except (ValueError, TypeError, AssertionError, RuntimeError) as error:
            if len(methods) == 1:
                raise
            tqdm.write(f"{name} is left out: {models.first_line(error)}")


def _map(method: Any, image: Tensor, target: int) -> tuple[Tensor, FusionDetails | None]:
    """A method's map in the picture's space, (1, 1, H, W) in [0, 1], and how a fusion came about."""
    if isinstance(method, (LayerFusionCAM, LayerUnionCAM)):
        heat, details = method.attribute(image, target, return_details=True)
        if not isinstance(heat, Tensor):
            raise ValueError("the layer must return one tensor, not several; name a part of it")
        return heat, details
    raw = method.attribute(image, target)
    if not isinstance(raw, Tensor) or raw.dim() != image.dim():
        raise ValueError("the layer must return one tensor (N, channels, height, width)")
    heat = raw.detach().sum(1, keepdim=True).relu()
    return functional.normalize(functional.upsample(heat, image.shape[2:])), None


# ------------------------------------------------------------------------------------------------------------- details


def _predicted(model: nn.Module, image: Tensor) -> int:
    with torch.no_grad():
        return int(model(image).argmax(1))


def _scores(model: nn.Module, inputs: Tensor, target: list[int], score_fn: str | None = None) -> list[float]:
    with torch.no_grad():
        scores = functional.score_function(score_fn or "softmax")(model(inputs))
    return [float(row[index]) for row, index in zip(scores, target, strict=True)]


def _open_image(path: Path) -> Image.Image:
    try:
        image = load_image(path)
    except ValueError as error:
        raise CommandError(str(error)) from error
    assert isinstance(image, Image.Image)
    return image


def _target(wanted: str, outputs: int, names: Sequence[str] | None) -> int | None:
    if wanted == "auto":
        return None
    if re.fullmatch("-?[0-9]+", wanted):
        if not 0 <= int(wanted) < outputs:
            raise CommandError(f"target: {wanted} is not one of the classes 0 to {outputs - 1}")
        return int(wanted)
    if names is None:
        raise CommandError(f"target: the class names are not known, so {wanted!r} must be an index (or give --classes)")
    found = [i for i, name in enumerate(names) if name.casefold() == wanted.casefold()]
    if len(found) == 1:
        return found[0]
    if found:
        raise CommandError(f"target: {len(found)} classes are called {wanted!r}; give the index: {found}")
    part = [name for name in names if wanted.casefold() in name.casefold()]
    near = [*part[:5], *difflib.get_close_matches(wanted, names, n=5, cutoff=0.6)][:5]
    raise CommandError(
        f"target: there is no class {wanted!r}" + (f"; did you mean {', '.join(map(repr, near))}?" if near else "")
    )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"device: {name} is not available here ({models.first_line(error)})") from error
    return device


def _stems(files: Sequence[str]) -> list[str]:
    """Distinct names for the output of each file."""
    stems: list[str] = []
    for file in files:
        stem, number = Path(file).stem, 2
        while stem in stems:
            stem, number = f"{Path(file).stem}_{number}", number + 1
        stems.append(stem)
    return stems


def _check_folder(folder: Path) -> None:
    for each in (folder, *folder.parents):
        if each.exists() and not each.is_dir():
            raise CommandError(f"output: {each} is a file, not a folder")


def _write_figure(path: Path, figure: Figure) -> None:
    _write(path, partial(figure.savefig, dpi=110, format="png", bbox_inches="tight", pad_inches=0.08))


def _write(path: Path, save: Callable[[Any], Any]) -> None:
    content = BytesIO()
    try:
        save(content)
        write_whole(path, content.getvalue())
    except OSError as error:
        raise CommandError(f"output: {path} could not be written ({error})") from error


if __name__ == "__main__":
    sys.exit(main())
