"""Tests on real networks and photographs. They are not in the repository; CONTRIBUTING.md gives their location."""

from __future__ import annotations

import csv
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from captum.attr import LayerFeatureAblation, LayerGradCam
from PIL import Image
from torch import Tensor, nn

from captum_fusion import (
    FusionDetails,
    LayerAblationCAM,
    LayerFusionCAM,
    LayerIntegrativeCAM,
    LayerLayerCAM,
    LayerLinearCAM,
    LayerXGradCAM,
)
from captum_fusion._passes.call import Call
from captum_fusion._passes.layer_pass import layer_pass
from captum_fusion.attr.catalog import METHODS
from captum_fusion.functional import upsample
from tests import real_data, reference
from tests.benchmarks import contrast
from tests.networks import correlations
from tests.real_data import DATA
from tests.test_torchcam import torchcams

if not (DATA / "builders.py").is_file():
    pytest.skip(f"no real networks and photographs at {DATA}", allow_module_level=True)

SIZE = 224


class Photo(NamedTuple):
    """A preprocessed photograph and the bounding box of each animal in it, by class, in its pixels."""

    tensor: Tensor
    boxes: dict[int, tuple[int, int, int, int]]


class Explained(NamedTuple):
    """A batch of photographs, their targets and the Fusion-CAM."""

    model: nn.Module
    x: Tensor
    targets: list[int]
    boxes: list[dict[int, tuple[int, int, int, int]]]
    maps: Tensor
    details: FusionDetails


@pytest.fixture(scope="session")
def builders() -> Any:
    return real_data.builders()


@pytest.fixture(scope="session")
def photos() -> dict[str, Photo]:
    found: dict[str, Photo] = {}
    with open(DATA / "two_objects" / "boxes.csv", newline="") as file:
        for row in csv.DictReader(file):
            name = row["filename"]
            image = Image.open(DATA / "two_objects" / name).convert("RGB")
            if name not in found:
                pixels = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)) / 255
                pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
                found[name] = Photo(torch.from_numpy(pixels).permute(2, 0, 1).float(), {})
            x0, x1 = (round(int(row[key]) * SIZE / image.width) for key in ("x0", "x1"))
            y0, y1 = (round(int(row[key]) * SIZE / image.height) for key in ("y0", "y1"))
            found[name].boxes[int(row["class_index"])] = (x0, y0, x1, y1)
    return found


def explain(model: nn.Module, photos: dict[str, Photo], chosen: list[tuple[str, int]]) -> Explained:
    x = torch.stack([photos[name].tensor for name, _ in chosen])
    targets = [target for _, target in chosen]
    maps, details = LayerFusionCAM(model, model.features).attribute(x, targets, return_details=True)
    return Explained(model, x, targets, [photos[name].boxes for name, _ in chosen], maps, details)


DOG_CAT = [("dog_cat.png", 243), ("dog_cat.png", 282)]
TWO_DOGS = [("two_dogs.jpg", 195), ("two_dogs.jpg", 171)]


@pytest.fixture(scope="session")
def squeezenet(builders: Any, photos: dict[str, Photo]) -> Explained:
    """Bull mastiff, the cat beside it, and Boston bull. The layer has 512 channels of 13 x 13; convolutions follow."""
    return explain(builders.squeezenet1_1(), photos, [*DOG_CAT, TWO_DOGS[0]])


@pytest.fixture(scope="session")
def mobilenet(builders: Any, photos: dict[str, Photo]) -> Explained:
    """Three dogs in two photographs. The layer has 1280 channels of 7 x 7; global pooling and a linear layer follow."""
    return explain(builders.mobilenet_v2_tf(), photos, [DOG_CAT[0], *TWO_DOGS])


# torchcam does not skip dead channels. The second network gets one target, which already takes 1280 passes.
@pytest.mark.parametrize(("network", "chosen", "others"), [("squeezenet", [0, 2], [2, 0]), ("mobilenet", [1], [0])])
def test_region_map_correlates_with_torchcam(
    network: str, chosen: list[int], others: list[int], request: pytest.FixtureRequest
) -> None:
    case: Explained = request.getfixturevalue(network)
    theirs = torchcams(case.model, "features", case.x[chosen], [case.targets[i] for i in chosen])
    theirs = upsample(theirs, (SIZE, SIZE))
    assert min(correlations(case.details.region_map[chosen], theirs)) > 0.999
    assert max(correlations(case.details.region_map[others], theirs)) < 0.99


def test_fusion_equals_the_reference(squeezenet: Explained) -> None:
    example = 1  # the cat, which is not among the most probable classes
    expected, found = reference.fusion_cam(
        squeezenet.model,
        squeezenet.model.features,
        squeezenet.x[example : example + 1],
        squeezenet.targets[example],
    )
    np.testing.assert_allclose(squeezenet.maps[example, 0].numpy(), expected, rtol=0, atol=1e-4)
    for name in ("gradient_map", "denoised_map", "region_map", "union_map", "similarity_map"):
        actual = getattr(squeezenet.details, name)[example, 0].numpy()
        # Rounding can move a value at the percentile to either side.
        differs = np.abs(actual - found[name]) > 1e-4
        assert differs.mean() < (1e-3 if name == "denoised_map" else 1e-9), name
    for name in ("score", "baseline_score", "gradient_contribution", "region_contribution", "union_contribution"):
        actual = getattr(squeezenet.details, name)[example].item()
        assert actual == pytest.approx(found[name], rel=1e-3, abs=1e-5), name
    for name in ("union_weights", "fusion_weights"):
        actual = getattr(squeezenet.details, name)[example].tolist()
        assert actual == pytest.approx(found[name], rel=1e-3, abs=1e-4), name


def test_batch_equals_one_by_one(squeezenet: Explained) -> None:
    example = 2
    alone = LayerFusionCAM(squeezenet.model, squeezenet.model.features).attribute(
        squeezenet.x[example : example + 1], squeezenet.targets[example]
    )
    torch.testing.assert_close(squeezenet.maps[example : example + 1], alone, rtol=1e-5, atol=1e-5)


def energy(attribution: Tensor, box: tuple[int, int, int, int]) -> float:
    x0, y0, x1, y1 = box
    return float(attribution[0, y0:y1, x0:x1].sum() / attribution.sum())


@pytest.mark.parametrize(("network", "first", "second"), [("squeezenet", 0, 1), ("mobilenet", 1, 2)])
def test_each_class_lies_in_its_own_animal(
    network: str, first: int, second: int, request: pytest.FixtureRequest
) -> None:
    case: Explained = request.getfixturevalue(network)
    for own, other in ((first, second), (second, first)):
        box = case.boxes[own][case.targets[own]]
        assert energy(case.maps[own], box) > energy(case.maps[other], box) + 0.05, case.targets[own]
        assert energy(case.maps[own], box) > (box[2] - box[0]) * (box[3] - box[1]) / SIZE**2, "more than a uniform map"


def test_one_animal_rather_than_the_other(builders: Any) -> None:
    model = builders.squeezenet1_1().eval()
    found = {
        (one.method, one.animal): one for one in contrast.class_shares("squeezenet1_1", model, model.features, DATA)
    }
    for method, gain in (("Grad-CAM", 0.15), ("Fusion-CAM, fast", 0.05)):
        for animal in ("dog", "cat"):
            one = found[method, animal]
            assert one.contrast > one.plain + gain, one


def test_similar_to_dogs_rather_than_to_cats(builders: Any) -> None:
    model = builders.mobilenet_v2_tf().eval()
    dog, cat = contrast.similarity_shares("mobilenet_v2_tf", model, model.features, DATA)
    assert dog.contrast > dog.plain + 0.2, dog
    assert cat.contrast > cat.plain + 0.05, cat


# --------------------------------------------------------------------------------------------------------- all methods


#: Settings that reduce the number of forward samples.
CHEAP: dict[str, dict[str, Any]] = {
    "augmented-grad-cam": {"n_samples": 8, "combination": "mean"},
    "integrated-grad-cam": {"n_steps": 5},
    "is-cam": {"n_steps": 1},
    "shap-cam": {"n_samples": 1},
    "rise": {"n_masks": 100},
}
#: Methods tested above, or similar to one of them and expensive.
LEFT_OUT = {"fusion-cam", "union-cam", "guided-fusion-cam", "ss-cam", "cam", "score-cam", "is-cam"}


@pytest.mark.parametrize("name", sorted(METHODS.keys() - LEFT_OUT))
def test_every_method_lies_in_the_mastiff(squeezenet: Explained, name: str) -> None:
    """The mastiff's share of the map exceeds its share of the picture, in a batch as for a single example."""
    model, x, targets = squeezenet.model, squeezenet.x[[0, 2]], [squeezenet.targets[i] for i in (0, 2)]
    method = METHODS[name].build(model, [model.features], **CHEAP.get(name, {}))
    found = method.attribute(x, targets).detach().sum(1, keepdim=True)
    assert found.isfinite().all()
    alone = method.attribute(x[:1], targets[:1]).detach().sum(1, keepdim=True)
    torch.testing.assert_close(found[:1], alone, rtol=0, atol=1e-4 * float(found.abs().max()))
    heat = upsample(found.relu(), (SIZE, SIZE))
    heat = heat - heat.amin((1, 2, 3), keepdim=True)
    x0, y0, x1, y1 = squeezenet.boxes[0][243]
    assert energy(heat[0], (x0, y0, x1, y1)) > 1.2 * (x1 - x0) * (y1 - y0) / SIZE**2


def test_gradient_methods_equal_torchcams(squeezenet: Explained, mobilenet: Explained) -> None:
    from torchcam.methods import LayerCAM, XGradCAM

    for case in (squeezenet, mobilenet):
        for ours, theirs in ((LayerLayerCAM, LayerCAM), (LayerXGradCAM, XGradCAM)):
            found = ours(case.model, case.model.features).attribute(case.x, case.targets)
            low, high = found.amin((1, 2, 3), keepdim=True), found.amax((1, 2, 3), keepdim=True)
            with theirs(case.model, "features") as extractor:
                scores = case.model(case.x)
                expected = extractor(case.targets, scores)[0][:, None].detach()
            torch.testing.assert_close((found - low) / (high - low), expected, rtol=0, atol=1e-4)


def test_ablation_cam_equals_captums_layer_feature_ablation(squeezenet: Explained) -> None:
    model, layer, x = squeezenet.model, squeezenet.model.features, squeezenet.x[:1]
    mask = torch.arange(8).repeat_interleave(64).reshape(1, 512, 1, 1)
    drops = LayerFeatureAblation(model, layer).attribute(x, target=243, layer_mask=mask)
    with torch.no_grad():
        expected = (drops[:, :, :1, :1] * layer(x)).sum(1, keepdim=True).relu()
    found = LayerAblationCAM(model, layer, groups=8, grouping="chunks").attribute(x, 243)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.max()))


def test_cam_is_for_networks_that_end_in_pooling(squeezenet: Explained, mobilenet: Explained) -> None:
    found = LayerLinearCAM(mobilenet.model, mobilenet.model.features).attribute(mobilenet.x, mobilenet.targets)
    grad = LayerGradCam(mobilenet.model, mobilenet.model.features).attribute(mobilenet.x, mobilenet.targets)
    torch.testing.assert_close(found, grad.detach() * 49, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="CAM needs a network that ends in global average pooling"):
        LayerLinearCAM(squeezenet.model, squeezenet.model.features).attribute(squeezenet.x, squeezenet.targets)


def test_the_residual_bias_of_integrative_cam_is_complete(squeezenet: Explained) -> None:
    """A layer's map before its ReLU sums to the score."""
    case, layers = squeezenet, [squeezenet.model.features[7], squeezenet.model.features[12]]
    method = LayerIntegrativeCAM(case.model, layers)
    call = Call.checked(case.model, case.x, case.targets)
    with torch.no_grad():
        scores = case.model(case.x)[range(3), case.targets].double()
    for layer, values in zip(layers, layer_pass(call, layers, None, True).evaluations, strict=True):
        assert values.gradients is not None
        raw, _ = method._layer_map(layer, values.activations[0], values.gradients[0], scores, None)
        torch.testing.assert_close(raw.sum((1, 2, 3)), scores, rtol=1e-4, atol=1e-4)
