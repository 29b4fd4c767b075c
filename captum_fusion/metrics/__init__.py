"""How good a map is, and how to hand one to captum's own metrics."""

from captum_fusion.metrics.adapters import explanation_func, to_input_shape
from captum_fusion.metrics.causal import Curve, deletion, insertion
from captum_fusion.metrics.confidence import average_drop, average_gain, average_increase, complexity, confidences

__all__ = [
    "Curve",
    "average_drop",
    "average_gain",
    "average_increase",
    "complexity",
    "confidences",
    "deletion",
    "explanation_func",
    "insertion",
    "to_input_shape",
]
