"""Figures: bars of the means, mean curves, and dependence on theta."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D

from captum_fusion.evaluation.report.statistics import Results, one_line, spec_of
from captum_fusion.evaluation.report.tables import ARROWS, fixed, listed, places

#: Heading and caption of each kind of figure.
KINDS = {
    "metrics": ("Means", "Means with 95 % intervals."),
    "curves": ("Curves", "Mean curves over all pictures, with the areas under them."),
    "theta": ("Theta", "Dependence on theta: means with 95 % intervals."),
}

FORMATS = ("png", "svg")

#: Okabe and Ito's colours, distinct for colour-blind readers; without their yellow, which is too pale on white.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.2, 1.4)), (0, (6, 2, 1.2, 2)))

_STYLE = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.labelsize": 9.0,
    "axes.edgecolor": "#555555",
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.hashsalt": "captum_fusion",
}

#: Longest line of a name in a figure, in characters; longer names are wrapped.
_LINE = 34


class Drawing(NamedTuple):
    """A figure.

    Attributes:
        files: The file's content in each of the formats.
        note: What it does not show; empty if it shows every metric.
    """

    files: dict[str, bytes]
    note: str


def draw(results: Results, model: str) -> dict[str, Drawing]:
    """Draw the figures of a network for which there is something to see.

    Returns:
        dict: For each kind its figure.
    """
    drawn: dict[str, Drawing] = {}
    with matplotlib.style.context(["default", _STYLE]):
        for kind, function in (("metrics", _bars), ("curves", _curves), ("theta", _theta)):
            figure, note = function(results, model)
            if figure is not None:
                drawn[kind] = Drawing({format: _save(figure, format) for format in FORMATS}, note)
    return drawn


def _numbers(results: Results, model: str, methods: Iterable[str], metric: str) -> set[float]:
    """The means of methods and the ends of their intervals, as the table shows them."""
    decimals = places(results, metric)
    cells = [results.cell(model, method, metric) for method in methods]
    numbers = (number for cell in cells for number in (cell.mean, cell.low, cell.high))
    return {float(fixed(number, decimals)) for number in numbers if number is not None}


def _not_drawn(results: Results, metrics: Sequence[str], why: str) -> str:
    return f"Not drawn, since {why}: {listed([results.heading(metric)[0] for metric in metrics])}." if metrics else ""


def _title(axis: Axes, results: Results, metric: str) -> None:
    text, better = results.heading(metric)
    axis.set_title(_wrapped(f"{text} {ARROWS.get(better, '')}"), loc="left", parse_math=False)


def _bars(results: Results, model: str) -> tuple[Figure | None, str]:
    methods, measured = results.outline.methods, results.measured(model, results.outline.metrics)
    zeros = [metric for metric in measured if _numbers(results, model, methods, metric) == {0.0}]
    metrics, note = [m for m in measured if m not in zeros], _not_drawn(results, zeros, "0 for every method")
    if not metrics:
        return None, note
    labels = [_wrapped(method) for method in methods]
    lines, columns = _panels(metrics, 3 if len(methods) <= 12 else 4)
    room = np.array([max(0.25, 0.1 + 0.155 * (label.count("\n") + 1)) for label in labels])  # in inches
    places = room.cumsum() - room / 2
    margin = 0.3 + 0.078 * max(len(part) for label in labels for part in label.split("\n"))
    size = (margin + 2.3 * columns, lines * (float(room.sum()) + 0.75))
    figure = Figure(figsize=size, layout="constrained")
    axes: Any = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axis in axes.flat[len(metrics) :]:
        axis.remove()
    for axis, metric in zip(axes.flat, metrics, strict=False):
        _title(axis, results, metric)
        for place, method in zip(places, methods, strict=True):
            cell = results.cell(model, method, metric)
            if cell.mean is None:
                continue
            color = "#D9772B" if method == results.outline.reference else "#7FA8C9"
            axis.barh(place, cell.mean, height=0.17, color=color)
            if cell.low is None or cell.high is None:
                continue
            ends = [[max(0.0, cell.mean - cell.low)], [max(0.0, cell.high - cell.mean)]]
            axis.errorbar(cell.mean, place, xerr=ends, color="#222222", elinewidth=1, capsize=2)
        axis.set_yticks(places, labels, parse_math=False)
        axis.tick_params(axis="y", length=0)
        axis.axvline(0, color="#555555", linewidth=0.7)
        axis.spines["left"].set_visible(False)
        axis.grid(axis="x")
        axis.locator_params(axis="x", nbins=4)
        axis.set_ylim(float(room.sum()), 0)
        cells = [results.cell(model, method, metric) for method in methods]
        if axis.get_xlim()[1] > 0 and all((cell.mean or 0) >= 0 and (cell.low or 0) >= 0 for cell in cells):
            axis.set_xlim(left=0)
    _space(figure)
    return figure, note


def _curves(results: Results, model: str) -> tuple[Figure | None, str]:
    methods = results.outline.methods
    found = {metric: curves for metric in results.outline.metrics if (curves := results.mean_curves(model, metric))}
    zeros = [metric for metric, curves in found.items() if not any(scores.any() for _, scores in curves.values())]
    found, note = {m: c for m, c in found.items() if m not in zeros}, _not_drawn(results, zeros, "0 for every method")
    if not found:
        return None, note
    labels = {method: _wrapped(method) for method in methods}
    legend = 1.1 + 0.075 * max(len(part) for label in labels.values() for part in label.split("\n"))
    high = max(2.9, 0.5 + 0.165 * sum(label.count("\n") + 1 for label in labels.values()))
    figure = Figure(figsize=(4.7 + legend, high * len(found)), layout="constrained")
    axes: Any = figure.subplots(len(found), 1, squeeze=False)
    for axis, (metric, curves) in zip(axes[:, 0], found.items(), strict=True):
        _title(axis, results, metric)
        for i, method in enumerate(methods):
            if method in curves:
                area = fixed(results.cell(model, method, metric).mean, 3)
                label = labels[method].replace("\n", "\n" + " " * 10)
                width = 2.4 if method == results.outline.reference else 1.5
                axis.plot(*curves[method], label=f"{area}  {label}", linewidth=width, **_look(i))
        removed = spec_of(metric).name == "deletion"
        axis.set_xlabel(f"share of pixels {'removed' if removed else 'shown'}")
        axis.set_ylabel("score")
        axis.set_xlim(0, 1)
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
        axis.grid()
        _as_it_is(axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=2.6))
    _space(figure)
    return figure, note


def _theta(results: Results, model: str) -> tuple[Figure | None, str]:
    groups: dict[str, list[tuple[float, str]]] = {}
    for method in results.outline.methods:
        name, options = spec_of(method)
        theta = options.pop("theta", None)
        if isinstance(theta, (int, float)) and math.isfinite(theta):
            rest = ",".join(f"{key}={value}" for key, value in options.items())
            groups.setdefault(f"{name}:{rest}" if rest else name, []).append((float(theta), method))
    groups = {name: sorted(points) for name, points in groups.items() if len({x for x, _ in points}) > 1}
    points = [method for group in groups.values() for _, method in group]
    measured = results.measured(model, results.outline.metrics)
    shown = {m: {fixed(results.cell(model, point, m).mean, places(results, m)) for point in points} for m in measured}
    equal = [metric for metric in measured if len(shown[metric]) == 1]
    metrics, note = [m for m in measured if m not in equal], _not_drawn(results, equal, "equal for every theta")
    if not groups or not metrics:
        return None, note
    lines, columns = _panels(metrics, 3)
    legend = 0.3 + 0.17 * sum(_wrapped(name).count("\n") + 1 for name in groups)
    figure = Figure(figsize=(3.0 * columns, 2.6 * lines + legend), layout="constrained")
    axes: Any = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat[len(metrics) :]:
        axis.remove()
    for axis, metric in zip(axes.flat, metrics, strict=False):
        _title(axis, results, metric)
        for i, group in enumerate(groups.values()):
            cells = [(x, results.cell(model, method, metric)) for x, method in group]
            known = [(x, c.mean, c.low, c.high) for x, c in cells if c.mean is not None]
            if known:
                x, mean, low, high = (np.array(each, dtype=np.float64) for each in zip(*known, strict=True))
                axis.fill_between(x, low, high, color=_look(i)["color"], alpha=0.18, linewidth=0)
                axis.plot(x, mean, marker="o", markersize=3.5, linewidth=1.5, **_look(i))
        axis.set_xlabel("theta")
        axis.grid()
    handles = [Line2D([], [], marker="o", markersize=3.5, linewidth=1.5, **_look(i)) for i in range(len(groups))]
    names = [" " + _wrapped(name).replace("\n", "\n ") for name in groups]
    _as_it_is(figure.legend(handles, names, loc="outside lower left"))
    _space(figure)
    return figure, note


def _save(figure: Figure, format: str) -> bytes:
    file = io.BytesIO()
    metadata: dict[str, Any] = {"Software": None} if format == "png" else {"Date": None}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)  # a name's rare letter
        figure.savefig(file, format=format, dpi=150, metadata=metadata, bbox_inches="tight", pad_inches=0.08)
    return file.getvalue()


def _as_it_is(legend: Legend) -> None:
    """Show a ``$`` of a name as such."""
    for text in legend.get_texts():
        text.set_parse_math(False)


def _panels(metrics: Sequence[str], most: int) -> tuple[int, int]:
    """Lines and columns of small multiples."""
    columns = min(most, len(metrics)) if len(metrics) != 4 else min(most, 4 if most > 3 else 2)
    return -(-len(metrics) // columns), columns


def _space(figure: Figure) -> None:
    """Some room between panels."""
    engine: Any = figure.get_layout_engine()
    engine.set(wspace=0.05, hspace=0.06)


def _look(i: int) -> dict[str, Any]:
    return {"color": _COLORS[i % len(_COLORS)], "linestyle": _DASHES[i // len(_COLORS) % len(_DASHES)]}


def _wrapped(text: str) -> str:
    """Text in lines of at most ``_LINE`` characters, broken after ``:`` and ``,`` where possible."""
    lines = [""]
    for piece in re.findall(r"[^:, ]*[:, ]?", one_line(text)):
        for part in (piece[i : i + _LINE] for i in range(0, len(piece), _LINE)):
            if len(lines[-1]) + len(part) > _LINE and lines[-1]:
                lines.append("")
            lines[-1] += part
    return "\n".join(lines)
