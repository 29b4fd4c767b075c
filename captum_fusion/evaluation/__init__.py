"""Which explanation method is faithful on your network and your pictures: the papers' tables of a dataset."""

from captum_fusion.evaluation.data import Dataset, Example, ExampleDataset, Region, as_example, load_image
from captum_fusion.evaluation.measures import METRICS
from captum_fusion.evaluation.presets import PRESETS, Preset
from captum_fusion.evaluation.running import Evaluation, evaluate
from captum_fusion.evaluation.sources import open_dataset

__all__ = [
    "METRICS",
    "PRESETS",
    "Dataset",
    "Evaluation",
    "Example",
    "ExampleDataset",
    "Preset",
    "Region",
    "as_example",
    "evaluate",
    "load_image",
    "open_dataset",
]
