"""``captum-fusion explain``: maps of pictures and a network of the user's."""

from __future__ import annotations

import argparse
import webbrowser
from pathlib import Path
from typing import Any

from tqdm import tqdm

from captum_fusion import models
from captum_fusion._arguments import printable
from captum_fusion._commands.common import (
    CommandError,
    add_layers,
    add_methods,
    add_network,
    add_reshape,
    add_score_fn,
    made_folder,
)
from captum_fusion._commands.explain import cost, inputs, page, plan, writing
from captum_fusion._commands.explain.compute import Progress, explain
from captum_fusion._commands.explain.inputs import open_image as open_image
from captum_fusion._commands.explain.writing import Result, Style, Writer
from captum_fusion._pictures import visible_box
from captum_fusion.attr.catalog import METHODS
from captum_fusion.evaluation import methods


def add(commands: Any, epilog: str) -> None:
    """Add the command to the parser's commands."""
    parser = commands.add_parser(
        "explain",
        help="explain pictures of your own to any network",
        description="Explain pictures to the bundled model, a torchvision model, or one that a function of yours "
        "returns. Weight files are read without executing code. Files of earlier runs are not overwritten.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="picture files, folders of pictures, or patterns")
    add_network(parser)
    what = parser.add_argument_group("the explanation")
    add_methods(what, "fusion-cam", ["fusion-cam"])
    add_layers(
        what,
        "integrative-cam and layer-cam fuse several, other methods explain each (default: the last convolutional "
        "stage, or a transformer's last tokens; for integrative-cam the last stage of every resolution)",
    )
    add_reshape(what)
    classes = what.add_mutually_exclusive_group()
    classes.add_argument(
        "--target",
        nargs="+",
        metavar="CLASS",
        help="'auto' (the predicted class, the default), an index or a class name; several are explained side by side, "
        "for less than the cost of as many runs",
    )
    classes.add_argument("--top", type=int, metavar="N", help="explain the N most probable classes")
    add_score_fn(what)
    _add_output(parser)
    parser.set_defaults(run=run, refuse=parser.error)


def _add_output(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("the output")
    output.add_argument(
        "--output",
        default=".",
        type=Path,
        metavar="FOLDER|FILE",
        help="the folder for all files (default: the current one), or the figure's file name for one picture",
    )
    output.add_argument("--format", choices=inputs.FORMATS, help="of the figure (default: png)")
    output.add_argument("--dpi", type=int, default=150, metavar="N", help="of the figure (default: 150)")
    output.add_argument(
        "--overlay", action="store_true", help="also write each map over its picture, in the picture's own resolution"
    )
    output.add_argument("--save-map", action="store_true", help="also write the map, (H, W) float32, as .npy")
    output.add_argument(
        "--html", action="store_true", help="also write one page with all pictures, maps and numbers, for any browser"
    )
    output.add_argument("--json", action="store_true", help="also write classes, scores and names of files as JSON")
    output.add_argument("--cmap", metavar="NAME", help="matplotlib's colour map (default: inferno)")
    output.add_argument("--alpha", type=float, metavar="X", help="opacity of the maps, 0 to 1 (default: 0.6)")
    output.add_argument(
        "--threshold", type=float, metavar="X", help="show only what exceeds this fraction of a map's maximum, 0 to 1"
    )
    output.add_argument("--colorbar", action="store_true", help="draw a colour bar")
    output.add_argument("--open", action="store_true", help="open the page, or else the first figure, when done")


def run(options: argparse.Namespace) -> None:
    """Explain each picture; write its figure and the other files that are wanted."""
    specs = methods.split(options.methods, METHODS)
    if not specs:
        raise CommandError("methods: there is none")
    try:
        for spec in specs:
            methods.check(spec)
        style = Style(options.cmap, options.alpha, options.threshold, options.colorbar, options.dpi).check()
    except ValueError as error:
        raise CommandError(str(error)) from error
    files = inputs.pictures(options)
    folder, file, suffix = inputs.destination(options, len(files))
    given = plan.make(specs, options, files[0])
    with made_folder(folder):
        estimate = cost.estimate(given, files[0], len(files))
        cost.announce(estimate, len(files))
        writer = Writer(folder, file, suffix, style, options.overlay, options.save_map)
        results = _explain_all(given, files, writer, Progress(given, estimate, len(files)))
        if options.json:
            tqdm.write(printable(f"wrote {writer.write_json(given, results)}"))
        if options.html:
            tqdm.write(printable(f"wrote {page.write_page(writer, given, results)}"))
    if options.open:
        webbrowser.open(next(iter(writer.pages or writer.figures)).resolve().as_uri())


def _explain_all(given: plan.Plan, files: list[Path], writer: Writer, progress: Progress) -> list[Result]:
    """Explain and write one picture after the other."""
    results = []
    with progress:
        for number, file in enumerate(files):
            image = open_image(file)
            tensor = given.loaded.preprocess(image).to(given.device)
            progress.start(number, file.name)
            try:
                explained = explain(given, tensor, progress)
                box = visible_box(given.loaded.preprocess, image.size)
                result = writer.write(given, Result(file, image, box, explained, {}))
            except (ValueError, TypeError, AssertionError) as error:  # a layer without spatial dimensions, say
                name = given.specs[0] if len(given.specs) == 1 else "methods"
                where = f"{name} on layer {','.join(given.layers)}"
                raise CommandError(f"{where}: {models.first_line(error)}") from error
            results.append(result)
            for line in writing.sentences(given, result, writer.folder):
                tqdm.write(printable(line))
    return results
