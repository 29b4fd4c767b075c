"""Metrics of attribution maps, and adapters for captum's own metrics, Quantus and torchmetrics.

The positional arguments of a metric are ``forward_func`` (where it runs the network), ``inputs``, ``attributions``,
``target`` and ``additional_forward_args``; for the localization metrics, ``attributions`` and the object's masks or
boxes. Everything else is a keyword argument. Each returns a value, or a named tuple of values, for each example.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from captum_fusion.metrics.adapters import explanation_func, quantus_explain_func, to_input_shape
from captum_fusion.metrics.causal import Curve, deletion, insertion, overall
from captum_fusion.metrics.coherency import ADCC, adcc, coherency
from captum_fusion.metrics.confidence import (
    average_drop,
    average_gain,
    average_increase,
    complexity,
    confidences,
    win_rate,
)
from captum_fusion.metrics.localization import (
    boxes_to_masks,
    energy_pointing_game,
    localization_iou,
    pointing_game,
    segmentation_iou,
)
from captum_fusion.metrics.road import Road, road
from captum_fusion.metrics.sanity import Randomization, cascading_randomization

if TYPE_CHECKING:
    from captum_fusion.metrics.streaming import AttributionMetric as AttributionMetric

#: ``AttributionMetric`` is missing, so that ``import *`` does not need torchmetrics.
__all__ = [
    "ADCC",
    "Curve",
    "Randomization",
    "Road",
    "adcc",
    "average_drop",
    "average_gain",
    "average_increase",
    "boxes_to_masks",
    "cascading_randomization",
    "coherency",
    "complexity",
    "confidences",
    "deletion",
    "energy_pointing_game",
    "explanation_func",
    "insertion",
    "localization_iou",
    "overall",
    "pointing_game",
    "quantus_explain_func",
    "road",
    "segmentation_iou",
    "to_input_shape",
    "win_rate",
]


def __getattr__(name: str) -> type[AttributionMetric]:
    """Import ``AttributionMetric`` on first use, because torchmetrics is optional."""
    if name == "AttributionMetric":
        from captum_fusion.metrics.streaming import AttributionMetric

        return AttributionMetric
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
