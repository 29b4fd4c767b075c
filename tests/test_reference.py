"""Score-CAM and the fusions equal the implementations in ``tests/reference.py`` for each example of a mixed batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from captum_fusion import FusionDetails, LayerFusionCAM, LayerScoreCAM, LayerUnionCAM
from tests import reference

#: The reference's weighting "official" is the package's option ``authors_code``.
WEIGHTINGS = ["normalized", "raw", "official"]
OPTIONS: dict[str, dict[str, Any]] = {
    "normalized": {"weighting": "normalized"},
    "raw": {"weighting": "raw"},
    "official": {"authors_code": True},
}
THETAS = [0.0, 10.0, 50.0, 100.0]
EXACT = 1e-9  # float64 networks
CLOSE = 1e-5  # float32 networks


# ------------------------------------------------------------------------------------------------------------- networks


class Stack(nn.Module):
    """Two convolutions and a linear head. Channel 0 of each is dead at 0, channel 1 dead at a constant."""

    def __init__(self, dims: int, size: tuple[int, ...], head: str, gain: float = 3.0, outputs: int = 5) -> None:
        super().__init__()
        convolution = getattr(nn, f"Conv{dims}d")
        self.conv1, self.relu1 = convolution(2, 7, 3, padding=1), nn.ReLU()
        self.conv2, self.relu2 = convolution(7, 9, 3, padding=1, stride=2), nn.ReLU()
        for layer in (self.conv1, self.conv2):
            for channel, constant in ((0, -1.0), (1, 0.5)):
                nn.init.zeros_(layer.weight[channel])
                nn.init.constant_(layer.bias[channel : channel + 1], constant)
        features = 9
        if head == "flat":
            for n in size:
                features *= (n + 1) // 2
        self.head, self.gap, self.gain = nn.Linear(features, outputs), head == "gap", gain

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu2(self.conv2(self.relu1(self.conv1(x)))).flatten(2)
        return self.gain * self.head(x.mean(2) if self.gap else x.flatten(1))


class Darkens(nn.Module):
    """Any visible part of an input lowers the score of class 0."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.head = nn.Conv2d(2, 6, 3, padding=1, stride=2), nn.ReLU(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.head(self.relu(self.conv(x)).mean((2, 3)))
        return torch.cat([scores[:, :1] - 4 * x.square().mean((1, 2, 3))[:, None], scores[:, 1:]], 1)


class Pairs(Stack):
    """Returns (N, 3, 4)."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return torch.stack([y, y.flip(1), -y], 1)


class Alone(Stack):
    """Returns (N,)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, 2]


@dataclass(frozen=True)
class Case:
    """One network, one layer, one mixed batch."""

    build: Callable[[], nn.Module]
    layer: str
    size: tuple[int, ...]
    seed: int
    targets: Any = (0, 1, 2, 3, 4, 0, 1, 2)
    baselines: str = "zero"
    score_fn: Any = "softmax"
    dtype: torch.dtype = torch.float64

    def __call__(self) -> tuple[Any, nn.Module, Tensor, Any, list[Any]]:
        """Model, layer, inputs, baselines in captum's format, and the baseline of each example."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = self.build().eval().to(self.dtype)
            count = len(self.targets)
            x = torch.randn(count, 2, *self.size, dtype=self.dtype)
            # Examples of very different scale, so that any quantity shared over the batch shows up.
            x = x * torch.linspace(0.5, 2.5, count, dtype=self.dtype).reshape(-1, *[1] * (x.dim() - 1))
            if self.baselines == "zero":
                given, bases = 0, [0.0] * count
            elif self.baselines == "number":
                given, bases = 0.7, [0.7] * count
            else:
                given = 0.5 * torch.randn(count, 2, *self.size, dtype=self.dtype)
                bases = [given[i : i + 1] for i in range(count)]
        return model, getattr(model, self.layer), x, given, bases


def flat_2d() -> nn.Module:
    return Stack(2, (8, 6), "flat")


def squared(output: Tensor) -> Tensor:
    return output.softmax(1).square()


CASES = {
    "gap-2d": Case(lambda: Stack(2, (9, 6), "gap", gain=12.0), "relu2", (9, 6), 1),
    "gap-2d-early-layer": Case(lambda: Stack(2, (8, 6), "gap", gain=12.0), "relu1", (8, 6), 61),
    "flat-2d": Case(flat_2d, "relu2", (8, 6), 3),
    "flat-2d-early-layer": Case(flat_2d, "relu1", (8, 6), 4),
    "flat-2d-signed-activations": Case(flat_2d, "conv2", (8, 6), 5),
    "1d": Case(lambda: Stack(1, (13,), "flat"), "relu2", (13,), 6),
    "3d": Case(lambda: Stack(3, (5, 4, 6), "flat"), "relu2", (5, 4, 6), 7),
    "baseline-number": Case(flat_2d, "relu1", (8, 6), 8, baselines="number"),
    "baseline-tensor": Case(flat_2d, "relu2", (8, 6), 9, baselines="tensor"),
    "sigmoid": Case(flat_2d, "relu2", (8, 6), 10, score_fn="sigmoid"),
    "identity": Case(flat_2d, "relu1", (8, 6), 11, score_fn="identity", baselines="number"),
    "callable": Case(flat_2d, "relu2", (8, 6), 12, score_fn=squared),
    "both-negative": Case(Darkens, "relu", (8, 6), 13, targets=(0,) * 6),
    "tuple-targets": Case(
        lambda: Pairs(2, (8, 6), "flat", outputs=4), "relu2", (8, 6), 14, targets=[(i % 3, i % 4) for i in range(6)]
    ),
    "no-target": Case(lambda: Alone(2, (8, 6), "flat"), "relu2", (8, 6), 15, targets=(None,) * 6, score_fn="identity"),
    "float32": Case(flat_2d, "relu2", (8, 6), 57, dtype=torch.float32),
    "float32-3d": Case(lambda: Stack(3, (5, 4, 6), "flat"), "relu1", (5, 4, 6), 17, dtype=torch.float32),
}


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def target_argument(case: Case) -> Any:
    return None if case.targets[0] is None else list(case.targets)


def tolerance(case: Case, weighting: str = "normalized") -> float:
    if case.dtype == torch.float64:
        return EXACT
    # Signed contributions can nearly cancel; the remainder is then mostly rounding noise.
    return CLOSE if weighting in ("normalized", "softmax") else 10 * CLOSE


def assert_same(actual: Any, expected: Any, tolerance: float, what: str) -> None:
    if isinstance(actual, Tensor):
        actual = actual.numpy()
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance, err_msg=what)


def assert_details(details: FusionDetails, found: list[dict[str, Any]], tolerance: float) -> None:
    """Compare every field of every example."""
    assert set(FusionDetails._fields) == set(found[0])
    for name in FusionDetails._fields:
        field = getattr(details, name)
        if found[0][name] is None:
            assert field is None, name
            continue
        assert len(field) == len(found), name
        for i, expected in enumerate(found):
            if name == "selected":
                assert field.dtype == torch.bool
                assert bool(field[i]) is expected[name], f"{name} of example {i}"
                continue
            actual = field[i, 0] if name.endswith("_map") else field[i]
            assert np.shape(actual) == np.shape(expected[name]), name
            assert_same(actual, expected[name], tolerance, f"{name} of example {i}")


# ------------------------------------------------------------------------------------------------------------ Score-CAM


@pytest.mark.parametrize("weighting", ["softmax", "increase"])
def test_score_cam(case: Case, weighting: str) -> None:
    model, layer, x, given, bases = case()
    method = LayerScoreCAM(model, layer, weighting=weighting, score_fn=case.score_fn)
    maps = method.attribute(x, target_argument(case), baselines=given)
    shown = 0
    for i, target in enumerate(case.targets):
        expected, found = reference.score_cam(
            model, layer, x[i : i + 1], target, weighting, score_fn=case.score_fn, baseline=bases[i]
        )
        assert_same(maps[i, 0], expected, tolerance(case), f"example {i}")
        shown += expected.max() > 0.01
        if isinstance(model, Stack):
            assert {0, 1}.isdisjoint(found["live"]), "the dead channels must be in the test"
    assert shown or (weighting == "increase" and isinstance(model, Darkens)), "some maps must not be all zero"


def test_score_cam_with_channels_that_are_dead_in_some_examples_only() -> None:
    case = replace(CASES["flat-2d"], seed=30)
    model, layer, x, _, _ = case()
    with torch.no_grad():
        model.conv2.bias[2:] -= 0.8
    maps = LayerScoreCAM(model, layer).attribute(x, list(case.targets))
    live = []
    for i, target in enumerate(case.targets):
        expected, found = reference.score_cam(model, layer, x[i : i + 1], target)
        assert_same(maps[i, 0], expected, EXACT, f"example {i}")
        live.append(tuple(found["live"]))
    assert len(set(live)) > 1, "the examples must differ in their live channels"


# ----------------------------------------------------------------------------------------------------------- Fusion-CAM


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_fusion_cam(case: Case, weighting: str, theta: float) -> None:
    model, layer, x, given, bases = case()
    method = LayerFusionCAM(model, layer, theta=theta, **OPTIONS[weighting], score_fn=case.score_fn)
    maps, details = method.attribute(x, target_argument(case), baselines=given, return_details=True)
    found = []
    for i, target in enumerate(case.targets):
        expected, intermediate = reference.fusion_cam(
            model, layer, x[i : i + 1], target, theta, weighting, score_fn=case.score_fn, baseline=bases[i]
        )
        assert_same(maps[i, 0], expected, tolerance(case, weighting), f"example {i}")
        found.append(intermediate)
    assert_details(details, found, tolerance(case, weighting))
    if theta == 50.0:
        changed = [np.any(each["denoised_map"] != each["gradient_map"]) for each in found]
        assert any(changed), "theta must remove something"


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_fusion_cam_of_increase_score_cam(weighting: str) -> None:
    case = CASES["baseline-tensor"]
    model, layer, x, given, bases = case()
    method = LayerFusionCAM(
        model, layer, region_method=LayerScoreCAM(model, layer, weighting="increase"), **OPTIONS[weighting]
    )
    maps, details = method.attribute(x, list(case.targets), baselines=given, return_details=True)
    results = [
        reference.fusion_cam(
            model, layer, x[i : i + 1], t, 10.0, weighting, baseline=bases[i], region_weighting="increase"
        )
        for i, t in enumerate(case.targets)
    ]
    for i, (expected, _) in enumerate(results):
        assert_same(maps[i, 0], expected, EXACT, f"example {i}")
    assert_details(details, [found for _, found in results], EXACT)


def test_contributions_cover_every_sign() -> None:
    """The cases include every combination of signs of the two contributions."""
    signs = set()
    for case in CASES.values():
        model, layer, x, _, bases = case()
        for i, target in enumerate(case.targets):
            _, found = reference.fusion_cam(
                model, layer, x[i : i + 1], target, weighting="raw", score_fn=case.score_fn, baseline=bases[i]
            )
            signs.add((found["gradient_contribution"] > 0, found["region_contribution"] > 0))
    assert signs == {(False, False), (False, True), (True, False), (True, True)}


def test_both_contributions_negative() -> None:
    case = CASES["both-negative"]
    model, layer, x, _, _ = case()
    _, details = LayerFusionCAM(model, layer).attribute(x, 0, return_details=True)
    assert (details.gradient_contribution < 0).all()
    assert (details.region_contribution < 0).all()
    assert (details.union_weights == 0.5).all()
    assert (details.fusion_weights == 0.5).all()


# ------------------------------------------------------------------------------------------------------------- UnionCAM


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("alpha", ["sum", "count"])
def test_union_cam(case: Case, alpha: str, weighting: str, theta: float) -> None:
    model, layer, x, given, bases = case()
    method = LayerUnionCAM(model, layer, theta=theta, alpha=alpha, **OPTIONS[weighting], score_fn=case.score_fn)
    maps, details = method.attribute(x, target_argument(case), baselines=given, return_details=True)
    found = []
    for i, target in enumerate(case.targets):
        expected, intermediate = reference.union_cam(
            model, layer, x[i : i + 1], target, theta, alpha, weighting, score_fn=case.score_fn, baseline=bases[i]
        )
        assert_same(maps[i, 0], expected, tolerance(case, weighting), f"example {i}")
        found.append(intermediate)
    assert_details(details, found, tolerance(case, weighting))


@pytest.mark.parametrize("alpha", ["sum", "count"])
def test_union_cam_selects_both_ways(case: Case, alpha: str) -> None:
    """In every batch the union is selected for some examples and the region map for others, and they differ."""
    model, layer, x, given, _ = case()
    method = LayerUnionCAM(model, layer, alpha=alpha, score_fn=case.score_fn)
    maps, details = method.attribute(x, target_argument(case), baselines=given, return_details=True)
    assert details.selected.any()
    assert not details.selected.all()
    assert (maps[details.selected] == details.union_map[details.selected]).all()
    assert (maps[~details.selected] == details.region_map[~details.selected]).all()
    apart = (details.union_map - details.region_map).flatten(1).abs().amax(1)
    assert (apart[details.selected] > 1e-3).any()


def test_union_cam_denoises_gradients_that_vary() -> None:
    """In the flat-headed case the percentile removes positive gradients, so that theta has an effect."""
    case = CASES["flat-2d-early-layer"]
    model, layer, x, _, _ = case()
    _, found = reference.union_gradient_map(model, layer, x[:1], 0, 50.0, "sum")
    assert found["removed"] > 0
    few, many = (LayerUnionCAM(model, layer, theta=theta).attribute(x, 0) for theta in (0.0, 90.0))
    assert (few - many).abs().max() > 0.01


# ------------------------------------------------------------------------------------------------- the reference itself


def test_similarity_step_in_closed_form() -> None:
    generator = np.random.default_rng(0)
    one, other = generator.random((2, 1000))
    d = one - other
    s = np.clip(1 - np.abs(d), 0, 1)
    fused = s * np.maximum(one, other) + (1 - s) * (one + other) / 2
    np.testing.assert_allclose(fused, np.maximum(one, other) - d**2 / 2, rtol=0, atol=1e-15)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_fusion_is_the_closed_form_of_its_details(weighting: str) -> None:
    case = CASES["flat-2d"]
    model, layer, x, _, _ = case()
    maps, details = LayerFusionCAM(model, layer, **OPTIONS[weighting]).attribute(
        x, list(case.targets), return_details=True
    )
    checked = 0
    for i in range(len(x)):
        one, other = (
            float(details.fusion_weights[i, j]) * m[i, 0].numpy()
            for j, m in enumerate((details.union_map, details.region_map))
        )
        if np.abs(one - other).max() <= 1:
            fused = np.maximum(one, other) - (one - other) ** 2 / 2
            assert_same(maps[i, 0], reference.min_max(fused), EXACT, f"example {i}")
            checked += 1
    assert checked > 1


@pytest.mark.parametrize(
    ("old", "size"), [((2,), (5,)), ((6,), (4,)), ((3, 5), (7, 4)), ((1, 2), (3, 9)), ((4, 2, 3), (3, 8, 5))]
)
def test_reference_upsampling(old: tuple[int, ...], size: tuple[int, ...]) -> None:
    values = torch.randn(old, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(old)]
    expected = nn.functional.interpolate(values[None, None], size, mode=mode, align_corners=False)[0, 0]
    np.testing.assert_allclose(reference.upsample(values.numpy(), size), expected.numpy(), atol=1e-12)
