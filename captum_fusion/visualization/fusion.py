"""The figure of a fusion: its components, their union and the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from captum_fusion.attr.fusion import FusionDetails
from captum_fusion.visualization.maps import visualize_grid
from captum_fusion.visualization.pictures import Picture

#: One line for a reader who has not seen such a figure.
LEGEND = (
    "Bright parts are important for the class. 'keeps 89 % of the score': if the network sees only the bright parts, "
    "the class gets 89 % of its score for the whole picture."
)

_TINY = 0.005  # scores that are 0.00 in a caption
_MORE = 1.005  # a larger ratio is no longer 100 % of the score


def kept(alone: float, score: float) -> str:
    """How much of a score the highlighted part alone keeps, in words.

    Args:
        alone (float): Score of the highlighted part alone.
        score (float): Score of the whole picture.

    Examples::

        >>> kept(0.8, 0.9), kept(0.9, 0.3), kept(1.5, -2.0)
        ('keeps 89 % of the score', 'raises the score to 0.90', 'has a score of 1.5')
    """
    if score <= 0 or alone < 0 or max(score, alone) < _TINY:
        return f"has a score of {alone:.2g}"
    if alone > _MORE * score:
        return f"raises the score to {alone:.2f}"
    return f"keeps {alone / score:.0%} of the score".replace("%", " %")


def visualize_fusion(
    images: Tensor | Sequence[Picture],
    attributions: Tensor,
    details: FusionDetails,
    *,
    titles: Sequence[str] | None = None,
    alone: Sequence[float] | None = None,
    name: str = "fusion",
    legend: str | None = LEGEND,
    **style: Any,
) -> Figure:
    """Draw the steps of a fusion, with one row per example: image | gradient map | region map | union | fusion.

    Below each map stands how much of the class's score the part that it highlights keeps alone.

    Args:
        images (Tensor or sequence): Images, as in :func:`to_picture`; a tensor is of shape (N, C, H, W).
        attributions (Tensor): Maps of the fusion, of shape (N, 1, H, W).
        details (FusionDetails): Details of the fusion, from ``return_details=True``.
        titles (sequence of str, optional): Text beside each row, for example the class that is explained.
            Default: None
        alone (sequence of float, optional): Score of the part that each fusion highlights alone, for its caption.
            Default: None
        name (str, optional): Title of the last column. Default: ``"fusion"``
        legend (str, optional): Text below the panels. Default: an explanation of the captions
        style: Further arguments of :func:`visualize_grid`.

    Returns:
        Figure: The figure, or that of the subfigure. Save it with ``figure.savefig(...)``.

    Raises:
        ValueError: If ``images``, ``attributions`` or ``alone`` are not of as many examples as ``details``.

    Examples::

        >>> from captum_fusion import LayerFusionCAM
        >>> from captum_fusion.demo import digits
        >>> model, scene = digits.load_model(), digits.load_scenes()[0]
        >>> inputs = digits.preprocess(scene.image)
        >>> maps, details = LayerFusionCAM(model, model.stage4).attribute(inputs, scene.labels[0], return_details=True)
        >>> figure = visualize_fusion(inputs, maps, details, titles=["four"])
        >>> [axis.get_title().split()[0] for axis in figure.axes]
        ['picture', 'gradient', 'region', 'union', 'fusion']
    """
    for argument, values in {"images": images, "attributions": attributions, "alone": alone}.items():
        if values is not None and len(values) != len(details.score):
            raise ValueError(f"{argument} must be of the {len(details.score)} examples of details, not {len(values)}")
    rows = []
    for i, image in enumerate(images):
        score, baseline = float(details.score[i]), float(details.baseline_score[i])
        (gradient, region), (union, rival) = details.union_weights[i].tolist(), details.fusion_weights[i].tolist()
        if alone is not None:
            last = f"{name}\n{kept(alone[i], score)}"
        elif details.selected is None:
            last = f"{name}\n{union:.0%} union, {rival:.0%} region map".replace("%", " %")
        else:
            last = f"{name}\nselected: {'union' if details.selected[i] else 'region map'}"
        captions = (
            f"gradient map, weight {gradient:.2f}\n{kept(float(details.gradient_contribution[i]) + baseline, score)}",
            f"region map, weight {region:.2f}\n{kept(float(details.region_contribution[i]) + baseline, score)}",
            f"union\n{kept(float(details.union_contribution[i]) + baseline, score)}",
            last,
        )
        maps = (details.denoised_map, details.region_map, details.union_map, attributions)
        panels = [(m[i : i + 1], caption) for m, caption in zip(maps, captions, strict=True)]
        rows.append((image, [(None, "picture"), *panels]))
    return visualize_grid(rows, labels=titles, legend=legend, **style)
