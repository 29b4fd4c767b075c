"""A dataset in, the papers' tables out: which explanation method is faithful, on your network and your pictures."""

from captum_fusion.evaluation.data import Example, Region, as_example, load_image, open_dataset
from captum_fusion.evaluation.measures import METRICS
from captum_fusion.evaluation.presets import PRESETS, Preset
from captum_fusion.evaluation.running import Evaluation, evaluate

__all__ = [
    "METRICS",
    "PRESETS",
    "Evaluation",
    "Example",
    "Preset",
    "Region",
    "as_example",
    "evaluate",
    "load_image",
    "open_dataset",
]
