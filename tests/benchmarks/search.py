"""Correlation of the searched Score-CAM map with the full one, against the number of evaluated channels.

    python -m tests.benchmarks.search --data ../shared/data --images 10 --output search.md

``--data`` is a folder with a ``builders.py`` and ``val_boxes_dev`` (``labels.csv`` and photographs). Every channel of
a photograph is scored once. The searches are then answered from this table, so that any number of budgets costs little
more. The explained class is the prediction. A run can be continued: scores are kept in ``--cache``. ``--method ss-cam``
and ``--method is-cam`` do the same for SS-CAM and IS-CAM, whose channels take 35 and 10 samples each.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import functional as transforms
from tqdm import tqdm

from captum_fusion import LayerISCAM, LayerScoreCAM, LayerSSCAM, functional, shared_work
from captum_fusion.attr._search import SearchOptions, channel_weights, search_channels
from tests.benchmarks.cost import SIZE
from tests.benchmarks.networks import DEVIATION, EVERY_NETWORK, MEAN, NETWORKS, build

#: The weightings of each method.
WEIGHTINGS = {
    "score-cam": ("softmax", "increase", "probability"),
    "ss-cam": ("probability",),
    "is-cam": ("probability",),
}
TOLERANCE = 0.01


class Scored(NamedTuple):
    """The channels of one photograph, batch dimension kept: all (1, K, ...)."""

    activations: Tensor
    gradients: Tensor
    live: Tensor
    logits: Tensor
    probabilities: Tensor
    baseline: Tensor


class Found(NamedTuple):
    """A searched map against the full one."""

    correlation: float
    evaluations: int


def photographs(folder: Path, count: int) -> list[Path]:
    with open(folder / "labels.csv", newline="") as file:
        return [folder / row["filename"] for row in csv.DictReader(file)][:count]


def load(path: Path) -> Tensor:
    image = Image.open(path).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return transforms.normalize(transforms.to_tensor(image), MEAN, DEVIATION)[None]


def score_all(model: nn.Module, layer: nn.Module, x: Tensor, name: str = "score-cam") -> Scored:
    """Every live channel's score.

    Score-CAM's as a logit and as a probability, from one set of masked samples. The others have probabilities only.
    """
    with torch.no_grad():
        target = int(model(x).argmax(1))
    method = LayerScoreCAM(model, layer)
    method.uses_gradients = True
    softmax = functional.score_function("softmax")

    def compute(passes: Any, evaluations: Any) -> Scored:
        [[tensor]] = method._tensors(passes, evaluations)
        live = functional.live_channels(tensor.activations)
        examples, channels = functional.channel_pairs(live)
        if name == "score-cam":
            methods = [LayerScoreCAM(model, layer, weighting=weighting) for weighting in ("softmax", "probability")]
        else:
            methods = [{"ss-cam": LayerSSCAM, "is-cam": LayerISCAM}[name](model, layer)]
        scores = [method._evaluator(tensor)(examples, channels) for method in methods]
        tables = [functional.channel_table(live, examples, channels, values) for values in scores]
        baseline = tensor.baseline_scores(softmax)
        return Scored(tensor.activations, tensor.gradients, live, tables[0], tables[-1], baseline)

    with shared_work():
        return method._explain(compute, x, target, None, False)


def search(scored: Scored, weighting: str, options: SearchOptions) -> Found:
    table = scored.logits if weighting == "softmax" else scored.probabilities

    def full_map(scores: Tensor) -> Tensor:
        weights = channel_weights(scores, scored.live, weighting, scored.baseline.to(scores))
        return functional.weighted_activations(scored.activations, weights).double().flatten()

    scores, details = search_channels(
        scored.activations,
        scored.gradients,
        scored.live,
        lambda examples, channels: table[examples, channels],
        options,
        weighting=weighting,
        is_probability=weighting != "softmax",
        baseline=scored.baseline if weighting == "increase" else None,
    )
    pair = torch.stack([full_map(table.double()), full_map(scores)])
    return Found(float(torch.corrcoef(pair)[0, 1]), int(details.evaluations[0]))


def report(
    found: dict[tuple[str, str], list[Found]], networks: Sequence[str], weightings: Sequence[str], title: str
) -> list[str]:
    lines = [f"| {title} | " + " | ".join(networks) + " |", "|---" * (len(networks) + 1) + "|"]
    for weighting in weightings:
        cells = []
        for network in networks:
            some = [each for each in found[network, weighting] if each.correlation == each.correlation]
            correlations = [each.correlation for each in some]
            used = statistics.mean(each.evaluations for each in some)
            cells.append(f"{statistics.median(correlations):.4f} / {min(correlations):.3f} ({used:.0f}; n {len(some)})")
        lines.append(f"| {weighting} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", choices=EVERY_NETWORK, default=list(NETWORKS))
    parser.add_argument("--method", choices=WEIGHTINGS, default="score-cam")
    parser.add_argument("--images", type=int, default=10)
    parser.add_argument("--budgets", nargs="+", type=int, default=[24, 32, 56, 96])
    parser.add_argument("--cache", type=Path, default=Path("search-scores"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = photographs(options.data / "val_boxes_dev", options.images)
    options.cache.mkdir(parents=True, exist_ok=True)
    scored: dict[str, list[Scored]] = {network: [] for network in options.networks}
    models = {network: build(network, options.data).requires_grad_(False) for network in options.networks}
    for name in tqdm(names, unit="image"):
        for network, model in models.items():
            prefix = "" if options.method == "score-cam" else f"{options.method}_"
            file = options.cache / f"{prefix}{network}_{name.stem}.pt"
            if not file.is_file():
                layer = model.get_submodule(EVERY_NETWORK[network].layer)
                torch.save(tuple(score_all(model, layer, load(name), options.method)), file)
            scored[network].append(Scored(*torch.load(file, weights_only=True)))
    lines = ["Median / smallest correlation with the full map (mean evaluations; photographs).", ""]
    kinds = {f"budget {budget}": SearchOptions(budget) for budget in options.budgets}
    kinds[f"tolerance {TOLERANCE}"] = SearchOptions(tolerance=TOLERANCE)
    for title, limit in kinds.items():
        found = {
            (network, weighting): [search(each, weighting, limit) for each in scored[network]]
            for network in options.networks
            for weighting in WEIGHTINGS[options.method]
        }
        lines += report(found, options.networks, WEIGHTINGS[options.method], title)
    text = "\n".join(lines)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
