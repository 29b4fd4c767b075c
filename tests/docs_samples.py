"""Counts the samples that every method sends through the bundled network for the espresso in the bundled photograph.

``python -m tests.docs_samples`` writes tests/docs_samples.json, which docs/choosing.md shows. It takes about ten
minutes on one core, most of them for SS-CAM.
"""

from __future__ import annotations

import json

import torch

from captum_fusion.attr.catalog import METHODS
from captum_fusion.demo import photographs
from captum_fusion.evaluation.network import Meter
from captum_fusion.functional import live_channels
from tests.docs_tables import SAMPLES


def count(name: str) -> dict[str, int] | None:
    """Samples through the first module, the last one, and back; None for CAM, which does not fit the network."""
    if name == "cam":
        return None  # a ReLU stands between the last convolution and the pooling
    model = photographs.load_model()
    photograph = photographs.load_photographs()[0]
    inputs, target = photographs.preprocess(photograph.image), photograph.labels[0]
    with Meter(model.features[0], inputs.device) as first, Meter(model.classifier[3], inputs.device) as last:
        METHODS[name].build(model, [model.features]).attribute(inputs, target)
    below, above = int(first.costs["forward_samples"]), int(last.costs["forward_samples"])
    return {"below": below, "above": above, "backward": int(last.costs["backward_samples"])}


def size() -> tuple[int, int]:
    """The live channels and the positions of the layer."""
    photograph = photographs.load_photographs()[0]
    with torch.no_grad():
        activations = photographs.load_model().features(photographs.preprocess(photograph.image))
    return int(live_channels(activations).sum()), activations[0, 0].numel()


def main() -> None:
    """Count the samples of every method, and write them."""
    torch.use_deterministic_algorithms(True)  # nothing is timed
    channels, positions = size()
    counts = {}
    for name in METHODS:
        counts[name] = count(name)
        print(name, counts[name], flush=True)
    SAMPLES.write_text(
        json.dumps({"K": channels, "Z": positions, "samples": counts}, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
