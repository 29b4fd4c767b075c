"""Correlation of the searched Score-CAM map with the full one, against the number of evaluated channels.

    python -m tests.benchmarks.search --data ../shared/data --images 10 --output search.md

``--data`` is a folder with a ``builders.py`` and ``val_boxes_dev`` (``labels.csv`` and photographs). Every channel of
a photograph is scored once. The searches are then answered from this table, so that any number of budgets costs little
more. The explained class is the prediction. A run can be continued: scores are kept in ``--cache``. ``--method ss-cam``
and ``--method is-cam`` do the same for SS-CAM and IS-CAM, whose channels take 35 and 10 samples each. The channels with
the largest gradients are evaluated for comparison, with a weight of 0 for all others.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
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
BY_GRADIENT = "largest gradients (gScoreCAM)"


class Scored(NamedTuple):
    """The channels of one photograph, batch dimension kept: all (1, K, ...).

    For SS-CAM and IS-CAM, ``logits`` has the probabilities too.
    """

    activations: Tensor
    gradients: Tensor
    live: Tensor
    logits: Tensor
    probabilities: Tensor
    baseline: Tensor

    def table(self, weighting: str) -> Tensor:
        """The scores that a weighting uses."""
        return self.logits if weighting == "softmax" else self.probabilities

    def correlation(self, weighting: str, scores: Tensor, live: Tensor) -> float:
        """Correlation of the map of some scores of some channels with the full map."""

        def flat_map(chosen_scores: Tensor, channels: Tensor) -> Tensor:
            weights = channel_weights(chosen_scores, channels, weighting, self.baseline.to(chosen_scores))
            return functional.weighted_activations(self.activations, weights).double().flatten()

        full = flat_map(self.table(weighting).double(), self.live)
        return float(torch.corrcoef(torch.stack([full, flat_map(scores.double(), live)]))[0, 1])


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
    table = scored.table(weighting)
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
    return Found(scored.correlation(weighting, scores, scored.live), int(details.evaluations[0]))


def top_by_gradient(gradients: Tensor, live: Tensor, number: int) -> Tensor:
    """The live channels with the largest mean gradients, bool (N, K), as gScoreCAM (P. Chen et al., ACCV 2022)."""
    preference = gradients.flatten(2).mean(2).masked_fill(~live, -torch.inf)
    top = torch.zeros_like(live).scatter_(1, preference.topk(min(number, live.shape[1]), dim=1).indices, True)
    return top & live


def top(scored: Scored, weighting: str, number: int) -> Found:
    """The map of the channels with the largest mean gradients alone."""
    kept = top_by_gradient(scored.gradients, scored.live, number)
    scores = scored.table(weighting).where(kept, 0)
    return Found(scored.correlation(weighting, scores, kept), int(kept.sum()))


def correlations(found: Sequence[Found]) -> list[float]:
    """Those of photographs whose maps are not constant."""
    return [each.correlation for each in found if not math.isnan(each.correlation)]


def report(found: Mapping[tuple[str, str], Sequence[Found]], networks: Sequence[str], title: str) -> list[str]:
    """A Markdown table with a row for each way to choose channels, of ``found[network, way]``."""
    lines = [f"| {title} | " + " | ".join(networks) + " |", "|---" * (len(networks) + 1) + "|"]
    for way in dict.fromkeys(way for _, way in found):
        cells = []
        for network in networks:
            values = correlations(found[network, way])
            used = statistics.mean(each.evaluations for each in found[network, way])
            cells.append(f"{statistics.median(values):.4f} / {min(values):.3f} ({used:.0f}; n {len(values)})")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def correlation_figure(found: Mapping[int, Mapping[tuple[str, str], Sequence[Found]]], ways: tuple[str, str]) -> Figure:
    """Median ``1 - correlation`` with the full map against evaluated channels, of ``found[budget][network, way]``.

    The first way is the search, the second takes the largest gradients.
    """
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.subplots()
    networks = dict.fromkeys(network for some in found.values() for network, _ in some)
    for color, network in enumerate(networks):
        for way, style in zip(ways, ("o-", "s--"), strict=True):
            medians = [1 - statistics.median(correlations(some[network, way])) for some in found.values()]
            label = EVERY_NETWORK[network].title if way == ways[0] else None
            axes.plot(list(found), medians, style, color=f"C{color}", label=label, markersize=4)
    for way, style in zip(("search", BY_GRADIENT), ("o-", "s--"), strict=True):
        axes.plot([], [], style, color="black", label=way, markersize=4)
    axes.set_yscale("log")
    axes.set_xlabel("evaluated channels")
    axes.set_ylabel("1 - correlation with the full map, median")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    return figure


def scores_of(options: argparse.Namespace) -> dict[str, list[Scored]]:
    """The scores of all photographs, read from the cache or computed."""
    cache = options.cache if options.method == "score-cam" else options.cache / options.method
    cache.mkdir(parents=True, exist_ok=True)
    scored: dict[str, list[Scored]] = {network: [] for network in options.networks}
    models = {network: build(network, options.data).requires_grad_(False) for network in options.networks}
    for name in tqdm(photographs(options.data / "val_boxes_dev", options.images), unit="image"):
        for network, model in models.items():
            file = cache / f"{network}_{name.stem}.pt"
            if not file.is_file():
                layer = model.get_submodule(EVERY_NETWORK[network].layer)
                torch.save(tuple(score_all(model, layer, load(name), options.method)), file)
            scored[network].append(Scored(*torch.load(file, weights_only=True)))
    return scored


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", choices=EVERY_NETWORK, default=list(NETWORKS))
    parser.add_argument("--method", choices=WEIGHTINGS, default="score-cam")
    parser.add_argument("--weightings", nargs="+", choices=WEIGHTINGS["score-cam"], help="default: all of the method")
    parser.add_argument("--images", type=int, default=10)
    parser.add_argument("--budgets", nargs="+", type=int, default=[24, 32, 56, 96])
    parser.add_argument("--cache", type=Path, default=Path("search-scores"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--figure", type=Path, help="also plot the correlations with the first weighting")
    options = parser.parse_args()
    weightings = options.weightings or WEIGHTINGS[options.method]
    if unknown := set(weightings) - set(WEIGHTINGS[options.method]):
        parser.error(f"--weightings: {options.method} has no {', '.join(unknown)}")
    torch.set_num_threads(1)
    scored = scores_of(options)

    def found(limit: SearchOptions) -> dict[tuple[str, str], list[Found]]:
        return {
            (network, weighting): [search(each, weighting, limit) for each in some]
            for weighting in weightings
            for network, some in scored.items()
        }

    lines = ["Median / smallest correlation with the full map (mean evaluations; photographs).", ""]
    by_gradient = f"{weightings[0]}, {BY_GRADIENT}"
    budgets = {}
    for budget in options.budgets:
        budgets[budget] = found(SearchOptions(budget))
        for network, some in scored.items():
            budgets[budget][network, by_gradient] = [top(each, weightings[0], budget) for each in some]
        lines += report(budgets[budget], options.networks, f"budget {budget}")
    lines += report(found(SearchOptions(tolerance=TOLERANCE)), options.networks, f"tolerance {TOLERANCE}")
    text = "\n".join(lines)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    if options.figure:
        correlation_figure(budgets, (weightings[0], by_gradient)).savefig(options.figure, dpi=130)


if __name__ == "__main__":
    main()
