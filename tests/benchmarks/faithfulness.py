"""How faithful the maps are, and what they cost: docs/faithfulness.md and its figure.

    python -m tests.benchmarks.search --data ../shared/data --images 100 --cache search-scores     (optional, see below)
    python -m tests.benchmarks.faithfulness --data ../shared/data --images 100 --slow 12 --output faithfulness --write

``--data`` is a folder with a ``builders.py`` and ``val_boxes_dev`` (photographs with boxes). Every network explains its
prediction for every photograph with every method. A run that was stopped continues. ``--scores`` names the folder of
channel scores that the first command wrote: Score-CAM, UnionCAM and Fusion-CAM take them from there instead of
computing them again, and the maps are the same. Forward samples are counted on the first photograph without them.
``--slow`` is the number of photographs for methods and metrics that need thousands of samples for each; with 0 they are
left out, and no report is written.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import captum
import torch
from captum.attr import KernelShap
from torch import Tensor, nn

from captum_fusion import LayerFusionCAM, LayerRegressionCAM, LayerScoreCAM, LayerUnionCAM, functional
from captum_fusion.attr._bases import LayerTensor
from captum_fusion.attr._search import channel_weights
from captum_fusion.evaluation import evaluate
from tests.benchmarks.faithfulness_report import PRESETS, REFERENCE, write_report
from tests.benchmarks.networks import EVERY_NETWORK
from tests.benchmarks.search import Scored, top_by_gradient

AREA = 0.25
METRICS = (
    "overall:steps=14",
    f"average_drop:area={AREA}",
    f"average_increase:area={AREA}",
    "road:percentiles=[10,30,50,70,90]",
    "energy_pointing_game",
    "pointing_game",
    "complexity",
)


def digest(activations: Tensor) -> str:
    """A key of a layer's activations."""
    return hashlib.sha1(activations.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


class StoredScoreCAM(LayerScoreCAM):
    """Score-CAM that takes the channels' scores for the predicted class from an earlier run, where it has them."""

    stored: ClassVar[dict[str, Tensor]] = {}

    @classmethod
    def read(cls, folder: Path) -> None:
        for file in sorted(folder.glob("*.pt")):
            scored = Scored(*torch.load(file, weights_only=True))
            cls.stored[digest(scored.activations)] = scored.logits

    def _evaluator(self, tensor: LayerTensor) -> Callable[[Tensor, Tensor], Tensor]:
        scores = self.stored.get(digest(tensor.activations))
        if scores is None:
            return super()._evaluator(tensor)
        scores = scores.to(tensor.activations.device)
        return lambda examples, channels: scores[examples, channels]


class TopScoreCAM(LayerScoreCAM):
    """Score-CAM of the channels with the largest mean gradients, as gScoreCAM (P. Chen et al., ACCV 2022)."""

    number = 56

    def __init__(self, model: nn.Module, layer: nn.Module) -> None:
        super().__init__(model, layer)
        self.uses_gradients = True

    def _map(self, tensor: LayerTensor) -> Tensor:
        kept = top_by_gradient(tensor.gradients, functional.live_channels(tensor.activations), self.number)
        examples, channels = functional.channel_pairs(kept)
        scores = functional.channel_table(kept, examples, channels, self._evaluator(tensor)(examples, channels))
        return functional.weighted_activations(tensor.activations, channel_weights(scores, kept, self.weighting))


# The methods as functions, since one attribution object explains one network.


def fusion(model: nn.Module, layer: nn.Module, inputs: Tensor, target: Any) -> Any:
    return LayerFusionCAM(model, layer, region_method=StoredScoreCAM(model, layer)).attribute(inputs, target)


def fast(model: nn.Module, layer: nn.Module, inputs: Tensor, target: Any) -> Any:
    region = StoredScoreCAM(model, layer, max_evaluations=56)
    return LayerFusionCAM(model, layer, region_method=region).attribute(inputs, target)


def fusion_of_few_cells(model: nn.Module, layer: nn.Module, inputs: Tensor, target: Any) -> Any:
    region = LayerRegressionCAM(model, layer, n_masks=128)
    return LayerFusionCAM(model, layer, region_method=region).attribute(inputs, target)


def union(model: nn.Module, layer: nn.Module, inputs: Tensor, target: Any) -> Any:
    return LayerUnionCAM(model, layer, region_method=StoredScoreCAM(model, layer)).attribute(inputs, target)


def score_cam(model: nn.Module, layer: nn.Module, inputs: Tensor, target: Any) -> Any:
    return StoredScoreCAM(model, layer).attribute(inputs, target)


def top_score_cam(model: nn.Module, layer: nn.Module, inputs: Tensor, target: Any) -> Any:
    return TopScoreCAM(model, layer).attribute(inputs, target)


def kernel_shap(model: nn.Module, layer: nn.Module, inputs: Tensor, target: Any) -> Any:
    """Captum's KernelShap on the 7 x 7 cells of the grid, whose masks have hard edges."""
    size = inputs.shape[2:]
    cells = nn.functional.interpolate(torch.arange(49.0).reshape(1, 1, 7, 7), size=tuple(size), mode="nearest")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return KernelShap(lambda x: model(x).softmax(1)).attribute(
            inputs, target=target, feature_mask=cells.long().to(inputs.device), n_samples=512, perturbations_per_eval=4
        )


def opti_cam(model: nn.Module, layer: nn.Module, inputs: Tensor, target: Any, steps: int = 20) -> Any:
    """Opti-CAM (H. Zhang et al., 2023): channel weights that maximise the masked input's output, by Adam."""
    kept: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _, __, output: kept.append(output.detach()))
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        hook.remove()
    logits = torch.ones(kept[0].shape[:2], device=inputs.device, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)

    def combined() -> Tensor:
        return (logits.softmax(1)[:, :, None, None] * kept[0]).sum(1, keepdim=True)

    with torch.enable_grad():
        for _ in range(steps):
            masks = functional.normalize(functional.upsample(combined(), inputs.shape[2:]))
            loss = -model(masks * inputs).gather(1, torch.as_tensor(target, device=inputs.device).reshape(-1, 1)).sum()
            (logits.grad,) = torch.autograd.grad(loss, logits)
            optimizer.step()
    return combined().detach()


RISE_LABEL = "RISE, 4000"

#: The methods by their labels.
METHODS: dict[str, Any] = {
    REFERENCE: fusion,
    "Fusion-CAM, fast": fast,
    "Fusion-CAM, best": "fusion-cam:preset=best",
    "Fusion-CAM, 128 cell masks": fusion_of_few_cells,
    "cell regression": "regression-cam",
    "UnionCAM": union,
    "Score-CAM": score_cam,
    "Score-CAM, top 56 (gScoreCAM)": top_score_cam,
    "Group-CAM": "group-cam",
    "Grad-CAM": "grad-cam",
    "KernelShap, 512, same cells": kernel_shap,
    "Opti-CAM, 20 steps": opti_cam,
    RISE_LABEL: "rise:n_masks=4000",
}
#: Those that are measured on ``--slow`` photographs only.
SLOW = ("KernelShap, 512, same cells", "Opti-CAM, 20 steps", RISE_LABEL)
#: Those that may take stored scores, as they are without.
UNSTORED = {
    REFERENCE: "fusion-cam",
    "Fusion-CAM, fast": "fusion-cam:preset=fast",
    "UnionCAM": "union-cam",
    "Score-CAM": "score-cam",
}


def run(options: argparse.Namespace, folder: str, methods: Mapping[str, Any], images: int, **settings: Any) -> Any:
    sys.path.insert(0, str(options.data.resolve()))
    return evaluate(
        options.data / "val_boxes_dev",
        [EVERY_NETWORK[network].spec for network in options.networks],
        output=options.output / folder,
        methods=methods,
        layer=[EVERY_NETWORK[network].layer for network in options.networks],
        reference=REFERENCE,
        limit=images,
        whole_image=True,
        pictures=0,
        device=options.device,
        **settings,
    ).rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", choices=EVERY_NETWORK, default=list(EVERY_NETWORK))
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--slow", type=int, default=10)
    parser.add_argument("--rise", action=argparse.BooleanOptionalAction, default=True, help="RISE, 4000 samples each")
    parser.add_argument("--scores", type=Path)
    parser.add_argument("--device", default=None)
    parser.add_argument("--output", type=Path, default=Path("faithfulness"))
    parser.add_argument("--write", action="store_true", help="write docs/faithfulness.md and its figure")
    options = parser.parse_args(arguments)
    torch.backends.cudnn.allow_tf32 = False  # convolutions on a GPU as precise as on the CPU
    if options.scores:
        StoredScoreCAM.read(options.scores)

    def ways(labels: Iterable[str]) -> dict[str, Any]:
        return {label: METHODS[label] for label in labels}

    fast_methods = [label for label in METHODS if label not in SLOW]
    rows = run(options, "rows", ways(fast_methods), options.images, metrics=METRICS)
    if not options.slow:
        return
    costs = run(options, "costs", UNSTORED, 1, preset="time", metrics=["complexity"])
    slow = [label for label in SLOW if options.rise or label != RISE_LABEL]
    slow_rows = list(run(options, "slow", ways([REFERENCE, *slow]), options.slow, metrics=METRICS))
    slow_rows += run(options, "adcc", ways([REFERENCE, *PRESETS, "Grad-CAM"]), options.slow, metrics=["adcc"])
    write_report(options, rows, slow_rows, costs, {"captum": captum.__version__, "torch": torch.__version__})


if __name__ == "__main__":
    main()
