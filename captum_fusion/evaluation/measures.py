"""The metrics of the tables by name, each computed for one picture that one method has explained."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from captum_fusion import functional as formulas
from captum_fusion import metrics
from captum_fusion.evaluation.data import Example
from captum_fusion.evaluation.labels import NOT_KNOWN, ObjectMasks
from captum_fusion.evaluation.methods import Explain, MethodSpec, import_object, parse, refuse_unknown, unknown
from captum_fusion.metrics import Curve
from captum_fusion.metrics.localization import bounding_boxes

#: The value of a metric: a number, a curve, or why there is none.
Outcome = float | Curve | str


_NONE = torch.zeros(0, 1, 1, dtype=torch.bool)
_NO_OBJECTS = ObjectMasks(_NONE, _NONE, NOT_KNOWN)


@dataclass
class Subject:
    """A picture that a method has explained: what a metric is computed for.

    Attributes:
        model: The network.
        inputs: Its input, ``(1, C, H, W)``.
        attributions: What the method returned, ``(1, C, *spatial)``.
        target: The explained class.
        example: The picture's description.
        explain: The method, for metrics that explain again.
        options: ``score_fn``, ``perturbations_per_eval`` and ``seed``, for the metrics that have them.
        objects: Where the objects of the explained class are in ``inputs``.
        rivals: Drops under the reference method's map, by the metric's options.
        is_reference: Whether the method is the reference.
    """

    model: Any
    inputs: Tensor
    attributions: Tensor
    target: int
    example: Example
    explain: Explain
    options: Mapping[str, Any] = field(default_factory=dict)
    objects: ObjectMasks = _NO_OBJECTS
    rivals: dict[Any, float] = field(default_factory=dict)
    is_reference: bool = False
    _values: dict[Any, Any] = field(default_factory=dict)

    def call(self, metric: Callable[..., Any], **options: Any) -> Any:
        """Compute a metric of :mod:`captum_fusion.metrics`, once for the same options."""
        key = metric, options_key(options)
        if key not in self._values:
            given = {**self.options_of(metric), **options}
            self._values[key] = metric(self.model, self.inputs, self.attributions, self.target, **given)
        return self._values[key]

    def options_of(self, metric: Callable[..., Any]) -> dict[str, Any]:
        """The options that a metric has."""
        known = inspect.signature(metric).parameters
        return {key: value for key, value in self.options.items() if key in known}

    @cached_property
    def region(self) -> Tensor:
        """The union of the objects' masks, bool (1, H, W)."""
        return self.objects.masks.any(0, keepdim=True)


@dataclass(frozen=True)
class Measure:
    """A metric as a table shows it.

    Attributes:
        name: Its name on the command line.
        heading: The heading of its column.
        better: Whether higher (``"up"``) or lower (``"down"``) values are better; ``""`` for neither.
        meaning: A sentence that explains it.
        compute: Computes it for a subject, with options of the metric.
        located: Whether it needs the object's location.
        described: Whether it is given the example.
    """

    name: str
    heading: str
    better: str
    meaning: str
    compute: Callable[..., Any]
    located: bool = False
    described: bool = False

    @property
    def ours(self) -> bool:
        """Whether it is one of :data:`METRICS`, not a user's own."""
        return METRICS.get(self.name) is self

    @property
    def sees_regions(self) -> bool:
        """Whether its value may depend on the example's regions."""
        return self.located or self.described


def _of(metric: Callable[..., Any]) -> Callable[..., Any]:
    return lambda subject, **options: subject.call(metric, **options)


def _confidence(formula: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """A metric of two scores, for the whole picture and its highlighted part, which are computed once for all."""
    return lambda subject, **options: formula(*subject.call(metrics.confidences, **options))


def options_key(options: Mapping[str, Any]) -> Any:
    """Options as the key of a dict."""
    return tuple(sorted((name, repr(value)) for name, value in options.items()))


def drop_of(subject: Subject, options: Mapping[str, Any]) -> float:
    """The average drop of a subject, in percent."""
    return float(formulas.drop(*subject.call(metrics.confidences, **options)))


def _win(subject: Subject, **options: Any) -> float:
    drop = drop_of(subject, options)
    rival = drop if subject.is_reference else subject.rivals.get(options_key(options))
    if rival is None:
        raise RuntimeError("the reference method has failed")
    return float(formulas.increase(torch.tensor(drop), torch.tensor(rival)))


def _overall(subject: Subject, **options: Any) -> Tensor:
    """:func:`captum_fusion.metrics.overall` of the two curves, which are shared with insertion and deletion."""
    ends = {name: options.pop(f"{name}_baselines", None) for name in ("insertion", "deletion")}
    areas = []
    for metric in (metrics.insertion, metrics.deletion):
        start = ends[metric.__name__]
        areas.append(subject.call(metric, **options, **({} if start is None else {"baselines": start})).auc)
    area: Tensor = areas[0] - areas[1]
    return area


def _adcc(part: str) -> Callable[..., Any]:
    return lambda subject, **options: getattr(
        subject.call(metrics.adcc, explanation_func=subject.explain, **options), part
    )


def _iou(subject: Subject, **options: Any) -> Tensor:
    masks = subject.objects.boxes
    size = (int(masks.shape[1]), int(masks.shape[2]))
    iou: Tensor = metrics.localization_iou(subject.attributions, [bounding_boxes(masks)], size, **options)
    return iou


_ALL = (
    Measure(
        "average_drop",
        "AD %",
        "down",
        "Percentage of its score that the class loses when only the highlighted part is shown and the rest of the "
        "network's input is 0. Larger masks lose less: read it together with the mask's area.",
        _confidence(formulas.drop),
    ),
    Measure(
        "average_increase",
        "AI %",
        "up",
        "Percentage of pictures whose score rises when only the highlighted part is shown.",
        _confidence(formulas.increase),
    ),
    Measure(
        "average_gain",
        "AG %",
        "up",
        "Percentage of the score's distance to 1 that is gained when only the highlighted part is shown.",
        _confidence(formulas.gain),
    ),
    Measure(
        "win_rate",
        "win %",
        "up",
        "Percentage of pictures whose score drops less than with the reference method's map.",
        _win,
    ),
    Measure(
        "complexity",
        "area",
        "",  # a small mask is not better, it is harder
        "Mean of the map in [0, 1], i.e. the mask's area.",
        lambda subject, **options: metrics.complexity(
            formulas.upsample(subject.attributions.sum(1, keepdim=True), subject.inputs.shape[2:]), **options
        ),
    ),
    Measure(
        "insertion", "insertion", "up", "Area under the score's curve while pixels are shown, the highest first.",
        _of(metrics.insertion),
    ),
    Measure(
        "deletion", "deletion", "down", "Area under the score's curve while pixels are removed, the highest first.",
        _of(metrics.deletion),
    ),
    Measure("overall", "ins - del", "up", "Insertion minus deletion.", _overall),
    Measure(
        "coherency", "coherency", "up", "Correlation of the map with the map of the highlighted part, from 0 to 1.",
        _adcc("coherency"),
    ),
    Measure(
        "adcc", "ADCC", "up", "Harmonic mean of coherency, 1 - area and 1 - drop, from 0 to 1.", _adcc("adcc"),
    ),
    Measure(
        "road",
        "ROAD",
        "up",
        "Half the difference between the scores with the least and with the most highlighted pixels imputed.",
        lambda subject, **options: subject.call(metrics.road, **options).combined,
    ),
    Measure(
        "pointing_game", "pointing %", "up", "Percentage of pictures whose highest map value lies on the object.",
        lambda subject, **options: 100 * metrics.pointing_game(subject.attributions, subject.region, **options),
        located=True,
    ),
    Measure(
        "energy_pointing_game", "energy", "up", "Share of the map that lies on the object.",
        lambda subject, **options: metrics.energy_pointing_game(subject.attributions, subject.region, **options),
        located=True,
    ),
    Measure(
        "localization_iou", "box IoU", "up", "Overlap of the box around the map's largest part with the object's box.",
        _iou, located=True,
    ),
    Measure(
        "segmentation_iou", "mask IoU", "up", "Overlap of the map's largest part with the object.",
        lambda subject, **options: metrics.segmentation_iou(subject.attributions, subject.region, **options),
        located=True,
    ),
)  # fmt: skip

#: Every metric by its name. What methods cost (:data:`COSTS`) is always measured.
METRICS: dict[str, Measure] = {measure.name: measure for measure in _ALL}

#: What is always measured for every method.
COSTS = ("forward_samples", "backward_samples", "seconds")


def find(metric: Any) -> tuple[Measure, dict[str, Any]]:
    """Find a metric by its spec, or make one of a user's function.

    Args:
        metric (str or callable): A name of :data:`METRICS` with options (``insertion:preset=rise``);
            ``package.module:function``; or a function ``metric(forward_func, inputs, attributions, target)`` that
            returns a value for each example. Functions of :mod:`captum_fusion.metrics` are recognised. If the function
            has an argument ``example``, it is given the :class:`captum_fusion.evaluation.Example`; the same holds for
            ``score_fn``, ``perturbations_per_eval`` and ``seed``.

    Returns:
        tuple[Measure, dict]: The metric and its options.

    Raises:
        ValueError: If there is no such metric, or it has no such option.

    Examples::

        >>> find("insertion:steps=10")[1]
        {'steps': 10}
    """
    spec = parse(metric) if isinstance(metric, str) else MethodSpec(getattr(metric, "__name__", str(metric)), {})
    if isinstance(metric, str) and ":" in spec.name:
        metric = import_object(spec.name, METRICS)
    name = spec.name.rpartition(":")[2]
    if isinstance(metric, str) or getattr(metrics, name, None) is metric:
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
        refuse_unknown("metrics", MethodSpec(name, spec.options), _function_of(name))
        return METRICS[name], spec.options
    if not callable(metric):
        raise ValueError(f"metric {spec.name!r} must be a function(forward_func, inputs, attributions, target)")
    refuse_unknown("metrics", spec, metric)
    return _own(metric, spec.name), spec.options


#: The functions of :mod:`captum_fusion.metrics` whose options a metric has, where the name is another.
_FUNCTIONS = {
    "average_drop": "confidences",
    "average_increase": "confidences",
    "average_gain": "confidences",
    "win_rate": "confidences",
    "coherency": "adcc",
}


def _function_of(name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(metrics, _FUNCTIONS.get(name, name))
    return function


def options_in_force(metric: tuple[Measure, dict[str, Any]]) -> dict[str, Any]:
    """The options that a metric is computed with, without those that all metrics are given.

    Examples::

        >>> options_in_force(find("deletion:baselines=1"))
        {'preset': 'groupcam_head', 'baselines': 1}
    """
    measure, given = metric
    if not measure.ours:
        return given
    shared = ("score_fn", "perturbations_per_eval", "seed")
    defaults = {
        option.name: option.default
        for option in inspect.signature(_function_of(measure.name)).parameters.values()
        if option.kind is option.KEYWORD_ONLY and option.name not in shared
    }
    return {name: v for name, v in defaults.items() if v not in (None, inspect.Parameter.empty)} | given


def _own(metric: Callable[..., Any], name: str) -> Measure:
    wants_example = "example" in inspect.signature(metric).parameters

    def compute(subject: Subject, **options: Any) -> Any:
        extra = {"example": subject.example} if wants_example else {}
        tensors = subject.inputs.clone(), subject.attributions.clone()  # whatever the function does to them
        return metric(subject.model, *tensors, subject.target, **{**extra, **subject.options_of(metric), **options})

    meaning = (inspect.getdoc(metric) or name).splitlines()[0]
    return Measure(name, name.rpartition(":")[2], "", meaning, compute, described=wants_example)


def measure(metric: tuple[Measure, dict[str, Any]], subject: Subject) -> Outcome:
    """Compute a metric for a subject.

    Args:
        metric (tuple[Measure, dict]): The metric and its options, from :func:`find`.
        subject (Subject): The explained picture.

    Returns:
        float, Curve or str: The value, or why there is none.
    """
    measure, options = metric
    if measure.located and not len(subject.objects.masks):
        return subject.objects.missing
    value = measure.compute(subject, **options)
    if isinstance(value, (Curve, str)):
        return value
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{measure.name} must give one value for each example, not {tuple(value.shape)}")
        value = value.item()
    return float(value)
