"""Methods without a layer, with several layers or for special networks, which the common tests do not cover."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import Attribution, GuidedGradCam, LayerGradCam, NoiseTunnel
from captum.metrics import infidelity
from torch import Tensor, nn

import captum_fusion
from captum_fusion import (
    RISE,
    GuidedFusionCAM,
    LayerAugmentedGradCAM,
    LayerDecomCAM,
    LayerEigenCAM,
    LayerFDCAM,
    LayerFusionCAM,
    LayerGroupCAM,
    LayerHiResCAM,
    LayerIntegratedGradCAM,
    LayerIntegrativeCAM,
    LayerISCAM,
    LayerLayerCAM,
    LayerLinearCAM,
    LayerScoreCAM,
    LayerSmoothGradCAMPlusPlus,
    LayerSSCAM,
    functional,
)
from captum_fusion._passes.modes import callers_autocast
from captum_fusion.attr.catalog import METHODS
from tests.networks import Counter, FlatHead, Net, Score, TupleLayer, TwoInputs, hooks_on, images, make
from tests.test_contract import one_by_one, same

# ---------------------------------------------------------------------------------------------------------- LinearCAM


class Convolutional(nn.Module):
    """Ends in a 1 x 1 convolution and the mean of its maps."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.classifier = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 1)
        self.between = nn.Identity() if between is None else between

    def forward(self, x: Tensor) -> Tensor:
        return self.between(self.classifier(self.conv(x))).mean((2, 3))


def test_cam_uses_the_classifiers_weights() -> None:
    model, x = make(), images(3, 3, 8, 8)
    method = LayerLinearCAM(model, model.relu2)
    activations = model.relu2(model.conv2(model.relu1(model.conv1(x)))).detach()
    result = method.attribute(x, [0, 3, 1])
    expected = torch.stack(
        [(model.head.weight[t].detach()[:, None, None] * activations[i]).sum(0) for i, t in ((0, 0), (1, 3), (2, 1))]
    )
    same(result[:, 0], expected)
    score = model(x).detach()[[0, 1, 2], [0, 3, 1]]
    same(result.mean((1, 2, 3)), score - model.head.bias.detach()[[0, 3, 1]])
    same(result, one_by_one(method, x, [0, 3, 1]))
    same(result, LayerGradCam(model, model.relu2).attribute(x, [0, 3, 1]).detach() * 16)  # 16 positions
    assert hooks_on(model) == 0


@pytest.mark.parametrize("dims", [1, 3])
def test_cam_in_other_dimensions(dims: int) -> None:
    model, x = make(dims=dims), images(2, 3, *(8, 6, 10)[:dims])
    grad = LayerGradCam(model, model.relu2).attribute(x, 1).detach()
    same(LayerLinearCAM(model, model.relu2).attribute(x, 1), grad * grad[0].numel())


def test_cam_of_a_convolutional_classifier_and_a_score() -> None:
    model, x = make(Convolutional), images(2, 3, 8, 8)
    maps = model.classifier(model.conv(x)).detach() - model.classifier.bias.detach().reshape(-1, 1, 1)
    same(LayerLinearCAM(model, model.conv).attribute(x, 3), maps[:, 3:4])
    single = make(outputs=1)
    wrapped = lambda x: single(x)[:, 0]  # noqa: E731
    same(
        LayerLinearCAM(wrapped, single.relu2, classifier=single.head).attribute(x),
        LayerLinearCAM(single, single.relu2).attribute(x, 0),
    )


@pytest.mark.parametrize(
    ("build", "layer", "why"),
    [
        (FlatHead, "relu2", "no linear layer from the layer's 8 channels to the 5 outputs"),
        (Net, "conv2", "its Linear of that size does not give the output"),
        (lambda: Convolutional(nn.ReLU()), "conv", "its Conv2d of that size does not give the output"),
    ],
)
def test_cam_rejects_other_networks_and_says_why(build: Any, layer: str, why: str) -> None:
    model = make(build)
    with pytest.raises(ValueError, match=f"global average pooling.*{why}"):
        LayerLinearCAM(model, getattr(model, layer)).attribute(images(2, 3, 8, 8), 1)
    assert hooks_on(model) == 0


def test_cam_needs_to_know_the_classifier() -> None:
    model = make()
    with pytest.raises(ValueError, match="classifier must be given"):
        LayerLinearCAM(lambda x: model(x), model.relu2)
    with pytest.raises(TypeError, match="classifier must be a linear layer"):
        LayerLinearCAM(model, model.relu2, classifier=model.conv1)
    x = images(2, 3, 8, 8)
    given = LayerLinearCAM(lambda x: model(x), model.relu2, classifier=model.head).attribute(x, 1)
    same(given, LayerLinearCAM(model, model.relu2).attribute(x, 1))
    for target in (None, "cat", [0]):
        with pytest.raises(AssertionError):
            LayerLinearCAM(model, model.relu2).attribute(x, target)


def test_cam_under_autocast_and_example_by_example() -> None:
    class Half(Net):
        def forward(self, x: Tensor) -> Tensor:
            features = self.relu2(self.conv2(self.relu1(self.conv1(x))))
            with torch.autocast("cpu", torch.bfloat16):
                return self.head(self.pool(features).flatten(1))

    model, plain, x = make(Half), make(), images(2, 3, 8, 8)
    found = LayerLinearCAM(model, model.relu2).attribute(x, 1)
    same(found, LayerLinearCAM(plain, plain.relu2).attribute(x, 1))

    class Clamped(Net):
        def forward(self, x: Tensor) -> Tensor:
            features = self.relu2(self.conv2(self.relu1(self.conv1(x))))
            return self.head(self.pool(features.clamp(max=2)).flatten(1))

    model, x = make(Clamped), images(2, 3, 8, 8) * torch.tensor([1e-2, 1e3]).reshape(2, 1, 1, 1)
    assert LayerLinearCAM(model, model.relu2).attribute(x[:1], 1).isfinite().all()
    for given in (x, x[1:]):
        with pytest.raises(ValueError, match="CAM needs"):
            LayerLinearCAM(model, model.relu2).attribute(given, 1)


def test_no_accelerator_is_asked_for_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """``current_accelerator`` raises an error there in torch 2.6, and returns None in later releases."""

    def none_available() -> None:
        raise RuntimeError("Cannot access accelerator device when none is available.")

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", none_available)
    assert callers_autocast() == ()
    with torch.autocast("cpu", torch.bfloat16):
        assert callers_autocast() == (("cpu", torch.bfloat16),)


def test_an_integral_needs_its_steps() -> None:
    """The trapezoidal rule has a step at either end."""
    model = make()
    for n_steps, rule in ((0, "riemann_right"), (0, "gausslegendre"), (1, "riemann_trapezoid")):
        with pytest.raises(ValueError, match="n_steps"):
            LayerIntegratedGradCAM(model, model.relu2, n_steps=n_steps, rule=rule)
    assert LayerIntegratedGradCAM(model, model.relu2, n_steps=1, rule="riemann_right").n_steps == 1


def test_numbers_of_numpy_are_numbers() -> None:
    model = make()
    assert LayerSSCAM(model, model.relu2, n_samples=np.int64(3), stdevs=np.float32(0.5)).n_samples == 3
    for wrong in (3.0, True, "3"):
        with pytest.raises(ValueError, match="n_samples"):
            LayerSSCAM(model, model.relu2, n_samples=wrong)


# ---------------------------------------------------------------------------------------------------------------- RISE


def test_rise_is_an_input_attribution() -> None:
    model, x = make(), images(3, 3, 8, 9)
    rise = RISE(model, n_masks=40, grid_size=3)
    result = rise.attribute(x, [0, 3, 1])
    assert result.shape == x.shape
    assert (result[:, :1] == result).all(), "all channels are identical"
    assert result.is_contiguous()
    alone = torch.cat([rise.attribute(x[[i]], t) for i, t in enumerate((0, 3, 1))])
    same(result, alone)
    for chunk in (1, 3, 7, 1000):
        same(rise.attribute(x, [0, 3, 1], perturbations_per_eval=chunk), alone)
    assert not torch.allclose(result, RISE(model, n_masks=40, grid_size=3, seed=1).attribute(x, [0, 3, 1]))
    assert infidelity(model, lambda t: (torch.full_like(t, 0.1), t - 0.1), x, result, target=1).isfinite().all()
    zero_noise = NoiseTunnel(rise).attribute(x, nt_samples=2, stdevs=0.0, target=[0, 3, 1])
    same(zero_noise, result)


def test_rise_of_several_inputs_and_errors() -> None:
    model, x = make(TwoInputs), (images(2, 3, 8, 8), images(2, 3, 12, 12), images(2, 5))
    found = RISE(model, n_masks=20).attribute(x, 1)
    assert isinstance(found, tuple)
    assert [f.shape for f in found] == [t.shape for t in x]
    assert found[0].abs().sum() > 0
    assert found[1].abs().sum() > 0
    assert (found[2] == 0).all()
    only = RISE(model, n_masks=20).attribute(x, 1, mask_inputs=[1])
    assert (only[0] == 0).all()
    assert only[1].abs().sum() > 0
    plain = make()
    with pytest.raises(ValueError, match="inputs: there is nothing to mask"):
        RISE(lambda x: x).attribute(images(2, 5), 1)
    for target in (None, [0, 1], torch.tensor([1, 2])):
        with pytest.raises(AssertionError):
            RISE(plain, n_masks=20).attribute(images(3, 3, 8, 8), target, perturbations_per_eval=2)
    for name, value in {"n_masks": 0, "grid_size": 1.5, "probability": 0, "seed": -1, "score_fn": "logit"}.items():
        with pytest.raises(ValueError, match=name):
            RISE(plain, **{name: value})
    with pytest.raises(ValueError, match="probability"):
        RISE(plain, probability=1.5)
    with pytest.raises(TypeError, match="forward_func"):
        RISE(3)


def test_rise_costs_its_masks_and_keeps_few_in_memory() -> None:
    counted = Counter(make())
    RISE(counted, n_masks=50).attribute(images(2, 3, 8, 8), 1, perturbations_per_eval=4)
    assert counted.rows == 2 + 2 * 50
    assert counted.largest == 8


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_rise_restores_all_state(dims: int) -> None:
    model, x = make(dims=dims), images(2, 3, *(8, 6, 10)[:dims])
    state, rise = torch.get_rng_state(), RISE(model, n_masks=10)
    expected = rise.attribute(x, 1)
    assert torch.equal(torch.get_rng_state(), state)
    same(pickle.loads(pickle.dumps(rise)).attribute(x, 1), expected)
    with torch.inference_mode():
        same(copy.deepcopy(rise).attribute(x.clone(), 1), expected)
    with torch.device("meta"):
        same(rise.attribute(x, 1), expected)
    assert rise.get_name() == "RISE"


# -------------------------------------------------------------------------------------------------------------- guided


def test_guided_fusion_is_captums_guided_grad_cam_with_another_map() -> None:
    model, x = make(), images(2, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # captum's warnings
        expected = GuidedGradCam(model, model.relu2).attribute(x, [1, 3], interpolate_mode="bilinear").detach()
    same(
        GuidedFusionCAM(model, model.relu2, layer_method=LayerGradCam(model, model.relu2)).attribute(x, [1, 3]),
        expected,
    )
    fused = LayerFusionCAM(model, model.relu2).attribute(x, [1, 3])
    guided = GuidedFusionCAM(model, model.relu2).attribute(x, [1, 3])
    assert guided.shape == x.shape
    assert torch.equal(guided == 0, (guided == 0) | (fused == 0).expand_as(guided)), (
        "the attribution is 0 where the map is"
    )
    assert not torch.allclose(guided, expected, atol=1e-6)
    assert hooks_on(model) == 0
    assert not x.requires_grad


def test_guided_fusion_of_several_inputs_and_errors() -> None:
    model, x = make(TwoInputs), (images(2, 3, 8, 8), images(2, 3, 12, 12), images(2, 5))
    found = GuidedFusionCAM(model, model.relu2).attribute(x, 1)
    assert [f.shape for f in found] == [t.shape for t in x]
    assert (found[2] == 0).all()
    assert all(f.abs().sum() > 0 for f in found[:2])
    kwargs = GuidedFusionCAM(model, model.relu2).attribute(x, 1, layer_kwargs={"perturbations_per_eval": 2})
    same(kwargs, found)
    with pytest.raises(TypeError, match="method must be a layer attribution"):
        GuidedFusionCAM(model, model.relu2, layer_method=RISE(model))
    with pytest.raises(ValueError, match="layer must be the layer that layer_method explains"):
        GuidedFusionCAM(model, model.relu1, layer_method=LayerGradCam(model, model.relu2))
    with pytest.raises(ValueError, match="method must return one tensor, not a tuple"):
        GuidedFusionCAM(model, model.relu2).attribute(x, 1, layer_kwargs={"return_details": True})
    with pytest.raises(ValueError, match="inputs must be floating point"):
        GuidedFusionCAM(model, model.relu2).attribute((*x[:2], torch.ones(2, 5, dtype=torch.long)), 1)
    single = make(outputs=1)
    assert GuidedFusionCAM(single, single.relu2, score_fn="sigmoid").attribute(x[0], 0).isfinite().all()
    with pytest.raises(TypeError, match="model must be"):
        GuidedFusionCAM(lambda x: x, model.relu2)
    plain = make()
    with pytest.raises(AssertionError):
        GuidedFusionCAM(plain, plain.relu2).attribute(x[0], None)
    assert hooks_on(plain) == 0


# --------------------------------------------------------------------------------------------------- layers and options


def test_layer_cam_of_several_layers() -> None:
    model, x = make(FlatHead), images(2, 3, 8, 8)
    early, last = (LayerLayerCAM(model, layer).attribute(x, 1) for layer in (model.relu1, model.relu2))
    last = nn.functional.interpolate(last, (8, 8), mode="bilinear")
    share = [m / m.amax((1, 2, 3), keepdim=True) for m in (early, last)]
    expected = torch.maximum(torch.tanh(3 * share[0]), share[1])
    low, high = expected.amin((1, 2, 3), keepdim=True), expected.amax((1, 2, 3), keepdim=True)
    fused = LayerLayerCAM(model, [model.relu1, model.relu2], gamma=3.0).attribute(x, 1)
    same(fused, (expected - low) / (high - low))
    with pytest.raises(ValueError, match="gamma"):
        LayerLayerCAM(model, model.relu2, gamma=0)


def test_methods_of_several_layers_as_components() -> None:
    model, x = make(FlatHead), images(2, 3, 8, 8)
    layers = [model.relu1, model.relu2]
    integrative = LayerIntegrativeCAM(model, layers)
    expected = integrative.attribute(x, [1, 2])
    _, details = LayerFusionCAM(model, model.relu2, None, integrative).attribute(x, [1, 2], return_details=True)
    same(details.gradient_map, expected)
    both = LayerFusionCAM(model, layers, None, integrative).attribute(x, [1, 2], return_details=True)
    for _, found in both:
        same(found.gradient_map, expected)


def test_methods_of_several_layers_on_a_layer_of_several_tensors() -> None:
    model, x = make(TupleLayer), images(2, 3, 8, 8)
    for layer in (model.branches, [model.branches]):
        for kind in (LayerIntegrativeCAM, LayerLayerCAM):
            fusion = LayerFusionCAM(model, layer, None, kind(model, layer))
            found = fusion.attribute(x, 1)
            found = found[0] if isinstance(found, list) else found
            assert [tensor.shape for tensor in found] == [(2, 1, 8, 8)] * 2


class Given(Attribution):
    """An attribution that returns a given map."""

    def __init__(self, model: Any, given: Tensor) -> None:
        super().__init__(model)
        self.given = given

    def attribute(self, inputs: Tensor) -> Tensor:
        return self.given


def test_consensus_of_three_methods_by_hand() -> None:
    x = torch.ones(1, 1, 2)
    model = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(2, 1, bias=False), nn.Flatten(0)).eval()
    with torch.no_grad():
        model[2].weight.copy_(torch.tensor([[1.0, 3.0]]))  # the score of a mask is m1 + 3 m2
    maps = [torch.tensor([[values]]) for values in ([1.0, 0.0], [0.0, 1.0], [1.0, 0.0])]
    fusion = LayerFusionCAM.consensus(model, model[0], [Given(model, m) for m in maps], theta=0.0, score_fn="identity")
    # [1, 0] scores 1 and [0, 1] scores 3. Union: weights 1/4, 3/4; N([1/4, 3/4]) = [0, 1], which scores 3 as well.
    # P = Q = [0, 1] / 2, so that the first fusion is [0, 1].
    # Third map: scores 3 and 1, weights 3/4, 1/4; N([1/4, 3/4]) = [0, 1]. P = 3/4 [0, 1], Q = 1/4 [1, 0].
    # s = 1 - [1/4, 3/4]; s max + (1 - s) mean = [3/4 * 1/4 + 1/4 * 1/8, 1/4 * 3/4 + 3/4 * 3/8] = [7/32, 15/32].
    attribution, details = fusion.attribute(x, return_details=True)
    same(details.gradient_map, torch.tensor([[[0.0, 1.0]]]))
    same(details.fusion_weights, torch.tensor([[0.75, 0.25]]))
    same(details.similarity_map, torch.tensor([[[0.75, 0.25]]]))
    same(attribution, torch.tensor([[[0.0, 1.0]]]))


def test_consensus_of_two_methods_is_their_fusion_and_three_cost_three_samples_more() -> None:
    model, x = make(FlatHead), images(2, 3, 8, 8)
    counted = Counter(model)
    kinds = (LayerHiResCAM, LayerEigenCAM, LayerLayerCAM)
    first, second, third = (kind(counted, model.relu2) for kind in kinds)
    both = LayerFusionCAM(counted, model.relu2, None, first, second, theta=30.0).attribute(x, [1, 2])
    two = counted.rows
    same(LayerFusionCAM.consensus(counted, model.relu2, [first, second], theta=30.0).attribute(x, [1, 2]), both)
    counted.rows = 0
    outer = LayerFusionCAM(counted, model.relu2, None, Given(counted, both), third, theta=0.0).attribute(x, [1, 2])
    counted.rows = 0
    same(LayerFusionCAM.consensus(counted, model.relu2, [first, second, third], theta=30.0).attribute(x, [1, 2]), outer)
    assert counted.rows == two + 3 * len(x)
    with pytest.raises(ValueError, match="at least two attributions, not 1"):
        LayerFusionCAM.consensus(model, model.relu2, [first])
    with pytest.raises(TypeError, match=r"methods\[1\] must be an object with an attribute method"):
        LayerFusionCAM.consensus(model, model.relu2, [first, LayerLayerCAM])
    with pytest.raises(TypeError, match="gradient_method"):
        LayerFusionCAM.consensus(model, model.relu2, [first, second], gradient_method=first)


def test_integrative_cam_costs_one_pass() -> None:
    model, x = make(FlatHead), images(2, 3, 8, 8)
    backward: list[int] = []
    model.head.register_full_backward_hook(lambda module, given, found: backward.append(found[0].shape[0]))
    counted = Counter(model)
    LayerIntegrativeCAM(counted, [model.conv1, model.relu1, model.conv2, model.relu2]).attribute(x, 1)
    assert counted.rows == 2
    assert backward == [2]
    LayerIntegrativeCAM(counted, [model.relu1, model.relu2], phi="softmax", softmax_classes=3).attribute(x, 1)
    assert counted.rows == 2 + 2 + 2 * 3


def test_integrative_details_and_errors() -> None:
    model, x = make(FlatHead), images(2, 3, 8, 8)
    method = LayerIntegrativeCAM(model, [model.relu1, model.relu2, model.relu2], redundancy_threshold=1e-3)
    result, details = method.attribute(x, 1, return_details=True)
    assert details.layer_maps.shape == (2, 3, 8, 8)
    assert (details.kept.sum(1) == 2).all(), "the same layer twice is redundant"
    same(details.layer_weights.sum(1), torch.ones(2))
    plain = LayerIntegrativeCAM(model, [model.relu1, model.relu2]).attribute(x, 1)
    assert result.shape == plain.shape == (2, 1, 8, 8)
    for name, value in {
        "phi": "cosine",
        "bias": "all",
        "layer_weighting": "sum",
        "balance": 1.5,
        "redundancy_threshold": -1,
        "softmax_classes": 1,
    }.items():
        with pytest.raises(ValueError, match=name):
            LayerIntegrativeCAM(model, model.relu2, **{name: value})
    with pytest.raises(TypeError, match="phi"):
        LayerIntegrativeCAM(model, model.relu2, phi=3)
    with pytest.raises(ValueError, match="phi must return a tensor of the scores' shape"):
        LayerIntegrativeCAM(model, model.relu2, phi=lambda s: s.sum()).attribute(x, 1)
    scalar = make(Score)
    with pytest.raises(ValueError, match=r"phi=\"softmax\" needs an output of shape"):
        LayerIntegrativeCAM(scalar, scalar.relu2, phi="softmax").attribute(x)
    with pytest.raises(ValueError, match="bias: ReLU contains no convolution"):
        LayerIntegrativeCAM(model, model.relu2, bias="layer").attribute(x, 1)


def test_biases_of_layers() -> None:
    """The bias of a convolution and the batch norm after it is their output for a zero input."""

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stage = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6))
            self.head = nn.Linear(6 * 64, 5)
            norm = self.stage[1]
            for tensor in (norm.running_mean, norm.weight.data, norm.bias.data):
                tensor.normal_()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.stage(x).relu().flatten(1))

    model, x = make(Stage), images(2, 3, 8, 8)
    from captum_fusion.attr.integrative import _layer_bias

    same(_layer_bias(model.stage, 6), model.stage(torch.zeros(1, 3, 8, 8))[0, :, 4, 4].detach())
    none, layer, full = (
        LayerIntegrativeCAM(model, model.stage, bias=b).attribute(x, 1) for b in ("none", "layer", "fullgrad")
    )
    assert not torch.allclose(none, full, atol=1e-3)
    assert layer.isfinite().all()


def test_eigen_cam_needs_no_target() -> None:
    model, x = make(), images(3, 3, 8, 8)
    method = LayerEigenCAM(model, model.relu2)
    same(method.attribute(x), method.attribute(x, [0, 3, 1]))
    assert (method.attribute(x).sum((1, 2, 3)) > 0).all()
    with pytest.raises(AssertionError):
        method.attribute(x, [0, 1])


@pytest.mark.parametrize(
    "build",
    [
        lambda m, seed: LayerSmoothGradCAMPlusPlus(m, m.relu1, seed=seed),
        lambda m, seed: LayerSSCAM(m, m.relu2, n_samples=5, seed=seed),
        lambda m, seed: captum_fusion.LayerShapCAM(m, m.relu2, n_samples=3, seed=seed),
        lambda m, seed: LayerAugmentedGradCAM(m, m.relu2, n_samples=5, combination="mean", seed=seed),
        lambda m, seed: RISE(m, n_masks=20, seed=seed),
    ],
)
def test_seeds(build: Any) -> None:
    model, x = make(FlatHead), images(3, 3, 8, 8)
    state = torch.get_rng_state()
    first = build(model, 0).attribute(x, 1)
    torch.manual_seed(12345)
    same(build(model, 0).attribute(x, 1), first, tolerance=2e-6)
    assert not torch.allclose(build(model, 1).attribute(x, 1), first, atol=1e-6), "another seed gives other samples"
    twice = build(model, 0).attribute(x[[1, 1]], 1)
    same(twice[0], twice[1], tolerance=1e-6)
    torch.set_rng_state(state)


def test_ss_cam_without_noise_is_is_cam_of_one_step() -> None:
    model, x = make(), images(2, 3, 8, 8)
    expected = LayerISCAM(model, model.relu2, n_steps=1).attribute(x, [1, 3])
    same(LayerScoreCAM(model, model.relu2, weighting="probability").attribute(x, [1, 3]), expected)
    softmax = LayerScoreCAM(model, model.relu2).attribute(x, [1, 3])
    same(LayerISCAM(model, model.relu2, n_steps=1, weighting="softmax").attribute(x, [1, 3]), softmax)
    noiseless = LayerSSCAM(model, model.relu2, stdevs=0.0, n_samples=2, weighting="softmax")
    same(noiseless.attribute(x, [1, 3]), softmax)
    weights = LayerScoreCAM(model, model.relu2, weighting="increase", score_fn=lambda o: o.softmax(1)).attribute(
        x, [1, 3]
    )
    assert not torch.allclose(weights, expected, atol=1e-4), "no baseline is subtracted"
    for noise in ("map", "input"):
        same(LayerSSCAM(model, model.relu2, stdevs=0.0, noise=noise, n_samples=2).attribute(x, [1, 3]), expected)


def test_authors_ss_cam_scales_its_noise() -> None:
    model, x = make(), images(2, 3, 8, 8)
    activations = model.relu2(model.conv2(model.relu1(model.conv1(x)))).detach()
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    expected = torch.zeros(2, 1, 4, 4)
    for n, target in enumerate((1, 3)):
        for k in range(8):
            raised = nn.functional.interpolate(activations[n : n + 1, k : k + 1], (8, 8), mode="bilinear")
            if raised.max() == raised.min():
                continue
            deviation = (0.5 / (raised.max() - raised.min())) ** 2
            with torch.no_grad():
                weight = model(x[n] * (raised + deviation * noise)).softmax(1)[:, target].mean()
            expected[n] += weight * activations[n, k]
    method = LayerSSCAM(model, model.relu2, n_samples=4, stdevs=0.5, authors_code=True, seed=7)
    same(method.attribute(x, [1, 3]), expected)


@pytest.mark.parametrize("noise", ["map", "input"])
def test_authors_ss_cam_in_half_precision(noise: str) -> None:
    """The published standard deviation grows without bound for maps of small range."""
    model, x = make().half(), images(2, 3, 8, 8).half()
    with torch.no_grad():
        model.conv2.weight *= 0.01
    found = LayerSSCAM(model, model.relu2, n_samples=3, authors_code=True, noise=noise).attribute(x, [1, 3])
    assert found.isfinite().all()


def test_augmented_grad_cam_without_augmentation_is_grad_cam() -> None:
    model, x = make(FlatHead), images(2, 3, 8, 8)
    cam = LayerGradCam(model, model.relu2).attribute(x, 1, relu_attributions=True).detach()
    expected = functional.normalize(functional.upsample(cam, (8, 8)))
    for combination in ("mean", "max"):
        method = LayerAugmentedGradCAM(model, model.relu2, n_samples=3, rotation=0, shift=0, combination=combination)
        same(method.attribute(x, 1), expected)
    solved = LayerAugmentedGradCAM(model, model.relu2, n_samples=3, rotation=0, shift=0, n_iterations=2000)
    coarse = nn.functional.avg_pool2d(solved.attribute(x, 1), 2)
    similar = nn.functional.cosine_similarity(coarse.flatten(1), cam.flatten(1))
    assert (similar > 0.999).all(), "the mean over each cell gives the coarse map"


def test_augmented_grad_cam_moves_maps_back() -> None:
    """For a network that detects a bright spot, the maps of transformed copies agree on its position."""

    class Spot(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.AvgPool2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).sum((2, 3))

    x = torch.zeros(1, 1, 48, 64)
    x[..., 12:20, 40:48] = 1
    model = Spot().eval()
    for combination in ("mean", "max", "super_resolution"):
        method = LayerAugmentedGradCAM(model, model.layer, combination=combination, n_samples=20, rotation=0.6)
        found = method.attribute(x, 0)
        row, column = divmod(int(found.flatten().argmax()), 64)
        assert 12 <= row < 20, combination
        assert 40 <= column < 48, combination
        assert found[..., 12:20, 40:48].mean() > 6 * found.mean()
        if combination != "super_resolution":  # its map is not exactly 0 outside the spot
            weights = found[0, 0] / found.sum()
            assert abs(weights.sum(1) @ torch.arange(48.0) - 15.5) < 0.5
            assert abs(weights.sum(0) @ torch.arange(64.0) - 43.5) < 0.5


def test_augmented_copies_are_turned_and_moved_within_the_limits() -> None:
    """The first copy is the picture; the others are spread over both directions up to the limits."""

    class Seen(Net):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach())
            return super().forward(nn.functional.adaptive_avg_pool2d(x, 8))

    model, line = make(Seen), torch.arange(64.0) - 31.5
    spot = (-((line[:, None] - 0.0).square() + (line - 16).square()) / 8).exp()  # 16 pixels to the right of the centre
    x = spot.expand(1, 3, 64, 64)
    angles, shifts = [], []
    for rotation, shift in ((0.5, 0.0), (0.0, 0.2)):
        seen: list[Tensor] = []
        method = LayerAugmentedGradCAM(
            model, model.relu2, n_samples=30, rotation=rotation, shift=shift, combination="mean"
        )
        method.attribute(x, 1, perturbations_per_eval=10)
        copies = torch.cat(seen[1:])[:, 0]  # after the clean pass
        assert len(copies) == 30
        same(copies[0], x[0, 0])
        across, down = ((copies * grid).sum((1, 2)) / copies.sum((1, 2)) for grid in (line, line[:, None]))
        angles.append(torch.atan2(down, across)[1:])
        shifts.append(torch.stack([across - 16, down], 1)[1:] / 64)
    for found, limit in ((angles[0], 0.5), (shifts[1][:, 0], 0.2), (shifts[1][:, 1], 0.2)):
        assert 0.7 * limit < float(found.max()) < 1.02 * limit
        assert 0.7 * limit < float(-found.min()) < 1.02 * limit


def test_group_cam_on_a_network_with_dead_groups() -> None:
    model, x = make(), images(2, 3, 8, 8)
    with torch.no_grad():
        model.conv2.weight[:4] = 0
        model.conv2.bias[:4] = -1
    counted = Counter(model)
    result = LayerGroupCAM(counted, model.relu2, groups=4).attribute(x, 1)
    assert result.isfinite().all()
    assert counted.rows <= 2 + 2 + 2 * 2, "clean, blurred, and two live groups"


# ----------------------------------------------------------------------------------------------------------- catalogue


def test_the_catalogue_names_every_public_method() -> None:
    public = {value for value in vars(captum_fusion).values() if inspect.isclass(value)}
    public -= {
        captum_fusion.FusionDetails,
        captum_fusion.IntegrativeDetails,
        captum_fusion.RegressionDetails,
        captum_fusion.SavedWork,
        captum_fusion.SearchDetails,
    }
    assert {method.cls for method in METHODS.values()} == {*public, LayerGradCam}
    for method in METHODS.values():
        assert method.cls is LayerGradCam or method.info.url in inspect.getdoc(method.cls), method.name


@pytest.mark.parametrize("name", METHODS)
def test_the_catalogue_states_the_cost_of_a_method(name: str) -> None:
    model, x = make(), images(1, 3, 8, 8)
    live = int(functional.live_channels(model.relu2(model.conv2(model.relu1(model.conv1(x)))).detach()).sum())
    backward: list[int] = []
    below: list[int] = []
    above: list[int] = []
    model.conv1.register_forward_hook(lambda module, inputs, output: below.append(len(output)))
    model.head.register_forward_hook(lambda module, inputs, output: above.append(len(output)))
    model.head.register_full_backward_hook(lambda module, given, found: backward.append(len(found[0])))
    method = METHODS[name].build(model, [model.relu2])
    method.attribute(x, 1)
    cost = {"": 0, " b": 0, " (layer)": 0}
    for part in METHODS[name].info.cost.split(", "):
        kind = next((suffix for suffix in (" b", " (layer)") if part.endswith(suffix)), "")
        product = re.sub(r"(\d) (?=[K(])", r"\1 * ", part.removesuffix(kind))
        cost[kind] = eval(product, {}, {"K": live, "Z": 16})
    whole, back, at_layer = cost.values()
    assert sum(backward) == back
    if at_layer:
        assert sum(above) <= whole + at_layer
        assert sum(above) >= whole + at_layer - 1
        assert sum(below) < sum(above)
    elif name in ("group-cam", "decom-cam"):
        assert sum(above) <= whole, "fewer groups or components than the maximum"
    else:
        assert sum(above) == whole


# ------------------------------------------------------------------------------------------- simple re-implementations


def test_fd_cam_by_loops() -> None:
    """Each channel's group of similar channels is switched on and off, one model call at a time."""
    model, x = make(FlatHead).double(), images(2, 3, 8, 8).double()
    with torch.no_grad():
        model.conv2.weight[2] = 0
        model.conv2.bias[2] = -1  # a dead channel, whose group is empty
    after = nn.Sequential(nn.Flatten(), model.head)
    for threshold in (0.5, 0.95):
        found = LayerFDCAM(model, model.relu2, threshold=threshold).attribute(x, [1, 3])
        for n, target in enumerate((1, 3)):
            activations = model.relu2(model.conv2(model.relu1(model.conv1(x[n : n + 1])))).detach().requires_grad_()
            (gradient,) = torch.autograd.grad(after(activations)[0, target], activations)
            gradient, features = gradient[0].mean((1, 2)).numpy(), activations.detach()[0].flatten(1).numpy()
            with np.errstate(invalid="ignore"):
                cosine = features @ features.T / np.outer(*[np.linalg.norm(features, axis=1)] * 2)
            cosine = np.nan_to_num(cosine)
            scores = []
            for k in range(8):
                group = torch.from_numpy(cosine[k] > np.quantile(cosine[k], threshold))[:, None, None]
                with torch.no_grad():
                    on, all_, off = (
                        after(activations * mask)[0, target] for mask in (group, torch.ones(8, 1, 1), ~group)
                    )
                scores.append(float(on + all_ - off))
            score = (np.array(scores) - min(scores)) / (max(scores) - min(scores))
            weights = np.exp(score) * (gradient - gradient.min()) / (gradient.max() - gradient.min()) - 0.5
            expected = np.maximum((weights[:, None] * features).sum(0), 0).reshape(4, 4)
            assert expected.max() > 0
            np.testing.assert_allclose(found[n, 0].numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("weighting", ["scaled", "softmax"])
def test_decom_cam_by_scikit_learn(weighting: str) -> None:
    decomposition = pytest.importorskip("sklearn.decomposition")
    model, x = make(FlatHead).double(), images(2, 3, 8, 8).double()
    targets, channels, components = [1, 3], 6, 4
    method = LayerDecomCAM(
        model, model.relu2, channels=channels, components=components, score_fn="softmax", weighting=weighting
    )
    found = method.attribute(x, targets)
    blurred = functional.gaussian_blur(x, 81, 10.0)
    after = nn.Sequential(nn.Flatten(), model.head)
    for n, target in enumerate(targets):
        activations = model.relu2(model.conv2(model.relu1(model.conv1(x[n : n + 1])))).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(after(activations)[0, target], activations)
        alpha = gradient[0].mean((1, 2))
        best = alpha.argsort(descending=True)[:channels]
        table = (alpha[best, None] * activations.detach()[0, best].flatten(1)).T.numpy()
        projected = decomposition.PCA(components).fit_transform(table)
        projected = projected * np.sign(projected[np.abs(projected).argmax(0), range(components)])
        maps = torch.from_numpy(np.maximum(projected, 0).T.reshape(components, 1, 4, 4))
        raised = nn.functional.interpolate(maps, (8, 8), mode="bicubic", align_corners=False).relu()
        low, high = raised.amin((1, 2, 3), keepdim=True), raised.amax((1, 2, 3), keepdim=True)
        masks = (raised - low) / (high - low)
        with torch.no_grad():
            samples = torch.maximum(x[n] * masks, blurred[n] * (1 - masks))
            scores = model(samples).softmax(1)[:, target]
            behind = model(blurred[n : n + 1]).softmax(1)[:, target]
        if weighting == "scaled":
            weights = torch.where(scores < 1e-3, 0.0, scores) / scores.max()
        else:
            weights = (scores - behind) * (scores - behind).softmax(0)
        expected = (maps[:, 0] * weights[:, None, None]).sum(0).relu()
        torch.testing.assert_close(found[n, 0], expected, rtol=1e-9, atol=1e-9)
    assert found.max() > 0


@pytest.mark.parametrize("noise", ["map", "input"])
def test_ss_cam_by_loops(noise: str) -> None:
    model, x = make().double(), images(2, 3, 8, 8).double()
    method = LayerSSCAM(model, model.relu2, n_samples=3, stdevs=0.7, noise=noise, seed=5)
    found = method.attribute(x, [1, 3])
    shape = (1, 8, 8) if noise == "map" else (3, 8, 8)
    draws = torch.randn(3, *shape, generator=torch.Generator().manual_seed(5)).double()
    activations = model.relu2(model.conv2(model.relu1(model.conv1(x)))).detach()
    for n, target in enumerate((1, 3)):
        expected = torch.zeros(4, 4).double()
        for k in range(8):
            mask = nn.functional.interpolate(activations[n : n + 1, k : k + 1], (8, 8), mode="bilinear")
            if mask.max() == mask.min():
                continue
            mask = (mask - mask.min()) / (mask.max() - mask.min())
            for draw in draws:
                shown = x[n] * (mask + 0.7 * draw) if noise == "map" else x[n] * mask + 0.7 * draw
                with torch.no_grad():
                    expected += model(shown).softmax(1)[0, target] / 3 * activations[n, k]
        torch.testing.assert_close(found[n, 0], expected.relu(), rtol=1e-9, atol=1e-9)


def test_clusters_are_groups_of_similar_maps() -> None:
    """Compared with scikit-learn's k-means from the same centres, and with known patterns."""
    cluster = pytest.importorskip("sklearn.cluster")
    patterns = torch.rand(4, 36, generator=torch.Generator().manual_seed(0))
    which = torch.arange(24) % 4
    noise = 0.02 * torch.rand(2, 24, 36, generator=torch.Generator().manual_seed(1))
    maps = (3 * patterns[which] + noise).reshape(2, 24, 6, 6)
    labels = functional.cluster_channels(maps, 4)
    for n in range(2):
        assert len({(int(a), int(b)) for a, b in zip(labels[n], which, strict=True)}) == 4, "one cluster per pattern"
    activations = images(1, 20, 5, 5, seed=3).relu()
    normal = functional.normalize(activations.flatten(0, 1).flatten(1)).double().numpy()
    own = functional.cluster_channels(activations, 5, iterations=100)[0].numpy()
    centres = np.stack([normal[own == group].mean(0) for group in range(5)])
    theirs = cluster.KMeans(5, init=centres, n_init=1).fit(normal).labels_
    assert (own == theirs).all(), "a fixed point of Lloyd's algorithm"


def test_components_of_two_positions_are_positive_at_the_first() -> None:
    """Their two values are opposite, and rounding does not choose the sign."""
    activations = torch.randn(50, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first, second = functional.principal_components(activations, 1)[:, 0].unbind(1)
    half = (activations[..., 0] - activations[..., 1]).norm(dim=1) / 2
    torch.testing.assert_close(first, half)
    torch.testing.assert_close(second, -half)
