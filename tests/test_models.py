from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

from captum_fusion.demo import digits
from captum_fusion.models import imagenet_classes, load_model
from tests.networks import make

A_MODULE = make()
GREY = Image.new("RGB", (300, 260), (124, 116, 104))  # ImageNet's mean colour


def no_model() -> int:
    return 3


def trained(name: str, **options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None, **options)


@pytest.fixture(scope="module")
def squeezenet() -> torch.nn.Module:
    return trained("squeezenet1_1")


@pytest.fixture(params=["safetensors", "pt", "checkpoint.pth"])
def weight_file(request: pytest.FixtureRequest, tmp_path: Path, squeezenet: torch.nn.Module) -> Path:
    file, state = tmp_path / f"squeezenet.{request.param}", squeezenet.state_dict()
    if file.suffix == ".safetensors":
        save_file(state, file)
    elif file.suffix == ".pth":  # as a training script under DataParallel leaves it
        torch.save({"epoch": 3, "state_dict": {f"module.{key}": value.half() for key, value in state.items()}}, file)
    else:
        torch.save(state, file)
    return file


def test_digits() -> None:
    loaded = load_model("digits")
    assert loaded.class_names == digits.CLASSES
    assert not loaded.model.training
    assert loaded.preprocess(GREY).shape == (1, 3, 96, 96)


def test_torchvision_model_with_weights_from_a_file(weight_file: Path, squeezenet: torch.nn.Module) -> None:
    loaded = load_model("squeezenet1_1", str(weight_file))
    assert not loaded.model.training
    assert loaded.class_names is not None
    assert loaded.class_names[282] == "tiger cat"
    key = "features.0.weight"
    expected = squeezenet.state_dict()[key]
    torch.testing.assert_close(loaded.model.state_dict()[key], expected, rtol=1e-3, atol=1e-4)


def test_pictures_are_prepared_as_the_weights_ask() -> None:
    loaded = load_model("tests.networks:make")
    prepared = loaded.preprocess(GREY)
    assert prepared.shape == (1, 3, 224, 224)
    assert prepared.abs().max() < 0.02, "the mean colour is zero"
    torch.testing.assert_close(loaded.restore(prepared)[0, :, 0, 0], torch.tensor([124, 116, 104]) / 255)


def test_the_whole_picture_or_its_centre() -> None:
    picture = Image.new("RGB", (400, 200), "black")
    picture.paste("white", (0, 0, 40, 200))  # a bar that the central crop cuts off
    cropped, whole = (load_model("tests.networks:make", whole_image=each).preprocess(picture) for each in (False, True))
    assert cropped.shape == whole.shape == (1, 3, 224, 224)
    assert (cropped < 0).all()
    assert (whole[..., :20] > 0).all()
    assert (whole[..., 24:] < 0).all()


def test_number_of_classes_follows_the_file(tmp_path: Path) -> None:
    file = tmp_path / "seven.pt"
    torch.save(trained("resnet18", num_classes=7).state_dict(), file)
    loaded = load_model("resnet18", str(file))
    assert loaded.model.fc.out_features == 7
    assert loaded.class_names is None, "they are not ImageNet's"


@pytest.mark.parametrize("aux", [True, False])
def test_networks_that_undo_the_preprocessing_themselves(tmp_path: Path, aux: bool) -> None:
    file = tmp_path / "googlenet.pt"
    torch.save(torchvision.models.googlenet(weights=None, aux_logits=aux, init_weights=False).state_dict(), file)
    loaded = load_model("googlenet", str(file))
    assert loaded.model.transform_input, "as torchvision does for its published weights"
    assert loaded.model.aux_logits is aux


def test_a_model_with_a_child_called_module(tmp_path: Path) -> None:
    file = tmp_path / "wrapped.safetensors"
    save_file(wrapped().state_dict(), file)
    assert isinstance(load_model("tests.test_models:wrapped", str(file)).model, torch.nn.DataParallel)


def wrapped() -> torch.nn.Module:
    return torch.nn.DataParallel(make())


def test_a_function_of_ones_own_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_network_for_this_test.py").write_text("from tests.networks import make\nbuild = lambda: make()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    loaded = load_model("my_network_for_this_test:build")
    assert not loaded.model.training
    assert loaded.class_names is None
    file = tmp_path / "other.safetensors"
    save_file(make(seed=5).state_dict(), file)
    other = load_model("my_network_for_this_test:build", str(file))
    assert torch.equal(other.model.head.weight, make(seed=5).head.weight)


@pytest.mark.parametrize(("suffix", "text"), [("json", '["a", "b"]'), ("txt", "a\nb\n"), ("txt", "\ufeffa\nb\n\n")])
def test_class_names_from_a_file(tmp_path: Path, suffix: str, text: str) -> None:
    file = tmp_path / f"classes.{suffix}"
    file.write_text(text, encoding="utf-8")
    assert load_model("tests.networks:make", classes=str(file)).class_names == ["a", "b"]


def test_published_weights_are_asked_for_by_their_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def no_network(url: str, *args: Any, **kwargs: Any) -> Any:
        asked.append(url)
        raise URLError("no network in this test")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    for name, weights, part in (
        ("squeezenet1_1", None, "squeezenet1_1-"),
        ("resnet50", "DEFAULT", "resnet50-11ad3fa6"),
        ("resnet50", "IMAGENET1K_V1", "resnet50-0676ba61"),
    ):
        with pytest.raises(ValueError, match=rf"weights: those of {name} could not be downloaded .*no network"):
            load_model(name, weights)
        assert part in asked[-1]


def test_imagenet_classes() -> None:
    assert len(imagenet_classes()) == 1000


class Trap:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("trap_was_sprung"),))


def test_no_code_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, save in (("a.pt", torch.save), ("b.pkl", lambda value, file: file.write_bytes(pickle.dumps(value)))):
        save({"weight": Trap()}, tmp_path / name)
        with pytest.raises(ValueError, match=r"execute code|could not be read"):
            load_model("squeezenet1_1", str(tmp_path / name))
    assert not (tmp_path / "trap_was_sprung").exists()


def write(file: Path, value: Any) -> Path:
    if isinstance(value, bytes):
        file.write_bytes(value)
    else:
        torch.save(value, file)
    return file


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet5", None, "no model 'resnet5'.*resnet50"),
        ("fcn_resnet50", None, "no model"),
        ("resnet18", "IMAGENET1K_V9", "weights: resnet18 has IMAGENET1K_V1"),
        ("resnet18", "absent.pt", "weights: there is no file"),
        ("digits", "DEFAULT", "its own weights"),
        ("nowhere.to_be:found", None, "model: nowhere.to_be:found could not be imported"),
        ("tests.networks:nothing", None, "could not be imported"),
        ("..tests:nothing", None, "could not be imported"),
        ("tests.test_models:no_model", None, "must return a torch.nn.Module, not int"),
        ("tests.networks:hooks_on", None, "callable without arguments"),
        ("tests.test_models:GREY", None, "is not callable"),
        ("tests.test_models:A_MODULE", None, "is a module; give a function"),
        ("tests.networks:make", "DEFAULT", "must be a .safetensors or .pt file"),
    ],
)
def test_what_cannot_be_loaded(name: str, weights: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(name, weights)


@pytest.mark.parametrize(
    ("file", "value", "message"),
    [
        ("a.pt", b"no zip file", "could not be read|execute code"),
        ("a.safetensors", b"nor this", "could not be read"),
        ("a.pt", {"weight": 3}, "not a state dict"),
        ("a.pt", {3: torch.zeros(2)}, "not a state dict"),
        (
            "a.pt",
            {"head.weight": torch.zeros(2)},
            r"does not fit tests.networks:make: 5 missing .*; 1 of another shape",
        ),
        ("a.pt", {"more": torch.zeros(2)}, r"1 not in the model \(more\)"),
    ],
)
def test_weight_files_that_do_not_fit(tmp_path: Path, file: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        load_model("tests.networks:make", str(write(tmp_path / file, value)))
    assert "\n" not in str(raised.value)


def test_bad_class_files(tmp_path: Path) -> None:
    file = tmp_path / "classes.json"
    for text in ("{", '{"a": 1}'):
        file.write_text(text)
        with pytest.raises(ValueError, match="classes: "):
            load_model("tests.networks:make", classes=str(file))
    with pytest.raises(ValueError, match=r"classes: .* could not be read"):
        load_model("tests.networks:make", classes=str(tmp_path / "absent.txt"))
