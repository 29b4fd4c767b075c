"""Means over pictures, with bootstrap intervals, paired differences and mean curves."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from captum_fusion._arguments import printable
from captum_fusion.evaluation.fingerprints import seed_of
from captum_fusion.evaluation.measures import COSTS
from captum_fusion.evaluation.methods import MethodSpec, parse
from captum_fusion.evaluation.store import Row, Rows

#: Pictures drawn at once by the bootstrap: few enough for the processor's cache.
_DRAWN_AT_ONCE = 1 << 16

#: Quantiles at the ends of an interval of 95 %.
_ENDS = np.array([(1 - 0.95) / 2, 1 - (1 - 0.95) / 2])

#: A mean and the ends of its interval.
_Mean = tuple[float | None, float | None, float | None]

#: Positions and mean scores.
Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


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
        skipped: Pictures without results, each with the reason.
        settings: Shown on the page: command, versions, seed, target.
        examples: PNG files of example maps, by network.
        headings: For each metric a short heading and its better direction: ``"down"``, ``"up"`` or ``""``. A metric
            that is missing here is shown by its own name.
        published: Published results: a sentence on the source, then method, then metric.
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
    return _summarize(_Grid(rows, outline), outline, resamples, seed)


class Results:
    """The rows of an outline and their summaries: what tables, figures and the page are made from.

    Args:
        rows (iterable of dict): As of :func:`summarize`.
        outline (Outline): What is shown.
        cells (sequence of Cell, optional): What :func:`summarize` returned. Default: () (computed here)
    """

    def __init__(self, rows: Iterable[Row], outline: Outline, cells: Sequence[Cell] = ()) -> None:
        self.outline = outline
        self._grid = _Grid(rows, outline)
        self._cells = {
            (cell.model, cell.method, cell.metric): cell for cell in cells or _summarize(self._grid, outline)
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

    def tabled(self, model: str) -> list[str]:
        """The metrics that have a column: not those that failed on every picture, unless all did."""
        missing = self.missing(model)
        return [metric for metric in self.outline.metrics if metric not in missing] or list(self.outline.metrics)

    def missing(self, model: str) -> dict[str, list[str]]:
        """The metrics without any value, each with the reasons; those that were not tried are left out."""
        measured = self.measured(model, self.outline.metrics)
        reasons = {
            metric: [
                why for method in self.outline.methods for why, _ in self._grid.errors_of(model, method, metric)
            ]
            for metric in self.outline.metrics
            if metric not in measured
        }  # fmt: skip
        return {metric: list(dict.fromkeys(why)) for metric, why in reasons.items() if why}

    def heading(self, metric: str) -> tuple[str, str]:
        """A metric's heading, and its better direction."""
        return self.outline.headings.get(metric, (metric, ""))

    def seconds(self, model: str, method: str) -> tuple[float | None, float | None, float | None]:
        """Median and mean, and the median relative to the reference's, over the pictures that have both."""
        values = self._grid.values_of(model, method, "seconds")
        own = values[~np.isnan(values)]
        if not len(own):
            return None, None, None
        other = np.full_like(values, np.nan)
        if self.outline.reference is not None:
            other = self._grid.values_of(model, self.outline.reference, "seconds")
        both = ~np.isnan(values) & ~np.isnan(other)
        rival = float(np.median(other[both])) if both.any() else 0.0
        relative = float(np.median(values[both])) / rival if rival > 0 else None
        return float(np.median(own)), math.fsum(own.tolist()) / len(own), relative

    def mean_curves(self, model: str, metric: str) -> dict[str, Curve]:
        """The mean curve of each method that has any."""
        curves = {method: self._grid.mean_curve(model, method, metric) for method in self.outline.methods}
        return {method: curve for method, curve in curves.items() if curve is not None}

    def errors(self) -> list[tuple[str, str, str, str, int]]:
        """Values that are missing: network, method (or all), metric (or all), reason, and number of pictures."""
        every = self._grid.metrics
        counts: dict[tuple[str, str, str], Counter[str]] = {}
        for model in self.outline.models:
            for method in self.outline.methods:
                for metric in every:
                    for why, number in self._grid.errors_of(model, method, metric):
                        counts.setdefault((model, method, why), Counter())[metric] += number
        methods: dict[tuple[str, str, str, int], list[str]] = {}  # that have the same error
        for (model, method, why), numbers in counts.items():
            of_all = set(numbers) == set(every) and len(set(numbers.values())) == 1
            for metric, number in [("all", max(numbers.values()))] if of_all else numbers.items():
                methods.setdefault((model, metric, why, number), []).append(method)
        number_of_methods = len(self.outline.methods)
        return [
            (model, method, metric, why, number)
            for (model, metric, why, number), some in methods.items()
            for method in (["all"] if len(some) == number_of_methods > 1 else some)
        ]


def one_line(text: str) -> str:
    """Text without line breaks and other control characters."""
    return printable(" ".join(str(text).split()))


def spec_of(label: str) -> MethodSpec:
    """The name and options in the label of a method or metric."""
    try:
        return parse(label)
    except ValueError:  # a user's own label
        return MethodSpec(label, {})


# ------------------------------------------------------------------------------------------------------------- values


class _Grid:
    """Rows by network, method, metric and picture, the pictures in the order of their names.

    Of several rows for one cell a value counts before an error. Rows that the outline does not name are ignored.

    Attributes:
        metrics: The metrics and the costs.
        images: Names of the pictures.
    """

    def __init__(self, rows: Iterable[Row], outline: Outline) -> None:
        self._rows = rows if isinstance(rows, Rows) else Rows(rows)
        self.metrics = (*outline.metrics, *COSTS)
        self.images: list[str] = sorted(self._rows.column("image")[1])
        axes: dict[str, Sequence[str]] = {
            "model": outline.models, "method": outline.methods, "metric": self.metrics, "image": self.images,
        }  # fmt: skip
        self._positions = {name: {each: i for i, each in enumerate(names)} for name, names in axes.items()}
        shape = tuple(len(names) for names in axes.values())
        numbers, cells = self._cells(shape)
        values = self._rows.values[numbers]
        valid = np.isfinite(values)
        self._values = np.full(shape, np.nan)
        self._values.put(cells[valid], values[valid])
        clash = self._values.take(cells[valid]) != values[valid]
        if clash.any():
            row = self._rows[int(numbers[valid][clash.argmax()])]
            raise ValueError(
                f"rows: {row['image']} has two values of {row['metric']} by {row['method']} on {row['model']}"
            )
        # The number of each cell's row. Of repeated cells the last assignment counts: the first of the errors in
        # alphabetical order, and any value after all errors.
        codes, texts = self._rows.column("error")
        order = {text: rank for rank, text in enumerate(sorted({*map(str, texts), "None"}))}
        ranks = np.array([*(order[str(text)] for text in texts), order["None"]])[codes[numbers]]
        errors = np.flatnonzero(~valid)
        errors = errors[np.argsort(-ranks[errors], kind="stable")]
        self._numbers = np.full(shape, -1)
        self._numbers.put(cells[errors], numbers[errors])
        self._numbers.put(cells[valid][::-1], numbers[valid][::-1])

    def _cells(self, shape: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Numbers of the rows that the outline names, and the flat positions of their cells."""
        axes = []
        for name, positions in self._positions.items():
            codes, categories = self._rows.column(name)
            axes.append(np.array([*(positions.get(each, -1) for each in categories), -1], np.int32)[codes])
        numbers = np.flatnonzero(np.all([axis >= 0 for axis in axes], axis=0))
        return numbers, np.ravel_multi_index([axis[numbers] for axis in axes], shape)

    def _at(self, model: str, method: str, metric: str) -> tuple[int, int, int]:
        names = {"model": model, "method": method, "metric": metric}
        a, b, c = (self._positions[axis][name] for axis, name in names.items())
        return a, b, c

    def values_of(self, model: str, method: str, metric: str) -> NDArray[np.float64]:
        """A value for each picture, NaN where there is none."""
        values: NDArray[np.float64] = self._values[self._at(model, method, metric)]
        return values

    def _failed(self, model: str, method: str, metric: str) -> NDArray[np.int64]:
        """Numbers of the rows that have no value."""
        numbers = self._numbers[self._at(model, method, metric)]
        failed: NDArray[np.int64] = numbers[(numbers >= 0) & np.isnan(self.values_of(model, method, metric))]
        return failed

    def count_errors(self, model: str, method: str, metric: str) -> int:
        """Number of pictures with an error instead of a value."""
        return len(self._failed(model, method, metric))

    def errors_of(self, model: str, method: str, metric: str) -> list[tuple[str, int]]:
        """Each reason why there is no value, and of how many pictures."""
        codes, texts = self._rows.column("error")
        found, first, counts = np.unique(
            codes[self._failed(model, method, metric)], return_index=True, return_counts=True
        )
        return [
            (one_line((texts[found[i]] if found[i] >= 0 else "") or "no value"), int(counts[i]))
            for i in np.argsort(first)
        ]

    def mean_curve(self, model: str, method: str, metric: str) -> Curve | None:
        """The mean of the curves, on their own steps if all have the same."""
        numbers = self._numbers[self._at(model, method, metric)]
        numbers = numbers[~np.isnan(self.values_of(model, method, metric))]
        numbers = [number for number in numbers.tolist() if len(self._rows.curve(number))]
        if not numbers:
            return None
        codes, steps = self._rows.column("shares")
        alike = len(set(codes[numbers].tolist())) == 1
        grid = np.array(steps[codes[numbers[0]]], dtype=np.float64) if alike else np.linspace(0, 1, 201)
        total = np.zeros(len(grid))
        for number in numbers:
            curve = self._rows.curve(number)
            total += curve if alike else np.interp(grid, steps[codes[number]], curve)
        return grid, total / len(numbers)


# ----------------------------------------------------------------------------------------------------------- intervals


class _Sample(NamedTuple):
    """The values of some examples, put together by picture.

    Attributes:
        mean: Mean of the examples; None without any.
        sums: For each picture the sum of its examples.
        counts: For each picture the number of its examples.
    """

    mean: float | None
    sums: NDArray[np.float64]
    counts: NDArray[np.float64]


def _summarize(grid: _Grid, outline: Outline, resamples: int = 2000, seed: int = 0) -> list[Cell]:
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, not {resamples}")
    pictures = [outline.pictures.get(image, image) for image in grid.images]
    alone = len(set(pictures)) == len(pictures)
    cells: dict[tuple[str, str, str], Cell] = {}
    for model in outline.models:
        for metric in grid.metrics:
            values = {method: grid.values_of(model, method, metric) for method in outline.methods}
            rival = None if outline.reference is None else values.get(outline.reference, np.full(len(pictures), np.nan))
            differences = [
                each - rival for method, each in values.items() if rival is not None and method != outline.reference
            ]
            samples = [_sample(each, None if alone else pictures) for each in (*values.values(), *differences)]
            means = iter(_means_and_intervals(samples, resamples, seed_of(seed, model, metric)))
            found = dict(zip(outline.methods, means, strict=False))
            for method, each in values.items():
                paired = (None, None, None) if rival is None or method == outline.reference else next(means)
                count = int(np.count_nonzero(~np.isnan(each)))
                errors = grid.count_errors(model, method, metric)
                cells[model, method, metric] = Cell(model, method, metric, *found[method], count, errors, *paired)
    return [
        cells[model, method, metric]
        for model in outline.models
        for method in outline.methods
        for metric in grid.metrics
    ]


def _sample(values: NDArray[np.float64], pictures: Sequence[str] | None) -> _Sample:
    """The values that are not NaN, by the pictures' names; None if each is a picture of its own."""
    present = ~np.isnan(values)
    known = values[present]
    mean = math.fsum(known.tolist()) / len(known) if len(known) else None
    if pictures is None:
        return _Sample(mean, known, np.ones(len(known)))
    together: dict[str, list[float]] = {}
    for i, value in zip(np.flatnonzero(present).tolist(), known.tolist(), strict=True):
        together.setdefault(pictures[i], []).append(value)
    sums = np.array([math.fsum(each) for each in together.values()])
    return _Sample(mean, sums, np.array([float(len(each)) for each in together.values()]))


def _means_and_intervals(samples: Sequence[_Sample], resamples: int, seed: int) -> list[_Mean]:
    """The means, and the 2.5 and 97.5 percentiles of the means of resampled pictures, of which there must be two.

    Samples of the same number of pictures share their draws.
    """
    means: list[_Mean] = [(sample.mean, None, None) for sample in samples]
    by_size: dict[int, list[int]] = {}
    for i, sample in enumerate(samples):
        if len(sample.sums) > 1:  # one picture says nothing of others
            by_size.setdefault(len(sample.sums), []).append(i)
    for chosen in by_size.values():
        drawn = _resampled_means([samples[i] for i in chosen], resamples, seed)
        for i, ends in zip(chosen, _ends(drawn), strict=True):
            # No mean lies beyond its values, whatever rounding says: the interval of equal values has no width.
            each = samples[i].sums / samples[i].counts
            mean, low, high = np.clip([samples[i].mean, *ends], each.min(), each.max()).tolist()
            means[i] = mean, low, high
    return means


def _resampled_means(samples: Sequence[_Sample], resamples: int, seed: int) -> NDArray[np.float64]:
    """For each sample the means of as many pictures drawn with replacement; all samples have the same number."""
    number = len(samples[0].sums)
    generator = np.random.default_rng(seed)
    means = np.empty((len(samples), resamples))
    alone = [bool((sample.counts == 1).all()) for sample in samples]
    at_once = max(1, _DRAWN_AT_ONCE // number)
    for start in range(0, resamples, at_once):
        drawn = generator.integers(0, number, (min(at_once, resamples - start), number))
        for i, sample in enumerate(samples):
            size = number if alone[i] else sample.counts[drawn].sum(1)
            means[i, start : start + len(drawn)] = sample.sums.take(drawn).sum(1) / size
    return means


def _ends(drawn: NDArray[np.float64]) -> NDArray[np.float64]:
    """The ends of the interval of each row, interpolated as :func:`scipy.stats.quantile` does to the last digit."""
    ordered, number = np.sort(drawn, axis=1), drawn.shape[1]
    rank = _ENDS * number + (1 - _ENDS)
    above, share = rank.astype(int), rank % 1
    below, above = ordered[:, above - 1], ordered[:, np.minimum(above, number - 1)]
    ends: NDArray[np.float64] = (1 - share) * below + share * above
    return ends
