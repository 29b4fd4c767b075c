"""Tables of means, differences and costs, as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tabulate import tabulate

from captum_fusion.evaluation.labels import NOT_KNOWN
from captum_fusion.evaluation.measures import COSTS
from captum_fusion.evaluation.report.statistics import Outline, Results, one_line, spec_of

#: Headings of the costs that do not depend on the machine.
COST_HEADINGS = {"forward_samples": "forward samples", "backward_samples": "backward samples"}

#: Signs of a metric's better direction.
ARROWS = {"down": "↓", "up": "↑"}

MINUS, _TIMES, _NOTHING = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"

COST_NOTE = (
    "Forward and backward samples are examples, or perturbed copies of them, that pass through the network. "
    "Seconds depend on the machine and vary between runs."
)


class Entry(NamedTuple):
    """One cell of a table.

    Attributes:
        text: The number.
        interval: Its interval.
        note: A note on it.
        best: Whether it is the best of its column.
        faint: Whether it is missing or undecided.
    """

    text: str
    interval: str = ""
    note: str = ""
    best: bool = False
    faint: bool = False


class Table(NamedTuple):
    """A table with a row for each method.

    Attributes:
        columns: For each column its heading and better direction.
        lines: For each method its label, a note on it, and its entries.
    """

    columns: list[tuple[str, str]]
    lines: list[tuple[str, str, list[Entry]]]


class ModelTables(NamedTuple):
    """The tables of one network.

    Attributes:
        means: The means, without the columns of metrics that have no value.
        missing: Sentences that say which metrics have no value, and why.
        differences: Paired differences; None without a reference that another method can be paired with.
        costs: The cost for each picture.
    """

    means: Table
    missing: list[str]
    differences: Table | None
    costs: Table


def tables_of(results: Results, model: str) -> ModelTables:
    """The tables of a network."""
    return ModelTables(
        _means(results, model), _missing(results, model), _differences(results, model), _costs(results, model)
    )


def documents(results: Results, model: str, tables: ModelTables) -> Iterator[tuple[str, str]]:
    """The files of a network's tables: the end of each name, and its text."""
    outline = results.outline
    title = f"# {_escape_markdown(model)}: cost per picture\n\n"
    yield ".md", _markdown_page(results, model, tables)
    yield ".csv", _csv(_csv_lines(results, model))
    yield ".tex", _tex_page(results, model, tables)
    yield "_cost.md", f"{title}{_markdown(tables.costs)}\n\n{COST_NOTE}\n"
    yield "_cost.csv", _csv(_csv_costs(results, model))
    yield "_cost.tex", f"{_tex_head(outline, model)}{_tex(tables.costs)}\n"


def drop_note(outline: Outline) -> str:
    """How to read average drop; empty if it is not shown."""
    if "average_drop" not in {spec_of(metric).name for metric in outline.metrics}:
        return ""
    return "Average drop falls as masks grow: read it together with the mask's area."


def published(results: Results) -> list[tuple[str, Table]]:
    """Published results: each source with its table, methods and metrics in the outline's order before others."""
    tables = []
    for source, figures in results.outline.published.items():
        metrics = list(dict.fromkeys(metric for each in figures.values() for metric in each))
        metrics.sort(
            key=lambda m: results.outline.metrics.index(m) if m in results.outline.metrics else len(metrics) + 99
        )
        methods = [m for m in results.outline.methods if m in figures]
        methods += [m for m in figures if m not in methods]
        lines = [
            (
                method,
                "",
                [Entry(f"{figures[method][m]:.{_published_decimals(figures, m)}f}")
                 if m in figures[method] else Entry(_NOTHING, faint=True) for m in metrics],
            )
            for method in methods
        ]  # fmt: skip
        tables.append((source, Table([results.heading(metric) for metric in metrics], lines)))
    return tables


def _published_decimals(figures: Mapping[str, Mapping[str, float]], metric: str) -> int:
    """The number of decimals in the source, at least two."""
    texts = [repr(float(each[metric])) for each in figures.values() if metric in each]
    return max(2, *(len(text.partition(".")[2]) if "e" not in text else 6 for text in texts))


def _means(results: Results, model: str) -> Table:
    outline, notes = results.outline, _notes(results, model)
    columns: dict[str, list[Entry]] = {}
    for metric in results.tabled(model):
        cells, decimals = [results.cell(model, method, metric) for method in outline.methods], places(results, metric)
        better = results.heading(metric)[1]
        shown = [float(fixed(cell.mean, decimals)) for cell in cells if cell.mean is not None]
        best = {"down": min, "up": max}[better](shown) if len(set(shown)) > 1 and better else None
        columns[metric] = [
            Entry(
                fixed(cell.mean, decimals),
                _interval(cell.low, cell.high, decimals),
                f"n = {cell.count}" if cell.count < results.count(model, cell.method) else "",
                best is not None and cell.mean is not None and float(fixed(cell.mean, decimals)) == best,
                cell.mean is None,
            )
            for cell in cells
        ]
    for cost in results.measured(model, list(COST_HEADINGS)):
        columns[cost] = [_cost_entry(results, model, method, cost) for method in outline.methods]
    return Table(
        [(COST_HEADINGS[each], "") if each in COST_HEADINGS else results.heading(each) for each in columns],
        [
            (method, notes[method], [entries[i] for entries in columns.values()])
            for i, method in enumerate(outline.methods)
        ],
    )


def _missing(results: Results, model: str) -> list[str]:
    """Which metrics have no value, grouped by the reasons."""
    groups: dict[str, list[str]] = {}
    for metric, reasons in results.missing(model).items():
        groups.setdefault("; ".join(reasons), []).append(metric)
    need = " (localization metrics need the boxes or masks of the objects in the dataset)"
    return [
        f"No values of {listed([results.heading(metric)[0] for metric in metrics])}: "
        f"{why}{need if why == NOT_KNOWN else ''}."
        for why, metrics in groups.items()
    ]


def listed(names: Sequence[str]) -> str:
    """Names in a sentence.

    Examples::

        >>> listed(["AD %"]), listed(["AD %", "area", "energy"])
        ('AD %', 'AD %, area and energy')
    """
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def places(results: Results, metric: str) -> int:
    """Decimals: two for percentages, as in papers; else at least three significant digits of the largest mean."""
    means = [abs(cell.mean) for cell in results.cells(metric) if cell.mean]
    if "%" in results.heading(metric)[0]:
        return 2
    return _decimals(max(means), 4 if max(means) >= 1 else 3) if means else 2


def _notes(results: Results, model: str) -> dict[str, str]:
    """For each method the number of its pictures; empty notes if every method has all of them."""
    counts = {method: results.count(model, method) for method in results.outline.methods}
    short = any(count < results.outline.images for count in counts.values())
    return {method: _of(results.outline, count) if short else "" for method, count in counts.items()}


def _of(outline: Outline, count: int) -> str:
    return f"n = {count} of {outline.images}" if count < outline.images else f"n = {count}"


def _cost_entry(results: Results, model: str, method: str, cost: str) -> Entry:
    mean = results.cell(model, method, cost).mean
    return Entry(fixed(mean, 0 if mean is None or mean == int(mean) else 1), faint=mean is None)


def _interval(low: float | None, high: float | None, decimals: int, sign: bool = False) -> str:
    if low is None or high is None:
        return ""
    return f"[{fixed(low, decimals, sign)}, {fixed(high, decimals, sign)}]"


def _differences(results: Results, model: str) -> Table | None:
    outline = results.outline
    metrics = results.tabled(model)
    decimals = {metric: places(results, metric) for metric in metrics}
    lines = []
    for method in outline.methods:
        cells = [results.cell(model, method, metric) for metric in metrics]
        if method != outline.reference and any(cell.difference is not None for cell in cells):
            entries = [
                Entry(
                    fixed(cell.difference, decimals[cell.metric], True),
                    _interval(cell.difference_low, cell.difference_high, decimals[cell.metric], True),
                    faint=cell.count < 2
                    or cell.difference_low is None
                    or cell.difference_high is None
                    or cell.difference_low <= 0 <= cell.difference_high
                    or all(_is_zero(end, decimals[cell.metric]) for end in (cell.difference_low, cell.difference_high)),
                )
                for cell in cells
            ]
            lines.append((method, "", entries))
    return Table([results.heading(metric) for metric in metrics], lines) if lines else None


def _costs(results: Results, model: str) -> Table:
    columns = [(heading, "") for heading in COST_HEADINGS.values()]
    columns += [("seconds, median", ""), ("seconds, mean", "")]
    if results.outline.reference is not None:
        columns.append((f"relative to {results.outline.reference}", ""))
    lines = []
    for method in results.outline.methods:
        median, mean, relative = results.seconds(model, method)
        entries = [_cost_entry(results, model, method, cost) for cost in COST_HEADINGS]
        entries += [Entry(_significant(each), faint=each is None) for each in (median, mean)]
        if results.outline.reference is not None:
            entries.append(
                Entry(_NOTHING if relative is None else f"{_significant(relative)} {_TIMES}", faint=not relative)
            )
        lines.append((method, "", entries))
    return Table(columns, lines)


def _summary(results: Results, model: str) -> str:
    return f"{_of(results.outline, results.count(model))}; means with 95 % bootstrap intervals"


def _markdown_page(results: Results, model: str, tables: ModelTables) -> str:
    outline = results.outline
    parts = [f"# {_escape_markdown(model)}", f"{_escape_markdown(outline.title)}; {_summary(results, model)}."]
    parts += [_markdown(tables.means), *map(_escape_markdown, tables.missing)]
    if note := drop_note(outline):
        parts.append(note)
    if tables.differences is not None:
        parts += [
            f"Paired differences, method minus {_escape_markdown(str(outline.reference))}:",
            _markdown(tables.differences),
        ]
    for source, table in published(results):
        parts += [f"Published results: {_escape_markdown(source)}", _markdown(table)]
    return "\n\n".join(parts) + "\n"


def _tex_head(outline: Outline, model: str) -> str:
    return f"% {_escape_tex(outline.title)}: {_escape_tex(model)}. Needs \\usepackage{{booktabs}}.\n"


def _tex_page(results: Results, model: str, tables: ModelTables) -> str:
    head = [f"{_tex_head(results.outline, model)}% {_escape_tex(_summary(results, model))}."]
    parts = [*head, *(f"% {_escape_tex(sentence)}" for sentence in tables.missing), _tex(tables.means)]
    if tables.differences is not None:
        reference = _escape_tex(str(results.outline.reference))
        parts += [f"\n\\par\\bigskip\n% Paired differences, method minus {reference}.", _tex(tables.differences)]
    return "\n".join(parts) + "\n"


def _csv_lines(results: Results, model: str) -> list[list[Any]]:
    outline = results.outline
    differs = outline.reference is not None
    suffixes = ["", "_low", "_high", *(["_difference", "_difference_low", "_difference_high"] if differs else [])]
    costs = results.measured(model, list(COST_HEADINGS))
    head = ["model", "method"]
    for metric in outline.metrics:
        head += [metric + suffix for suffix in (*suffixes, "_images", "_errors")]
    lines: list[list[Any]] = [[*head, *costs, "images", "errors"]]
    for method in outline.methods:
        line: list[Any] = [model, method]
        for metric in outline.metrics:
            cell = results.cell(model, method, metric)
            line += [cell.mean, cell.low, cell.high]
            line += [cell.difference, cell.difference_low, cell.difference_high] if differs else []
            line += [cell.count, cell.errors]
        line += [results.cell(model, method, cost).mean for cost in costs]
        errors = sum(results.cell(model, method, metric).errors for metric in outline.metrics)
        lines.append([*line, results.count(model, method), errors])
    return lines


def _csv_costs(results: Results, model: str) -> list[list[Any]]:
    differs = results.outline.reference is not None
    head = ["model", "method", *COST_HEADINGS, "seconds_median", "seconds_mean"]
    lines: list[list[Any]] = [[*head, *(["seconds_relative"] if differs else []), "images"]]
    for method in results.outline.methods:
        rows = [results.cell(model, method, cost).mean for cost in COST_HEADINGS]
        count = max(results.cell(model, method, cost).count for cost in COSTS)
        lines.append([model, method, *rows, *results.seconds(model, method)[: 2 + differs], count])
    return lines


def _escape_markdown(text: str) -> str:
    return re.sub(r"([\\`*_|<>&\[\]~$])", r"\\\1", one_line(text))


def _markdown(table: Table) -> str:
    def entry(each: Entry) -> str:
        number = f"**{each.text}**" if each.best else each.text
        return " ".join(part for part in (number, each.interval, f"({each.note})" if each.note else "") if part)

    noted = any(note for _, note, _ in table.lines)
    heads = [" ".join((_escape_markdown(text), ARROWS.get(better, ""))).strip() for text, better in table.columns]
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
    MINUS: "$-$", _TIMES: r"$\times$", _NOTHING: "--", **{each: f"\\{each}" for each in "&%$#_{}"},
}  # fmt: skip


def _escape_tex(text: str) -> str:
    return "".join(_TEX.get(each, each) for each in one_line(text).replace("--", "-\0-")).replace("\0", "{}")


def _tex(table: Table) -> str:
    def number(each: Entry) -> str:
        text = re.sub("^-", "$-$", each.text) if each.text[:1] == "-" else _escape_tex(each.text)
        return f"\\textbf{{{text}}}" if each.best else text

    def beneath(each: Entry) -> str:
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


def _csv(lines: Iterable[Sequence[Any]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([_inert(cell) for cell in line] for line in lines)
    return file.getvalue()


def _inert(cell: Any) -> Any:
    """A text that a spreadsheet does not take for a formula."""
    return f"'{one_line(cell)}" if isinstance(cell, str) and cell.lstrip()[:1] in ("=", "+", "-", "@") else cell


def fixed(value: float | None, decimals: int, sign: bool = False) -> str:
    """A number with a fixed number of decimals; without a sign if all digits are zeros."""
    if value is None:
        return _NOTHING
    text = f"{value:+.{decimals}f}" if sign else f"{value:.{decimals}f}"
    return text.lstrip("+-") if float(text) == 0 else text


def _is_zero(value: float, decimals: int) -> bool:
    """Whether a number with so many decimals shows as 0."""
    return not float(fixed(value, decimals))


def _significant(value: float | None, digits: int = 3) -> str:
    """A number with at least so many significant digits, never in scientific notation."""
    if value is None:
        return _NOTHING
    return f"{value:.{_decimals(value, digits)}f}"


def _decimals(value: float, digits: int) -> int:
    return min(9, max(0, digits - 1 - math.floor(math.log10(abs(value))))) if value else 0
