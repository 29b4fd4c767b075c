"""What an evaluation compares and how it runs, made and checked once; what its rows depend on, in ``run.json``."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any

import captum
import torch

import captum_fusion
from captum_fusion import functional
from captum_fusion._arguments import choice, count
from captum_fusion.evaluation import measures, store
from captum_fusion.evaluation import methods as specs
from captum_fusion.evaluation.measures import COSTS, METRICS, Measure
from captum_fusion.evaluation.presets import PRESETS, Preset

#: What :func:`captum_fusion.evaluation.evaluate` writes into its folder, besides ``run.json`` and ``index.html``.
FOLDERS = ("rows", "maps", "tables", "figures")

#: The format of ``run.json`` and of rows. Rows of another format are not mixed with new ones.
FORMAT = 1

#: Which class is explained: the network's prediction for the whole picture, or the dataset's label.
EXPLAINED = ("prediction", "label")


@dataclass(frozen=True)
class Study:
    """What is compared on every network.

    Attributes:
        methods: The methods by their labels, in the order of the tables: what
            :func:`captum_fusion.evaluation.methods.build` takes.
        metrics: The metrics by their labels, each with its options.
        reference: The label of the method that differences and wins are against.
        explain: One of :data:`EXPLAINED`.
        score_fn: For methods and metrics; None for the default of each.
        perturbations_per_eval: Forward samples in one call of the network.
        seed: Of methods and metrics that draw at random, and of the bootstrap.
        share: Whether methods share the passes that they have in common.
        title: Heading of the page.
        published: Figures from papers, by a sentence on their source.
        fingerprints: What the labels of ``"methods"`` and ``"metrics"`` stand for, for comparison with earlier rows.
    """

    methods: Mapping[str, Any]
    metrics: Mapping[str, tuple[Measure, dict[str, Any]]]
    reference: str
    explain: str = "prediction"
    score_fn: str | None = None
    perturbations_per_eval: int = 4
    seed: int = 0
    share: bool = True
    title: str = "Explanation methods compared"
    published: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    fingerprints: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def reference_first(self) -> list[str]:
        """The labels of the methods in the order in which they run: wins need the reference's result."""
        return sorted(self.methods, key=lambda label: label != self.reference)

    @property
    def columns(self) -> list[str]:
        """What is measured for every method: the metrics and the costs."""
        return [*self.metrics, *COSTS]

    def is_win(self, metric: str) -> bool:
        """Whether a metric compares with the reference method."""
        return metric in self.metrics and self.metrics[metric][0] is METRICS["win_rate"]

    def sees_regions(self, metric: str) -> bool:
        """Whether a metric may depend on an example's regions."""
        return metric in self.metrics and self.metrics[metric][0].sees_regions


@dataclass(frozen=True)
class Settings:
    """How a study runs.

    Attributes:
        study: What is compared.
        output: The folder for the results.
        device: Where networks that are loaded by name run.
        limit: How many pictures, or None for all.
        whole_image: Whether pictures are squeezed into the network's input instead of cropped.
        threads: Threads of torch in each process.
        workers: Processes that read pictures.
        pictures: For how many pictures the maps are drawn.
        show_progress: Whether a progress bar is shown.
        command: The command line, for the page.

    Raises:
        ValueError: For a value that does not fit; the message names it.
    """

    study: Study
    output: Path
    device: str = "cpu"
    limit: int | None = None
    whole_image: bool = False
    threads: int = 1
    workers: int = 0
    pictures: int = 4
    show_progress: bool = True
    command: str | None = None

    def __post_init__(self) -> None:
        choice("explain", self.study.explain, EXPLAINED)
        counts = {
            "seed": (self.study.seed, 0),
            "workers": (self.workers, 0),
            "pictures": (self.pictures, 0),
            "threads": (self.threads, 1),
            "perturbations_per_eval": (self.study.perturbations_per_eval, 1),
            "limit": (1 if self.limit is None else self.limit, 1),
        }
        for name, (value, least) in counts.items():
            count(name, value, least)
        functional.score_function(self.study.score_fn or "softmax")

    def of_rows(self, source: str) -> dict[str, Any]:
        """What all rows depend on.

        Args:
            source (str): Where the pictures are from.
        """
        return {
            "dataset": source,
            "explain": self.study.explain,
            "score_fn": self.study.score_fn,
            "perturbations_per_eval": self.study.perturbations_per_eval,
            "threads": self.threads,
            "seed": self.study.seed,
            "share": self.study.share,
            "whole_image": self.whole_image,
            "device": self.device.partition(":")[0],
            **self.study.fingerprints,
        }


# -------------------------------------------------------------------------------------------------------------- studies


def make_study(
    *,
    preset: str | None = None,
    methods: Sequence[Any] | Mapping[str, Any] | None = None,
    metrics: Sequence[Any] | Mapping[str, Any] | None = None,
    theta: Sequence[float] | None = None,
    reference: str | None = None,
    **measured: Any,
) -> Study:
    """Make a study of a preset, and of what replaces parts of it.

    Args:
        preset, methods, metrics, theta, reference: As of :func:`captum_fusion.evaluation.evaluate`.
        measured: The other fields of :class:`Study`: ``explain``, ``score_fn``, ``perturbations_per_eval``, ``seed``.

    Returns:
        Study: With a label for every method and metric.

    Raises:
        ValueError: For a name or a combination that does not fit.

    Examples::

        >>> make_study(methods=["grad-cam", "fusion-cam"], theta=[0, 10]).reference_first
        ['fusion-cam:theta=10', 'grad-cam', 'fusion-cam:theta=0']
    """
    chosen = _preset(preset, is_free=methods is not None)
    compared = _with_theta(_labelled("method", chosen.methods if methods is None else methods), theta, chosen.theta)
    for method in compared.values():
        if isinstance(method, str):
            specs.check(method)
    given = _labelled("metric", chosen.metrics if metrics is None else metrics)
    found = {label: measures.find(metric) for label, metric in given.items()}
    _add_area(given, found)
    if reference is None:
        reference = chosen.reference if chosen.reference in compared else list(compared)[-1]
    if reference not in compared:
        raise ValueError(f"reference must be one of the methods {', '.join(compared)}, not {reference!r}")
    shown: dict[str, Any] = {} if preset is None else {"title": chosen.title, "published": chosen.published}
    fingerprints = {"methods": _fingerprints(compared), "metrics": _fingerprints(given)}
    return Study(compared, found, reference, share=chosen.share, fingerprints=fingerprints, **shown, **measured)


def _fingerprints(labelled: Mapping[str, Any]) -> dict[str, str]:
    return {label: specs.fingerprint(value) for label, value in labelled.items()}


def _preset(name: str | None, is_free: bool) -> Preset:
    if name is not None and name not in PRESETS:
        raise specs.unknown("preset", name, PRESETS)
    chosen = PRESETS[name or "fusioncam-table"]
    return replace(chosen, methods=(), reference="") if name is None and is_free else chosen


def _labelled(kind: str, given: Any) -> dict[str, Any]:
    """Methods or metrics by their labels."""
    if isinstance(given, str):
        given = [given]
    if isinstance(given, Mapping):
        labelled = dict(given)
    else:
        labelled = {}
        for value in given:
            label = value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__)
            if label in labelled:
                raise ValueError(f"{kind}s: there are two called {label!r}; name them in a dict")
            labelled[label] = value
    if not labelled:
        raise ValueError(f"{kind}s: there is none")
    for label in labelled:
        if not isinstance(label, str) or not label:
            raise ValueError(f"{kind}s: a label must be a text, not {label!r}")
        if kind == "metric" and label in COSTS:
            raise ValueError(f"metrics: {label!r} is always measured of every method; name yours otherwise")
    return labelled


def _with_theta(labelled: dict[str, Any], given: Any, usual: Sequence[float]) -> dict[str, Any]:
    """The methods, those that have ``theta`` once for each of its values."""
    values = usual if given is None else given
    if isinstance(values, str) or not isinstance(values, Iterable) or not all(isinstance(v, Real) for v in values):
        raise ValueError(f"theta must be a sequence of numbers, not {values!r}")
    if not values:
        return labelled
    expanded: dict[str, Any] = {}
    for label, method in labelled.items():
        spec = specs.parse(method) if isinstance(method, str) else None
        if spec is None or not specs.takes(spec.name, "theta") or "theta" in spec.options:
            expanded[label] = method
            continue
        for value in values:
            shown = f"{value:g}" if float(f"{value:g}") == value else repr(value)
            text = f"{method}{',' if spec.options else ':'}theta={shown}"
            expanded[text if label == method else f"{label}:theta={shown}"] = text
    if given and expanded == labelled:
        raise ValueError(f"theta: none of the methods {', '.join(labelled)} has it, or all have one of their own")
    return expanded


def _add_area(given: dict[str, Any], found: dict[str, tuple[Measure, dict[str, Any]]]) -> None:
    """Add the mask's area to an average drop: a mask that shows everything has no drop."""
    used = [measure for measure, _ in found.values()]
    drops = METRICS["average_drop"] in used or any(label.partition(":")[0] == "average_drop" for label in found)
    if drops and METRICS["complexity"] not in used:
        if "complexity" in found:
            raise ValueError("metrics: 'complexity' is the mask's area, shown with average_drop; name yours otherwise")
        given["complexity"], found["complexity"] = "complexity", measures.find("complexity")


# ------------------------------------------------------------------------------------------------------------- run.json


def agree(output: Path, parts: Mapping[str, Mapping[str, Any]], has_rows: bool, say: Callable[[str], None]) -> None:
    """Write ``run.json``, or refuse to mix rows that were made with different settings.

    Args:
        output (Path): The folder of the results.
        parts (mapping): What rows depend on: ``"run"``, and ``"model NAME"`` for each network. A setting that is a dict
            may get more entries in a later run; an entry that is there must stay the same.
        has_rows (bool): Whether there are rows already.
        say (callable): Called with a remark for the user.

    Raises:
        ValueError: If there are rows that depend on something else.
    """
    path = output / "run.json"
    known: dict[str, Any] = _read(path) if has_rows else {"format": FORMAT}
    merged = {part: _merged(output, known.get(part), settings) for part, settings in parts.items()}
    kept = {**known, **merged}
    other = [f"{k} {v}" for k, v in known.get("versions", {}).items() if _versions().get(k) != v]
    if other:
        say(f"the rows in {output} were made with {', '.join(other)}: last digits may differ")
    kept.setdefault("versions", _versions())
    if kept != known:
        store.write_whole(path, (json.dumps(kept, indent=2) + "\n").encode())


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(known, dict):
            raise ValueError("it holds no settings")
        written = known.get("format", "not recorded")
        if written != FORMAT:
            raise ValueError(f"its format is {written!r}, not {FORMAT}")
        for part in ("run", "versions"):
            if not known.get(part):
                raise ValueError(f"it has no {part!r}")
        for part, settings in known.items():
            if part != "format" and not isinstance(settings, dict):
                raise ValueError(f"its {part!r} is not a dict")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"output: there are rows in {path.parent}, but what they were made with could not be read from {path} "
            f"({error}); choose another folder"
        ) from error
    return known


def _merged(output: Path, before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of before, None if there were none, and now.

    Raises:
        ValueError: If a setting has changed.
    """
    if before is None:
        return dict(now)
    merged = dict(before)
    for key, value in now.items():
        entries = before.get(key)
        if isinstance(value, dict) and isinstance(entries, dict):
            changed = [(f"{key} {name!r}", entries[name], v) for name, v in value.items() if entries.get(name, v) != v]
            merged[key] = {**entries, **value}
        else:
            old = before.get(key, "not recorded")
            changed = [(key, old, value)] if old != value else []
            merged[key] = value
        for name, old, new in changed:
            raise ValueError(
                f"output: the rows in {output} were made with {name} = {old!r} and would now be made with {new!r}; "
                "choose another folder"
            )
    return merged


def _versions() -> dict[str, str]:
    return {
        "captum_fusion": captum_fusion.__version__,
        "torch": torch.__version__,
        "captum": captum.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
