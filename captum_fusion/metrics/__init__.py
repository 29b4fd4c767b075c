"""How good a map is, and how to hand one to captum's own metrics."""

from captum_fusion.metrics.adapters import explanation_func, to_input_shape

__all__ = ["explanation_func", "to_input_shape"]
