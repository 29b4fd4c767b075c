"""Time and memory that the report of a large evaluation takes.

    python -m tests.benchmarks.report --pictures 50000 [--curves] [--errors 0.01]

Writes generated rows into a temporary folder, as an evaluation does, and makes the report in a fresh process. Prints
the wall-clock and processor seconds of each stage, and the peak resident memory of that process.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar
from unittest import mock

import numpy as np

from captum_fusion.evaluation import report
from captum_fusion.evaluation.measures import COSTS
from captum_fusion.evaluation.report import figures
from captum_fusion.evaluation.store import Store

Result = TypeVar("Result")

METHODS = ("grad-cam", "grad-cam++", "xgrad-cam", "score-cam", "group-cam", "union-cam", "fusion-cam")
METRICS = ("complexity", "insertion", "deletion")
STEPS = 113


def curves(number: int, rng: np.random.Generator) -> list[str]:
    """Curves as they stand in a row."""
    shares = json.dumps(np.linspace(0, 1, STEPS).tolist())
    scores = np.sort(rng.random((number, STEPS)), axis=1).tolist()
    return [f', "shares": {shares}, "curve": {json.dumps(each)}' for each in scores]


def lines(pictures: int, with_curves: bool, errors: float) -> Iterator[str]:
    """Rows of one network, line by line; a share of the maps has failed."""
    rng = np.random.default_rng(0)
    known = curves(1000, rng) if with_curves else [""]
    for i in range(pictures):
        head = f'"model": "resnet50", "image": "ILSVRC2012_val_{i + 1:08}.JPEG", "target": {i % 1000}'
        tail = f', "picture": "{i:016x}"}}\n'
        values = rng.random((len(METHODS), len(METRICS) + len(COSTS)))
        failed = rng.random(len(METHODS)) < errors
        for method, numbers, fails in zip(METHODS, values.tolist(), failed.tolist(), strict=True):
            for metric, value in zip((*METRICS, *COSTS), numbers, strict=True):
                outcome = '"value": null, "error": "RuntimeError: out of memory"' if fails else f'"value": {value!r}'
                curve = known[i % len(known)] if metric in ("insertion", "deletion") and not fails else ""
                yield f'{{{head}, "method": "{method}", "metric": "{metric}", {outcome}{curve}{tail}'


def generate(folder: Path, pictures: int, with_curves: bool, errors: float) -> int:
    """Write the rows; how many bytes they are."""
    folder.mkdir(parents=True)
    with (folder / "rank-0.jsonl").open("w") as file:
        file.writelines(lines(pictures, with_curves, errors))
    return (folder / "rank-0.jsonl").stat().st_size


def measured(folder: Path, pictures: int) -> list[tuple[str, float, float]]:
    """Make the report of the rows in a folder; the stages with their wall-clock and processor seconds."""
    stages: list[tuple[str, float, float]] = []

    def timed(name: str, work: Callable[[], Result]) -> Result:
        wall, processor = time.perf_counter(), time.process_time()
        result = work()
        stages.append((name, time.perf_counter() - wall, time.process_time() - processor))
        return result

    outline = report.Outline(
        "Generated rows", ["resnet50"], METHODS, METRICS, METHODS[-1], pictures,
        headings={"complexity": ("area", ""), "insertion": ("insertion", "up"), "deletion": ("deletion", "down")},
    )  # fmt: skip
    draw = figures.draw
    with mock.patch.object(figures, "draw", lambda *given: timed("figures", lambda: draw(*given))):
        rows = timed("reading", Store(folder / "rows").rows)
        cells = timed("bootstrap", lambda: report.summarize(rows, outline))
        timed("tables", lambda: report.write(folder, rows, outline, cells=cells))
    names, wall, processor = (list(each) for each in zip(*stages, strict=True))
    drawn, tabled = names.index("figures"), names.index("tables")
    for seconds in (wall, processor):
        seconds[tabled] -= seconds[drawn]  # the figures are drawn while the tables are written
    return [*zip(names, wall, processor, strict=True), ("total", sum(wall), sum(processor))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=50000)
    parser.add_argument("--curves", action="store_true", help="insertion and deletion with a curve in every row")
    parser.add_argument("--errors", type=float, default=0.0, help="share of the maps that failed")
    parser.add_argument("--rows", type=Path, help="make the report of this folder; this is the fresh process")
    options = parser.parse_args()
    if options.rows is not None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(
            "\n".join(
                f"{name:<10}{wall:>10.1f}{cpu:>10.1f}" for name, wall, cpu in measured(options.rows, options.pictures)
            )
        )
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"peak RSS {after / 2**20:.2f} GiB, of which {before / 2**20:.2f} GiB after the imports")
        return
    with tempfile.TemporaryDirectory() as folder:
        size = generate(Path(folder) / "rows", options.pictures, options.curves, options.errors)
        number = options.pictures * len(METHODS) * (len(METRICS) + len(COSTS))
        print(f"{number} rows, {size / 1e6:.0f} MB\nstage        seconds       CPU", flush=True)
        command = [sys.executable, "-m", "tests.benchmarks.report", "--rows", folder]
        subprocess.run([*command, "--pictures", str(options.pictures)], check=True)


if __name__ == "__main__":
    main()
