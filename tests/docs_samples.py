"""Counts the samples that every method sends through the bundled network for the espresso in the bundled photograph.

``python -m tests.docs_samples`` writes tests/docs_samples.json, which docs/choosing.md shows. It takes about ten
minutes on one core, most of them for SS-CAM.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from captum_fusion.attr.catalog import METHODS
from captum_fusion.demo import photographs
from captum_fusion.functional import live_channels
from tests.docs_tables import SAMPLES


def count(name: str) -> dict[str, int] | None:
    """Samples through the first module, the last one, and back; None for CAM, which does not fit the network."""
    if name == "cam":
        return None  # a ReLU stands between the last convolution and the pooling
    model = photographs.load_model()
    photograph = photographs.load_photographs()[0]
    inputs, target = photographs.preprocess(photograph.image), photograph.labels[0]
    counts = {"below": 0, "above": 0, "backward": 0}

    def counter(kind: str) -> Any:
        def add(module: Any, given: Any, output: Any) -> None:
            counts[kind] += len(output[0] if kind == "backward" else output)

        return add

    model.features[0].register_forward_hook(counter("below"))
    model.classifier[3].register_forward_hook(counter("above"))
    model.classifier[3].register_full_backward_hook(counter("backward"))
    METHODS[name].build(model, [model.features]).attribute(inputs, target)
    return counts


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
