"""Edge cases: unusual inputs give a documented result, invalid ones a clear error."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import (
    GuidedGradCam,
    IntegratedGradients,
    LayerActivation,
    LayerGradCam,
    NoiseTunnel,
    Occlusion,
    Saliency,
)
from torch import Tensor, nn

from captum_fusion import (
    LayerAblationCAM,
    LayerAugmentedGradCAM,
    LayerDecomCAM,
    LayerFDCAM,
    LayerFusionCAM,
    LayerReciproCAM,
    LayerRegressionCAM,
    LayerScoreCAM,
    LayerShapCAM,
    LayerUnionCAM,
    LayerXGradCAM,
)
from captum_fusion.attr._bases import MaskedCAM
from tests.classes import BLUR, FUSIONS, INPUT_SPACE, masks_input, options, takes, with_baselines
from tests.networks import Counter, DictLayer, FlatHead, Net, Score, TupleLayer, Views, hooks_on, images, make
from tests.test_contract import same

# --------------------------------------------------------------------------------------------------- documented results


def test_zero_input_equals_its_baseline(cls: Any) -> None:
    model = make()
    assert cls(model, model.relu2).attribute(torch.zeros(2, 3, 8, 8), 1).isfinite().all()
    if cls is LayerFusionCAM:
        _, details = cls(model, model.relu2).attribute(torch.zeros(2, 3, 8, 8), 1, return_details=True)
        assert (details.gradient_contribution == 0).all()
        assert (details.union_weights == 0.5).all(), "equal if both contributions are 0"


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_dead_layer_gives_zeros(cls: Any, value: float) -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
            nn.init.zeros_(self.conv.weight)
            nn.init.constant_(self.conv.bias, value)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x).mean((2, 3)))

    model = make(Dead)
    counted = Counter(model)
    result = cls(counted, model.conv).attribute(images(2, 3, 8, 8), [0, 1])
    assert result.isfinite().all()
    if cls is LayerRegressionCAM:
        assert (result == 0).all(), "the scores of all masks are the same"
    elif cls in FUSIONS or issubclass(cls, MaskedCAM):
        assert (result == 0).all(), "a constant channel cannot mask"
        assert counted.rows <= 2 * 5, "dead channels take no masked sample"
    elif value == 0 and cls is not LayerReciproCAM:
        assert (result == 0).all(), "without activations there is no attribution"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapley_values_of_a_score_that_does_not_change_are_zero(dtype: torch.dtype) -> None:
    """Rounding noise of the scores would be shown as a map once it is normalised."""
    model = make(FlatHead).to(dtype)
    with torch.no_grad():
        model.conv1.weight.zero_()  # every position has its channel's mean, by which Shap-CAM replaces it
        model.head.weight.mul_(20)
    method, x = LayerShapCAM(model, model.relu1), images(2, 3, 8, 8).to(dtype)
    assert (method.attribute(x, [0, 3]) == 0).all()
    assert (method.attribute(x, [0, 3], baselines=0) != 0).any()


def test_one_dead_example_among_live_ones(cls: Any) -> None:
    model, x = make(), images(3, 3, 8, 8)
    with torch.no_grad():
        model.conv2.bias.zero_()
        model.conv1.bias.zero_()
    x[1] = 0
    result = cls(model, model.relu2).attribute(x, [0, 1, 2])
    assert (result[1] == 0).all() or cls is LayerReciproCAM
    same(result[[0, 2]], cls(model, model.relu2).attribute(x[[0, 2]], [0, 2]))


class NegativeContributions(Net):
    """Any visible part of a positive input lowers the score of class 0."""

    def forward(self, x: Tensor) -> Tensor:
        features = self.relu1(self.conv1(x))
        total = x.mean((1, 2, 3)) * 5 + features.mean((1, 2, 3)) * 1e-3
        return torch.stack([-total, total], 1)


def test_negative_contributions_of_both_components() -> None:
    model, x = make(NegativeContributions), images(2, 3, 8, 8).abs()
    for cls in (LayerFusionCAM, LayerUnionCAM):
        result, details = cls(model, model.relu1).attribute(x, 0, return_details=True)
        assert result.isfinite().all()
        assert (result >= 0).all()
        assert (details.region_contribution < 0).all()
        assert (details.gradient_contribution <= 0).all()
        assert (details.union_weights == 0.5).all()
    for variant in ({"weighting": "raw"}, {"authors_code": True}):
        result = LayerFusionCAM(model, model.relu1, **variant).attribute(x, 0)
        assert result.isfinite().all()


@pytest.mark.parametrize("dims", [2, 3])
def test_a_model_that_rejects_channels_last(cls: Any, dims: int) -> None:
    if cls is LayerAugmentedGradCAM and dims == 3:
        pytest.skip("for images only")

    class Channels(Views):
        def forward(self, x: Tensor) -> Tensor:
            x.view(-1)
            return super().forward(x)

    model, plain = make(Channels, dims=dims), make(dims=dims)
    x = images(2, 3, *(8,) * dims)
    with pytest.raises(RuntimeError, match="view"):
        model(x.to(memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d))
    same(cls(model, model.relu2).attribute(x, [0, 1]), cls(plain, plain.relu2).attribute(x, [0, 1]))


def test_saturated_scores_contribute_nothing() -> None:
    class Saturated(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1e-9 + torch.tensor([300.0, 0.0, 0.0, 0.0, 0.0])

    model = make(Saturated)
    _, details = LayerFusionCAM(model, model.relu2).attribute(images(3, 3, 8, 8), [0, 1, 2], return_details=True)
    assert (details.union_weights == 0.5).all()
    assert (details.fusion_weights == 0.5).all()


def test_create_graph_keeps_the_result_in_the_graph() -> None:
    model, x = make(FlatHead), images(1, 3, 8, 8)
    fusion = LayerFusionCAM(model, model.relu2)
    result = fusion.attribute(x, 1, grad_kwargs={"create_graph": True})
    assert result.requires_grad
    result.sum().backward()
    assert model.head.weight.grad is not None
    same(result.detach(), fusion.attribute(x, 1))


def test_a_head_that_squeezes_single_samples(cls: Any) -> None:
    class Squeezes(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, :1].squeeze()

    model, plain, x = make(Squeezes), make(Score), images(3, 3, 8, 8)
    same(cls(model, model.relu2).attribute(x), cls(plain, plain.relu2).attribute(x))
    same(cls(model, model.relu2).attribute(x[:1]), cls(plain, plain.relu2).attribute(x[:1]))


def test_a_network_that_squeezes_all_its_output(cls: Any) -> None:
    """A single sample gives (classes,) instead of (1, classes), in passes with gradients as well."""

    class Squeezes(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).squeeze()

    model, plain, x = make(Squeezes), make(), images(2, 3, 8, 8)
    same(cls(model, model.relu2).attribute(x, [0, 3]), cls(plain, plain.relu2).attribute(x, [0, 3]))


@pytest.mark.filterwarnings("ignore:the model is in train mode")
@pytest.mark.parametrize("live", [5, 8])
def test_a_train_mode_that_rejects_single_samples(cls: Any, live: int) -> None:
    class Refuses(Net):
        def __init__(self) -> None:
            super().__init__()
            self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8))
            with torch.no_grad():
                self.conv2.weight[live:] = 0

    model = make(Refuses).train()
    assert cls(model, model.conv2).attribute(images(3, 3, 8, 8), 1).isfinite().all()


def test_a_network_that_reuses_the_memory_of_its_output(cls: Any) -> None:
    class Reuses(Score):
        buffer = torch.zeros(4096)

        def forward(self, x: Tensor) -> Tensor:
            out = self.buffer[: x.shape[0]]
            return out.copy_(super().forward(x)) if not torch.is_grad_enabled() else super().forward(x)

    model, plain, x = make(Reuses), make(Score), images(3, 3, 8, 8)
    with torch.no_grad():
        same(cls(model, model.relu2).attribute(x), cls(plain, plain.relu2).attribute(x))


def test_a_target_made_under_inference_mode(cls: Any) -> None:
    model, x = make(), images(3, 3, 8, 8)
    with torch.inference_mode():
        target = model(x).argmax(1)
    same(cls(model, model.relu2).attribute(x, target), cls(model, model.relu2).attribute(x, target.tolist()))


@pytest.mark.parametrize(
    "baseline", [0.5, np.float32(0.5), torch.tensor(0.5), torch.full((1, 3, 1, 1), 0.5), torch.full((2, 3, 8, 8), 0.5)]
)
def test_forms_of_baselines(cls: Any, baseline: Any) -> None:
    if not masks_input(cls):
        pytest.skip("uses no baseline of the input")
    model, x, given = make(), images(2, 3, 8, 8), with_baselines(cls)
    method = cls(model, model.relu2, **given)
    result = method.attribute(x, 1, baselines=baseline)
    same(method.attribute(x, 1, baselines=None), method.attribute(x, 1))
    if issubclass(cls, LayerDecomCAM):  # its masked input is a maximum, which is not shift-invariant
        assert not torch.allclose(result, method.attribute(x, 1), atol=1e-6)
        return
    same(result, cls(lambda y: model(y + 0.5), model.relu2, **given).attribute(x - 0.5, 1))


def test_baselines_that_would_not_be_used() -> None:
    model, x = make(), images(2, 3, 8, 8)
    for cls in BLUR:
        with pytest.raises(ValueError, match=r"baselines are used only with background=\"baseline\""):
            cls(model, model.relu2).attribute(x, 1, baselines=0.5)
        for nothing in (None, 0.0, (0,)):
            same(cls(model, model.relu2).attribute(x, 1, baselines=nothing), cls(model, model.relu2).attribute(x, 1))
        # A component with a blurred background ignores the fusion's baseline, on the same layer and on others.
        maps = []
        for layer in (model.relu2, model.relu1):
            fusion = LayerFusionCAM(model, model.relu2, region_method=cls(model, layer))
            for baseline in (0, 0.3):
                maps.append(fusion.attribute(x, 1, baselines=baseline, return_details=True)[1].region_map)
            with pytest.raises(ValueError, match="baselines are used only with"):
                fusion.attribute(x, 1, region_kwargs={"baselines": 0.5})
        same(maps[0], maps[1])
        same(maps[2], maps[3])
        shown = LayerFusionCAM(model, model.relu2, region_method=cls(model, model.relu2, background="baseline"))
        same(
            shown.attribute(x, 1, baselines=0.3), shown.attribute(x, 1, region_kwargs={"baselines": 0.3}, baselines=0.3)
        )


@pytest.mark.parametrize("cls", [LayerAblationCAM, LayerReciproCAM, LayerFDCAM, LayerShapCAM])
def test_baselines_of_the_layer(cls: Any) -> None:
    class Shifted(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.relu2(self.conv2(self.relu1(self.conv1(x)))) + 0.5).mean((2, 3)))

    model, x = make(Shifted), images(2, 3, 8, 8)
    method, plain = cls(model, model.relu2), cls(model, model.relu2).attribute(x, [1, 2], baselines=0)
    number = method.attribute(x, [1, 2], baselines=0.5)
    mean = model.relu2(model.conv2(model.relu1(model.conv1(x)))).detach().mean((2, 3), keepdim=True)
    same(method.attribute(x, [1, 2], baselines="mean"), method.attribute(x, [1, 2], baselines=mean))
    same(method.attribute(x, [1, 2]), method.attribute(x, [1, 2], baselines="mean" if cls is LayerShapCAM else 0))
    assert not torch.allclose(number, plain, atol=1e-5)
    for form in (np.float64(0.5), torch.tensor(0.5), torch.full((1, 8, 1, 1), 0.5), torch.full((2, 8, 4, 4), 0.5)):
        same(method.attribute(x, [1, 2], baselines=form), number)
    same(method.attribute(x, [1, 2], baselines=None), plain)
    for wrong in (torch.zeros(3, 8, 4, 4), (0, 0), "black"):
        with pytest.raises(ValueError, match="baselines"):
            method.attribute(x, [1, 2], baselines=wrong)
    with pytest.raises(TypeError, match="baselines"):
        method.attribute(x, [1, 2], baselines=[0.0])
    assert hooks_on(model) == 0


def test_batches_of_networks_with_little_contrast_equal_one_by_one(cls: Any) -> None:
    for seed in range(8):
        model, x, targets = make(seed=seed), images(4, 3, 8, 8, seed=seed), [0, 1, 2, 3]
        method = cls(model, model.conv2)
        chunks = {"perturbations_per_eval": 3} if takes(cls, "perturbations_per_eval") else {}
        alone = torch.cat([method.attribute(x[[i]], targets[i], **chunks) for i in range(4)])
        # The super-resolution's iterations amplify rounding errors, and so does dividing by a sum that nearly cancels.
        tolerance = {LayerAugmentedGradCAM: 1e-3, LayerXGradCAM: 1e-3 * float(alone.abs().max())}.get(cls, 1e-5)
        torch.testing.assert_close(method.attribute(x, targets), alone, rtol=0, atol=tolerance)


# --------------------------------------------------------------------------------------------------------------- errors


def test_softmax_over_a_single_column() -> None:
    model, x = make(outputs=1), images(2, 3, 8, 8)
    for build in (LayerFusionCAM, LayerUnionCAM, lambda *args: LayerScoreCAM(*args, weighting="increase")):
        with pytest.raises(ValueError, match=r"score_fn=\"softmax\".*score_fn=\"sigmoid\""):
            build(model, model.relu2).attribute(x, 0)
    assert hooks_on(model) == 0
    assert LayerFusionCAM(model, model.relu2, score_fn="sigmoid").attribute(x, 0).amax() == 1
    assert LayerScoreCAM(model, model.relu2).attribute(x, 0).isfinite().all(), "softmax weights use the raw output"


def test_a_layer_that_the_forward_pass_does_not_use(cls: Any) -> None:
    model = make()
    with pytest.raises(ValueError, match="layer: the forward pass does not use Conv2d"):
        cls(model, nn.Conv2d(3, 4, 3)).attribute(images(1, 3, 8, 8), 0)
    with pytest.raises(ValueError, match="layer: the forward pass does not use Conv2d"):
        cls(model, [model.conv1, nn.Conv2d(3, 4, 3)]).attribute(images(1, 3, 8, 8), 0)
    assert hooks_on(model) == 0


def test_a_layer_that_the_target_does_not_depend_on() -> None:
    class Aside(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.conv1(x)
            return x.mean((2, 3))

    model = make(Aside)
    for cls in (LayerFusionCAM, LayerUnionCAM):
        with pytest.raises(ValueError, match="layer"):
            cls(model, model.conv1).attribute(images(1, 3, 8, 8).requires_grad_(), 0)


def test_a_layer_without_spatial_dimensions(cls: Any) -> None:
    model = make()
    with pytest.raises(ValueError, match=r"layer: the output .* spatial"):
        cls(model, model.head).attribute(images(1, 3, 8, 8), 0)
    assert hooks_on(model) == 0


def test_no_input_with_the_layers_dimensions(cls: Any) -> None:
    model = make()
    if cls not in INPUT_SPACE and not takes(cls, "mask_inputs"):
        assert cls(lambda x: model(x.reshape(-1, 3, 8, 8)), model.conv2).attribute(images(1, 192), 0).isfinite().all()
        return
    with pytest.raises(ValueError, match="inputs: none has the layer's 2 spatial dimensions"):
        cls(lambda x: model(x.reshape(-1, 3, 8, 8)), model.conv2).attribute(images(1, 192), 0)


def test_a_layer_that_returns_a_dict(cls: Any) -> None:
    model = make(DictLayer)
    with pytest.raises(TypeError, match="layer: Branches must return a tensor"):
        cls(model, model.branches).attribute(images(1, 3, 8, 8), 0)
    assert hooks_on(model) == 0


def test_a_layer_that_also_returns_a_loss() -> None:
    model = make(TupleLayer)
    model.branches.register_forward_hook(lambda module, inputs, output: (*output, output[0].mean()))
    for cls in (LayerScoreCAM, LayerXGradCAM):
        with pytest.raises(TypeError, match=r"layer: Branches must return .*, not Tensor, Tensor, a single number"):
            cls(model, model.branches).attribute(images(2, 3, 8, 8), 0)
    assert hooks_on(model) == 1


def test_a_forward_func_that_does_not_return_a_tensor(cls: Any) -> None:
    model = make()
    with pytest.raises(TypeError, match="forward_func must return a tensor, not dict"):
        cls(lambda x: {"out": model(x)}, model.conv2).attribute(images(1, 3, 8, 8), 0)


def test_a_forward_func_that_drops_samples(cls: Any) -> None:
    model = make()
    with pytest.raises(AssertionError, match="one output for each"):
        cls(lambda x: model(x)[:1], model.conv2).attribute(images(2, 3, 8, 8), 0)


BAD_ARGUMENTS = {
    "baselines": [(0, 0), torch.zeros(4, 3, 8, 8), torch.zeros(1, 3, 9, 9)],
    "mask_inputs": [[1], [-1], ["x"], [], 0, "0"],
    "perturbations_per_eval": [0, -1, 2.0, True],
}


@pytest.mark.parametrize(("name", "value"), [(k, v) for k, values in BAD_ARGUMENTS.items() for v in values], ids=repr)
def test_bad_arguments_of_attribute(cls: Any, name: str, value: Any) -> None:
    model = make()
    if not takes(cls, name) or (name == "baselines" and not masks_input(cls)):
        pytest.skip("no such argument")
    with pytest.raises(ValueError, match=name):
        cls(model, model.relu2, **with_baselines(cls)).attribute(images(2, 3, 8, 8), 1, **{name: value})
    assert hooks_on(model) == 0


def test_bad_types(cls: Any) -> None:
    model = make()
    for args, message in (((3, model.relu2), "forward_func"), ((model, "relu2"), "layer"), ((model, []), "layer")):
        with pytest.raises(TypeError, match=message):
            cls(*args)
    with pytest.raises(TypeError, match="device_ids must be a list of device numbers, not LayerScoreCAM"):
        cls(model, model.relu2, LayerScoreCAM(model, model.relu2))
    with pytest.raises(TypeError, match=r"inputs .* not ndarray"):
        cls(model, model.relu2).attribute(np.zeros((1, 3, 8, 8)), 1)
    with pytest.raises(TypeError, match="reshape must be a callable"):
        cls(model, model.relu2, reshape=(14, 14))
    if masks_input(cls):
        with pytest.raises(TypeError, match="baselines"):
            cls(model, model.relu2, **with_baselines(cls)).attribute(images(2, 3, 8, 8), 1, baselines="black")
        with pytest.raises(ValueError, match="inputs: input 1 has 3 examples and the first input 2"):
            cls(lambda a, b: model(a), model.relu2).attribute((images(2, 3, 8, 8), images(3, 3, 8, 8)), 1)
    if options(cls, score_fn=3):
        with pytest.raises(TypeError, match="score_fn"):
            cls(model, model.relu2, score_fn=3)
    for fusion in (LayerFusionCAM, LayerUnionCAM):
        with pytest.raises(TypeError, match="score_fn must return a tensor, not int"):
            fusion(model, model.relu2, score_fn=lambda output: 3).attribute(images(2, 3, 8, 8), 1)


def test_bad_options() -> None:
    model = make()
    for cls in (LayerFusionCAM, LayerUnionCAM):
        for theta in (-1, 101, "ten", True, float("nan")):
            with pytest.raises(ValueError, match="theta"):
                cls(model, model.relu2, theta=theta)
        with pytest.raises(ValueError, match="weighting must be one of 'normalized', 'raw', not"):
            cls(model, model.relu2, weighting="softmax")
        with pytest.raises(ValueError, match="score_fn"):
            cls(model, model.relu2, score_fn="logit")
        for component in (LayerGradCam, "gradcam", object()):
            with pytest.raises(TypeError, match="region_method"):
                cls(model, model.relu2, region_method=component)
    with pytest.raises(ValueError, match="alpha must be one of 'sum', 'count'"):
        LayerUnionCAM(model, model.relu2, alpha="mean")
    with pytest.raises(ValueError, match="weighting must be one of 'softmax', 'probability', 'increase'"):
        LayerScoreCAM(model, model.relu2, weighting="normalized")


# ----------------------------------------------------------------------------------------------------------- components


COMPONENTS = {
    "Occlusion": lambda m: (Occlusion(m), {"sliding_window_shapes": (3, 4, 4), "strides": (3, 2, 2)}),
    "IntegratedGradients": lambda m: (IntegratedGradients(m), {"n_steps": 4}),
    "GuidedGradCam": lambda m: (GuidedGradCam(m, m.relu2), {}),
    "LayerActivation": lambda m: (LayerActivation(m, m.relu2), {}),
    "LayerGradCam elsewhere": lambda m: (LayerGradCam(m, m.relu1), {}),
    "LayerGradCam with options": lambda m: (LayerGradCam(m, m.relu2), {"attr_dim_summation": False}),
    "NoiseTunnel": lambda m: (
        NoiseTunnel(LayerGradCam(m, m.relu2)),
        {"nt_type": "smoothgrad", "nt_samples": 2, "stdevs": 0.0},
    ),
    "LayerScoreCAM": lambda m: (
        LayerScoreCAM(m, m.relu2, weighting="increase"),
        {"perturbations_per_eval": 3, "baselines": 0.5},
    ),
    "LayerAblationCAM": lambda m: (LayerAblationCAM(m, m.relu2), {}),
    "LayerUnionCAM": lambda m: (LayerUnionCAM(m, m.relu2), {}),
    "LayerFusionCAM": lambda m: (LayerFusionCAM(m, m.relu2), {}),
}


@pytest.mark.filterwarnings(
    "ignore:Setting (forward, )?backward hooks", "ignore:Input Tensor 0 did not already require"
)
@pytest.mark.parametrize("name", COMPONENTS)
def test_any_attribution_can_be_a_component(name: str) -> None:
    model, x, targets = make(), images(2, 3, 8, 8), [1, 3]
    component, kwargs = COMPONENTS[name](model)
    given = {} if isinstance(component, LayerActivation) else {"target": targets}
    raw = component.attribute(x, **given, **kwargs).detach().sum(1, keepdim=True).relu()
    if raw.shape[2:] != x.shape[2:]:
        raw = nn.functional.interpolate(raw, x.shape[2:], mode="bilinear", align_corners=False)
    low, high = raw.amin((1, 2, 3), keepdim=True), raw.amax((1, 2, 3), keepdim=True)
    expected = ((raw - low) / (high - low)).nan_to_num(0.0)
    assert expected[0].amax() == 1
    fusion = LayerFusionCAM(model, model.relu2, None, component, theta=0)
    result, details = fusion.attribute(x, targets, gradient_kwargs=kwargs, return_details=True)
    assert not result.requires_grad
    assert not any(field.requires_grad for field in details if field is not None)
    assert {field.dtype for field in details if field is not None} == {torch.float32}
    same(details.gradient_map, expected.float())
    for cls in (LayerFusionCAM, LayerUnionCAM):
        union = cls(model, model.relu2, region_method=component)
        _, details = union.attribute(x, targets, region_kwargs=kwargs, return_details=True)
        same(details.region_map, expected.float())


def test_components_do_not_touch_the_input() -> None:
    model, x = make(), images(2, 3, 8, 8)
    broken = Saliency(lambda given: model(given)[:, 7])
    with pytest.raises(IndexError):
        LayerFusionCAM(model, model.relu2, None, broken).attribute(x, 1)
    assert not x.requires_grad
    with torch.inference_mode():
        inside = LayerFusionCAM(model, model.relu2, None, Saliency(model)).attribute(x.clone(), 1)
    same(inside, LayerFusionCAM(model, model.relu2, None, Saliency(model)).attribute(x, 1))


def test_sharing_a_pass_does_not_change_the_masked_inputs() -> None:
    model, x = make(), images(2, 3, 8, 8)
    shared = LayerFusionCAM(model, model.relu2, region_method=LayerScoreCAM(model, model.relu2))
    apart = LayerFusionCAM(model, model.relu2, region_method=LayerScoreCAM(lambda y: model(y), model.relu2))
    same(apart.attribute(x, 1, baselines=0.7), shared.attribute(x, 1, baselines=0.7))


def test_a_component_that_returns_no_map() -> None:
    class Wrong:
        def attribute(self, inputs: Tensor, target: Any = None) -> Tensor:
            return inputs.sum((1, 2, 3))

    model = make()
    with pytest.raises(ValueError, match=r"gradient_method must return a map of shape \(2, channels.*, not \(2,\)"):
        LayerFusionCAM(model, model.relu2, None, Wrong()).attribute(images(2, 3, 8, 8), 1)


def test_a_component_that_returns_more_maps_than_the_layer_has_tensors() -> None:
    model = make()

    class Twice(LayerGradCam):
        def attribute(self, inputs: Any, target: Any = None, additional_forward_args: Any = None) -> Any:
            return (super().attribute(inputs, target, additional_forward_args),) * 2

    fusion = LayerFusionCAM(model, model.relu2, None, Twice(model, model.relu2))
    with pytest.raises(ValueError, match="gradient_method returned 2 maps for a layer with 1 tensors"):
        fusion.attribute(images(2, 3, 8, 8), 1)


def test_components_of_several_inputs() -> None:
    model = make()

    def of_two(a: Tensor, b: Tensor) -> Tensor:
        return model(a + b)

    x = images(2, 3, 8, 8), images(2, 3, 8, 8, seed=4)
    fusion = LayerFusionCAM(of_two, model.relu2, None, IntegratedGradients(of_two))
    result, details = fusion.attribute(x, 1, gradient_kwargs={"n_steps": 4}, return_details=True)
    assert result.shape == (2, 1, 8, 8)
    first, second = (
        maps.sum(1).relu().flatten(1).argmax(1)
        for maps in IntegratedGradients(of_two).attribute(x, target=1, n_steps=4)
    )
    assert (first != second).all()
    assert torch.equal(details.gradient_map.flatten(1).argmax(1), first), "the map of the first masked input"


def test_a_class_name_as_target_is_explained() -> None:
    model, x = make(), images(1, 3, 8, 8)
    for target in ("tiger cat", ["tiger cat"]):
        with pytest.raises(
            AssertionError, match=r"target must be the index of a class, not 'tiger cat'.*class_names.index"
        ):
            LayerFusionCAM(model, model.relu2).attribute(x, target)


@pytest.mark.parametrize("target", [torch.tensor([1.0, 2.0]), torch.tensor([True, False])], ids=repr)
def test_a_tensor_of_no_indices_as_target_is_explained(target: Tensor) -> None:
    model, x = make(), images(2, 3, 8, 8)
    with pytest.raises(AssertionError, match=f"target must hold .* indices .*, not a tensor of {target.dtype}"):
        LayerScoreCAM(model, model.relu2).attribute(x, target)


def test_details_are_printed_without_their_maps() -> None:
    model, x = make(), images(2, 3, 8, 8)
    _, details = LayerFusionCAM(model, model.relu2).attribute(x, [0, 1], return_details=True)
    text = repr(details._replace(union_weights=torch.tensor([[0.63456, 0.36544], [1.0, 0.0]])))
    assert "union_weights=[[0.635, 0.365], [1.0, 0.0]]" in text
    assert text.startswith("FusionDetails(maps of shape (2, 1, 8, 8), score=[")
    assert "fusion_weights=[[" in text
    assert "tensor" not in text
    assert re.search(r"\.\d{4}", text) is None, "three decimals"
    assert len(text) < 600
