"""NaN in, NaN out: what is not finite stays so, for its own example alone, and is never shown as 0."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from captum_fusion import RISE, GuidedFusionCAM, LayerFusionCAM, LayerUnionCAM, metrics
from captum_fusion import functional as F
from captum_fusion.attr.fusion import single
from tests.classes import CLASSES, few
from tests.networks import FlatHead, Net, images, make
from tests.test_evaluation import run, small

NAN = float("nan")


class BrokenHead(FlatHead):
    """Finite activations and scores that are NaN, as after training has diverged."""

    def forward(self, x: Tensor, scale: Tensor | None = None, power: int = 1) -> Tensor:
        return super().forward(x, scale, power) * NAN


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls.needs_target])
def test_a_network_of_nan_gives_no_map(cls: Any) -> None:
    model, x = make(BrokenHead), images(2, 3, 8, 8)
    maps = cls(model, model.conv2, **few(cls)).attribute(x, 1)
    assert not maps.flatten(1).isfinite().all(1).any()


def test_attributions_to_the_input() -> None:
    model, x = make(BrokenHead), images(2, 3, 8, 8)
    assert RISE(model, n_masks=4).attribute(x, 1).isnan().all()
    assert not GuidedFusionCAM(model, model.relu2).attribute(x, 1).isfinite().any()


def test_the_evaluation_reports_no_number_for_a_network_of_nan(tmp_path: Path) -> None:
    broken = small(kind=type("BrokenNet", (Net,), {"forward": lambda self, x: Net.forward(self, x) * NAN}))
    found = run(
        tmp_path,
        model=broken,
        methods=["fusion-cam", "eigen-cam"],
        metrics=["average_drop", "average_increase", "average_gain", "win_rate", "insertion:steps=3", "adcc"],
        limit=2,
    )
    costs = ("complexity", "forward_samples", "backward_samples", "seconds")
    assert {row["value"] for row in found.rows if row["metric"] not in costs} == {None}


# ---------------------------------------------------------------------------------------------------------- formulas


def test_formulas_of_scores() -> None:
    whole, part = torch.tensor([NAN, 0.5, NAN, 0.0, 1.0, 0.5]), torch.tensor([0.5, NAN, NAN, NAN, NAN, 0.25])
    for formula in (F.drop, F.increase, F.gain):
        assert formula(whole, part).isnan().tolist() == [True] * 5 + [False]
        assert formula(whole.double(), part.double()).dtype == torch.double
    assert F.contribution_weights(torch.tensor([NAN, 0.1]), torch.tensor([0.1, NAN])).isnan().all()
    assert F.contribution_weights(torch.tensor([0.1]), torch.tensor([0.2]), torch.tensor([NAN])).isnan().all()


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_formulas_of_maps(value: float) -> None:
    maps = torch.rand(2, 1, 4, 4)
    maps[0, 0, 1, 1] = value
    normalized = F.normalize(maps)
    assert normalized[0].isnan().all()
    assert (normalized[1].amin(), normalized[1].amax()) == (0, 1)
    assert F.denoise(normalized, 50.0)[0].isnan().all()
    large = torch.full((1, 1, 2, 2), 3e38) * torch.tensor([-1.0, 1.0])
    assert F.normalize(large).tolist() == [[[[0, 0]] * 2]], "finite, but the range is not"


def test_one_broken_example_has_no_decomposition_and_the_others_have() -> None:
    x = torch.rand(3, 4, 3, 3)
    x[1, 2, 0, 0] = NAN
    found = F.principal_components(x, 2)
    assert found[1].isnan().all()
    torch.testing.assert_close(found[[0, 2]], F.principal_components(x[[0, 2]], 2))


# ----------------------------------------------------------------------------------------------------------- metrics


def maps_of(x: Tensor, value: float) -> Tensor:
    maps = torch.rand(len(x), 1, 8, 8, generator=torch.Generator().manual_seed(0))
    maps[0, 0, 2, 2] = value
    return maps


def metrics_of(model: Any, x: Tensor, maps: Tensor) -> dict[str, Tensor]:
    def explain(inputs: Tensor, target: Any = None) -> Tensor:
        return inputs.abs().sum(1, keepdim=True)

    masks = torch.zeros(len(x), 8, 8, dtype=torch.bool)
    masks[:, 2:5, 2:5] = True
    boxes = [torch.tensor([[2.0, 2, 5, 5]])] * len(x)
    arguments: Any = (model, x, maps, 1)
    combined = metrics.adcc(*arguments, explanation_func=explain)
    curves = {name: getattr(metrics, name)(*arguments, steps=4) for name in ("insertion", "deletion")}
    return {
        **{name: getattr(metrics, name)(*arguments) for name in ("average_drop", "average_increase", "average_gain")},
        "win": metrics.win_rate(*arguments, other_attributions=torch.rand_like(maps)),
        "loss": metrics.win_rate(model, x, torch.rand_like(maps), 1, other_attributions=maps),
        "complexity": metrics.complexity(maps),
        **{f"adcc {name}": part for name, part in combined._asdict().items()},
        "coherency": metrics.coherency(x, maps, 1, explanation_func=explain),
        **{name: curve.auc for name, curve in curves.items()},
        **{f"{name} curve": curve.scores.sum(1) for name, curve in curves.items()},
        "overall": metrics.overall(*arguments, steps=4),
        "road": metrics.road(*arguments, percentiles=[50]).combined,
        "pointing_game": metrics.pointing_game(maps, masks),
        "energy": metrics.energy_pointing_game(maps, masks),
        "mask": metrics.segmentation_iou(maps, masks),
        "box": metrics.localization_iou(maps, boxes, (8, 8)),
    }


@pytest.mark.parametrize("value", [NAN, math.inf])
def test_metrics_of_a_map_that_is_not_finite(value: float) -> None:
    model, x = make(), images(2, 3, 8, 8)
    for name, values in metrics_of(model, x, maps_of(x, value)).items():
        assert values.isnan().tolist() == [True, False], name


def test_metrics_of_scores_that_are_nan() -> None:
    model, x = make(), images(2, 3, 8, 8)

    def broken(inputs: Tensor) -> Tensor:
        output = model(inputs)
        return output * NAN

    found = metrics_of(broken, x, maps_of(x, 0.5))
    for name in (
        "average_drop",
        "average_increase",
        "average_gain",
        "win",
        "adcc adcc",
        "insertion",
        "deletion",
        "road",
    ):
        assert found[name].isnan().all(), name


# ------------------------------------------------------------------------------------------- weights near the floor


def test_weights_are_shares_above_the_floor_and_continuous_below() -> None:
    scale = torch.full((7,), 0.5, dtype=torch.double)
    first = torch.tensor([0.3, 1.5e-4, 0.825e-4, 1.5e-5 + 1e-9, 1.5e-5, 0.0, -1.0], dtype=torch.double)
    weights = F.contribution_weights(first, torch.zeros_like(first), scale)[:, 0]
    assert weights.tolist() == pytest.approx([1, 1, 0.75, 0.5 + 0.5e-9 / 1.35e-4, 0.5, 0.5, 0.5])
    above = torch.rand(50, 2, dtype=torch.double)
    ones = torch.ones(50, dtype=torch.double)
    assert torch.equal(F.contribution_weights(*above.T, ones), above / above.sum(1, keepdim=True)), "the closed form"
    noise = 2e-5 * (2 * torch.rand(50, 2, dtype=torch.double) - 1)
    tiny = 1e-4 * torch.rand(50, 2, dtype=torch.double)
    change = F.contribution_weights(*tiny.T, ones) - F.contribution_weights(*(tiny + noise).T, ones)
    assert 0.01 < change.abs().max() < 0.15, "noise of the scores moves weights a little and never switches them"


def test_a_fusion_changes_smoothly_with_contributions_near_the_floor() -> None:
    """Scores that hardly depend on the input, as those of a saturated network: rounding must not switch the map."""
    model, x = make(FlatHead, seed=3), images(3, 3, 8, 8, seed=2)
    found = []
    for step in range(160):
        slope = 10 ** (-6 + step / 40)  # from 1e-6 to 1e-2
        fusion = LayerFusionCAM(model, model.conv2, score_fn=lambda output, slope=slope: 1 + slope * output)
        _, details = single(fusion.attribute(x, 2, perturbations_per_eval=8, return_details=True))
        found.append(torch.cat([details.union_weights[:, 0], details.fusion_weights[:, 0]]))
    weights = torch.stack(found)
    assert (weights[0] == 0.5).all(), "all is noise"
    assert ((weights[-1] - 0.5).abs() > 0.1).any(), "nothing is"
    assert weights.diff(dim=0).abs().max() < 0.1


@pytest.mark.parametrize("cls", [LayerFusionCAM, LayerUnionCAM])
@pytest.mark.parametrize("weighting", ["normalized", "raw"])
def test_contributions_that_are_noise_are_0_if_they_are_normalized(cls: Any, weighting: str) -> None:
    model, x = make(FlatHead, seed=3).double(), images(3, 3, 8, 8, seed=2).double()
    fusion = cls(model, model.conv2, weighting=weighting, score_fn=lambda output: 1 + 1e-6 * output)
    _, details = single(fusion.attribute(x, 2, return_details=True))
    found = torch.cat([details.gradient_contribution, details.region_contribution, details.union_contribution])
    assert (found == 0).all() if weighting == "normalized" else (found != 0).all()
