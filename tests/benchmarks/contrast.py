"""How much of a map lies on the animal asked about, in a photograph of a dog and a cat: the table of docs/targets.md.

    python -m tests.benchmarks.contrast --data ../shared/data

``--data`` is a folder with a ``builders.py``, ``two_objects`` (the photograph and its boxes) and ``images_dev``
(photographs with labels). "rather than" contrasts the two classes, or the mean embeddings of the dogs and the cats of
``images_dev``.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from captum.attr import LayerGradCam
from PIL import Image
from torch import Tensor, nn

from captum_fusion import LayerFusionCAM, functional
from captum_fusion.targets import Contrast, Similarity
from tests.benchmarks.networks import NETWORKS, build
from tests.benchmarks.search import SIZE, load

DOG, CAT = 243, 282
#: ImageNet's dogs and domestic cats.
DOGS, CATS = range(151, 269), range(281, 286)


class Share(NamedTuple):
    """Share of a map inside the animal's box, from the plain score and from the contrast with the other animal."""

    network: str
    method: str
    animal: str
    plain: float
    contrast: float


def boxes(data: Path) -> dict[int, tuple[slice, slice]]:
    """Rows and columns of each animal's box, by class."""
    with Image.open(data / "two_objects" / "dog_cat.png") as image:
        width, height = image.size
    with open(data / "two_objects" / "boxes.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["filename"] == "dog_cat.png"]

    def span(row: dict[str, str], axis: str, length: int) -> slice:
        return slice(*(round(int(row[f"{axis}{end}"]) * SIZE / length) for end in (0, 1)))

    return {int(row["class_index"]): (span(row, "y", height), span(row, "x", width)) for row in rows}


def share(attribution: Tensor, box: tuple[slice, slice]) -> float:
    raised = functional.upsample(attribution.detach().relu(), (SIZE, SIZE))
    return float(raised[..., box[0], box[1]].sum() / raised.sum())


def class_shares(network: str, model: nn.Module, layer: nn.Module, data: Path) -> Iterator[Share]:
    """One animal's class, and that class rather than the other's."""
    x, where, contrast = load(data / "two_objects" / "dog_cat.png"), boxes(data), Contrast(model)
    for animal, target, other in (("dog", DOG, CAT), ("cat", CAT, DOG)):
        others = torch.tensor([[other]])
        plain = LayerGradCam(model, layer).attribute(x, target)
        rather = LayerGradCam(contrast, layer).attribute(x, target, additional_forward_args=others)
        yield Share(network, "Grad-CAM", animal, share(plain, where[target]), share(rather, where[target]))
        plain = LayerFusionCAM.fast(model, layer).attribute(x, target)
        fusion = LayerFusionCAM.fast(contrast, layer, score_fn=contrast.score_fn)
        rather = fusion.attribute(x, target, additional_forward_args=others)
        yield Share(network, "Fusion-CAM, fast", animal, share(plain, where[target]), share(rather, where[target]))


def similarity_shares(network: str, model: nn.Module, layer: nn.Module, data: Path) -> Iterator[Share]:
    """Similar to other photographs of one animal, and rather than to those of the other, by the layer's mean."""
    x, where = load(data / "two_objects" / "dog_cat.png"), boxes(data)
    embed = nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with open(data / "images_dev" / "labels.csv", newline="") as file:
        labels = {row["filename"]: int(row["class_index"]) for row in csv.DictReader(file)}
    with torch.no_grad():
        references = torch.stack(
            [
                torch.cat(
                    [embed(load(data / "images_dev" / name)) for name, label in labels.items() if label in chosen]
                ).mean(0)
                for chosen in (DOGS, CATS)
            ]
        )
    similarity = Similarity(embed, references)
    for index, (animal, target) in enumerate((("dog", DOG), ("cat", CAT))):
        maps = [LayerGradCam(f, layer).attribute(x, index) for f in (similarity, Contrast(similarity))]
        yield Share(network, "Grad-CAM of the similarity", animal, *(share(m, where[target]) for m in maps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data
    print("| network | method | dog | dog rather than cat | cat | cat rather than dog |\n| --- " + "| --- " * 5 + "|")
    for network in NETWORKS:
        model = build(network, data)
        layer = model.get_submodule(NETWORKS[network].layer)
        found = list(class_shares(network, model, layer, data))
        if NETWORKS[network].layer == "features":  # the layers up to it are one module
            found += similarity_shares(network, model, layer, data)
        for method in dict.fromkeys(one.method for one in found):
            cells = [f"{v:.2f}" for one in found if one.method == method for v in (one.plain, one.contrast)]
            print(f"| {network} | {method} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
