from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from captum_fusion import RISE
from captum_fusion.__main__ import main
from captum_fusion._commands.explain import open_image, plan
from captum_fusion.attr.catalog import METHODS
from captum_fusion.demo import digits, photographs
from captum_fusion.evaluation import METRICS as MEASURES
from captum_fusion.layers import TokenGrid
from tests.networks import TupleLayer, make
from tests.test_layers import Transformer

SCENE = next(scene for scene in digits.load_scenes() if len(scene.labels) == 2)
PICTURE = str(digits.scene_path(SCENE.name))


def explain(folder: Path, *arguments: str) -> int:
    return main(["explain", *arguments, "--output", str(folder)])


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 0
    with Image.open("captum_fusion_demo.png") as figure:
        assert figure.width > 800
    printed = capsys.readouterr().out
    for label in photographs.load_photographs()[0].labels:
        assert f"{photographs.CLASSES[label]}: probability" in printed
    assert printed.count("with only the highlighted part shown") == 2
    assert "captum-fusion explain" in printed, "the next command to try"
    assert [file.name for file in tmp_path.iterdir()] == ["captum_fusion_demo.png"]


def test_the_demo_explains_two_objects(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cat", "nothing"):
        assert main(["demo", "--photograph", name]) == 2
        assert f"no photograph {name!r} of two objects; there are cat_and_coffee, two_dogs" in capsys.readouterr().err


def test_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "captum_fusion", "demo", "--output", str(tmp_path / "new")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new" / "captum_fusion_demo.png").exists()


def test_help_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ([], ["explain"], ["demo"]):
        with pytest.raises(SystemExit) as stopped:
            main([*command, "--help"])
        assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for word in ("--model", "--weights", "--layers", "--target", "--methods", "--device", "--output", "--save-map"):
        assert word in printed


@pytest.fixture
def few_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """RISE with 200 masks instead of 4000."""
    monkeypatch.setitem(RISE.__init__.__kwdefaults__, "n_masks", 200)


@pytest.mark.usefixtures("few_masks")
@pytest.mark.parametrize("method", ["fusion-cam", "union-cam", "grad-cam", "ablation-cam", "eigen-cam", "rise"])
def test_explain_with_a_method(tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    target = SCENE.labels[0]
    arguments = ("--model", "digits", "--method", method, "--target", digits.CLASSES[target], "--save-map")
    assert explain(tmp_path, PICTURE, *arguments) == 0
    printed = capsys.readouterr().out
    assert "layer: stage4" in printed
    assert f"{digits.CLASSES[target]} ({target}), probability" in printed
    stem = f"{Path(PICTURE).stem}_{method}"
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"{stem}.npy", f"{stem}.png"]
    heat = np.load(tmp_path / f"{stem}.npy")
    assert heat.shape == (96, 96)
    assert heat.dtype == np.float32
    model, inputs = digits.load_model(), digits.preprocess(SCENE.image)
    raw = METHODS[method].build(model, [model.stage4]).attribute(inputs, target).detach().relu()
    raw = raw.sum(1, keepdim=True)
    wanted = torch.nn.functional.interpolate(raw, (96, 96), mode="bilinear") if raw.shape[-1] != 96 else raw
    wanted = (wanted - wanted.min()) / (wanted.max() - wanted.min())
    np.testing.assert_allclose(heat, wanted[0, 0].numpy(), atol=1e-4)


@pytest.mark.usefixtures("few_masks")
def test_methods_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--model", "digits", "--method", "all", "--target", "0", "--save-map")
    assert explain(tmp_path, PICTURE, *arguments) == 0
    stem = Path(PICTURE).stem
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {f"{stem}_methods.png", *(f"{stem}_{name}.npy" for name in METHODS)}
    assert f"{len(METHODS)} methods" in capsys.readouterr().out
    several = [np.load(tmp_path / f"{stem}_{name}.npy") for name in ("fusion-cam", "score-cam", "rise", "shap-cam")]
    assert all(heat.max() == 1 for heat in several)
    assert len({heat.tobytes() for heat in several}) == 4
    with Image.open(tmp_path / f"{stem}_methods.png") as figure:
        assert figure.width > 1200
        assert figure.height > 1200


def test_a_method_that_does_not_fit_is_left_out_of_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (PICTURE, "--model", "digits", "--layer", "stage3", "--save-map")
    assert explain(tmp_path, *arguments, "--method", "grad-cam,cam,grad-cam") == 0
    printed = capsys.readouterr()
    assert "cam is left out: layer: CAM needs a network" in printed.out + printed.err
    stem = Path(PICTURE).stem
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"{stem}_grad-cam.npy", f"{stem}_methods.png"]
    assert explain(tmp_path, *arguments, "--method", "cam") == 2
    assert "cam on layer stage3: layer: CAM needs a network" in capsys.readouterr().err


def test_several_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (PICTURE, "--model", "digits", "--save-map", "--target", "0", "--output", str(tmp_path))
    assert main(["explain", *arguments, "--method", "integrative-cam,layer-cam", "--layer", "stage2,stage4"]) == 0
    model, inputs = digits.load_model(), digits.preprocess(SCENE.image)
    for name in ("integrative-cam", "layer-cam"):
        expected = METHODS[name].build(model, [model.stage2, model.stage4]).attribute(inputs, 0)
        found = np.load(tmp_path / f"{Path(PICTURE).stem}_{name}.npy")
        np.testing.assert_allclose(found, expected[0, 0].numpy(), atol=1e-5)
    assert main(["explain", *arguments, "--method", "integrative-cam"]) == 0
    assert "layers of integrative-cam: stage1,stage2,stage4" in capsys.readouterr().out


def test_several_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stem, names = Path(PICTURE).stem, [digits.CLASSES[label] for label in SCENE.labels]
    arguments = ("--model", "digits", "--save-map")
    assert explain(tmp_path, PICTURE, *arguments, "--target", *names, names[0]) == 0
    printed = capsys.readouterr().out
    for name, label in zip(names, SCENE.labels, strict=True):
        assert printed.count(f"{name} ({label}), probability") == 1
    expected = {f"{stem}_fusion-cam.png", *(f"{stem}_fusion-cam_{label}.npy" for label in SCENE.labels)}
    assert {file.name for file in tmp_path.iterdir()} == expected
    model, inputs = digits.load_model(), digits.preprocess(SCENE.image)
    for label in SCENE.labels:
        alone = METHODS["fusion-cam"].build(model, [model.stage4]).attribute(inputs, label)
        found = np.load(tmp_path / f"{stem}_fusion-cam_{label}.npy")
        np.testing.assert_allclose(found, alone[0, 0].numpy(), atol=1e-4)
    with Image.open(tmp_path / f"{stem}_fusion-cam.png") as figure:
        assert figure.height > 500, "a row for each target"
    assert explain(tmp_path, PICTURE, *arguments, "--target", "auto", "0", "--method", "grad-cam,hires-cam") == 0
    assert "0), probability" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require")
def test_both_commands_have_one_grammar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_maps.py").write_text(
        "def bright(model, layer, inputs, target, power=1.0):\n    return inputs.abs().mean(1, keepdim=True) ** power\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    specs = ["fusion-cam:theta=20,weighting=raw", "captum.attr:Saliency:abs=False", "my_maps:bright:power=2"]
    for option, words in (("--methods", specs), ("--method", [",".join(specs)])):
        folder = tmp_path / option
        arguments = (PICTURE, "--model", "digits", option, *words, "--layers", "stage4", "--target", "3", "--save-map")
        assert explain(folder, *arguments) == 0
        files = ["fusion-cam_theta=20,weighting=raw", "captum.attr_Saliency_abs=False", "my_maps_bright_power=2"]
        stem = Path(PICTURE).stem
        assert {file.name for file in folder.iterdir()} == {
            f"{stem}_methods.png", *(f"{stem}_{name}.npy" for name in files)
        }  # fmt: skip
        model, inputs = digits.load_model(), digits.preprocess(SCENE.image)
        fusion = METHODS["fusion-cam"].build(model, [model.stage4], theta=20, weighting="raw").attribute(inputs, 3)
        np.testing.assert_allclose(np.load(folder / f"{stem}_{files[0]}.npy"), fusion[0, 0].numpy(), atol=1e-4)
        bright = inputs.abs().mean(1)[0] ** 2
        bright = (bright - bright.min()) / (bright.max() - bright.min())
        np.testing.assert_allclose(np.load(folder / f"{stem}_{files[2]}.npy"), bright.numpy(), atol=1e-4)
        arguments = ("--model", "digits", option, *words, "--layers", "stage4", "--explain", "label", "--limit", "1")
        out = ("--metrics", "complexity", "--output", str(folder / "table"), "--pictures", "0")
        assert main(["evaluate", "digits", *arguments, *out]) == 0
        run = json.loads((folder / "table" / "run.json").read_text())
        assert list(run["run"]["methods"]) == specs
        assert run["model digits"]["layer"] == "stage4"


def test_a_method_that_does_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, hint in (("fusion", "did you mean fusion-cam"), ("xyz", "'captum-fusion methods' lists them")):
        for command in (["explain", PICTURE], ["evaluate", "digits"]):
            arguments = ["--model", "digits", "--method", wrong, "--output", str(tmp_path / "out")]
            assert main([*command, *arguments]) == 2
            assert hint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_layers_and_methods_that_do_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (PICTURE, "--model", "digits", "--target", "0")
    methods = ("--method", "layer-cam, grad-cam", "--layer", "stage2, stage4", "--save-map")
    assert explain(tmp_path, *arguments, *methods) == 0
    stem = Path(PICTURE).stem
    files = ("methods.png", "layer-cam.npy", "grad-cam_stage2.npy", "grad-cam_stage4.npy")
    assert {file.name for file in tmp_path.iterdir()} == {f"{stem}_{file}" for file in files}
    model, inputs = digits.load_model(), digits.preprocess(SCENE.image)
    for name in ("stage2", "stage4"):
        alone = METHODS["grad-cam"].build(model, [getattr(model, name)]).attribute(inputs, 0).detach().relu()
        alone = torch.nn.functional.interpolate(alone, (96, 96), mode="bilinear")
        found = np.load(tmp_path / f"{stem}_grad-cam_{name}.npy")
        np.testing.assert_allclose(found, (alone / alone.max())[0, 0].numpy(), atol=1e-4)
    assert explain(tmp_path / "none", *arguments, "--method", "hires-cam,xgrad-cam", "--layer", "classifier") == 2
    assert "none of the methods fits" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_list_of_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    methods, legend, metrics = capsys.readouterr().out.split("\n\n")
    assert all(f"{symbol}:" in legend for symbol in ("samples", "K", "Z", "b", "(layer)"))
    assert [line.split()[0] for line in metrics.splitlines()[1:]] == list(MEASURES)
    lines = methods.splitlines()
    assert lines[0].split() == ["method", "family", "samples", "paper"]
    assert [line.split()[0] for line in lines[1:]] == list(METHODS)
    for line, method in zip(lines[1:], METHODS.values(), strict=True):
        assert method.info.cost in line
        assert line.endswith(method.info.url)


@pytest.mark.parametrize("arguments", [["methods"], ["--help"]])
def test_a_reader_that_goes_away_gets_no_traceback(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "captum_fusion", *arguments]
    for buffered in ("", "1"):  # at the end, or while printing
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": buffered}
        )
        assert process.stdout is not None
        process.stdout.close()
        _, complaint = process.communicate(timeout=120)
        assert process.returncode == 141 or arguments == ["--help"], "argparse ignores it by itself"
        assert complaint == b""


def test_several_pictures_in_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "elsewhere" / Path(PICTURE).name
    copy.parent.mkdir()
    copy.write_bytes(Path(PICTURE).read_bytes())
    grey = tmp_path / "grey.jpg"
    Image.new("L", (50, 40), 90).save(grey)
    out = tmp_path / "out"
    assert explain(out, PICTURE, str(copy), str(grey), "--model", "digits") == 0
    stem = Path(PICTURE).stem
    names = {f"{stem}_fusion-cam.png", f"{stem}_2_fusion-cam.png", "grey_fusion-cam.png"}
    assert {file.name for file in out.iterdir()} == names
    assert capsys.readouterr().out.count("wrote") == 3


def test_auto_explains_the_predicted_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = digits.load_model()
    with torch.no_grad():
        predicted = int(model(digits.preprocess(SCENE.image)).argmax())
    assert explain(tmp_path, PICTURE, "--model", "digits", "--layer", "stage3") == 0
    printed = capsys.readouterr().out
    assert f"{digits.CLASSES[predicted]} ({predicted})" in printed
    assert "layer:" not in printed, "it was named"


def test_a_torchvision_network_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torchvision

    torch.manual_seed(0)
    weights = tmp_path / "random.pt"
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), weights)
    arguments = ("--model", "squeezenet1_1", "--weights", str(weights), "--method", "grad-cam", "--target", "tiger cat")
    assert explain(tmp_path, PICTURE, *arguments) == 0
    printed = capsys.readouterr().out
    assert "layer: features" in printed
    assert "tiger cat (282)" in printed


def test_a_function_with_1000_outputs_has_imagenets_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--model", "torchvision.models:squeezenet1_1", "--method", "grad-cam", "--target", "0")
    assert explain(tmp_path, PICTURE, *arguments) == 0
    printed = capsys.readouterr().out
    assert "ImageNet's class names are assumed" in printed
    assert "tench (0)" in printed


DIGITS = ("--model", "digits")
MISTAKES: dict[str, tuple[tuple[Any, ...], str]] = {
    "no file": (("absent.jpg", *DIGITS), "there is no file absent.jpg"),
    "no image": ((__file__, *DIGITS), "test_command_line.py is not an image"),
    "no method": ((PICTURE, *DIGITS, "--methods", ","), "methods: there is none"),
    "no method, but options": ((PICTURE, *DIGITS, "--methods", ",theta=3"), "no method 'theta=3'"),
    "no option": (
        (PICTURE, *DIGITS, "--methods", "fusion-cam:teta=3"),
        "fusion-cam has no option 'teta'; it has theta",
    ),
    "no layer": ((PICTURE, *DIGITS, "--layer", "stage5"), "no layer 'stage5'; did you mean .*stage4"),
    "empty layer": ((PICTURE, *DIGITS, "--layer", ""), "the model has no layer ''; did you mean stage1"),
    "no spatial layer": (
        (PICTURE, *DIGITS, "--layer", "classifier"),
        "fusion-cam on layer classifier: layer: the output",
    ),
    "no class": ((PICTURE, *DIGITS, "--target", "thre"), "no class 'thre'; did you mean .*'three'"),
    "no index": ((PICTURE, *DIGITS, "--target", "10"), "target: 10 is not one of the classes 0 to 9"),
    "below zero": ((PICTURE, *DIGITS, "--target=-1"), "target: -1 is not one of"),
    "no model": ((PICTURE, "--model", "resnet5"), "there is no model 'resnet5'"),
    "no weights": ((PICTURE, "--model", "resnet18", "--weights", "absent.pt"), "weights: there is no file absent.pt"),
    "no weight file": ((PICTURE, "--model", "resnet18", "--weights", PICTURE), "weights: .* could not be read|execute"),
    "no layer in use": (
        (PICTURE, "--model", "tests.test_command_line:aside", "--layer", "aside", "--method", "grad-cam"),
        "grad-cam on layer aside: Forward hook did not obtain any outputs",
    ),
    "no map": (
        (PICTURE, *DIGITS, "--layer", "classifier", "--method", "grad-cam"),
        "grad-cam on layer classifier: the layer must return one tensor",
    ),
    "several tensors": (
        (PICTURE, "--model", "tests.test_command_line:branches", "--layer", "branches"),
        "fusion-cam on layer branches: the layer must return one tensor",
    ),
    "other channels": (
        (PICTURE, "--model", "tests.test_command_line:grey"),
        r"model: tests.test_command_line:grey does not take an input of shape \(1, 3, 224, 224\)",
    ),
    "superscript": ((PICTURE, *DIGITS, "--target", "²"), "there is no class '²'"),
    "meta": ((PICTURE, *DIGITS, "--device", "meta"), "device: meta is not available"),
    "no device": ((PICTURE, *DIGITS, "--device", "abacus"), "device: abacus is not available"),
    "no names": ((PICTURE, *DIGITS, "--classes", "absent.txt"), "classes: absent.txt could not be read"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_give_one_clear_line(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, message = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    assert explain(tmp_path / "out", *arguments) == 2
    complaint = capsys.readouterr().err
    lines = [line for line in complaint.splitlines() if line and not line.startswith("images:")]
    assert len(lines) == 1
    assert lines[0].startswith("captum-fusion: error: ")
    assert re.search(message, lines[0]), lines[0]
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_a_name_that_several_classes_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = tmp_path / "classes.txt"
    names.write_text("\n".join(["crane", *map(str, range(8)), "Crane"]))
    weights = tmp_path / "weights.pt"
    torch.save(make(outputs=10).state_dict(), weights)
    model = ("--model", "tests.test_command_line:ten_classes", "--weights", str(weights), "--classes", str(names))
    assert explain(tmp_path / "out", PICTURE, *model, "--target", "crane") == 2
    assert "2 classes are called 'crane'; give the index: [0, 9]" in capsys.readouterr().err
    names.write_text("too\nfew")
    assert explain(tmp_path / "out", PICTURE, *model) == 2
    assert "2 names for 10 outputs" in capsys.readouterr().err


def test_a_binary_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ("--model", "tests.test_command_line:one_output", "--target", "0", "--save-map")
    assert explain(tmp_path, PICTURE, *model) == 2
    assert 'score_fn="softmax" of a single output column' in capsys.readouterr().err
    assert explain(tmp_path, PICTURE, *model, "--score-fn", "sigmoid") == 0
    assert (tmp_path / f"{Path(PICTURE).stem}_fusion-cam.npy").exists()


def aside() -> torch.nn.Module:
    model = make()
    model.aside = torch.nn.Conv2d(3, 3, 1)
    return model.eval()


def branches() -> torch.nn.Module:
    return make(TupleLayer)


def grey() -> torch.nn.Module:
    return make(channels=1)


def one_output() -> torch.nn.Module:
    return make(outputs=1)


def ten_classes() -> torch.nn.Module:
    return make(outputs=10)


def test_a_broken_picture_among_good_ones_stops_the_run_before_it_starts(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(PICTURE).read_bytes()[:200])
    assert explain(tmp_path / "out", PICTURE, str(broken), *DIGITS) == 2
    assert not (tmp_path / "out").exists()


def test_output_must_be_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    assert explain(file, PICTURE, *DIGITS) == 2
    assert main(["demo", "--output", str(file)]) == 2
    assert main(["demo", "--output", str(file / "below")]) == 2
    assert "is a file, not a folder" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["upright", "turned", "sixteen bits"])
def test_pictures_are_read_as_people_see_them(tmp_path: Path, kind: str) -> None:
    ramp = np.tile(np.arange(64, dtype=np.uint16) * 1024, (32, 1))
    picture = Image.fromarray(ramp if kind == "sixteen bits" else (ramp // 257).astype(np.uint8))
    exif = Image.Exif()
    if kind == "turned":  # as a phone held upright stores it
        picture, exif[0x0112] = picture.transpose(Image.Transpose.ROTATE_90), 6
    file = tmp_path / "picture.png"
    picture.save(file, exif=exif)
    read = np.asarray(open_image(file))
    assert read.shape == (32, 64, 3)
    np.testing.assert_allclose(read[0, :, 0], ramp[0] / 257, atol=1.5)


def test_pictures_of_floating_point_numbers_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "scan.tiff"
    Image.fromarray(np.ones((8, 8), np.float32)).save(file)
    assert explain(tmp_path / "out", str(file), *DIGITS) == 2
    assert "holds floating point numbers" in capsys.readouterr().err


def test_class_names_are_no_mathematics(tmp_path: Path) -> None:
    names = tmp_path / "classes.txt"
    names.write_text("\n".join([r"a$\x$"] * 10))
    assert explain(tmp_path, PICTURE, *DIGITS, "--classes", str(names), "--method", "grad-cam") == 0


def test_a_figure_that_cannot_be_written_leaves_no_half_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    assert explain(tmp_path, PICTURE, *DIGITS, "--method", "grad-cam") == 2
    assert not list(tmp_path.iterdir())


def test_bad_arguments_are_argparses(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["explain"], ["explain", PICTURE, "--score-fn", "no-fn"], []):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
    assert "usage: captum-fusion" in capsys.readouterr().err


def test_import_does_not_load_what_is_not_needed() -> None:
    code = "import sys, captum_fusion; sys.exit('torchvision' in sys.modules or 'safetensors' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------------------------------------------- explain: input


def grad_cam(folder: Path, *arguments: str) -> int:
    return explain(folder, *arguments, *DIGITS, "--method", "grad-cam", "--target", "four")


def make_wrong_pictures(folder: Path) -> None:
    (folder / "text.png").write_text("not a picture")
    (folder / "empty.png").touch()
    (folder / "empty folder").mkdir()
    (folder / "nested" / "below").mkdir(parents=True)
    parts = [b"IHDR" + (30_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0]), b"IDAT" + zlib.compress(bytes(99))]
    chunks = [(len(part) - 4).to_bytes(4, "big") + part + zlib.crc32(part).to_bytes(4, "big") for part in parts]
    (folder / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


WRONG_PICTURES = {
    "text.png": "text.png is not an image",
    "empty.png": "empty.png is empty",
    "empty folder": "there are no pictures in the folder empty folder$",
    "nested": r"there are no pictures in the folder nested \(its subfolders are not searched\)",
    "huge.png": "huge.png could not be read as an image .*900000000 pixels",
    "*.gif": r"no file matches '\*.gif'",
    "absent.png": "there is no file absent.png",
}


@pytest.mark.parametrize("name", WRONG_PICTURES)
def test_wrong_pictures_get_one_clear_line(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wrong_pictures(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert grad_cam(tmp_path / "out", name) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(WRONG_PICTURES[name], line.removeprefix("captum-fusion: error: ")), line
    assert not (tmp_path / "out").exists()


def test_unusual_pictures_are_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scene = Image.open(PICTURE).convert("RGB")
    folder = tmp_path / "pictures"
    folder.mkdir()
    scene.convert("CMYK").save(folder / "cmyk.jpg")
    scene.convert("L").save(folder / "grey.png")
    scene.save(folder / "moving.gif", save_all=True, append_images=[scene.rotate(90)])
    Image.fromarray(np.asarray(scene.convert("L")).astype(np.uint16) * 257).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    scene.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=exif)
    (folder / "notes.txt").write_text("no picture")
    patterns = (str(folder), str(folder / "*.gif"), str(folder / "grey.png"))
    assert grad_cam(tmp_path / "out", *patterns, "--save-map") == 0
    stems = ("cmyk", "grey", "moving", "deep", "turned")
    names = {f"{stem}_grad-cam.{ending}" for stem in stems for ending in ("png", "npy")}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    assert "moving.gif: the first of 2 pictures in the file is explained" in capsys.readouterr().out
    assert grad_cam(tmp_path / "reference", PICTURE, "--save-map") == 0
    upright = np.load(tmp_path / "reference" / f"{Path(PICTURE).stem}_grad-cam.npy")
    np.testing.assert_allclose(np.load(tmp_path / "out" / "turned_grad-cam.npy"), upright, atol=1e-5)


def test_transparent_pixels_are_explained_as_white(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    picture.putpixel((0, 0), (10, 20, 30, 255))
    picture.save(tmp_path / "clear.png")
    read = np.asarray(open_image(tmp_path / "clear.png"))
    assert read[0, 0].tolist() == [10, 20, 30]
    assert (read[1:] == 255).all()


def test_an_option_that_takes_the_picture_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["explain", *DIGITS, "--target", "auto", "x.webp"])
    assert stopped.value.code == 2
    assert "x.webp was read as a part of the option before it; put pictures first" in capsys.readouterr().err
    assert explain(tmp_path, PICTURE, *DIGITS, "--target", "auto", PICTURE) == 2
    assert "put pictures before the options" in capsys.readouterr().err


def test_hints_for_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(tmp_path, PICTURE, *DIGITS, "--method", "GradCAM") == 2
    assert "no method 'GradCAM'; did you mean grad-cam," in capsys.readouterr().err
    assert explain(tmp_path, PICTURE, *DIGITS, "--cmap", "Jet") == 2
    assert "no colour map 'Jet'; did you mean jet" in capsys.readouterr().err
    for option, value in (("--alpha", "2"), ("--threshold=-1", ""), ("--dpi", "0"), ("--top", "0")):
        assert explain(tmp_path, PICTURE, *DIGITS, option, *filter(None, [value])) == 2
        assert option.strip("-").split("=")[0] in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_failed_download_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    monkeypatch.setattr("torchvision.models.get_model", unreachable)
    assert explain(tmp_path, PICTURE, "--model", "resnet50") == 2
    line = capsys.readouterr().err
    assert "could not be downloaded (<urlopen error" in line
    assert "--weights FILE" in line
    assert "--model bundled" in line


def test_a_layer_with_one_position_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(tmp_path, PICTURE, *DIGITS, "--layer", "pool", "--method", "grad-cam", "--target", "four") == 0
    printed = capsys.readouterr().out
    assert "the map of grad-cam is zero everywhere (layer pool has a single position" in printed


def test_an_output_that_is_not_finite_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(tmp_path / "out", PICTURE, "--model", "tests.test_command_line:broken", "--method", "grad-cam") == 2
    assert "the network's output for this picture is not finite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def broken() -> torch.nn.Module:
    model = make()
    torch.nn.init.constant_(model.head.bias, float("nan"))
    return model


# ------------------------------------------------------------------------------------------------------ explain: output


def test_the_folder_is_made_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert grad_cam(Path("/proc/none/here"), PICTURE) == 2
    assert "output: /proc/none/here could not be written" in capsys.readouterr().err

    def work(*args: Any) -> None:
        assert (tmp_path / "a" / "b").is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr("captum_fusion._commands.explain.explain", work)
    assert grad_cam(tmp_path / "a" / "b", PICTURE) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "captum-fusion: stopped"
    assert not (tmp_path / "a").exists(), "nothing is left behind"


def test_ctrl_c_ends_every_command_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("captum_fusion._commands.methods._print", stop)
    assert main(["methods"]) == 130
    assert capsys.readouterr().err == "captum-fusion: stopped\n"


def test_later_runs_do_not_overwrite(tmp_path: Path) -> None:
    stem = Path(PICTURE).stem
    for _ in range(3):
        assert grad_cam(tmp_path, PICTURE, "--save-map", "--json") == 0
    names = {f"{stem}{number}_grad-cam.{ending}" for number in ("", "_2", "_3") for ending in ("png", "npy")}
    names |= {"explanations.json", "explanations_2.json", "explanations_3.json"}
    assert {file.name for file in tmp_path.iterdir()} == names


def test_the_format_and_the_name_of_the_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert grad_cam(tmp_path / "new" / "why.pdf", PICTURE) == 0
    assert (tmp_path / "new" / "why.pdf").read_bytes().startswith(b"%PDF")
    assert grad_cam(tmp_path / "new", PICTURE, "--format", "svg") == 0
    assert b"<svg" in (tmp_path / "new" / f"{Path(PICTURE).stem}_grad-cam.svg").read_bytes()
    for arguments, message in (
        (("why.pdf", PICTURE, "--format", "png"), "does not end in .png"),
        (("why.png", PICTURE, str(digits.scene_path("zero_and_nine"))), "is one file for 2 pictures"),
        (("why.jpg", PICTURE), "figures are written as png, pdf, svg, not jpg"),
    ):
        assert grad_cam(tmp_path / arguments[0], *arguments[1:]) == 2
        assert message in capsys.readouterr().err


def test_overlays_have_the_resolution_of_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = tmp_path / "wide.png"
    Image.open(PICTURE).convert("RGB").resize((640, 320)).save(wide)
    model = ("--model", "bundled", "--method", "grad-cam", "--target", "0", "1")
    drawing = ("--cmap", "jet", "--alpha", "0.5", "--threshold", "0.2", "--colorbar", "--dpi", "60")
    assert explain(tmp_path / "out", str(wide), *model, *drawing, "--overlay") == 0
    for index in (0, 1):
        with Image.open(tmp_path / "out" / f"wide_grad-cam_{index}_overlay.png") as drawn:
            assert drawn.size == (640, 320)
            saturation = np.asarray(drawn.convert("HSV"))[..., 1]
            assert saturation[:, :100].max() == 0, "not seen by the network: grey"
            assert saturation[:, 200:440].max() > 50
    printed = capsys.readouterr().out
    assert "wide.png: the network sees 38 % of the picture" in printed
    assert "--whole-image" in printed
    assert "too small for the map to mean anything" in printed
    assert explain(tmp_path / "whole", str(wide), *model, "--whole-image") == 0
    assert "the network sees" not in capsys.readouterr().out


def test_the_most_probable_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (PICTURE, *DIGITS, "--method", "fusion-cam:max_evaluations=8", "--top", "2", "--json", "--save-map")
    assert explain(tmp_path, *arguments) == 0
    content = json.loads((tmp_path / "explanations.json").read_text())
    (picture,) = content["pictures"]
    assert [one["index"] for one in picture["classes"]] == [6, 4]
    assert content["model"] == "digits"
    assert content["layers"] == ["stage4"]
    model, inputs = digits.load_model(), digits.preprocess(SCENE.image)
    for one in picture["classes"]:
        (entry,) = one["maps"]
        heat = torch.from_numpy(np.load(tmp_path / entry["files"]["map"]))
        with torch.no_grad():
            scores = model(torch.cat([inputs, inputs * heat])).softmax(1)[:, one["index"]]
        assert one["class"] == digits.CLASSES[one["index"]]
        assert [one["score"], entry["score_of_highlighted_part"]] == pytest.approx(scores.tolist(), abs=1e-4)
        assert set(entry["contributions"]) == {"gradient", "region", "union"}
    assert (tmp_path / picture["figure"]).exists()
    assert "the highlighted part alone" in capsys.readouterr().out


def test_the_page_holds_everything_and_escapes_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    names = tmp_path / "classes.txt"
    names.write_text("\n".join(f"<script>{i}</script>" for i in range(10)))
    picture = tmp_path / "a & b.png"
    picture.write_bytes(Path(PICTURE).read_bytes())
    arguments = (str(picture), *DIGITS, "--classes", str(names), "--method", "fusion-cam:max_evaluations=8", "grad-cam")
    assert explain(tmp_path, *arguments, "--html", "--open", "--target", "6", "--threshold", "0.3") == 0
    page = tmp_path / "explanations.html"
    assert opened == [page.as_uri()]
    text = page.read_text()
    assert "&lt;script&gt;6&lt;/script&gt;" in text
    assert "<script>6" not in text
    assert "a &amp; b.png" in text
    assert text.count('class="heat"') == 5, "gradient map, region map, union, fusion; Grad-CAM"
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!data:)", text), "nothing is loaded"
    assert "default-src 'none'" in text
    assert grad_cam(tmp_path, PICTURE, "--open") == 0
    assert opened[1] == (tmp_path / f"{Path(PICTURE).stem}_grad-cam.png").as_uri()


def test_a_long_run_is_announced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("captum_fusion._commands.explain.cost._seconds_of_a_sample", lambda plan, probe: 2.0)
    arguments = ("--method", "fusion-cam", "--target", "four")
    assert explain(tmp_path, PICTURE, *DIGITS, *arguments) == 0
    samples, seconds = re.search(r"at most (\d+) forward samples, about (\d+) min", capsys.readouterr().out).groups()
    channels = digits.load_model().stage4(torch.zeros(1, 80, 12, 12)).shape[1]
    assert 40 < int(samples) <= channels + 5
    assert int(seconds) == round((int(samples) + 2) * 2 / 60)
    assert grad_cam(tmp_path, PICTURE) == 0
    assert "at most" not in capsys.readouterr().out, "a short run is not"


@pytest.mark.parametrize(
    ("options", "samples"),
    [("preset=fast", 61), ("preset=best", 517), ("region_method=regression-cam", 517), ("region_method=grad-cam++", 5)],
)
def test_the_announced_cost_knows_presets_and_components(
    options: str, samples: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("captum_fusion._commands.explain.cost._WORTH_TIMING", 0)
    monkeypatch.setattr("captum_fusion._commands.explain.cost._seconds_of_a_sample", lambda plan, probe: 2.0)
    assert explain(tmp_path, PICTURE, *DIGITS, "--method", f"fusion-cam:{options}", "--target", "four") == 0
    said = capsys.readouterr().out
    assert f"at most {samples} forward samples, about" in said
    assert "costs less" not in said


def test_the_channels_of_tokens_are_not_their_positions() -> None:
    model, inputs = Transformer(2).eval(), torch.rand(1, 3, 32, 32)
    reshapes = {"patches": None, "blocks.1.norm1": TokenGrid(prefix=2)}
    assert plan._sizes(model, reshapes, inputs) == {"patches": (8, 64), "blocks.1.norm1": (8, 64)}


def test_one_bar_counts_the_samples_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tqdm

    bars: list[Any] = []

    class Bar(tqdm.tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": False, "file": io.StringIO()})
            bars.append(self)

        def close(self) -> None:
            self.last = self.n
            super().close()

    monkeypatch.setattr("captum_fusion._commands.explain.compute.tqdm", Bar)
    assert explain(tmp_path, PICTURE, *DIGITS, "--method", "fusion-cam", "grad-cam", "--target", "four") == 0
    (bar,) = bars
    assert bar.total > 60
    assert 0.8 * bar.total < bar.last <= bar.total


def test_one_method_is_shown_with_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "fusion-cam", "insertion"]) == 0
    method, metric = capsys.readouterr().out.split("\n\n")
    assert "theta=10.0" in method
    assert METHODS["fusion-cam"].info.url in method
    assert "higher is better" in metric
    assert main(["methods", "GradCAM"]) == 2
    assert "did you mean grad-cam" in capsys.readouterr().err
