"""``captum-fusion methods``: the methods and metrics that there are."""

from __future__ import annotations

import argparse
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from captum_fusion._commands.common import CommandError
from captum_fusion.attr.catalog import METHODS, Method
from captum_fusion.evaluation import METRICS
from captum_fusion.evaluation.measures import Measure
from captum_fusion.evaluation.methods import options_of, unknown

_LEGEND = """\
samples: forward samples for each picture. K: live channels of the layer (up to 512 in SqueezeNet, 2048 in ResNet-50).
Z: positions of the layer (13 x 13 and 7 x 7). b: backward samples. (layer): samples that begin at the layer, which cost
less.
'captum-fusion methods NAME' shows one method with its options."""

_BETTER = {"up": "higher is better", "down": "lower is better", "": ""}


def add(commands: Any) -> None:
    """Add the command to the parser's commands."""
    parser = commands.add_parser(
        "methods",
        help="list the methods with their cost, and the metrics",
        description="List the methods, and the metrics of 'evaluate', or show single ones with their options.",
        epilog=_LEGEND,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a method or metric to show (default: list all)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print both tables, or the methods and metrics that are named."""
    if options.names:
        try:
            shown = ["\n".join(_lines(name)) for name in options.names]
        except ValueError as error:
            raise CommandError(str(error)) from error
        print("\n\n".join(shown))
        return
    table = [("method", "family", "samples", "paper", "")]
    table += [
        (info.name, info.family, info.cost, info.citation + f" ({info.note})" * bool(info.note), info.url)
        for info in (m.info for m in METHODS.values())
    ]
    _print(table)
    print(f"\n{_LEGEND}\n")
    _print([("metric", "", ""), *((m.name, _BETTER[m.better], m.meaning) for m in METRICS.values())])


def _print(table: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _lines(name: str) -> Iterator[str]:
    """A method or metric, in lines.

    Raises:
        ValueError: If there is none of that name.
    """
    if name in METHODS:
        return _method(METHODS[name])
    if name in METRICS:
        return _metric(METRICS[name])
    raise unknown("method", name, [*METHODS, *METRICS])


def _method(method: Method) -> Iterator[str]:
    info = method.info
    package = "captum_fusion" if method.cls.__module__.startswith("captum_fusion.") else "captum.attr"
    yield f"{info.name}: {package}.{method.cls.__name__} ({info.family} method)"
    yield textwrap.fill(_summary(method.cls), 100, initial_indent="  ", subsequent_indent="  ")
    yield f"  samples for each picture: {info.cost}"
    yield f"  map: in the {info.space}'s size{', with both signs' if info.signed else ''}"
    yield f"  paper: {info.citation}, {info.url}"
    if info.note:
        yield f"  note: {info.note}"
    parameters = inspect.signature(method.cls.__init__).parameters
    options = [f"{option}={parameters[option].default}" for option in options_of(info.name) if option in parameters]
    yield f"  options: {', '.join(options) or 'none'}"
    if info.presets:
        yield f"  presets: {', '.join(f'preset={preset}' for preset in info.presets)}"
    example = info.name + (f":{options[0]}" if options else "")
    yield f"  captum-fusion explain cat.jpg --methods {example}"


def _metric(metric: Measure) -> Iterator[str]:
    yield f"{metric.name}: metric of 'captum-fusion evaluate'" + (f", {_BETTER[metric.better]}" * bool(metric.better))
    yield textwrap.fill(metric.meaning, 100, initial_indent="  ", subsequent_indent="  ")


def _summary(cls: type) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split()).replace("``", "")
