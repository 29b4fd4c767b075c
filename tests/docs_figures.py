"""The figure of docs/how_it_works.md: every intermediate map of Fusion-CAM on the bundled photograph.

``python -m tests.docs_figures`` writes docs/images/steps.jpg. It takes about ten seconds on one core.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.models import SqueezeNet1_1_Weights

from captum_fusion import FusionDetails, LayerFusionCAM
from captum_fusion.attr.fusion import single
from captum_fusion.demo import photographs
from captum_fusion.functional import weigh
from captum_fusion.visualization import to_picture, visualize_map
from captum_fusion.visualization.text import colour_bar, set_title
from tests.docs_tables import ROOT

PATH = ROOT / "docs" / "images" / "steps.jpg"
PANEL = 2.3  # inches
NORMALISATION = SqueezeNet1_1_Weights.IMAGENET1K_V1.transforms()  # torchvision's preprocessing, not its parameters


def steps() -> tuple[Tensor, Tensor, FusionDetails, float]:
    """The input, the map for the espresso, its details, and the probability under the final map."""
    model = photographs.load_model()
    photograph = photographs.load_photographs()[0]
    inputs, target = photographs.preprocess(photograph.image), photograph.labels[0]
    fusion = LayerFusionCAM(model, model.features)
    attribution, details = single(fusion.attribute(inputs, target, perturbations_per_eval=8, return_details=True))
    with torch.no_grad():
        alone = model(inputs * attribution).softmax(1)[0, target]
    return inputs, attribution, details, float(alone)


def draw(inputs: Tensor, attribution: Tensor, details: FusionDetails, alone: float) -> Figure:
    """Twelve panels: the input and every map, and what the network sees under three of them."""
    d: Any = details
    (w_d, w_r), (v_u, v_r) = d.union_weights[0].tolist(), d.fusion_weights[0].tolist()
    base = float(d.baseline_score)
    weighted_union, weighted_region = weigh((d.union_map, d.region_map), d.fusion_weights)
    dropped = float((d.gradient_map != d.denoised_map).float().mean())
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (NORMALISATION.mean, NORMALISATION.std))

    def under(mask: Tensor) -> Any:
        """What the network sees: where the mask is 0, the normalised input is 0, which is ImageNet's mean colour."""
        return to_picture(((inputs * mask)[0] * std + mean).clamp(0, 1))

    def seen(step: int, name: str, symbol: str, heat: Tensor, gain: Tensor) -> tuple[str, Any]:
        score = f"p = {float(gain) + base:.2f}, contribution {symbol} = {float(gain):.2f}"
        return f"{step}. picture under {name}\n{score}", under(heat)

    picture = under(torch.ones(()))
    panels: list[tuple[str, Any]] = [  # maps as tensors, pictures as arrays
        (f"picture\nespresso: p = {float(d.score):.2f}", picture),
        ("1. gradient map G\nN(Grad-CAM)", d.gradient_map),
        (f"1. denoised L_d\n{dropped:.0%} of the pixels set to 0".replace("%", " %"), d.denoised_map),
        ("2. region map L_r\nN(Score-CAM)", d.region_map),
        seen(3, "L_d", "B_d", d.denoised_map, d.gradient_contribution),
        seen(3, "L_r", "B_r", d.region_map, d.region_contribution),
        (f"4. union L_u\nN({w_d:.2f} L_d + {w_r:.2f} L_r)", d.union_map),
        seen(4, "L_u", "B_u", d.union_map, d.union_contribution),
        (f"5. P = {v_u:.2f} L_u", weighted_union),
        (f"5. Q = {v_r:.2f} L_r", weighted_region),
        (f"5. similarity s = 1 - |P - Q|\nfrom {float(d.similarity_map.min()):.2f} to 1", d.similarity_map),
        (f"5. Fusion-CAM L\np = {alone:.2f} under L", attribution),
    ]
    figure = Figure(figsize=(4 * PANEL, 3 * (PANEL + 0.42) + 0.55), layout="constrained")
    axes: Any = figure.subplots(3, 4)
    for axis, (title, shown) in zip(axes.flat, panels, strict=True):
        if isinstance(shown, Tensor):  # all maps have one scale, so that the weights can be seen
            visualize_map(shown, picture, fig_axis=(figure, axis), method="heat_map", scale=1.0)
        else:
            axis.imshow(shown)
            axis.set_axis_off()
        set_title(axis, title, PANEL)
    colour_bar(figure, list(axes.flat), "inferno", (0.0, 1.0), "value of the map, on one scale for all maps")
    return figure


def write(path: Path = PATH) -> None:
    """Compute the steps and write the figure."""
    figure = draw(*steps())
    figure.savefig(path, dpi=110, pil_kwargs={"quality": 85, "optimize": True})


if __name__ == "__main__":
    write()
    print(f"{PATH.relative_to(ROOT)}: written, {PATH.stat().st_size // 1000} kB")
