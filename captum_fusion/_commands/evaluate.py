"""``captum-fusion evaluate``: the papers' tables of a dataset."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from captum_fusion._commands.common import (
    CommandError,
    add_layers,
    add_methods,
    add_network,
    add_reshape,
    add_score_fn,
    check_folder,
    layer_names,
)
from captum_fusion.attr.catalog import METHODS
from captum_fusion.evaluation import METRICS, PRESETS, evaluate, open_dataset
from captum_fusion.evaluation.methods import split


def add(commands: Any, epilog: str) -> None:
    """Add the command to the parser's commands."""
    parser = commands.add_parser(
        "evaluate",
        help="compare methods on many pictures: the papers' tables for a network and pictures of your own",
        description="Compare explanation methods on a dataset. Rows are on disk as soon as they are computed; the same "
        "command continues where it was stopped. Under torchrun the processes divide the pictures between them. Writes "
        "rows/, tables/, figures/, maps/ and index.html.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "dataset",
        metavar="FOLDER_OR_CSV",
        help="a folder with a subfolder of pictures for each class, a folder of pictures, the root of ImageNet or "
        "PASCAL VOC, a CSV file (file, label, x0, y0, x1, y1, mask), a folder with labels.csv (and boxes.csv), or "
        "'digits' (the bundled scenes, for the model of the same name)",
    )
    add_network(parser, several=True)
    _add_study(parser.add_argument_group("the study"))
    _add_running(parser.add_argument_group("running"))
    parser.set_defaults(run=run)


def _add_study(study: Any) -> None:
    study.add_argument(
        "--preset",
        choices=list(PRESETS),
        help="; ".join(f"{name}: {preset.title}" for name, preset in PRESETS.items()).replace("%", "%%"),
    )
    add_methods(study, "the preset's")
    study.add_argument(
        "--metrics",
        nargs="+",
        metavar="METRIC",
        help=f"{', '.join(METRICS)}, with options (insertion:preset=rise), 'all', or your own: "
        "package.module:function, called with (forward_func, inputs, attributions, target); separated by spaces or "
        "commas (default: the preset's)",
    )
    study.add_argument("--theta", nargs="+", type=float, metavar="X", help="run the fusions with each of these")
    study.add_argument(
        "--reference",
        metavar="METHOD",
        help="the method that differences are taken against (default: the preset's, else the last)",
    )
    add_layers(
        study,
        "one for all models, or one for each (default: the last convolutional stage, or a transformer's last tokens)",
    )
    add_reshape(study, several=True)
    study.add_argument(
        "--explain",
        choices=["prediction", "label"],
        default="prediction",
        help="the class that is explained: the network's prediction for the whole picture (default), or the dataset's "
        "label",
    )
    add_score_fn(study)
    study.add_argument(
        "--limit", type=int, metavar="N", help="only the first N pictures; folders of classes are shuffled"
    )
    study.add_argument("--year", help="the year of PASCAL VOC (default: the latest)")
    study.add_argument(
        "--image-set", default="val", metavar="NAME", help="the split of ImageNet or PASCAL VOC (default: val)"
    )
    study.add_argument("--seed", type=int, default=0, help="of everything that is drawn at random (default: 0)")


def _add_running(running: Any) -> None:
    running.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes that read pictures (default: 0)"
    )
    running.add_argument(
        "--threads", type=int, default=1, metavar="N", help="of each process (default: 1; use torchrun for more cores)"
    )
    running.add_argument(
        "--perturbations-per-eval",
        type=int,
        metavar="N",
        help="masked samples in one call of the network (default: 4 on a CPU, else 64)",
    )
    running.add_argument(
        "--pictures", type=int, default=4, metavar="N", help="for how many pictures the maps are drawn (default: 4)"
    )
    running.add_argument(
        "--output", required=True, type=Path, metavar="FOLDER", help="the folder for rows, tables, figures and maps"
    )


def run(options: argparse.Namespace) -> None:
    """Run what is missing, write the report, and print its tables."""
    check_folder(options.output)
    given = {name: value for name, value in vars(options).items() if name not in ("run", "arguments")}
    given["methods"] = None if options.methods is None else split(options.methods, METHODS)
    given["metrics"] = None if options.metrics is None else split(options.metrics, METRICS)
    layers = layer_names(given.pop("layers"))
    if options.reshape is not None and len(options.reshape) == 1:
        given["reshape"] = options.reshape[0]
    source = {"year": given.pop("year"), "image_set": given.pop("image_set")}
    try:
        dataset = open_dataset(given.pop("dataset"), **source, for_each_label=options.explain == "label")
        results = evaluate(
            dataset,
            given.pop("model"),
            layer=layers[0] if layers is not None and len(layers) == 1 else layers,
            command=shlex.join(["captum-fusion", *options.arguments]),
            **given,
        )
    except (ValueError, TypeError) as error:
        raise CommandError(str(error)) from error
    except BrokenPipeError:  # of standard output
        raise
    except OSError as error:
        raise CommandError(f"output: {options.output} could not be written ({error})") from error
    except KeyboardInterrupt:
        print(f"\nstopped; the same command continues from the rows in {options.output}", file=sys.stderr)
        raise SystemExit(130) from None
    for file in results.files:
        if file.suffix == ".md" and file.stem.endswith("_cost") == (options.preset == "time"):
            print(re.sub(r"\\(\W)", r"\1", file.read_text(encoding="utf-8")))  # escapes are for Markdown
    if results.files:
        print(f"wrote {options.output / 'index.html'} and {len(results.files) - 1} other files")
    _report_failures(results.rows)


def _report_failures(rows: Iterable[dict[str, Any]]) -> None:
    """Print which methods failed.

    Raises:
        SystemExit: If one failed on every picture.
    """
    asked, failed = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for row in rows:
        if row["metric"] == "forward_samples":  # which every method has that returns a map
            asked[row["model"], row["method"]] += 1
            failed[row["model"], row["method"]] += "error" in row
    for (model, method), count in (+failed).items():
        print(f"{model}: {method} failed on {count} of {asked[model, method]} pictures", file=sys.stderr)
    if any(count == asked[key] for key, count in (+failed).items()):
        raise SystemExit(1)
