"""Means over pictures, with bootstrap intervals, paired differences and mean curves."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from captum_fusion.evaluation.measures import COSTS
from captum_fusion.evaluation.methods import MethodSpec, parse
from captum_fusion.evaluation.store import Row

#: Indices drawn at once by the bootstrap, which bounds its memory.
_DRAWN_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Outline:
    """What a report shows, and in what order.

    Attributes:
        title: Heading of the page.
        models: Names of the networks, in the order of their tables.
        methods: Labels of the methods, in the order of the table's rows.
        metrics: Names of the metrics, in the order of the table's columns, without the costs.
        reference: The method that paired differences are taken against; None for no differences.
        images: Number of pictures that were asked for.
        skipped: Pictures that were left out, each with the reason.
        settings: Shown on the page: command, versions, seed, target.
        examples: PNG files of example maps, by network.
        headings: For each metric a short heading and its better direction: ``"down"``, ``"up"`` or ``""``. A metric
            that is missing here is shown by its own name.
        published: Published figures: a sentence on the source, then method, then metric.
        pictures: For examples that share a picture (one for each label), the picture's name. Any other example is a
            picture of its own.
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
    """One method's result in one metric on one network.

    Attributes:
        model: Name of the network.
        method: Label of the method.
        metric: Name of the metric or cost.
        mean: Mean over the pictures; None without any value.
        low: Lower end of the mean's 95 % interval; None for fewer than two pictures.
        high: Upper end of the mean's 95 % interval.
        count: Number of pictures with a value.
        errors: Number of pictures with an error instead.
        difference: Mean of this method minus the reference, over the pictures that have both; None for the reference.
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


def summarize(rows: Iterable[Row], outline: Outline, *, resamples: int = 2000, seed: int = 0) -> list[Cell]:
    """Means over pictures, with intervals, and paired differences to the reference.

    The interval is the percentile interval of the bootstrap over pictures: pictures are drawn with replacement, as many
    as there are, and 95 % of the means of such samples lie in it. The examples of one picture are drawn together, since
    they are not independent. Pictures are taken in the order of their names, and the bootstrap's seed is derived from
    ``seed``, the network's name and the metric's name. So the same rows give the same digits in any order, and every
    method is measured on the same samples.

    Args:
        rows (iterable of dict): Rows with ``model``, ``image``, ``method``, ``metric`` and ``value``, at most one for
            each picture. A value that is None or not finite counts as an error. Rows that the outline does not name are
            ignored.
        outline (Outline): The models, methods and metrics to summarize.
        resamples (int, optional): Number of bootstrap samples. Default: 2000
        seed (int, optional): Seed of the bootstrap. Default: 0

    Returns:
        list[Cell]: One for each network, method, and metric or cost, in the outline's order.

    Raises:
        ValueError: If ``resamples`` is not positive, or a picture has two different values.

    Examples::

        >>> outline = Outline("a study", ["net"], ["a", "b"], ["insertion"], reference="a", images=2)
        >>> row = {"model": "net", "metric": "insertion"}
        >>> rows = [{**row, "image": i, "method": m, "value": v} for i, m, v in
        ...         [("1.png", "a", 0.25), ("2.png", "a", 0.5), ("1.png", "b", 0.75), ("2.png", "b", 1.0)]]
        >>> cells = summarize(rows, outline)
        >>> cells[4].method, cells[4].mean, cells[4].low, cells[4].high
        ('b', 0.875, 0.75, 1.0)
        >>> cells[4].difference, cells[4].difference_low, cells[4].difference_high
        (0.5, 0.5, 0.5)
    """
    return _summarize(_collect(rows, outline), outline, resamples, seed)


class Results:
    """The rows of an outline and their summaries: what tables, figures and the page are made from.

    Args:
        rows (iterable of dict): As of :func:`summarize`.
        outline (Outline): What is shown.
        cells (sequence of Cell, optional): What :func:`summarize` returned. Default: () (computed here)
    """

    def __init__(self, rows: Iterable[Row], outline: Outline, cells: Sequence[Cell] = ()) -> None:
        self.outline = outline
        self._found = _collect(rows, outline)
        self._cells = {
            (cell.model, cell.method, cell.metric): cell for cell in cells or _summarize(self._found, outline)
        }

    def cell(self, model: str, method: str, metric: str) -> Cell:
        """The summary of a method in a metric; an empty one without any row."""
        empty = Cell(model, method, metric, None, None, None, 0, 0)
        return self._cells.get((model, method, metric), empty)

    def cells(self, metric: str) -> list[Cell]:
        """All summaries of a metric."""
        return [cell for (_, _, name), cell in self._cells.items() if name == metric]

    def count(self, model: str, method: str | None = None) -> int:
        """Number of pictures with a value, in the metric that has most."""
        methods = self.outline.methods if method is None else [method]
        metrics = (*self.outline.metrics, *COSTS)
        return max((self.cell(model, each, metric).count for each in methods for metric in metrics), default=0)

    def measured(self, model: str, metrics: Sequence[str]) -> list[str]:
        """Those of the metrics that have a value."""
        return [
            metric
            for metric in metrics
            if any(self.cell(model, method, metric).count for method in self.outline.methods)
        ]

    def heading(self, metric: str) -> tuple[str, str]:
        """A metric's heading, and its better direction."""
        return self.outline.headings.get(metric, (metric, ""))

    def seconds(self, model: str, method: str) -> tuple[float | None, float | None, float | None]:
        """Median and mean, and the median relative to the reference's, over the pictures that have both."""
        own = _values(self._found[model, method, "seconds"])
        if not own:
            return None, None, None
        other = _values(self._found.get((model, self.outline.reference or "", "seconds"), {}))
        both = [image for image in own if image in other]
        rival = float(np.median([other[image] for image in both])) if both else 0.0
        relative = float(np.median([own[image] for image in both])) / rival if rival > 0 else None
        return float(np.median(list(own.values()))), math.fsum(own.values()) / len(own), relative

    def mean_curves(self, model: str, metric: str) -> dict[str, Curve]:
        """The mean curve of each method that has any."""
        curves = {method: _mean_curve(self._found[model, method, metric].values()) for method in self.outline.methods}
        return {method: curve for method, curve in curves.items() if curve is not None}

    def errors(self) -> list[tuple[str, str, str, str, int]]:
        """Values that are missing: network, method, metric (or all), reason, and number of pictures."""
        every = (*self.outline.metrics, *COSTS)
        counts: dict[tuple[str, str, str], Counter[str]] = {}
        for (model, method, metric), rows in self._found.items():
            for row in rows.values():
                if _value(row) is None:
                    why = one_line(row.get("error") or "no value")
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


def one_line(text: str) -> str:
    """Text without line breaks."""
    return " ".join(str(text).split())


def spec_of(label: str) -> MethodSpec:
    """The name and options in the label of a method or metric."""
    try:
        return parse(label)
    except ValueError:  # a user's own label
        return MethodSpec(label, {})


# ------------------------------------------------------------------------------------------------------------- numbers

#: For each network, method and metric, the rows by picture, in the order of the pictures' names.
_Found = dict[tuple[str, str, str], dict[str, Row]]

#: A mean and the ends of its interval.
_Mean = tuple[float | None, float | None, float | None]


def _collect(rows: Iterable[Row], outline: Outline) -> _Found:
    keys = [
        (model, method, metric)
        for model in outline.models
        for method in outline.methods
        for metric in (*outline.metrics, *COSTS)
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


def _summarize(found: _Found, outline: Outline, resamples: int = 2000, seed: int = 0) -> list[Cell]:
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, not {resamples}")
    cells = []
    for (model, method, metric), rows in found.items():
        values = _values(rows)
        mean, low, high = _mean_and_interval(values, outline.pictures, resamples, seed, model, metric)
        paired: _Mean = (None, None, None)
        if outline.reference is not None and method != outline.reference:
            other = _values(found.get((model, outline.reference, metric), {}))
            differences = {image: value - other[image] for image, value in values.items() if image in other}
            paired = _mean_and_interval(differences, outline.pictures, resamples, seed, model, metric)
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


#: Positions and mean scores.
Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


def _mean_curve(rows: Iterable[Row]) -> Curve | None:
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
