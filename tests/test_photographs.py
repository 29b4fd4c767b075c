"""The bundled SqueezeNet 1.1 and its photographs have the properties that they document."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from captum.attr import LayerAttribution, LayerGradCam
from torch import nn
from torchvision.models import squeezenet1_1

import captum_fusion
from captum_fusion.demo import photographs
from captum_fusion.demo.photographs import Photograph, load_model, load_photographs, preprocess
from tests.benchmarks import bundle

FOLDER = Path(photographs.__file__).parent
PHOTOGRAPHS = load_photographs()
PACKAGE = Path(captum_fusion.__file__).parent

#: What the package may take, in bytes.
LIMIT = 6_000_000

each_photograph = pytest.mark.parametrize("photograph", PHOTOGRAPHS, ids=[found.name for found in PHOTOGRAPHS])


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return load_model()


def test_the_network_is_torchvisions(model: nn.Module) -> None:
    assert str(model) == str(squeezenet1_1(weights=None).eval())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    stored = safetensors.torch.load_file(FOLDER / "squeezenet1_1.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}


@each_photograph
def test_the_network_recognises_the_objects(model: nn.Module, photograph: Photograph) -> None:
    with torch.no_grad():
        top = model(preprocess(photograph.image))[0].topk(2).indices.tolist()
    if len(photograph.labels) == 1:
        assert top[0] == photograph.labels[0]
    else:
        assert set(top) == set(photograph.labels)


@each_photograph
def test_masks_lie_on_their_objects(model: nn.Module, photograph: Photograph) -> None:
    """Grad-CAM finds each object rather than the rest of the picture, and rather than the other object."""
    masks = photograph.masks
    assert masks is not None
    assert masks.shape == (len(photograph.labels), photograph.image.height, photograph.image.width)
    assert (masks.sum(0) <= 1).all(), "objects do not overlap"
    square = masks.float().unsqueeze(0)  # what the preprocessing keeps
    side = min(square.shape[-2:])
    top, left = (square.shape[-2] - side) // 2, (square.shape[-1] - side) // 2
    square = nn.functional.interpolate(square[..., top : top + side, left : left + side], (256, 256), mode="area")
    seen = square[0, :, 16:240, 16:240]
    inputs = preprocess(photograph.image).repeat(len(masks), 1, 1, 1)
    heat = LayerGradCam(model, model.features).attribute(
        inputs, torch.tensor(photograph.labels), relu_attributions=True
    )
    heat = LayerAttribution.interpolate(heat.detach(), (224, 224), "bilinear")[:, 0]
    shares = torch.einsum("ihw,jhw->ij", heat, seen) / heat.sum((1, 2))[:, None]
    areas = seen.mean((1, 2))
    lift = shares / areas
    small = areas < 0.5  # the map of an object that fills the picture is close to its share by chance
    assert (lift.diagonal()[small] > 1.1).all(), lift
    assert (lift.diagonal() > 1).all(), lift
    for own, mask in enumerate(lift.T):
        assert mask.argmax() == own, lift


@each_photograph
def test_licences_are_clear(photograph: Photograph) -> None:
    assert photograph.author
    assert photograph.source
    for licence in photograph.licence.split("; "):
        assert licence in ("CC0 1.0", "Public domain (work of the United States government)")


def test_every_picture_is_described() -> None:
    files = {file.stem for file in (FOLDER / "pictures").iterdir()}
    assert files == {photograph.name for photograph in PHOTOGRAPHS}
    with pytest.raises(ValueError, match=r"name must be one of .*'cat'.*not 'dog'"):
        photographs.photograph_path("dog")


def test_the_facts_are_those_of_the_script() -> None:
    """The pictures' originals are not here, but their facts follow from the script alone."""
    assert json.loads((FOLDER / "photographs.json").read_text(encoding="utf-8")) == bundle.facts()


def test_the_package_is_small() -> None:
    """The wheel, which is compressed, is smaller than its files."""
    files = [file for file in PACKAGE.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert sum(file.stat().st_size for file in files) < LIMIT
