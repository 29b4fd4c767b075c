"""The methods other than the fusions equal the implementations in ``tests/reference_methods.py``, and they satisfy
what their formulas imply: hand-computed numbers, closed forms, conservation, invariances, and other libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import LayerFeatureAblation
from captum.attr._utils.approximation_methods import approximation_parameters
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from captum_fusion import (
    RISE,
    LayerAblationCAM,
    LayerEigenCAM,
    LayerGradCAMPlusPlus,
    LayerGroupCAM,
    LayerHiResCAM,
    LayerIntegratedGradCAM,
    LayerIntegrativeCAM,
    LayerISCAM,
    LayerLayerCAM,
    LayerLinearCAM,
    LayerReciproCAM,
    LayerShapCAM,
    LayerSmoothGradCAMPlusPlus,
    LayerXGradCAM,
    functional,
)
from tests import reference_methods as reference
from tests.networks import FlatHead, Net, images, make
from tests.reference import min_max, raw_output, score, upsample

EXACT = 1e-9
Network = tuple[Any, Any, Tensor, list[int]]

few = settings(deadline=None, max_examples=15, derandomize=True)


# ------------------------------------------------------------------------------------------------------------- networks


def network(kind: type[nn.Module], layer: str, *size: int, gain: float = 4.0, **options: Any) -> Network:
    """A network in float64, its layer, three images of very different scale, and their targets.

    Channel 0 of each convolution is dead at 0, channel 1 dead at a constant (where nothing is padded around it).
    """
    model = make(kind, **options).double()
    with torch.no_grad():
        for convolution in (model.conv1, model.conv2):
            for channel, constant in ((0, -0.2), (1, 0.2)):
                convolution.weight[channel] = 0
                convolution.bias[channel] = constant
        # Mostly positive weights; otherwise half of the maps would be all zero after the ReLU.
        model.head.weight += 0.5 * model.head.weight.std()
        model.head.weight *= gain
        x = images(3, 3, *size, seed=3).double()
        x *= torch.tensor([0.5, 1.0, 2.5]).reshape(-1, *[1] * (x.dim() - 1))
        # The most probable class, the second most probable and the most probable.
        ranks = model(x).argsort(1, descending=True)
    targets = [int(ranks[0, 0]), int(ranks[1, 1]), int(ranks[2, 0])]
    assert len(set(targets)) > 1
    return model, getattr(model, layer), x, targets


CASES: dict[str, Callable[[], Network]] = {
    "gap": lambda: network(Net, "relu2", 8, 6),
    "flat": lambda: network(FlatHead, "relu2", 8, 8),
    "flat-early-layer": lambda: network(FlatHead, "relu1", 8, 8),
    "flat-signed-activations": lambda: network(FlatHead, "conv2", 8, 8, seed=1),
    "1d": lambda: network(Net, "relu1", 11, dims=1),
    "3d": lambda: network(Net, "relu2", 5, 4, 6, dims=3),
}


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Network:
    return CASES[request.param]()


def assert_same(actual: Any, expected: Any, what: str = "", tolerance: float = EXACT) -> None:
    if isinstance(actual, Tensor):
        actual = actual.numpy()
    scale = float(np.max(np.abs(expected)))
    assert np.shape(actual) == np.shape(expected), what
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * scale, err_msg=what)


def compare(maps: Tensor, expected: Callable[[int], Any], tolerance: float = EXACT) -> None:
    """Compare maps (N, 1, ...) with one map per example. The maps must differ, and one must not be all zero."""
    assert maps.dtype == torch.float64
    wanted = [expected(i) for i in range(len(maps))]
    for i, each in enumerate(wanted):
        assert_same(maps[i, 0], each, f"example {i}", tolerance)
    assert any(np.abs(each).max() > 0 for each in wanted), "some maps must not be all zero"
    assert any(not np.allclose(wanted[0], each) for each in wanted[1:]), "the examples must differ"


def split(x: Tensor) -> list[Tensor]:
    return [x[i : i + 1] for i in range(len(x))]


def chunked(model: nn.Module, layer: nn.Module, x: Tensor, groups: int) -> list[list[int]]:
    """The channels of each group. The package chooses which groups are larger; see the next test."""
    activations = torch.from_numpy(reference.layer_output(model, layer, x[:1]))
    labels = functional.chunk_channels(activations[None], groups)[0].tolist()
    return [[k for k, label in enumerate(labels) if label == group] for group in range(groups)]


@few
@given(channels=st.integers(1, 40), data=st.data())
def test_chunks_are_contiguous_and_nearly_equal(channels: int, data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, channels))
    labels = functional.chunk_channels(torch.zeros(2, channels, 3), groups)
    assert torch.equal(labels[0], labels[1])
    assert labels[0].tolist() == sorted(labels[0].tolist())
    sizes = labels[0].bincount(minlength=groups)
    assert len(sizes) == groups
    assert sizes.max() - sizes.min() <= (channels % groups > 0)


# ----------------------------------------------------------------------------------------------------- gradient methods


def test_hires_cam(case: Network) -> None:
    model, layer, x, targets = case
    maps = LayerHiResCAM(model, layer).attribute(x, targets)
    compare(maps, lambda i: reference.hires_cam(model, layer, split(x)[i], targets[i]))


def test_layer_cam(case: Network) -> None:
    model, layer, x, targets = case
    maps = LayerLayerCAM(model, layer).attribute(x, targets)
    compare(maps, lambda i: reference.layer_cam(model, layer, split(x)[i], targets[i]))


@pytest.mark.parametrize("gamma", [2.0, 0.5])
def test_layer_cam_of_several_layers(gamma: float) -> None:
    model, _, x, targets = CASES["flat"]()
    layers = [model.relu1, model.relu2]
    maps = LayerLayerCAM(model, layers, gamma=gamma).attribute(x, targets)
    compare(maps, lambda i: reference.fused_layer_cam(model, layers, split(x)[i], targets[i], gamma))


def test_xgrad_cam(case: Network) -> None:
    model, layer, x, targets = case
    maps = LayerXGradCAM(model, layer).attribute(x, targets)
    compare(maps, lambda i: reference.xgrad_cam(model, layer, split(x)[i], targets[i])[0])


@pytest.mark.parametrize("normalize_alpha", [False, True])
def test_grad_cam_plus_plus(case: Network, normalize_alpha: bool) -> None:
    model, layer, x, targets = case
    maps = LayerGradCAMPlusPlus(model, layer, authors_code=normalize_alpha).attribute(x, targets)
    compare(maps, lambda i: reference.grad_cam_plus_plus(model, layer, split(x)[i], targets[i], normalize_alpha))


def noises(x: Tensor, count: int, stdevs: float, seed: int) -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(seed)
    return list(stdevs * torch.randn(count, *x.shape[1:], generator=generator).to(x.dtype)[:, None])


def test_smooth_grad_cam_plus_plus(case: Network) -> None:
    model, layer, x, targets = case
    method = LayerSmoothGradCAMPlusPlus(model, layer, n_samples=3, stdevs=0.4, seed=5)
    maps = method.attribute(x, targets, perturbations_per_eval=2)
    noise = noises(x, 3, 0.4, 5)
    compare(maps, lambda i: reference.smooth_grad_cam_plus_plus(model, layer, split(x)[i], targets[i], noise))
    assert torch.equal(maps, method.attribute(x, targets, perturbations_per_eval=2)), "the seed must repeat"


def test_smooth_grad_cam_plus_plus_without_noise(case: Network) -> None:
    model, layer, x, targets = case
    smooth = LayerSmoothGradCAMPlusPlus(model, layer, n_samples=3, stdevs=0.0)
    plain = LayerGradCAMPlusPlus(model, layer)
    assert_same(smooth.attribute(x, targets), plain.attribute(x, targets).numpy())


RULES = ["riemann_left", "riemann_right", "riemann_middle", "riemann_trapezoid", "gausslegendre"]
SINGLE = 1e-5  # captum computes the points in single precision


@pytest.mark.parametrize("method", RULES)
@pytest.mark.parametrize("baseline", ["zero", "number", "tensor"])
def test_integrated_grad_cam(method: str, baseline: str) -> None:
    model, layer, x, targets = CASES["flat"]()
    given: Any = {"zero": 0, "number": 0.7, "tensor": 0.5 * images(*x.shape, seed=9).double()}[baseline]
    maps = LayerIntegratedGradCAM(model, layer, n_steps=4, rule=method).attribute(x, targets, baselines=given)
    each = list(split(given)) if isinstance(given, Tensor) else [given] * len(x)
    compare(
        maps,
        lambda i: reference.integrated_grad_cam(model, layer, split(x)[i], targets[i], 4, method, each[i]),
        EXACT if method == "gausslegendre" else SINGLE,
    )


@pytest.mark.parametrize("name", ["gap", "flat-early-layer", "1d", "3d"])
def test_integrated_grad_cam_of_other_layers(name: str) -> None:
    model, layer, x, targets = CASES[name]()
    maps = LayerIntegratedGradCAM(model, layer, n_steps=3, rule="gausslegendre").attribute(x, targets)
    compare(maps, lambda i: reference.integrated_grad_cam(model, layer, split(x)[i], targets[i], 3, "gausslegendre"))


@pytest.mark.parametrize("method", RULES)
def test_the_references_integration_rules_are_captums(method: str) -> None:
    steps, points = approximation_parameters(method)
    own_points, own_steps = reference.integration_rule(method, 5)
    np.testing.assert_allclose(own_points, points(5), atol=1e-6)
    np.testing.assert_allclose(own_steps, steps(5), atol=1e-6)


def test_integrated_grad_cam_is_50_midpoints_by_default() -> None:
    model, layer, x, targets = CASES["gap"]()
    maps = LayerIntegratedGradCAM(model, layer).attribute(x, targets)
    compare(
        maps,
        lambda i: reference.integrated_grad_cam(model, layer, split(x)[i], targets[i], 50, "riemann_middle"),
        SINGLE,
    )


# -------------------------------------------------------------------------------------------------- numbers by hand


class ByHand(nn.Module):
    """A^1 = x and A^2 = 2 x for images of 2 x 2. Class 0 has the gradients G1 and G2, class 1 negative ones."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 2, 1, bias=False), nn.Linear(8, 2, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1))
            self.head.weight.copy_(torch.tensor([[1.0, -1, 2, 1, 0, 1, -1, 3], [-1.0] * 8]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).flatten(1))


X = [[1.0, 2.0], [3.0, 0.0]]
BY_HAND = {
    # g1 A1 + g2 A2 = [1 -2; 6 0] + [0 4; -6 0]
    "hires": (LayerHiResCAM, {}, [[1.0, 2.0], [0.0, 0.0]]),
    # relu(g1) A1 + relu(g2) A2 = [1 0; 6 0] + [0 4; 0 0]
    "layer": (LayerLayerCAM, {}, [[1.0, 4.0], [6.0, 0.0]]),
    # w1 = (1 - 2 + 6) / 6, w2 = (4 - 6) / 12; the map is (w1 + 2 w2) x = x / 2
    "xgrad": (LayerXGradCAM, {}, [[0.5, 1.0], [1.5, 0.0]]),
    # sums of activations 6 and 12; alpha = 1 / (2 + 6 g) and 1 / (2 + 12 g);
    # w1 = 1/8 + 2/14 + 1/8 = 11/28, w2 = 1/14 + 3/38 = 20/133; w1 + 2 w2 = 369/532
    "++": (LayerGradCAMPlusPlus, {}, [[369 / 532, 738 / 532], [1107 / 532, 0.0]]),
    # alphas sum to 9/28 and 13/133: w1 = 11/9, w2 = 20/13; w1 + 2 w2 = 503/117
    "++normalized": (
        LayerGradCAMPlusPlus,
        {"authors_code": True},
        [[503 / 117, 1006 / 117], [1509 / 117, 0.0]],
    ),
    # the linear score drops by g1 A1 = 5 and g2 A2 = -2
    "ablation": (LayerAblationCAM, {}, [[1.0, 2.0], [3.0, 0.0]]),
    # the score with only one position kept
    "recipro": (LayerReciproCAM, {"score_fn": "identity"}, [[1.0, 2.0], [0.0, 0.0]]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name: str) -> None:
    kind, options, expected = BY_HAND[name]
    model = ByHand().double().eval()
    # The second example has another target, for which every gradient is -1.
    maps = kind(model, model.conv, **options).attribute(torch.tensor([[X], [X]]).double(), [0, 1])
    assert_same(maps[0, 0], np.array(expected))
    if name != "recipro":
        assert (maps[1] == 0).all()


# ------------------------------------------------------------------------------------------------------ region methods

SCORE_FNS: dict[str, Any] = {
    "softmax": "softmax",
    "sigmoid": "sigmoid",
    "identity": "identity",
    "callable": lambda output: output.softmax(1).square(),
}


def mixed_baselines(x: Tensor) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Baselines in the format of ``attribute``, and the baseline of each example."""
    tensor = 0.5 * images(*x.shape, seed=9).double()
    return {"zero": 0, "number": 0.7, "tensor": tensor}, {
        "zero": [0.0] * len(x),
        "number": [0.7] * len(x),
        "tensor": split(tensor),
    }


@pytest.mark.parametrize("cumulative", [False, True])
def test_is_cam(case: Network, cumulative: bool) -> None:
    model, layer, x, targets = case
    maps = LayerISCAM(model, layer, n_steps=3, authors_code=cumulative).attribute(x, targets, perturbations_per_eval=4)
    compare(maps, lambda i: reference.is_cam(model, layer, split(x)[i], targets[i], 3, cumulative))


@pytest.mark.parametrize("cumulative", [False, True])
@pytest.mark.parametrize(
    ("score_fn", "baseline"), [("identity", "tensor"), ("sigmoid", "number"), ("callable", "zero")]
)
def test_is_cam_of_other_scores_and_baselines(score_fn: str, baseline: str, cumulative: bool) -> None:
    model, layer, x, targets = CASES["flat"]()
    argument, bases = (these[baseline] for these in mixed_baselines(x))
    fn = SCORE_FNS[score_fn]
    maps = LayerISCAM(model, layer, authors_code=cumulative, score_fn=fn).attribute(x, targets, baselines=argument)
    compare(
        maps,
        lambda i: reference.is_cam(
            model, layer, split(x)[i], targets[i], 10, cumulative, score_fn=fn, baseline=bases[i]
        ),
    )


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("cumulative", [False, True])
def test_is_cam_with_a_softmax_over_channels(case: Network, cumulative: bool, softmax: bool) -> None:
    """The weights of torchcam: the softmax of mean raw outputs, with the masks added up or not."""
    model, layer, x, targets = case
    weighting, fn = ("softmax", "softmax") if softmax else ("probability", "identity")
    method = LayerISCAM(model, layer, n_steps=3, weighting=weighting, authors_code=cumulative, score_fn=fn)
    compare(
        method.attribute(x, targets),
        lambda i: reference.is_cam(model, layer, split(x)[i], targets[i], 3, cumulative, softmax, score_fn="identity"),
    )


@pytest.mark.parametrize(("theta", "relu"), [(70.0, False), (70.0, True), (30.0, False), (None, True)])
@pytest.mark.parametrize("background", ["blur", "baseline"])
@pytest.mark.parametrize("groups", [1, 3, 5])
def test_group_cam(case: Network, theta: float | None, relu: bool, background: str, groups: int) -> None:
    model, layer, x, targets = case
    options = {"authors_code": True} if theta is None else {"theta": theta, "relu_weights": relu}
    method = LayerGroupCAM(model, layer, groups=groups, background=background, **options)
    maps = method.attribute(x, targets)
    members = chunked(model, layer, x, groups)
    expected = [
        reference.group_cam(model, layer, split(x)[i], t, members, theta, background, not relu)
        for i, t in enumerate(targets)
    ]
    for i, (each, _) in enumerate(expected):
        if each.any():
            assert_same(maps[i, 0], each, f"example {i}")
        else:
            assert (maps[i] == 0).all()


def test_group_cam_cases_cover_all_contributions() -> None:
    """The cases have groups of both signs and several with a contribution, and every option matters."""
    some = 0
    for build in CASES.values():
        model, layer, x, targets = build()
        for i, target in enumerate(targets):
            members = chunked(model, layer, x, 5)
            contributions = reference.group_cam(model, layer, split(x)[i], target, members)[1]["contributions"]
            some += sum(c > 0 for c in contributions) > 1 and any(c < 0 for c in contributions)
    assert some >= 3
    model, layer, x, targets = CASES["flat"]()
    options: list[dict[str, Any]] = [
        {},
        {"theta": 30.0},
        {"relu_weights": True},
        {"authors_code": True},
        {"background": "baseline"},
    ]
    maps = [LayerGroupCAM(model, layer, groups=3, **each).attribute(x, targets) for each in options]
    for other in maps[1:]:
        assert (maps[0] - other).abs().max() > 0.01 * maps[0].max()


@pytest.mark.parametrize(
    ("score_fn", "baseline"), [("identity", "tensor"), ("sigmoid", "number"), ("callable", "zero")]
)
def test_group_cam_of_other_scores_and_baselines(score_fn: str, baseline: str) -> None:
    model, layer, x, targets = CASES["flat"]()
    argument, bases = (these[baseline] for these in mixed_baselines(x))
    fn = SCORE_FNS[score_fn]
    method = LayerGroupCAM(model, layer, groups=4, background="baseline", score_fn=fn)
    maps = method.attribute(x, targets, baselines=argument, perturbations_per_eval=3)
    members = chunked(model, layer, x, 4)
    compare(
        maps,
        lambda i: reference.group_cam(
            model, layer, split(x)[i], targets[i], members, 70.0, "baseline", score_fn=fn, baseline=bases[i]
        )[0],
    )


def test_group_cam_of_an_image_as_large_as_its_blur() -> None:
    model, layer, x, targets = network(Net, "relu2", 56, 30, gain=10.0)
    maps = LayerGroupCAM(model, layer, groups=3).attribute(x, targets)
    members = chunked(model, layer, x, 3)
    compare(maps, lambda i: reference.group_cam(model, layer, split(x)[i], targets[i], members)[0])


# ------------------------------------------------------------------------------------- methods that replace activations


@pytest.mark.parametrize("groups", [None, 3, 5])
def test_ablation_cam(case: Network, groups: int | None) -> None:
    model, layer, x, targets = case
    maps = LayerAblationCAM(model, layer, groups=groups, grouping="chunks").attribute(x, targets)
    members = None if groups is None else chunked(model, layer, x, groups)
    compare(maps, lambda i: reference.ablation_cam(model, layer, split(x)[i], targets[i], members))


def layer_baselines(model: nn.Module, layer: nn.Module, x: Tensor) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Baselines of the layer in the format of ``attribute``, and the baseline of each example."""
    shape = (len(x), *reference.layer_output(model, layer, x[:1]).shape)
    full = 0.3 * images(*shape, seed=2).double()
    channels = 0.3 * images(1, shape[1], *[1] * (len(shape) - 2), seed=4).double()
    return {"number": 0.1, "full": full, "channels": channels}, {
        "number": [0.1] * len(x),
        "full": split(full),
        "channels": [channels] * len(x),
    }


@pytest.mark.parametrize("score_fn", SCORE_FNS)
@pytest.mark.parametrize("baseline", ["number", "full", "channels"])
@pytest.mark.parametrize("groups", [None, 3])
def test_ablation_cam_of_other_scores_and_baselines(score_fn: str, baseline: str, groups: int | None) -> None:
    model, layer, x, targets = CASES["flat"]()
    argument, bases = (these[baseline] for these in layer_baselines(model, layer, x))
    fn = SCORE_FNS[score_fn]
    method = LayerAblationCAM(model, layer, groups=groups, grouping="chunks", score_fn=fn)
    maps = method.attribute(x, targets, baselines=argument, perturbations_per_eval=3)
    members = None if groups is None else chunked(model, layer, x, groups)
    compare(
        maps,
        lambda i: reference.ablation_cam(
            model, layer, split(x)[i], targets[i], members, score_fn=fn, baseline=bases[i]
        ),
    )


@pytest.mark.parametrize("baseline", [0, 0.1])
def test_ablation_cam_is_captums_feature_ablation_of_channels(case: Network, baseline: float) -> None:
    model, layer, x, targets = case
    activations = torch.stack([torch.from_numpy(reference.layer_output(model, layer, each)) for each in split(x)])
    channels = torch.arange(activations.shape[1]).reshape(1, -1, *[1] * (x.dim() - 2))
    drops = LayerFeatureAblation(model, layer).attribute(x, baseline, target=targets[2], layer_mask=channels)
    maps = LayerAblationCAM(model, layer).attribute(x, targets[2], baselines=baseline)
    expected = (drops * activations).sum(1).relu()
    compare(maps, lambda i: expected[i].numpy())


@pytest.mark.parametrize("gaussian", [False, True])
def test_recipro_cam(case: Network, gaussian: bool) -> None:
    model, layer, x, targets = case
    maps = LayerReciproCAM(model, layer, gaussian=gaussian).attribute(x, targets)
    compare(maps, lambda i: reference.recipro_cam(model, layer, split(x)[i], targets[i], gaussian))


@pytest.mark.parametrize("score_fn", SCORE_FNS)
@pytest.mark.parametrize("baseline", ["number", "full", "channels"])
@pytest.mark.parametrize("gaussian", [False, True])
def test_recipro_cam_of_other_scores_and_baselines(score_fn: str, baseline: str, gaussian: bool) -> None:
    model, layer, x, targets = CASES["flat"]()
    argument, bases = (these[baseline] for these in layer_baselines(model, layer, x))
    fn = SCORE_FNS[score_fn]
    method = LayerReciproCAM(model, layer, gaussian=gaussian, score_fn=fn)
    maps = method.attribute(x, targets, baselines=argument, perturbations_per_eval=3)
    compare(
        maps,
        lambda i: reference.recipro_cam(
            model, layer, split(x)[i], targets[i], gaussian, score_fn=fn, baseline=bases[i]
        ),
    )


# ------------------------------------------------------------------------------------------------------------- Shap-CAM


class TinyFlatHead(Net):
    """For 4 x 4 inputs."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.pool, self.head = nn.Identity(), nn.Linear(8 * 2 * 2, 5)


def tiny() -> Network:
    """Four positions whose contributions depend on each other through a softmax."""
    return network(TinyFlatHead, "relu2", 4, 4, gain=6.0)


@pytest.mark.parametrize("score_fn", ["softmax", "sigmoid", "callable"])
@pytest.mark.parametrize("baseline", ["number", "full", "mean"])
def test_shap_cam_estimates_shapley_values(score_fn: str, baseline: str) -> None:
    model, layer, x, targets = tiny()
    arguments, of_examples = layer_baselines(model, layer, x)
    given = {} if baseline == "mean" else {"baselines": arguments[baseline]}  # the mean is the default
    bases = ["mean"] * len(x) if baseline == "mean" else of_examples[baseline]
    fn, n = SCORE_FNS[score_fn], 400
    maps, errors = LayerShapCAM(model, layer, n_samples=n, score_fn=fn, seed=1).attribute(
        x, targets, **given, perturbations_per_eval=200, return_standard_error=True
    )
    assert maps.shape == errors.shape == (3, 1, 2, 2)
    for i, target in enumerate(targets):
        exact, deviation = reference.shapley_values(model, layer, split(x)[i], target, score_fn=fn, baseline=bases[i])
        off = np.abs(maps[i, 0].numpy() - exact)
        assert (off <= 4.5 * errors[i, 0].numpy() + EXACT).all(), f"example {i}"
        np.testing.assert_allclose(errors[i, 0].numpy(), deviation / np.sqrt(n), rtol=0.2, err_msg=f"example {i}")
        # The test is sensitive: the values of the positions differ clearly.
        assert np.ptp(exact) > 5 * errors[i].max()


@few
@given(n_samples=st.integers(1, 6), seed=st.integers(0, 1000), score_fn=st.sampled_from(sorted(SCORE_FNS)))
def test_shap_cam_is_efficient(n_samples: int, seed: int, score_fn: str) -> None:
    """The values sum to the score minus the baseline's score, for any orders."""
    model, layer, x, targets = CASES["flat"]() if seed % 2 else tiny()
    arguments, _ = layer_baselines(model, layer, x)
    baseline = list(arguments.values())[seed % 3]
    fn = SCORE_FNS[score_fn]
    method = LayerShapCAM(model, layer, n_samples=n_samples, score_fn=fn, seed=seed)
    maps = method.attribute(x, targets, baselines=baseline, perturbations_per_eval=16)
    for i, target in enumerate(targets):
        activations = reference.layer_output(model, layer, split(x)[i])
        nothing = reference.absent(
            activations, baseline[i : i + 1] if len(np.shape(baseline)) and len(baseline) > 1 else baseline
        )
        gained = score(model, split(x)[i], target, fn) - reference.score_with(
            model, layer, split(x)[i], nothing, target, fn
        )
        np.testing.assert_allclose(maps[i].sum().item(), gained, rtol=1e-9, atol=1e-12)


def test_shap_cam_of_an_additive_game_is_exact() -> None:
    """If positions do not interact, one order is enough, and the estimates have no error."""
    model, layer, x, targets = CASES["gap"]()
    maps, errors = LayerShapCAM(model, layer, n_samples=2, score_fn="identity").attribute(
        x, targets, return_standard_error=True
    )
    cams = [
        reference.linear_cam(model, layer, split(x)[i], targets[i], model.head.weight) / maps[i].numel()
        for i in range(len(x))
    ]
    compare(maps, lambda i: cams[i] - cams[i].mean())  # the baseline is each channel's mean
    assert errors.abs().max() < 1e-12
    maps = LayerShapCAM(model, layer, n_samples=2, score_fn="identity").attribute(x, targets, baselines=0)
    compare(maps, lambda i: cams[i])


def test_shap_cam_gives_nothing_to_a_position_like_the_baseline() -> None:
    model, layer, x, targets = tiny()
    activations = torch.stack([torch.from_numpy(reference.layer_output(model, layer, each)) for each in split(x)])
    baseline = activations + 1
    baseline[:, :, 0, 1] = activations[:, :, 0, 1]
    maps = LayerShapCAM(model, layer, n_samples=3).attribute(x, targets, baselines=baseline)
    assert maps[:, 0, 0, 1].abs().max() < 1e-12
    assert maps.abs().amax((1, 2, 3)).min() > 1e-4


def test_shap_cam_repeats_with_its_seed_for_any_chunk_size() -> None:
    model, layer, x, targets = CASES["flat"]()

    def attribute(seed: int, chunk: int | None) -> Tensor:
        method = LayerShapCAM(model, layer, n_samples=2, seed=seed)
        return method.attribute(x, targets, perturbations_per_eval=chunk)

    maps = attribute(0, None)
    for chunk in (1, 7, 1000):
        assert_same(attribute(0, chunk), maps.numpy())
    assert (maps - attribute(1, None)).abs().max() > 0.01 * maps.abs().max()
    alone = LayerShapCAM(model, layer, n_samples=2).attribute(x[1:2], targets[1])
    assert_same(alone[0], maps[1].numpy(), "the orders are the same for every example")


# ----------------------------------------------------------------------------------------------------------------- RISE


class Plain(nn.Module):
    """A linear function of the input."""

    def __init__(self, size: tuple[int, ...]) -> None:
        super().__init__()
        self.head = nn.Linear(2 * int(np.prod(size)), 3)

    def forward(self, x: Tensor) -> Tensor:
        return 3 * self.head(x.flatten(1))


@pytest.mark.parametrize(
    ("size", "cells", "probability", "score_fn", "baseline"),
    [
        ((4, 4), 2, 0.5, "identity", 0.0),
        ((5, 4), 2, 0.3, "identity", 0.7),
        ((5, 6), 2, 0.6, "softmax", 0.0),
        ((7,), 3, 0.5, "sigmoid", 0.0),
        ((2, 3, 4), 2, 0.5, "identity", 0.0),
    ],
    ids=str,
)
def test_rise_converges_to_its_expectation(
    size: tuple[int, ...], cells: int, probability: float, score_fn: str, baseline: float
) -> None:
    model, n = make(Plain, size=size).double(), 10000
    x = images(2, 2, *size, seed=4).double()
    method = RISE(model, n_masks=n, grid_size=cells, probability=probability, score_fn=score_fn, seed=3)
    maps = method.attribute(x, [0, 2], baselines=baseline, perturbations_per_eval=2500)
    assert maps.shape == x.shape
    assert torch.equal(maps[:, 0], maps[:, 1]), "every channel has the same map"
    masks = reference.rise_masks(size, cells, probability)
    unshifted = masks[:: len(masks) // 2 ** (cells ** len(size))]
    unshifted = [(chance * len(masks) / len(unshifted), mask) for chance, mask in unshifted]
    furthest = 0.0
    for i, target in enumerate([0, 2]):
        options: dict[str, Any] = {"score_fn": score_fn, "baseline": baseline}
        exact, deviation = reference.rise(model, x[i : i + 1], target, masks, probability, **options)
        error = deviation / np.sqrt(n)
        assert (np.abs(maps[i, 0].numpy() - exact) / error).max() < 4.5, f"example {i}"
        other, _ = reference.rise(model, x[i : i + 1], target, unshifted, probability, **options)
        furthest = max(furthest, (np.abs(maps[i, 0].numpy() - other) / error).max())
    assert furthest > 6, "the test must detect masks that are never shifted"


def test_rise_of_a_score_for_each_example() -> None:
    """If the score is always 1, the map is 1 up to sampling noise."""
    x = images(2, 3, 6, 6).double()
    maps = RISE(lambda x: x.new_ones(len(x)), n_masks=4000, grid_size=3, probability=0.4).attribute(x)
    assert (maps - 1).abs().max() < 0.1
    assert (maps - 1).abs().max() > 1e-4


def test_rise_repeats_with_its_seed_for_any_chunk_size() -> None:
    model, _, x, targets = CASES["flat"]()

    def attribute(seed: int, chunk: int | None, chosen: slice = slice(None)) -> Tensor:
        method = RISE(model, n_masks=30, grid_size=3, seed=seed)
        return method.attribute(x[chosen], targets[chosen], perturbations_per_eval=chunk)

    before = torch.random.get_rng_state()
    maps = attribute(0, None)
    for chunk in (1, 7, 30, 1000):
        assert_same(attribute(0, chunk), maps.numpy())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert_same(attribute(0, 8, slice(1, 2)), maps[1:2].numpy(), "the masks are the same for every example")
    assert (maps - attribute(1, 30)).abs().max() > 0.01 * maps.abs().max()


# --------------------------------------------------------------------------------------------------- activation methods

POOLED = ["gap", "1d-last", "3d"]


def pooled(name: str) -> Network:
    return network(Net, "relu2", 11, dims=1) if name == "1d-last" else CASES[name]()


@pytest.mark.parametrize("name", POOLED)
def test_linear_cam(name: str) -> None:
    model, layer, x, targets = pooled(name)
    maps = LayerLinearCAM(model, layer).attribute(x, targets)
    compare(maps, lambda i: reference.linear_cam(model, layer, split(x)[i], targets[i], model.head.weight))
    for i, target in enumerate(targets):
        without_bias = raw_output(model, split(x)[i], target) - model.head.bias[target].item()
        np.testing.assert_allclose(maps[i].mean().item(), without_bias, rtol=EXACT)


class Convolutional(Net):
    """A 1 x 1 convolution whose maps are averaged."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.head(self.relu2(self.conv2(self.relu1(self.conv1(x)))))).flatten(1)


def test_linear_cam_of_a_convolution() -> None:
    model, layer, x, targets = network(Convolutional, "relu2", 8, 6)
    maps = LayerLinearCAM(model, layer).attribute(x, targets)
    compare(maps, lambda i: reference.linear_cam(model, layer, split(x)[i], targets[i], model.head.weight))


def test_linear_cam_of_a_function_and_its_classifier() -> None:
    model, layer, x, targets = CASES["gap"]()
    maps = LayerLinearCAM(lambda x: model(x), layer, classifier=model.head).attribute(x, targets)
    assert_same(maps, LayerLinearCAM(model, layer).attribute(x, targets).numpy())
    with pytest.raises(ValueError, match="classifier"):
        LayerLinearCAM(lambda x: model(x), layer).attribute(x, targets)


def after(step: Callable[[Tensor], Tensor]) -> type[Net]:
    """A network with a further step after its classifier."""

    class After(Net):
        def forward(self, x: Tensor) -> Tensor:
            return step(super().forward(x))

    return After


class TwoLinear(Net):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.between = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu2(self.conv2(self.relu1(self.conv1(x))))
        return self.head(self.between(self.pool(x).flatten(1)))


class MaxPooled(Net):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.pool = nn.AdaptiveMaxPool2d(1)


REFUSED = {
    "flat": (FlatHead, "relu2"),
    "earlier layer": (Net, "relu1"),
    "before the relu": (Net, "conv2"),
    "softmax": (after(lambda y: y.softmax(1)), "relu2"),
    "scaled": (after(lambda y: 1.5 * y), "relu2"),
    "relu": (after(lambda y: (y - 3).relu()), "relu2"),
    "two linear layers": (TwoLinear, "relu2"),
    "maximum": (MaxPooled, "relu2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_linear_cam_rejects_other_networks(name: str) -> None:
    kind, layer = REFUSED[name]
    model, layer, x, targets = network(kind, layer, 8, 8)
    with pytest.raises(ValueError, match=r"average|classifier|linear"):
        LayerLinearCAM(model, layer).attribute(x, targets)


@pytest.mark.parametrize("center", [False, True])
def test_eigen_cam(case: Network, center: bool) -> None:
    model, layer, x, targets = case
    maps = LayerEigenCAM(model, layer, center=center).attribute(x)
    compare(maps, lambda i: reference.eigen_cam(model, layer, split(x)[i], center))
    if not center:
        assert (maps.flatten(1).sum(1) > 0).all()
    assert torch.equal(maps, LayerEigenCAM(model, layer, center=center).attribute(x, targets))


@few
@given(seed=st.integers(0, 1000), center=st.booleans(), size=st.integers(2, 6), channels=st.integers(1, 9))
def test_eigen_cam_is_the_best_single_direction(seed: int, center: bool, size: int, channels: int) -> None:
    """The map's sum of squares is the squared largest singular value, the maximum over all unit directions."""
    layer = nn.Identity().eval()
    x = images(2, channels, size, size + 1, seed=seed).double()
    maps = LayerEigenCAM(layer, layer, center=center).attribute(x)
    for i in range(2):
        matrix = x[i].flatten(1).T.numpy()
        matrix = matrix - matrix.mean(0) if center else matrix
        largest = np.linalg.svd(matrix, compute_uv=False)[0]
        np.testing.assert_allclose(maps[i].square().sum().item(), largest**2, rtol=1e-9)
        # A A^T m = sigma^2 m: the map is a left singular vector, times its value.
        flat = maps[i].flatten().numpy()
        np.testing.assert_allclose(matrix @ (matrix.T @ flat), largest**2 * flat, atol=1e-8 * largest**3)


# ------------------------------------------------------------------------------------------------------ Integrative CAM

CLASSES: list[int] = [0, 1, 2, 3, 4]


def slope_of(phi: Callable[[Tensor], Tensor], s: float) -> float:
    point = torch.tensor([s], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(phi(point).sum(), point)
    return abs(slope.item())


PHIS: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "exp": ("exp", torch.exp),
    "softplus": ("softplus", nn.functional.softplus),
    "sigmoid": ("sigmoid", torch.sigmoid),
    "square": ("square", torch.square),
    "identity": ("identity", lambda s: 1 * s),
    "callable": (lambda s: s**3 / 9 + s, lambda s: s**3 / 9 + s),
    "falling": (lambda s: torch.exp(-0.5 * s), lambda s: torch.exp(-0.5 * s)),
}


def layer_map(
    model: nn.Module,
    layer: nn.Module,
    x: Tensor,
    target: int,
    phi: str,
    normalize_alpha: bool = True,
    bias: str = "residual",
    offsets: Any = None,
    classes: list[int] = CLASSES,
) -> tuple[Any, Any, float]:
    """The reference's map of one layer for a named phi, the map before its ReLU, and the fraction of clipped alphas."""
    if phi == "softmax":
        with torch.no_grad():
            slope = float(model(x)[0][classes].softmax(0)[classes.index(target)])

        def smooth(output: Tensor) -> Tensor:
            return output[classes].softmax(0)[classes.index(target)]

    else:
        slope = slope_of(PHIS[phi][1], raw_output(model, x, target))

        def smooth(output: Tensor) -> Tensor:
            return PHIS[phi][1](output[target])

    return reference.integrative_layer_map(model, layer, x, target, smooth, slope, normalize_alpha, bias, offsets)


def small(layer: str, gain: float = 3.0) -> Network:
    """Four positions and eight channels. The second target has a negative score."""
    model, at, x, targets = network(TinyFlatHead, layer, 4, 4, gain=gain)
    with torch.no_grad():
        targets[1] = int(model(x)[1].argmin())
        model.head.bias[targets[1]] -= 1.5
    return model, at, x, targets


@pytest.mark.parametrize("name", ["gap", "flat", "1d", "3d"])
def test_integrative_cam_of_one_layer_can_be_grad_cam_plus_plus(name: str) -> None:
    model, layer, x, targets = CASES[name]()
    maps = LayerIntegrativeCAM(model, layer, phi="exp", normalize_alpha=False, bias="none").attribute(x, targets)
    plain = LayerGradCAMPlusPlus(model, layer).attribute(x, targets)
    compare(maps, lambda i: min_max(upsample(plain[i, 0].numpy(), tuple(x.shape[2:]))))


@pytest.mark.parametrize(
    ("phi", "normalize_alpha", "bias"),
    [
        (phi, normalize_alpha, bias)
        for phi in [*PHIS, "softmax"]
        for normalize_alpha in (True, False)
        for bias in ("residual", "none")
        # The size of the identity's equal alphas is undefined. It matters only with a residual.
        if (phi, normalize_alpha, bias) != ("identity", False, "residual")
    ],
)
@pytest.mark.parametrize("layer", ["relu2", "conv2"])
def test_integrative_cam_of_one_layer(phi: str, layer: str, bias: str, normalize_alpha: bool) -> None:
    model, at, x, targets = small(layer)
    method = LayerIntegrativeCAM(
        model, at, phi=PHIS[phi][0] if phi in PHIS else phi, bias=bias, normalize_alpha=normalize_alpha
    )
    maps, details = method.attribute(x, targets, return_details=True)
    found = [layer_map(model, at, split(x)[i], targets[i], phi, normalize_alpha, bias) for i in range(3)]
    compare(maps, lambda i: min_max(upsample(found[i][0], (4, 4))))
    np.testing.assert_allclose(details.clipped[:, 0].numpy(), [cut for _, _, cut in found], rtol=1e-6)
    if bias == "residual":
        for i, (_, before, _) in enumerate(found):
            np.testing.assert_allclose(before.sum(), raw_output(model, split(x)[i], targets[i]), rtol=EXACT)


@pytest.mark.parametrize("normalize_alpha", [True, False])
@pytest.mark.parametrize(("phi", "gain"), [("exp", 24.0), ("callable", 48.0), ("sigmoid", 12.0), ("softplus", 12.0)])
def test_integrative_cam_clips_alphas(phi: str, gain: float, normalize_alpha: bool) -> None:
    """If the third derivative and the sum of a channel's activations differ in sign, alphas can have any size."""
    model, layer, x, targets = small("conv2", gain=gain)
    method = LayerIntegrativeCAM(model, layer, phi=PHIS[phi][0], normalize_alpha=normalize_alpha, bias="none")
    maps, details = method.attribute(x, targets, return_details=True)
    found = [layer_map(model, layer, split(x)[i], targets[i], phi, normalize_alpha, "none") for i in range(3)]
    compare(maps, lambda i: min_max(upsample(found[i][0], (4, 4))))
    np.testing.assert_allclose(details.clipped[:, 0].numpy(), [cut for _, _, cut in found], rtol=1e-6)
    assert ((details.clipped > 0) & (details.clipped < 1)).any()


def test_integrative_cams_variants_differ() -> None:
    """The variants of the test above give different maps."""
    model, at, x, targets = small("conv2")

    def attribute(phi: Any, **options: Any) -> Tensor:
        return LayerIntegrativeCAM(model, at, phi=phi, **options).attribute(x, targets)

    variants = [attribute(phi, bias="none") for phi in [*[phi for phi, _ in PHIS.values()], "softmax"]]
    variants += [attribute("exp"), attribute("exp", bias="none", normalize_alpha=False)]
    for i, one in enumerate(variants):
        for other in variants[:i]:
            assert (one - other).abs().max() > 1e-4


@pytest.mark.parametrize("classes", [2, 3])
def test_integrative_cam_of_a_softmax_over_few_classes(classes: int) -> None:
    model, layer, x, targets = small("relu2")
    method = LayerIntegrativeCAM(model, layer, phi="softmax", softmax_classes=classes)
    maps = method.attribute(x, targets)

    def expected(i: int) -> Any:
        with torch.no_grad():
            ranking = model(split(x)[i])[0].argsort(descending=True).tolist()
        ranking.remove(targets[i])
        among = [targets[i], *ranking[: classes - 1]]
        return min_max(upsample(layer_map(model, layer, split(x)[i], targets[i], "softmax", classes=among)[0], (4, 4)))

    compare(maps, expected)
    assert (maps - LayerIntegrativeCAM(model, layer, phi="softmax").attribute(x, targets)).abs().max() > 1e-3


@pytest.mark.parametrize("bias", ["layer", "fullgrad"])
@pytest.mark.parametrize("normalize_alpha", [True, False])
def test_integrative_cam_with_the_layers_bias(bias: str, normalize_alpha: bool) -> None:
    model, layer, x, targets = small("conv2")
    with torch.no_grad():  # a negative bias, with activations that are positive nevertheless
        layer.weight *= 8
        layer.bias -= 0.3
    method = LayerIntegrativeCAM(model, layer, bias=bias, normalize_alpha=normalize_alpha)
    maps = method.attribute(x, targets)
    offsets = layer.bias.detach().numpy()
    found = [layer_map(model, layer, split(x)[i], targets[i], "exp", normalize_alpha, bias, offsets) for i in range(3)]
    compare(maps, lambda i: min_max(upsample(found[i][0], (4, 4))))
    none = LayerIntegrativeCAM(model, layer, bias="none", normalize_alpha=normalize_alpha).attribute(x, targets)
    assert (maps - none).abs().max() > 1e-3


def integrative(model: nn.Module, layers: list[nn.Module], x: Tensor, targets: list[int]) -> list[list[Any]]:
    """The layer maps of each example, with default options."""
    return [[layer_map(model, layer, split(x)[i], targets[i], "exp")[0] for layer in layers] for i in range(len(x))]


@pytest.mark.parametrize(
    ("weighting", "balance"), [("mean", 0.5), ("mean", 0.0), ("mean", 0.9), ("product", 0.5), ("uniform", 0.5)]
)
def test_integrative_cam_of_several_layers(weighting: str, balance: float) -> None:
    model, _, x, targets = tiny()
    layers = [model.relu1, model.conv2, model.relu2]
    method = LayerIntegrativeCAM(model, layers, layer_weighting=weighting, balance=balance)
    maps, details = method.attribute(x, targets, return_details=True)
    found = integrative(model, layers, x, targets)
    weights = [
        reference.layer_weights(model, layers, split(x)[i], targets[i], weighting, balance) for i in range(len(x))
    ]
    results = [reference.fuse_layers(found[i], weights[i], (4, 4)) for i in range(len(x))]
    compare(maps, lambda i: results[i][0])
    for i, (_, expected) in enumerate(results):
        assert_same(details.layer_maps[i], np.stack(expected["layer_maps"]))
        assert_same(details.layer_weights[i], expected["layer_weights"])
        assert details.kept[i].tolist() == expected["kept"]
    # The order in which the layers are given does not matter.
    reverse = LayerIntegrativeCAM(model, layers[::-1], layer_weighting=weighting, balance=balance)
    assert_same(reverse.attribute(x, targets), maps.numpy())


def test_integrative_cam_leaves_out_redundant_layers() -> None:
    model, _, x, targets = tiny()
    layers = [model.relu1, model.conv2, model.relu2, model.pool]  # the last is an Identity and repeats the map
    found = integrative(model, layers, x, targets)
    weights = [reference.layer_weights(model, layers, split(x)[i], targets[i], "mean", 0.5) for i in range(len(x))]
    patterns = set()
    for threshold in (1e-6, 0.1, 0.2, 0.3, 0.6):
        method = LayerIntegrativeCAM(model, layers, redundancy_threshold=threshold)
        maps, details = method.attribute(x, targets, return_details=True)
        for i in range(len(x)):
            expected, inside = reference.fuse_layers(found[i], weights[i], (4, 4), threshold)
            assert_same(maps[i, 0], expected)
            # Either of two equal layers can be kept.
            kept = [*details.kept[i, :2].tolist(), bool(details.kept[i, 2:].any())]
            assert kept == [*inside["kept"][:2], any(inside["kept"][2:])]
            assert details.kept[i, 2:].sum() < 2
            shares, wanted = details.layer_weights[i].numpy(), inside["layer_weights"]
            assert_same([*shares[:2], shares[2:].sum()], [*wanted[:2], wanted[2:].sum()])
            assert (details.layer_weights[i][~details.kept[i]] == 0).all()
            patterns.add(tuple(kept))
    assert len(patterns) >= 3


def test_integrative_cam_gives_a_constant_layers_weight_to_the_others() -> None:
    """If no channel has a positive gradient, all channel weights are 0 and the map is constant, for any bias."""
    model, layer, x, targets = CASES["gap"]()
    with torch.no_grad():
        model.head.weight[targets[0]].abs_().neg_()
    layers = [model.relu1, layer]
    maps, details = LayerIntegrativeCAM(model, layers, bias="none").attribute(x, targets, return_details=True)
    assert details.kept.tolist()[0] == [True, False]
    assert details.kept[1:].any(1).all()
    assert details.layer_weights[0].tolist() == [1, 0]
    alone = LayerIntegrativeCAM(model, model.relu1, bias="none").attribute(x, targets)
    assert_same(maps[0], alone[0].numpy())
    assert maps[0].any()
    nothing, none = LayerIntegrativeCAM(model, layer).attribute(x[:1], targets[0], return_details=True)
    assert (nothing == 0).all()
    assert none.layer_weights.tolist() == [[0]]
    assert none.kept.tolist() == [[False]]


# ----------------------------------------------------------------------------------------- conservation, closed forms


def without_biases(positive: bool) -> Network:
    model, layer, x, _ = network(Net, "relu2", 8, 6)
    with torch.no_grad():
        for convolution in (model.conv1, model.conv2):
            nn.init.normal_(convolution.weight, generator=torch.Generator().manual_seed(5))
            convolution.bias.zero_()
        model.head.bias.zero_()
        if positive:
            model.conv2.weight.abs_()
            model.head.weight.abs_()
    return model, layer, x, [0, 3, 1]


@pytest.mark.parametrize("layer", ["relu1", "relu2"])
@pytest.mark.parametrize("kind", [LayerXGradCAM, LayerHiResCAM, LayerLayerCAM])
def test_maps_of_a_positive_network_add_up_to_the_score(kind: Any, layer: str) -> None:
    model, _, x, targets = without_biases(positive=True)
    maps = kind(model, getattr(model, layer)).attribute(x, targets)
    for i, target in enumerate(targets):
        np.testing.assert_allclose(maps[i].sum().item(), raw_output(model, split(x)[i], target), rtol=EXACT)


@pytest.mark.parametrize("layer", ["relu1", "relu2"])
def test_xgrad_cam_adds_up_to_the_score_before_its_relu(layer: str) -> None:
    model, _, x, targets = without_biases(positive=False)
    at, negative = getattr(model, layer), False
    maps = LayerXGradCAM(model, at).attribute(x, targets)
    for i, target in enumerate(targets):
        cut, whole = reference.xgrad_cam(model, at, split(x)[i], target)
        np.testing.assert_allclose(whole.sum(), raw_output(model, split(x)[i], target), rtol=EXACT)
        assert_same(maps[i, 0], cut)
        negative = negative or bool((whole < 0).any())
    assert negative


@pytest.mark.parametrize("name", POOLED)
def test_closed_forms_after_global_pooling(name: str) -> None:
    """All gradients are W / Z there, so that many methods coincide."""
    model, layer, x, targets = pooled(name)
    cam = LayerLinearCAM(model, layer).attribute(x, targets)
    z = cam[0].numel()
    for kind in (LayerHiResCAM, LayerXGradCAM):
        assert_same(kind(model, layer).attribute(x, targets), (cam / z).relu().numpy())
    alone = LayerReciproCAM(model, layer, score_fn="identity").attribute(x, targets)
    bias = model.head.bias.detach()[targets].reshape(-1, *[1] * (cam.dim() - 1))
    assert_same(alone, (cam / z + bias).numpy())
    for i, target in enumerate(targets):
        activations = reference.layer_output(model, layer, split(x)[i])
        weights = [float(w) * a.mean() for w, a in zip(model.head.weight[target].detach(), activations, strict=True)]
        expected = reference.relu(reference.weighted_sum(np.array(weights), activations))
        assert_same(LayerAblationCAM(model, layer).attribute(split(x)[i], target)[0, 0], expected)


def test_layer_cam_is_at_least_hires_cam_where_activations_are_positive() -> None:
    model, layer, x, targets = CASES["flat"]()
    apart = LayerLayerCAM(model, layer).attribute(x, targets) - LayerHiResCAM(model, layer).attribute(x, targets)
    assert apart.min() >= 0
    assert apart.max() > 0


# ---------------------------------------------------------------------------------------------------------- invariances


class Scaled(nn.Module):
    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.model(x)


HOMOGENEOUS: dict[str, tuple[Any, dict[str, Any]]] = {
    "hires": (LayerHiResCAM, {}),
    "xgrad": (LayerXGradCAM, {}),
    "layer": (LayerLayerCAM, {}),
    "integrated": (LayerIntegratedGradCAM, {"n_steps": 2}),
    "is": (LayerISCAM, {"n_steps": 2, "score_fn": "identity"}),
    "group": (LayerGroupCAM, {"groups": 3, "theta": 50.0, "score_fn": "identity"}),
    "ablation": (LayerAblationCAM, {}),
    "recipro": (LayerReciproCAM, {"score_fn": "identity"}),
    "shap": (LayerShapCAM, {"n_samples": 1, "score_fn": "identity"}),
}


@pytest.mark.parametrize("name", HOMOGENEOUS)
@few
@given(exponent=st.floats(-6, 6), case=st.sampled_from(["gap", "flat", "flat-signed-activations"]))
def test_maps_scale_with_the_logits(name: str, exponent: float, case: str) -> None:
    """The methods are linear in the score, so that their normalised maps do not change."""
    model, layer, x, targets = CASES[case]()
    kind, options = HOMOGENEOUS[name]
    factor = 10**exponent
    plain = kind(model, layer, **options).attribute(x, targets)
    scaled = kind(Scaled(model, factor), layer, **options).attribute(x, targets)
    assert_same(scaled, factor * plain.numpy())
    assert_same(functional.normalize(scaled), functional.normalize(plain).numpy(), tolerance=1e-7)
    assert plain.any()


@few
@given(exponent=st.floats(-6, 6))
def test_eigen_cam_does_not_depend_on_the_logits(exponent: float) -> None:
    model, layer, x, targets = CASES["flat"]()
    scaled = LayerEigenCAM(Scaled(model, 10**exponent), layer).attribute(x, targets)
    assert_same(scaled, LayerEigenCAM(model, layer).attribute(x, targets).numpy())


@few
@given(exponent=st.floats(-3, 3), phi=st.sampled_from(["square", "identity"]))
def test_integrative_cam_of_homogeneous_functions_does_not_depend_on_the_logits_scale(
    exponent: float, phi: str
) -> None:
    model, _, x, targets = CASES["flat"]()
    layers = [model.relu1, model.relu2]
    plain = LayerIntegrativeCAM(model, layers, phi=phi).attribute(x, targets)
    scaled = LayerIntegrativeCAM(Scaled(model, 10**exponent), layers, phi=phi).attribute(x, targets)
    assert_same(scaled, plain.numpy(), tolerance=1e-7)


EVERY: dict[str, tuple[Any, dict[str, Any]]] = {
    **HOMOGENEOUS,
    "++": (LayerGradCAMPlusPlus, {}),
    "++normalized": (LayerGradCAMPlusPlus, {"authors_code": True}),
    "smooth": (LayerSmoothGradCAMPlusPlus, {"n_samples": 2}),
    "is-softmax": (LayerISCAM, {"n_steps": 2}),
    "recipro-gaussian": (LayerReciproCAM, {"gaussian": True}),
    "shap-softmax": (LayerShapCAM, {"n_samples": 1}),
    "eigen": (LayerEigenCAM, {}),
    "eigen-centred": (LayerEigenCAM, {"center": True}),
    "integrative": (LayerIntegrativeCAM, {}),
    "integrative-softmax": (LayerIntegrativeCAM, {"phi": "softmax"}),
}


@pytest.mark.parametrize("name", sorted(set(EVERY) - {"group"}))
@settings(deadline=None, max_examples=5, derandomize=True)
@given(order=st.permutations(range(8)), examples=st.permutations(range(3)))
def test_the_order_of_channels_and_of_examples_does_not_matter(
    name: str, order: list[int], examples: list[int]
) -> None:
    model, layer, x, targets = CASES["flat"]()
    kind, options = EVERY[name]
    plain = kind(model, layer, **options).attribute(x, targets)
    with torch.no_grad():
        model.conv2.weight.copy_(model.conv2.weight[order])
        model.conv2.bias.copy_(model.conv2.bias[order])
        model.head.weight.copy_(model.head.weight.unflatten(1, (8, 16))[:, order].flatten(1))
    other = kind(model, layer, **options).attribute(x[examples], [targets[i] for i in examples])
    assert_same(other, plain[examples].numpy())


# ------------------------------------------------------------------------------------------------------------- torchcam


def torchcams(kind: str, model: nn.Module, layer: str, x: Tensor, targets: list[int], **options: Any) -> Tensor:
    """torchcam's maps, (N, 1, *spatial), which it normalises with an epsilon of 1e-8."""
    method = getattr(pytest.importorskip("torchcam.methods"), kind)
    with method(model, layer, input_shape=tuple(x.shape[1:]), **options) as extractor:
        return extractor(targets, model(x))[0].detach()[:, None]


@pytest.mark.parametrize("name", ["gap", "flat", "flat-early-layer", "flat-signed-activations"])
@pytest.mark.parametrize(("kind", "theirs"), [(LayerLayerCAM, "LayerCAM"), (LayerXGradCAM, "XGradCAM")])
def test_equals_torchcam(name: str, kind: Any, theirs: str) -> None:
    model, layer, x, targets = CASES[name]()
    model.head.weight.data *= 20  # far above torchcam's epsilons
    where = next(key for key, module in model.named_modules() if module is layer)
    ours = functional.normalize(kind(model, layer).attribute(x, targets))
    assert ours.any()
    assert_same(ours, torchcams(theirs, model, where, x, targets).numpy(), tolerance=1e-5)
    assert (ours - torchcams("GradCAM", model, where, x, targets)).abs().max() > 1e-3 or name == "gap"


def test_linear_cam_equals_torchcams() -> None:
    model, layer, x, targets = CASES["gap"]()
    model.head.weight.data *= 20
    ours = functional.normalize(LayerLinearCAM(model, layer).attribute(x, targets))
    theirs = torchcams("CAM", model, "relu2", x, targets, fc_layer="head")
    assert_same(ours, theirs.numpy(), tolerance=1e-5)
