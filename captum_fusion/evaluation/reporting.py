"""Rows in; tables, figures and one page out. The same rows, in whatever order, give the same bytes."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib.style
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from scipy.stats import bootstrap
from tabulate import tabulate

from captum_fusion.evaluation.measures import COSTS, METRICS
from captum_fusion.evaluation.methods import MethodSpec, parse
from captum_fusion.evaluation.store import Row, write_whole

#: What a cost is called in a heading.
_COST_HEADINGS = {"forward_samples": "forward samples", "backward_samples": "backward samples"}

_MINUS, _TIMES, _NOTHING = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"

#: Indices drawn at once by the bootstrap, which bounds its memory.
_DRAWN_AT_ONCE = 1 << 20

#: Okabe and Ito's colours, which colour-blind people can tell apart, without the yellow, which is pale on white.
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

#: A name is broken into lines of at most this many characters in figures.
_LINE = 34

#: At most this many skipped pictures are listed by name.
_LISTED = 100


@dataclass(frozen=True)
class Study:
    """What was compared, and how it is to be shown.

    Attributes:
        title: Heading of the page.
        models: Names of the networks, in the order of their tables.
        methods: Labels of the methods, in the order of the rows.
        metrics: Names of the metrics, in the order of the columns, without the costs.
        reference: The method that paired differences are taken against; None for no differences.
        images: How many pictures were wanted.
        skipped: Pictures that were left out, each with the reason.
        settings: Shown on the page: command, versions, seed, target.
        examples: For each network PNG files of example maps.
        headings: For a metric a short heading and what is better: ``"down"``, ``"up"`` or ``""``. A metric that is
            missing here has its own name for a heading.
        published: Published figures: a sentence on the source, then method, then metric.
        pictures: Of examples that share a picture (one for each label), what the picture is called; any other example
            is a picture of its own.
    """

    title: str
    models: Sequence[str]
    methods: Sequence[str]
    metrics: Sequence[str]
    reference: str | None
    images: int
    skipped: Sequence[tuple[str, str]] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    examples: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    headings: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    published: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    pictures: Mapping[str, str] = field(default_factory=dict)


class Cell(NamedTuple):
    """What one method has in one metric on one network.

    Attributes:
        model: Name of the network.
        method: Label of the method.
        metric: Name of the metric or cost.
        mean: Mean over the pictures; None without any value.
        low: Lower end of the mean's 95 % interval; None for fewer than two pictures.
        high: Upper end of the mean's 95 % interval.
        count: How many pictures have a value.
        errors: How many pictures have an error instead.
        difference: Mean, over the pictures that both have, of this method minus the reference; None for the reference.
        difference_low: Lower end of the difference's 95 % interval.
        difference_high: Upper end of the difference's 95 % interval.
    """

    model: str
    method: str
    metric: str
    mean: float | None
    low: float | None
    high: float | None
    count: int  # type: ignore[assignment]  # a tuple's own count() is not missed
    errors: int
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None


def summarize(rows: Iterable[Row], study: Study, *, resamples: int = 2000, seed: int = 0) -> list[Cell]:
    """Means over pictures, with intervals, and paired differences to the reference.

    An interval is the percentile interval of the bootstrap over pictures: the mean of as many pictures as there are,
    drawn with replacement, lies in it 95 times of 100. The examples of one picture are drawn together, since they say
    less than as many pictures would. Pictures are taken in the order of their names and the seed is derived from the
    names, so that the same rows give the same digits in whatever order they come.

    Args:
        rows (iterable of dict): With ``model``, ``image``, ``method``, ``metric`` and ``value``, at most one for each
            picture. A value that is None or not finite counts as an error. Rows that the study does not name are
            ignored.
        study (Study): What the rows are of.
        resamples (int, optional): How often the pictures are drawn again. Default: 2000
        seed (int, optional): Of the drawing. Default: 0

    Returns:
        list[Cell]: One for each network, method, and metric or cost, in the study's order.

    Raises:
        ValueError: If ``resamples`` is not positive, or a picture has two different values.

    Examples::

        >>> study = Study("a study", ["net"], ["a", "b"], ["insertion"], reference="a", images=2)
        >>> row = {"model": "net", "metric": "insertion"}
        >>> rows = [{**row, "image": i, "method": m, "value": v} for i, m, v in
        ...         [("1.png", "a", 0.25), ("2.png", "a", 0.5), ("1.png", "b", 0.75), ("2.png", "b", 1.0)]]
        >>> cells = summarize(rows, study)
        >>> cells[4].method, cells[4].mean, cells[4].low, cells[4].high
        ('b', 0.875, 0.75, 1.0)
        >>> cells[4].difference, cells[4].difference_low, cells[4].difference_high
        (0.5, 0.5, 0.5)
    """
    return _summarize(_collect(rows, study), study, resamples, seed)


def write_report(folder: str | Path, rows: Iterable[Row], study: Study, *, cells: Sequence[Cell] = ()) -> list[Path]:
    """Write tables, figures and a page that holds all of it.

    ``tables/`` has for each network ``.md``, ``.csv`` and ``.tex`` with means, intervals, paired differences and rows,
    which repeat byte for byte between runs, and the same with ``_cost`` in their names, which have seconds, too.
    ``figures/`` has bars, curves and dependence on ``theta``, as far as there are any, as PNG and SVG; an earlier
    report's, of which there are none now, are removed. ``index.html`` needs no other file. Each file is written whole
    or not at all.

    Args:
        folder (str or Path): Made if need be.
        rows (iterable of dict): As of :func:`summarize`; those of curves also have ``curve`` and ``shares``.
        study (Study): What the rows are of.
        cells (sequence of Cell, optional): What :func:`summarize` found. Default: () (found here)

    Returns:
        list[Path]: The files.

    Raises:
        ValueError: If the study has average drop without complexity: a mask that shows everything drops nothing, so the
            mask's area is always shown beside it.

    Examples::

        >>> import tempfile
        >>> study = Study("a study", ["net"], ["a"], ["insertion"], reference=None, images=1)
        >>> row = {"model": "net", "image": "1.png", "method": "a", "metric": "insertion", "value": 0.25}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files = write_report(folder, [row], study)
        ...     print((Path(folder) / "tables/net.csv").read_text().splitlines()[1])
        net,a,0.25,,,1,0,1,0
        >>> [file.name for file in files if file.suffix == ".md"], files[-1].name
        (['net.md', 'net_cost.md'], 'index.html')
    """
    names = {_words(metric).name for metric in study.metrics}
    if "average_drop" in names and "complexity" not in names:
        raise ValueError("metrics: average_drop needs complexity beside it; a mask that shows everything drops nothing")
    found = _collect(rows, study)
    return _Report(Path(folder), found, study, cells or _summarize(found, study)).write()


# ------------------------------------------------------------------------------------------------------------- numbers

#: For each network, method and metric, the rows by picture, in the order of the pictures' names.
_Found = dict[tuple[str, str, str], dict[str, Row]]

#: A mean and the ends of its interval.
_Mean = tuple[float | None, float | None, float | None]


def _collect(rows: Iterable[Row], study: Study) -> _Found:
    keys = [
        (model, method, metric)
        for model in study.models
        for method in study.methods
        for metric in (*study.metrics, *COSTS)
    ]
    found: _Found = {key: {} for key in keys}
    for row in rows:
        known = found.get((row["model"], row["method"], row["metric"]))
        if known is None:
            continue
        other = known.get(row["image"])
        if other is not None and _value(other) is not None:
            if _value(row) not in (None, _value(other)):
                raise ValueError(
                    f"rows: {row['image']} has two values of {row['metric']} by {row['method']} on {row['model']}"
                )
            continue
        if other is None or _value(row) is not None or str(row.get("error")) < str(other.get("error")):
            known[row["image"]] = row
    return {key: dict(sorted(known.items())) for key, known in found.items()}


def _value(row: Row) -> float | None:
    value = row.get("value")
    return float(value) if value is not None and math.isfinite(value) else None


def _values(rows: Mapping[str, Row]) -> dict[str, float]:
    return {image: value for image, row in rows.items() if (value := _value(row)) is not None}


def _summarize(found: _Found, study: Study, resamples: int = 2000, seed: int = 0) -> list[Cell]:
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, not {resamples}")
    cells = []
    for (model, method, metric), rows in found.items():
        values = _values(rows)
        mean, low, high = _mean_and_interval(values, study.pictures, resamples, seed, model, metric)
        paired: _Mean = (None, None, None)
        if study.reference is not None and method != study.reference:
            other = _values(found.get((model, study.reference, metric), {}))
            differences = {image: value - other[image] for image, value in values.items() if image in other}
            paired = _mean_and_interval(differences, study.pictures, resamples, seed, model, metric)
        cells.append(Cell(model, method, metric, mean, low, high, len(values), len(rows) - len(values), *paired))
    return cells


def _mean_of(sums: NDArray[np.float64], counts: NDArray[np.float64], axis: int) -> Any:
    return sums.sum(axis) / counts.sum(axis)


def _mean_and_interval(values: Mapping[str, float], pictures: Mapping[str, str], resamples: int, *seed: Any) -> _Mean:
    """The mean of the examples and the 2.5 and 97.5 percentiles of the means of resampled pictures, two at least."""
    if not values:
        return None, None, None
    together: dict[str, list[float]] = {}
    for example, value in values.items():
        together.setdefault(pictures.get(example, example), []).append(value)
    sums = np.array([math.fsum(each) for each in together.values()])
    counts = np.array([float(len(each)) for each in together.values()])
    means = sums / counts
    mean = math.fsum(values.values()) / len(values)
    if len(together) == 1:  # one picture says nothing of others
        return mean, None, None
    digest = hashlib.sha256(json.dumps(seed).encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:16], "big"))
    interval = bootstrap(
        (sums, counts),
        _mean_of,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _DRAWN_AT_ONCE // len(sums)),
        method="percentile",
        random_state=generator,  # scipy before 1.15 knows no other name for it
    ).confidence_interval
    # No mean lies beyond its values, whatever rounding says: the interval of equal values has no width.
    mean, low, high = np.clip([mean, interval.low, interval.high], means.min(), means.max()).tolist()
    return mean, low, high


# -------------------------------------------------------------------------------------------------------------- labels


def _words(label: str) -> MethodSpec:
    try:
        return parse(label)
    except ValueError:  # a user's own label
        return MethodSpec(label, {})


def _line(text: str) -> str:
    """Text without line breaks."""
    return " ".join(str(text).split())


def _breakable(text: str) -> Markup:
    """HTML that may be broken after the signs between a name and its options."""
    return Markup("<wbr>").join(re.findall(r"[^:,=_/]*[:,=_/]|[^:,=_/]+", str(text)))


def _wrapped(text: str) -> str:
    """Text in lines of at most ``_LINE`` characters, broken after ``:`` and ``,`` where possible."""
    lines = [""]
    for piece in re.findall(r"[^:, ]*[:, ]?", _line(text)):
        for part in (piece[i : i + _LINE] for i in range(0, len(piece), _LINE)):
            if len(lines[-1]) + len(part) > _LINE and lines[-1]:
                lines.append("")
            lines[-1] += part
    return "\n".join(lines)


def _file_names(models: Sequence[str]) -> dict[str, str]:
    """A file name for each network, distinct also where case does not count."""
    safe = {model: re.sub(r"[^A-Za-z0-9._-]", "_", model)[:80].lstrip(".-") for model in models}
    often = Counter(name.lower() for model, name in safe.items() if name == model)
    return {
        model: name
        if name == model and often[name.lower()] == 1 and not name.lower().endswith("_cost")
        else f"{name or 'model'}-{hashlib.sha256(model.encode()).hexdigest()[:6]}"
        for model, name in safe.items()
    }


def _fixed(value: float | None, decimals: int, sign: bool = False) -> str:
    """A number with so many decimals, and without a sign if that shows nothing but zeros."""
    if value is None:
        return _NOTHING
    text = f"{value:+.{decimals}f}" if sign else f"{value:.{decimals}f}"
    return text.lstrip("+-") if float(text) == 0 else text


def _significant(value: float | None, digits: int = 3) -> str:
    """A number with about so many digits, never in powers of ten."""
    if value is None:
        return _NOTHING
    return f"{value:.{_decimals(value, digits)}f}"


def _decimals(value: float, digits: int) -> int:
    return min(9, max(0, digits - 1 - math.floor(math.log10(abs(value))))) if value else 0


# -------------------------------------------------------------------------------------------------------------- tables


class _Entry(NamedTuple):
    """What stands in a table: a number, its interval, a note; the best of its column; nothing to rely on."""

    text: str
    interval: str = ""
    note: str = ""
    best: bool = False
    faint: bool = False


class _Table(NamedTuple):
    columns: list[tuple[str, str]]
    lines: list[tuple[str, str, list[_Entry]]]  # method, note on it, entries


_ARROWS = {"down": "↓", "up": "↑"}


def _escape_markdown(text: str) -> str:
    return re.sub(r"([\\`*_|<>&\[\]~$])", r"\\\1", _line(text))


def _markdown(table: _Table) -> str:
    def entry(each: _Entry) -> str:
        number = f"**{each.text}**" if each.best else each.text
        return " ".join(part for part in (number, each.interval, f"({each.note})" if each.note else "") if part)

    noted = any(note for _, note, _ in table.lines)
    heads = [" ".join((_escape_markdown(text), _ARROWS.get(better, ""))).strip() for text, better in table.columns]
    lines = [
        [_escape_markdown(method), *([note.removeprefix("n = ")] if noted else []), *map(entry, entries)]
        for method, note, entries in table.lines
    ]
    aligned = ["left", *["right"] * (len(heads) + noted)]
    heads = ["method", *(["n"] if noted else []), *heads]
    return str(tabulate(lines, heads, tablefmt="pipe", disable_numparse=True, colalign=aligned))


_TEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", "[": "{[}", "]": "{]}", "*": "{*}", '"': r"\textquotedbl{}",
    _MINUS: "$-$", _TIMES: r"$\times$", _NOTHING: "--", **{each: f"\\{each}" for each in "&%$#_{}"},
}  # fmt: skip


def _escape_tex(text: str) -> str:
    return "".join(_TEX.get(each, each) for each in _line(text).replace("--", "-\0-")).replace("\0", "{}")


def _tex(table: _Table) -> str:
    def number(each: _Entry) -> str:
        text = re.sub("^-", "$-$", each.text) if each.text[:1] == "-" else _escape_tex(each.text)
        return f"\\textbf{{{text}}}" if each.best else text

    def beneath(each: _Entry) -> str:
        text = each.interval.replace("-", "$-$") + (f" {each.note}" if each.note else "")
        return f"{{\\scriptsize {text.strip()}}}" if text else ""

    arrows = {better: f" $\\{better}arrow$" if better else "" for better in ("down", "up", "")}
    noted = any(note for _, note, _ in table.lines)
    heads = [_escape_tex(text) + arrows.get(better, "") for text, better in table.columns]
    lines = [
        f"\\begin{{tabular}}{{l{'r' * (len(heads) + noted)}}}",
        "\\toprule",
        " & ".join(["method", *(["$n$"] if noted else []), *heads]) + " \\\\",
        "\\midrule",
    ]
    for i, (method, note, entries) in enumerate(table.lines):
        start = [note.removeprefix("n = ")] if noted else []
        spread = any(each.interval or each.note for each in entries)
        if i and spread:
            lines.append("\\addlinespace")
        lines.append(" & ".join([_escape_tex(method), *start, *map(number, entries)]) + " \\\\")
        if spread:
            lines.append(" & ".join(["", *[""] * noted, *map(beneath, entries)]).rstrip() + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"])


def _csv(lines: Iterable[Sequence[Any]]) -> bytes:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(lines)
    return file.getvalue().encode()


# ------------------------------------------------------------------------------------------------------------- figures


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


def _mean_curve(rows: Iterable[Row]) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """The mean of curves, on their own steps if these are the same for all."""
    grid: NDArray[np.float64] | None = None
    curves = [row for row in rows if row.get("curve") and _value(row) is not None]
    if not curves:
        return None
    if all(row["shares"] == curves[0]["shares"] for row in curves):
        grid = np.asarray(curves[0]["shares"], dtype=np.float64)
        total = sum((np.asarray(row["curve"], dtype=np.float64) for row in curves), np.zeros(len(grid)))
    else:
        grid = np.linspace(0, 1, 201)
        total = sum((np.interp(grid, row["shares"], row["curve"]) for row in curves), np.zeros(len(grid)))
    return grid, total / len(curves)


# -------------------------------------------------------------------------------------------------------------- report


class _Picture(NamedTuple):
    """A figure on the page."""

    kind: str
    caption: str
    data: str


class _Report:
    """The files of a study."""

    def __init__(self, folder: Path, found: _Found, study: Study, cells: Sequence[Cell]) -> None:
        self.folder, self.found, self.study = folder, found, study
        self.cells = {(cell.model, cell.method, cell.metric): cell for cell in cells}
        self.names = _file_names(study.models)
        self.files: list[Path] = []
        self.decimals = {metric: self._decimals_of(metric) for metric in study.metrics}

    def write(self) -> list[Path]:
        sections = []
        for model in self.study.models:
            main, differences, costs = self._means(model), self._differences(model), self._costs(model)
            name = self.names[model]
            self._write(f"tables/{name}.md", self._markdown_page(model, main, differences))
            self._write(f"tables/{name}.csv", _csv(self._csv_lines(model)))
            self._write(f"tables/{name}.tex", self._tex_page(model, main, differences))
            title = f"# {_escape_markdown(model)}: cost for each picture\n\n"
            self._write(f"tables/{name}_cost.md", f"{title}{_markdown(costs)}\n\n{self._cost_note()}\n")
            self._write(f"tables/{name}_cost.csv", _csv(self._csv_costs(model)))
            self._write(f"tables/{name}_cost.tex", f"{self._tex_head(model)}{_tex(costs)}\n")
            sections.append(
                {
                    "name": model,
                    "id": self.names[model],
                    "count": self._count(model),
                    "table": main,
                    "differences": differences,
                    "costs": costs,
                    "figures": self._figures(model),
                    "examples": [
                        base64.b64encode(path.read_bytes()).decode()
                        for path in self.study.examples.get(model, ())
                        if path.is_file()
                    ],
                }
            )
        self._write("index.html", self._page(sections))
        return self.files

    def _write(self, name: str, content: str | bytes) -> None:
        path = self.folder / name
        write_whole(path, content if isinstance(content, bytes) else content.encode(errors="backslashreplace"))
        self.files.append(path)

    # --------------------------------------------------------------------------------------------------------- entries

    def _heading(self, metric: str) -> tuple[str, str]:
        return self.study.headings.get(metric, (metric, ""))

    def _decimals_of(self, metric: str) -> int:
        """Two decimals for percentages, as in papers; else three digits of the largest mean, at least."""
        means = [abs(cell.mean) for (_, _, name), cell in self.cells.items() if name == metric and cell.mean]
        if "%" in self._heading(metric)[0]:
            return 2
        return _decimals(max(means), 4 if max(means) >= 1 else 3) if means else 2

    def _cell(self, model: str, method: str, metric: str) -> Cell:
        empty = Cell(model, method, metric, None, None, None, 0, 0)
        return self.cells.get((model, method, metric), empty)

    def _count(self, model: str, method: str | None = None) -> int:
        """How many pictures have a value, in the metric that has most."""
        methods = self.study.methods if method is None else [method]
        metrics = (*self.study.metrics, *COSTS)
        return max((self._cell(model, each, metric).count for each in methods for metric in metrics), default=0)

    def _of(self, count: int) -> str:
        return f"n = {count} of {self.study.images}" if count < self.study.images else f"n = {count}"

    def _notes(self, model: str) -> dict[str, str]:
        """How many pictures each method has, if that is not all of them for all methods."""
        counts = {method: self._count(model, method) for method in self.study.methods}
        short = any(count < self.study.images for count in counts.values())
        return {method: self._of(count) if short else "" for method, count in counts.items()}

    def _means(self, model: str) -> _Table:
        study, notes = self.study, self._notes(model)
        columns: dict[str, list[_Entry]] = {}
        for metric in study.metrics:
            cells, decimals = [self._cell(model, method, metric) for method in study.methods], self.decimals[metric]
            better = self._heading(metric)[1]
            shown = [float(_fixed(cell.mean, decimals)) for cell in cells if cell.mean is not None]
            best = {"down": min, "up": max}[better](shown) if len(shown) > 1 and better else None
            columns[metric] = [
                _Entry(
                    _fixed(cell.mean, decimals),
                    self._interval(cell.low, cell.high, decimals),
                    f"n = {cell.count}" if cell.count < self._count(model, cell.method) else "",
                    best is not None and cell.mean is not None and float(_fixed(cell.mean, decimals)) == best,
                    cell.mean is None,
                )
                for cell in cells
            ]
        for cost in _COST_HEADINGS:
            if any(self._cell(model, method, cost).count for method in study.methods):
                columns[cost] = [self._row_entry(model, method, cost) for method in study.methods]
        return _Table(
            [(_COST_HEADINGS[each], "") if each in _COST_HEADINGS else self._heading(each) for each in columns],
            [
                (method, notes[method], [entries[i] for entries in columns.values()])
                for i, method in enumerate(study.methods)
            ],
        )

    def _row_entry(self, model: str, method: str, cost: str) -> _Entry:
        mean = self._cell(model, method, cost).mean
        return _Entry(_fixed(mean, 0 if mean is None or mean == int(mean) else 1), faint=mean is None)

    @staticmethod
    def _interval(low: float | None, high: float | None, decimals: int, sign: bool = False) -> str:
        if low is None or high is None:
            return ""
        return f"[{_fixed(low, decimals, sign)}, {_fixed(high, decimals, sign)}]"

    def _differences(self, model: str) -> _Table | None:
        study = self.study
        lines = []
        for method in study.methods:
            cells = [self._cell(model, method, metric) for metric in study.metrics]
            if method != study.reference and any(cell.difference is not None for cell in cells):
                entries = [
                    _Entry(
                        _fixed(cell.difference, self.decimals[cell.metric], True),
                        self._interval(cell.difference_low, cell.difference_high, self.decimals[cell.metric], True),
                        faint=cell.count < 2
                        or cell.difference_low is None
                        or cell.difference_high is None
                        or cell.difference_low <= 0 <= cell.difference_high,
                    )
                    for cell in cells
                ]
                lines.append((method, "", entries))
        return _Table([self._heading(metric) for metric in study.metrics], lines) if lines else None

    def _costs(self, model: str) -> _Table:
        columns = [(heading, "") for heading in _COST_HEADINGS.values()]
        columns += [("seconds, median", ""), ("seconds, mean", "")]
        if self.study.reference is not None:
            columns.append((f"relative to {self.study.reference}", ""))
        lines = []
        for method in self.study.methods:
            median, mean, relative = self._seconds(model, method)
            entries = [self._row_entry(model, method, cost) for cost in _COST_HEADINGS]
            entries += [_Entry(_significant(each), faint=each is None) for each in (median, mean)]
            if self.study.reference is not None:
                entries.append(
                    _Entry(_NOTHING if relative is None else f"{_significant(relative)} {_TIMES}", faint=not relative)
                )
            lines.append((method, "", entries))
        return _Table(columns, lines)

    def _seconds(self, model: str, method: str) -> tuple[float | None, float | None, float | None]:
        """Median and mean, and the median by that of the reference over the pictures that both have."""
        own = _values(self.found[model, method, "seconds"])
        if not own:
            return None, None, None
        other = _values(self.found.get((model, self.study.reference or "", "seconds"), {}))
        both = [image for image in own if image in other]
        rival = float(np.median([other[image] for image in both])) if both else 0.0
        relative = float(np.median([own[image] for image in both])) / rival if rival > 0 else None
        return float(np.median(list(own.values()))), math.fsum(own.values()) / len(own), relative

    # --------------------------------------------------------------------------------------------------- tables' files

    def _summary(self, model: str) -> str:
        return f"{self._of(self._count(model))}; means with 95 % bootstrap intervals"

    def _drop_note(self) -> str:
        if "average_drop" not in {_words(metric).name for metric in self.study.metrics}:
            return ""
        return "Average drop falls as masks grow: read it beside the area of the mask."

    def _cost_note(self) -> str:
        return (
            "Rows are examples that go through the network, or back through it. Seconds depend on the machine and do "
            "not repeat."
        )

    def _markdown_page(self, model: str, main: _Table, differences: _Table | None) -> str:
        study = self.study
        parts = [f"# {_escape_markdown(model)}", f"{_escape_markdown(study.title)}; {self._summary(model)}."]
        parts.append(_markdown(main))
        if self._drop_note():
            parts.append(self._drop_note())
        if differences is not None:
            parts += [
                f"Paired differences, method minus {_escape_markdown(str(study.reference))}, picture by picture:",
                _markdown(differences),
            ]
        for source, table in self._published():
            parts += [f"Published figures: {_escape_markdown(source)}", _markdown(table)]
        return "\n\n".join(parts) + "\n"

    def _tex_head(self, model: str) -> str:
        return f"% {_escape_tex(self.study.title)}: {_escape_tex(model)}. Needs \\usepackage{{booktabs}}.\n"

    def _tex_page(self, model: str, main: _Table, differences: _Table | None) -> str:
        parts = [f"{self._tex_head(model)}% {_escape_tex(self._summary(model))}.", _tex(main)]
        if differences is not None:
            reference = _escape_tex(str(self.study.reference))
            parts += [f"\n\\par\\bigskip\n% Paired differences, method minus {reference}.", _tex(differences)]
        return "\n".join(parts) + "\n"

    def _csv_lines(self, model: str) -> list[list[Any]]:
        study = self.study
        differs = study.reference is not None
        suffixes = ["", "_low", "_high", *(["_difference", "_difference_low", "_difference_high"] if differs else [])]
        costs = [
            cost for cost in _COST_HEADINGS if any(self._cell(model, method, cost).count for method in study.methods)
        ]
        head = ["model", "method"]
        for metric in study.metrics:
            head += [metric + suffix for suffix in (*suffixes, "_images", "_errors")]
        lines: list[list[Any]] = [[*head, *costs, "images", "errors"]]
        for method in study.methods:
            line: list[Any] = [model, method]
            for metric in study.metrics:
                cell = self._cell(model, method, metric)
                line += [cell.mean, cell.low, cell.high]
                line += [cell.difference, cell.difference_low, cell.difference_high] if differs else []
                line += [cell.count, cell.errors]
            line += [self._cell(model, method, cost).mean for cost in costs]
            errors = sum(self._cell(model, method, metric).errors for metric in study.metrics)
            lines.append([*line, self._count(model, method), errors])
        return lines

    def _csv_costs(self, model: str) -> list[list[Any]]:
        differs = self.study.reference is not None
        head = ["model", "method", *_COST_HEADINGS, "seconds_median", "seconds_mean"]
        lines: list[list[Any]] = [[*head, *(["seconds_relative"] if differs else []), "images"]]
        for method in self.study.methods:
            rows = [self._cell(model, method, cost).mean for cost in _COST_HEADINGS]
            count = max(self._cell(model, method, cost).count for cost in COSTS)
            lines.append([model, method, *rows, *self._seconds(model, method)[: 2 + differs], count])
        return lines

    def _published(self) -> list[tuple[str, _Table]]:
        """Each source with its table: its methods and metrics in the study's order, then others."""
        tables = []
        for source, figures in self.study.published.items():
            metrics = list(dict.fromkeys(metric for each in figures.values() for metric in each))
            metrics.sort(key=lambda m: self.study.metrics.index(m) if m in self.study.metrics else len(metrics) + 99)
            methods = [m for m in self.study.methods if m in figures]
            methods += [m for m in figures if m not in methods]
            lines = [
                (
                    method,
                    "",
                    [_Entry(f"{figures[method][m]:.{self._published_decimals(figures, m)}f}")
                     if m in figures[method] else _Entry(_NOTHING, faint=True) for m in metrics],
                )
                for method in methods
            ]  # fmt: skip
            tables.append((source, _Table([self._heading(metric) for metric in metrics], lines)))
        return tables

    @staticmethod
    def _published_decimals(figures: Mapping[str, Mapping[str, float]], metric: str) -> int:
        """As many decimals as the source has, and at least two."""
        texts = [repr(float(each[metric])) for each in figures.values() if metric in each]
        return max(2, *(len(text.partition(".")[2]) if "e" not in text else 6 for text in texts))

    # --------------------------------------------------------------------------------------------------------- figures

    def _figures(self, model: str) -> list[_Picture]:
        pictures = []
        kinds = (
            ("metrics", self._bars, "Means with their 95 % intervals."),
            ("curves", self._curves, "Mean curves over all pictures; before each name the area under its curve."),
            ("theta", self._theta, "Dependence on theta, with the 95 % intervals of the means."),
        )
        with matplotlib.style.context(["default", _STYLE]):
            for kind, draw, caption in kinds:
                figure = draw(model)
                names = {format: f"figures/{self.names[model]}_{kind}.{format}" for format in ("png", "svg")}
                if figure is None:
                    for name in names.values():
                        (self.folder / name).unlink(missing_ok=True)
                    continue
                for format, name in names.items():
                    content = _save(figure, format)
                    self._write(name, content)
                pictures.append(_Picture(kind, caption, base64.b64encode(content).decode()))
        return pictures

    def _title(self, axis: Axes, metric: str) -> None:
        text, better = self._heading(metric)
        axis.set_title(_wrapped(f"{text} {_ARROWS.get(better, '')}"), loc="left", parse_math=False)

    def _measured(self, model: str) -> list[str]:
        """The metrics that have a value."""
        return [
            metric
            for metric in self.study.metrics
            if any(self._cell(model, method, metric).count for method in self.study.methods)
        ]

    def _bars(self, model: str) -> Figure | None:
        metrics, methods = self._measured(model), self.study.methods
        if not metrics:
            return None
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
            self._title(axis, metric)
            for place, method in zip(places, methods, strict=True):
                cell = self._cell(model, method, metric)
                if cell.mean is None:
                    continue
                color = "#D9772B" if method == self.study.reference else "#7FA8C9"
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
            axis.locator_params(axis="x", nbins=5)
            axis.set_ylim(float(room.sum()), 0)
            cells = [self._cell(model, method, metric) for method in methods]
            if axis.get_xlim()[1] > 0 and all((cell.mean or 0) >= 0 and (cell.low or 0) >= 0 for cell in cells):
                axis.set_xlim(left=0)
        _space(figure)
        return figure

    def _curves(self, model: str) -> Figure | None:
        methods = self.study.methods
        found = {
            metric: {
                method: curve
                for method in methods
                if (curve := _mean_curve(self.found[model, method, metric].values())) is not None
            }
            for metric in self.study.metrics
        }
        found = {metric: curves for metric, curves in found.items() if curves}
        if not found:
            return None
        labels = {method: _wrapped(method) for method in methods}
        legend = 1.1 + 0.075 * max(len(part) for label in labels.values() for part in label.split("\n"))
        high = max(2.9, 0.5 + 0.165 * sum(label.count("\n") + 1 for label in labels.values()))
        figure = Figure(figsize=(4.7 + legend, high * len(found)), layout="constrained")
        axes: Any = figure.subplots(len(found), 1, squeeze=False)
        for axis, (metric, curves) in zip(axes[:, 0], found.items(), strict=True):
            self._title(axis, metric)
            for i, method in enumerate(methods):
                if method in curves:
                    area = _fixed(self._cell(model, method, metric).mean, 3)
                    label = labels[method].replace("\n", "\n" + " " * 10)
                    width = 2.4 if method == self.study.reference else 1.5
                    axis.plot(*curves[method], label=f"{area}  {label}", linewidth=width, **_look(i))
            removed = _words(metric).name == "deletion"
            axis.set_xlabel(f"share of the pixels {'taken away' if removed else 'shown'}")
            axis.set_ylabel("score")
            axis.set_xlim(0, 1)
            axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
            axis.grid()
            _as_it_is(axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=2.6))
        _space(figure)
        return figure

    def _theta(self, model: str) -> Figure | None:
        groups: dict[str, list[tuple[float, str]]] = {}
        for method in self.study.methods:
            name, options = _words(method)
            theta = options.pop("theta", None)
            if isinstance(theta, (int, float)) and math.isfinite(theta):
                rest = ",".join(f"{key}={value}" for key, value in options.items())
                groups.setdefault(f"{name}:{rest}" if rest else name, []).append((float(theta), method))
        groups = {name: sorted(points) for name, points in groups.items() if len({x for x, _ in points}) > 1}
        metrics = self._measured(model)
        if not groups or not metrics:
            return None
        lines, columns = _panels(metrics, 3)
        legend = 0.3 + 0.17 * sum(_wrapped(name).count("\n") + 1 for name in groups)
        figure = Figure(figsize=(3.0 * columns, 2.6 * lines + legend), layout="constrained")
        axes: Any = figure.subplots(lines, columns, squeeze=False)
        for axis in axes.flat[len(metrics) :]:
            axis.remove()
        for axis, metric in zip(axes.flat, metrics, strict=False):
            self._title(axis, metric)
            for i, points in enumerate(groups.values()):
                cells = [(x, self._cell(model, method, metric)) for x, method in points]
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
        return figure

    # ------------------------------------------------------------------------------------------------------------ page

    def _errors(self) -> list[tuple[str, str, str, str, int]]:
        """What could not be measured: network, method, metric (or all), why, and of how many pictures."""
        every = (*self.study.metrics, *COSTS)
        counts: dict[tuple[str, str, str], Counter[str]] = {}
        for (model, method, metric), rows in self.found.items():
            for row in rows.values():
                if _value(row) is None:
                    why = _line(row.get("error") or "no value")
                    counts.setdefault((model, method, why), Counter())[metric] += 1
        return [
            (model, method, metric, why, number)
            for (model, method, why), numbers in counts.items()
            for metric, number in (
                [("all", max(numbers.values()))]
                if set(numbers) == set(every) and len(set(numbers.values())) == 1
                else numbers.items()
            )
        ]

    def _page(self, sections: Sequence[Mapping[str, Any]]) -> str:
        study = self.study
        meanings = [
            (*self._heading(metric), METRICS[name].meaning if name in METRICS else "")
            for metric in study.metrics
            for name in [_words(metric).name]
        ]
        environment = jinja2.Environment(
            autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        environment.filters["minus"] = lambda text: text.replace("-", _MINUS)
        environment.filters["breakable"] = _breakable
        template = resources.files("captum_fusion.evaluation").joinpath("page.html").read_text(encoding="utf-8")
        return environment.from_string(template).render(
            study=study,
            sections=sections,
            meanings=meanings,
            arrows=_ARROWS,
            drop_note=self._drop_note(),
            cost_note=self._cost_note(),
            published=self._published(),
            errors=self._errors(),
            listed=_LISTED,
        )
