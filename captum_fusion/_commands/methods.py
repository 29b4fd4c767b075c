"""``captum-fusion methods``: the methods and metrics that there are."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from captum_fusion.attr.catalog import METHODS
from captum_fusion.evaluation import METRICS


def add(commands: Any) -> None:
    """Add the command to the parser's commands."""
    parser = commands.add_parser(
        "methods",
        help="list the methods with their cost, and the metrics",
        description="List the methods, and the metrics of 'evaluate'. Samples are forward samples for each picture, "
        "for a layer with K live channels and Z positions; '(layer)' are samples that begin at the layer, 'b' counts "
        "backward samples.",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print both tables."""
    table = [("method", "family", "samples", "paper", "")]
    table += [
        (info.name, info.family, info.cost, info.citation + f" ({info.note})" * bool(info.note), info.url)
        for info in (m.info for m in METHODS.values())
    ]
    _print(table)
    print()
    better = {"up": "higher is better", "down": "lower is better", "": ""}
    _print([("metric", "", ""), *((m.name, better[m.better], m.meaning) for m in METRICS.values())])


def _print(table: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
