"""The report of :mod:`tests.benchmarks.faithfulness`: means, paired differences, Holm's correction, and the figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats

from tests.benchmarks.networks import EVERY_NETWORK, UNSEEN

REFERENCE = "Fusion-CAM"
PRESETS = ("Fusion-CAM, fast", "Fusion-CAM, best")


class Column(NamedTuple):
    """A metric in the tables: its heading, digits, direction, and the loss that still counts as "not worse"."""

    heading: str
    digits: int
    sign: int
    margin: float | None


COLUMNS = {
    "overall": Column("ins - del ↑", 3, 1, 0.01),
    "average_drop": Column("AD % at equal area ↓", 1, -1, 2.0),
    "average_increase": Column("AI % at equal area ↑", 1, 1, None),
    "road": Column("ROAD ↑", 3, 1, None),
    "adcc": Column("ADCC ↑", 3, 1, 0.02),
    "energy_pointing_game": Column("energy in box ↑", 3, 1, 0.03),
    "pointing_game": Column("pointing % ↑", 1, 1, None),
    "complexity": Column("area", 3, 1, None),
}
#: The last of the photographs that were used while the presets were chosen, in the order of their names.
EXPLORED = "ILSVRC2012_val_00007007.jpg"
#: The metrics that say how faithful a map is; Holm's correction is over these and the networks.
FAITHFUL = ("overall", "average_drop", "road")


class Values:
    """Values of rows as arrays over photographs, NaN where there is none."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._values: dict[tuple[str, str, str], dict[str, float]] = {}
        for row in rows:
            metric = str(row["metric"]).partition(":")[0]
            value = math.nan if row.get("value") is None else float(row["value"])
            self._values.setdefault((_network(row), row["method"], metric), {})[row["image"]] = value
        self.networks = list(dict.fromkeys(network for network, _, _ in self._values))
        self.methods = list(dict.fromkeys(method for _, method, _ in self._values))
        self.metrics = [metric for metric in COLUMNS if any(m == metric for _, _, m in self._values)]
        self.photographs = sorted({image for values in self._values.values() for image in values})

    def of(self, network: str, method: str, metric: str) -> NDArray[np.float64]:
        found = self._values.get((network, method, metric), {})
        return np.array([found.get(image, math.nan) for image in self.photographs])

    def differences(self, network: str, method: str, metric: str) -> NDArray[np.float64]:
        values = self.of(network, method, metric) - self.of(network, REFERENCE, metric)
        return values[~np.isnan(values)]

    def over_networks(self, method: str, metric: str, difference: bool = False) -> NDArray[np.float64]:
        """For each photograph the mean over the networks, where all have a value."""
        stack = np.stack([self.of(network, method, metric) for network in self.networks])
        if difference:
            stack = stack - np.stack([self.of(network, REFERENCE, metric) for network in self.networks])
        means = stack.mean(0)
        return means[~np.isnan(means)]


def _network(row: Mapping[str, Any]) -> str:
    return str(row["model"]).partition(":")[2] or str(row["model"])


def _title(network: str) -> str:
    return EVERY_NETWORK[network].title if network in EVERY_NETWORK else network


def interval(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """Mean and 95 % bootstrap interval over photographs."""
    mean = float(values.mean()) if len(values) else math.nan
    if len(values) < 2 or np.ptp(values) == 0:
        return mean, mean, mean
    ends = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=5000, rng=np.random.default_rng(0))
    return mean, float(ends.confidence_interval.low), float(ends.confidence_interval.high)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted by S. Holm's step-down procedure (Scand. J. Stat. 6, 1979)."""
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def shown(values: NDArray[np.float64], digits: int, signed: bool = False) -> str:
    if not len(values):
        return "-"
    mean, low, high = (round(value, digits) + 0.0 for value in interval(values))
    plus = "+" if signed else ""
    return f"{mean:{plus}.{digits}f} [{low:{plus}.{digits}f}, {high:{plus}.{digits}f}]"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def mean_table(values: Values, methods: Sequence[str], samples: Callable[[str, Sequence[str]], str]) -> list[str]:
    """Every method: its mean over networks and photographs; the reference's value, and differences to it.

    Methods and metrics that no photograph has on all networks are left out.
    """
    metrics = [metric for metric in values.metrics if len(values.over_networks(REFERENCE, metric))]
    rows = []
    for method in methods:
        if not any(len(values.over_networks(method, metric)) for metric in metrics):
            continue
        cells = [
            shown(
                values.over_networks(method, metric, difference=method != REFERENCE),
                COLUMNS[metric].digits,
                signed=method != REFERENCE,
            )
            for metric in metrics
        ]
        rows.append([method, samples(method, values.networks), *cells])
    header = ["method", "forward samples, first photograph", *(COLUMNS[metric].heading for metric in metrics)]
    return table(header, rows)


def network_table(values: Values, method: str) -> list[str]:
    """One method minus the reference on every network, with Holm's correction for the faithfulness metrics."""
    tests = [(network, metric) for network in values.networks for metric in FAITHFUL if metric in values.metrics]
    p_values = []
    for network, metric in tests:
        differences = values.differences(network, method, metric)
        usable = len(differences) > 2 and np.ptp(differences) > 0
        p_values.append(float(stats.ttest_1samp(differences, 0).pvalue) if usable else 1.0)
    adjusted = dict(zip(tests, holm(p_values), strict=True))
    rows = []
    for network in values.networks:
        cells = []
        for metric in values.metrics:
            differences = values.differences(network, method, metric)
            text = shown(differences, COLUMNS[metric].digits, signed=True)
            gain = COLUMNS[metric].sign * differences.mean() if len(differences) else 0.0
            significant = adjusted.get((network, metric), 1.0) < 0.05
            cells.append(f"**{text}**" if significant and gain > 0 else f"{text} worse" if significant else text)
        rows.append([_title(network), str(len(values.differences(network, method, "overall"))), *cells])
    return table(["network", "photographs", *(COLUMNS[metric].heading for metric in values.metrics)], rows)


def verdict(values: Values, method: str) -> list[str]:
    """Where a method's mean is worse than the reference's by more than the margin."""
    worse = []
    for network in values.networks:
        for metric in values.metrics:
            column, differences = COLUMNS[metric], values.differences(network, method, metric)
            if column.margin is not None and len(differences) and column.sign * differences.mean() < -column.margin:
                worse.append(f"{_title(network)}, {column.heading.rstrip(' ↑↓')}")
    return worse


def price_figure(values: Values, methods: Sequence[str], samples: Callable[[str], float]) -> Figure:
    """Paired differences of insertion minus deletion and of ROAD to the reference, against forward samples."""
    metrics = [metric for metric in ("overall", "road") if metric in values.metrics]
    figure = Figure(figsize=(5.6 * len(metrics), 4.4), layout="constrained")
    for axes, metric in zip(np.atleast_1d(figure.subplots(1, len(metrics))), metrics, strict=True):
        for i, method in enumerate(methods):
            mean, low, high = interval(values.over_networks(method, metric, difference=True))
            ours = method in (*PRESETS, "cell regression", "Fusion-CAM, 128 cell masks")
            axes.errorbar(
                samples(method), mean, [[mean - low], [high - mean]], marker="oD^vsPX*<>"[i % 10], capsize=2,
                color=f"C{i % 10}", label=method, markerfacecolor=f"C{i % 10}" if ours else "white",
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlabel("forward samples per image")
        name = "insertion - deletion" if metric == "overall" else "ROAD"
        axes.set_ylabel(f"{name}, minus {REFERENCE}'s")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    return figure


def write_report(options: Any, rows: Any, slow_rows: Any, costs: Any, versions: Mapping[str, str]) -> None:
    """Write ``report.md`` and ``price.png`` into the output folder; into docs with ``--write``."""
    every, chosen = Values(rows), {row["image"] for row in slow_rows}
    again = [
        row for row in rows if row["image"] in chosen and row["method"] in (*PRESETS, "cell regression", "Grad-CAM")
    ]
    slow = Values([*slow_rows, *again])
    unseen = Values(row for row in rows if _network(row) in UNSEEN)
    seen = [row for row in rows if _network(row) not in UNSEEN]
    values, fresh = Values(seen), Values(row for row in seen if Path(row["image"]).name > EXPLORED)
    cost = _costs(rows) | _costs(slow_rows) | _costs(costs)

    def samples(method: str, networks: Sequence[str]) -> str:
        counts = [cost[network, method] for network in networks if (network, method) in cost]
        return f"{min(counts):.0f} to {max(counts):.0f}" if counts and min(counts) < max(counts) else f"{counts[0]:.0f}"

    def mean_samples(method: str) -> float:
        return float(np.mean([cost[network, method] for network in values.networks]))

    unused: list[str] = []
    if number := len(fresh.photographs):
        title = f"The presets on the photographs that were not used while they were chosen ({number} for each network):"
        unused = [title, "", *mean_table(fresh, PRESETS, samples)]
    if number := len(unseen.photographs):
        names = ", ".join(map(_title, unseen.networks))
        title = f"All methods on {names}, which was not used for any choice ({number} photographs):"
        unused += [title, "", *mean_table(unseen, unseen.methods, samples)]
    lines = [
        f"Means over photographs and networks ({', '.join(map(_title, values.networks))}).",
        "Fusion-CAM: its values; other methods: paired differences to it.",
        f"In brackets: 95 % bootstrap intervals over photographs ({len(values.photographs)} for each network).",
        "",
        *mean_table(values, values.methods, samples),
        *unused,
        f"Methods and metrics that need many more samples, on the first {len(slow.photographs)} photographs of "
        f"{', '.join(map(_title, slow.networks))}:",
        "",
        *mean_table(slow, slow.methods, samples),
    ]
    for method in PRESETS:
        worse = verdict(every, method) + verdict(Values(slow_rows), method)
        lines += [
            f"### {method} minus Fusion-CAM, by network",
            "",
            "Bold: better, significant at 5 % by paired t-tests with Holm's correction over the networks and the",
            "metrics ins - del, AD and ROAD.",
            f"Means that are worse by more than the margins (ins - del 0.01, AD 2 points, ADCC 0.02, energy 0.03): "
            f"{'; '.join(worse) if worse else 'none'}.",
            "",
            *network_table(every, method),
        ]
    lines += ["Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".", ""]
    text, figure = "\n".join(lines), price_figure(values, values.methods, mean_samples)
    (options.output / "report.md").write_text(text, encoding="utf-8")
    figure.savefig(options.output / "price.png", dpi=130)
    if options.write:
        docs = Path(__file__).parents[2] / "docs"
        page = docs / "faithfulness.md"
        before, start, rest = page.read_text(encoding="utf-8").partition("<!-- generated: measurements -->\n")
        end = rest[rest.index("<!-- end: measurements -->") :]
        page.write_text(f"{before}{start}\n{text}\n{end}", encoding="utf-8")
        figure.savefig(docs / "images" / "price.png", dpi=130)


def _costs(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], float]:
    return {
        (_network(row), row["method"]): float(row["value"])
        for row in rows
        if row["metric"] == "forward_samples" and row.get("value") is not None
    }
