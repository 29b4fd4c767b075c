"""The explorer without a browser: pictures, maps, questions, bundles, and what the page does with them."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import socket
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import squeezenet1_1 as build

import captum_fusion
from captum_fusion import LayerFusionCAM, LayerScoreCAM, functional, models
from captum_fusion.__main__ import main
from captum_fusion._pictures import visible_box
from captum_fusion.attr.catalog import METHODS
from captum_fusion.demo import digits
from captum_fusion.evaluation.cost import Cost, cost
from captum_fusion.evaluation.data import load_image
from captum_fusion.explore import bundle, drawing, sources, text
from captum_fusion.explore.pictures import Picture, read
from captum_fusion.explore.recipes import PRESETS, Recipe, checked
from captum_fusion.explore.session import CancelledError, Question, Session, Watch, top_share
from captum_fusion.layers import TokenGrid
from captum_fusion.visualization import MODES
from tests.test_layers import Transformer

SCENE = digits.scene_path("four_and_six")
QUICK = "fusion-cam:max_evaluations=4"


@pytest.fixture(scope="module")
def session() -> Session:
    return Session(*sources.of_name("digits"))


@pytest.fixture(scope="module")
def picture(session: Session) -> Picture:
    return session.open(SCENE)


def count(model: nn.Module) -> tuple[list[int], Any]:
    """The samples of each call of a network, and the hook that counts them."""
    calls: list[int] = []
    return calls, model.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))


# ---------------------------------------------------------------------------------------------------------------- maps


def test_a_map_is_the_methods_own_in_the_inputs_size(session: Session, picture: Picture) -> None:
    found = session.explain(picture, Question(4), Recipe("grad-cam"))
    raw = LayerGradCam(session.model, session.model.stage4).attribute(picture.inputs, 4)
    expected = functional.normalize(functional.upsample(raw.relu(), (96, 96)))[0, 0]
    torch.testing.assert_close(found.heat, expected.detach())
    assert found.layers == ("stage4",)
    assert (found.forward_samples, found.backward_samples) == (1, 1)
    assert found.score == pytest.approx(float(picture.scores[4]), abs=1e-6)
    kept = session.model(picture.inputs * found.heat).softmax(1)[0, 4]
    assert found.kept == pytest.approx(kept.item(), abs=1e-5)


def test_a_class_rather_than_another_explains_the_difference_of_their_outputs(
    session: Session, picture: Picture
) -> None:
    found = session.explain(picture, Question(4, 6), Recipe("grad-cam"))
    activations: list[Tensor] = []
    handle = session.model.stage4.register_forward_hook(lambda module, inputs, output: activations.append(output))
    logits = session.model(picture.inputs)[0]
    handle.remove()
    (gradients,) = torch.autograd.grad(logits[4] - logits[6], activations[0])
    raw = (gradients.mean((2, 3), keepdim=True) * activations[0]).sum(1, keepdim=True).relu()
    expected = functional.normalize(functional.upsample(raw, (96, 96)))[0, 0]
    torch.testing.assert_close(found.heat, expected.detach())
    assert found.score == pytest.approx((logits[4] - logits[6]).sigmoid().item(), abs=1e-6)
    fused = session.explain(picture, Question(4, 6), Recipe(QUICK))
    assert fused.details is not None
    assert fused.details.score.item() == pytest.approx((logits[4] - logits[6]).item(), abs=1e-4)
    shares = [float(part.split("&nbsp;%")[0]) for step in text.steps(fused) for part in step.split("through it: ")[1:]]
    assert all(0 <= share <= 100 for share in shares)


def test_a_map_is_made_once(session: Session, picture: Picture) -> None:
    recipe = Recipe("hires-cam")
    assert not session.has(picture, Question(6), recipe)
    first = session.explain(picture, Question(6), recipe)
    calls, handle = count(session.model)
    assert session.explain(picture, Question(6), recipe) is first
    assert session.has(picture, Question(6), recipe)
    handle.remove()
    assert not calls


def test_components_and_layers_are_chosen(session: Session, picture: Picture) -> None:
    recipe = Recipe(QUICK, "hires-cam", "ablation-cam")
    found = session.explain(picture, Question(4, layer="stage3"), recipe)
    assert found.code == (
        "LayerFusionCAM(network, layer, gradient_method=LayerHiResCAM(network, layer), "
        "region_method=LayerAblationCAM(network, layer))"
    )
    assert found.layers == ("stage3",)
    assert found.details is not None
    assert recipe.label == f"{QUICK} (hires-cam + ablation-cam)"
    assert session.layers_of(Recipe("integrative-cam"), Question(4)) == ("stage1", "stage2", "stage4")
    assert session.layers_of(Recipe("integrative-cam"), Question(4, layer="stage3")) == ("stage3",)


def test_the_limit_of_evaluations_belongs_to_the_region_component() -> None:
    made = Recipe(QUICK, None, "score-cam").construction(("stage4",), {})
    assert (
        made.code() == "LayerFusionCAM(network, layer, region_method=LayerScoreCAM(network, layer, max_evaluations=4))"
    )


@pytest.mark.parametrize("name", METHODS)
def test_the_cost_of_every_method_is_known_before_it_runs(session: Session, picture: Picture, name: str) -> None:
    known = session.cost(Recipe(name), picture)
    assert known is not None
    assert known[0].forward_samples >= 1
    assert known[1] > 0
    assert text.price(known)


@pytest.mark.parametrize(
    "recipe", [Recipe(QUICK), Recipe("score-cam"), Recipe("group-cam"), Recipe("fusion-cam", "hires-cam", "group-cam")]
)
def test_the_cost_is_what_a_method_takes(session: Session, picture: Picture, recipe: Recipe) -> None:
    known = session.cost(recipe, picture)
    assert known is not None
    found = session.explain(picture, Question(4), recipe)
    assert found.forward_samples == pytest.approx(known[0].forward_samples, abs=6)  # a group may be empty


def test_a_union_of_another_region_has_its_own_gradient_map() -> None:
    assert cost("union-cam:region_method=score-cam", 10, 4) == cost("union-cam", 10, 4) == Cost(15.0, 1.0)
    assert cost("union-cam:region_method=rise", 10, 4) == Cost(4006.0, 1.0)


@pytest.mark.parametrize(("spec", "samples"), [(PRESETS[0], 61), (PRESETS[1], 517)])
def test_presets_have_their_cost_and_take_components(
    session: Session, picture: Picture, spec: str, samples: int
) -> None:
    assert cost(spec, 512, 49) == Cost(samples, 1.0)
    known = session.cost(Recipe(spec), picture)
    found = session.explain(picture, Question(4), Recipe(spec))
    assert known is not None
    assert found.forward_samples == known[0].forward_samples
    assert found.code.startswith(f"LayerFusionCAM.{spec.rpartition('=')[2]}(network, layer")
    mixed = Recipe(spec, "hires-cam", "score-cam").construction(("stage4",), {}).code()
    assert "region_method=LayerScoreCAM(network, layer" in mixed
    assert ("max_evaluations=56" in mixed) == (spec == PRESETS[0])
    with pytest.raises(ValueError, match="preset must be one of fast, best"):
        checked(["fusion-cam:preset=slow"])


def test_a_bundle_names_files_without_their_folders(tmp_path: Path) -> None:
    weights, names = tmp_path / "mine.safetensors", tmp_path / "names.txt"
    save_file({key: value.contiguous() for key, value in build().state_dict().items()}, weights)
    names.write_text("\n".join(f"class {index}" for index in range(1000)))
    _, source = sources.of_name("squeezenet1_1", str(weights), str(names))
    assert source.facts == {"loaded_from": "squeezenet1_1", "weights": "mine.safetensors", "classes": "names.txt"}
    assert str(tmp_path) not in "".join(source.lines)
    assert "# Put your mine.safetensors and names.txt into this folder." in source.lines


def test_a_formula_that_is_not_understood_has_no_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    method = METHODS["grad-cam"]
    changed = type(method)(method.cls, method.info._replace(cost="K log K"))
    monkeypatch.setitem(METHODS, "grad-cam", changed)
    assert cost("grad-cam", 8, 9) is None
    assert cost("fusion-cam:gradient_method=grad-cam,region_method=rise", 8, 9) is None
    assert text.price(None) == ""


def test_a_run_is_followed_and_cancelled(session: Session, picture: Picture) -> None:
    seen: list[int] = []
    watch = Watch(seen.append, lambda: len(seen) >= 5)
    with pytest.raises(CancelledError):
        session.explain(picture, Question(4), Recipe("rise:n_masks=2000"), watch)
    assert seen == sorted(seen)
    assert not session.model._forward_hooks
    assert not session.has(picture, Question(4), Recipe("rise:n_masks=2000"))
    session.explain(picture, Question(4), Recipe("xgrad-cam"), Watch(seen.append))


def test_a_method_that_does_not_fit_says_so_in_one_line(session: Session, picture: Picture) -> None:
    with pytest.raises(ValueError, match="cam on layer stage2: layer: CAM needs a network") as error:
        session.explain(picture, Question(4, layer="stage2"), Recipe("cam"))
    assert "\n" not in str(error.value)
    for spec, message in (
        ("grad-cams", "there is no method 'grad-cams'; did you mean grad-cam"),
        ("grad-cam:theta=3", "grad-cam has no option 'theta'"),
        ("fusion-cam:theta=300", "theta must be a percentile"),
    ):
        with pytest.raises(ValueError, match=message):
            session.explain(picture, Question(4), Recipe(spec))
    with pytest.raises(ValueError, match="no option"):
        checked(["grad-cam", "grad-cam:theta=3"])


def test_the_session_refuses_what_does_not_fit() -> None:
    loaded, source = sources.of_name("digits")
    with pytest.raises(ValueError, match="layer: the model has no layer 'stag4'; did you mean stage4"):
        Session(loaded, source, "stag4")
    with pytest.raises(ValueError, match="there are 2 names for 10 outputs"):
        Session(sources.with_classes(loaded, ["a", "b"]), source)

    def broken(image: Image.Image) -> Tensor:
        raise RuntimeError("no\nway")

    with pytest.raises(ValueError, match=r"^preprocessing failed \(no\)$"):
        Session(loaded._replace(preprocess=broken), source)


# ----------------------------------------------------------------------------------------------------------- questions


def test_the_network_is_asked_about_a_part(session: Session, picture: Picture) -> None:
    everything = session.ask(picture, torch.ones(96, 96))
    torch.testing.assert_close(everything, picture.scores)
    half = torch.zeros(96, 96)
    half[:, :48] = 1
    expected = session.model(picture.inputs * half).softmax(1)[0]
    torch.testing.assert_close(session.ask(picture, half), expected.detach())
    blurred = session.ask(picture, half, "blur")
    assert not torch.allclose(blurred, expected.detach(), atol=1e-3)
    assert float(blurred.sum()) == pytest.approx(1, abs=1e-5)


def test_the_top_share_of_a_map_has_its_area() -> None:
    heat = torch.rand(20, 30) + 0.1
    mask = top_share(heat, 0.25)
    assert mask.sum() == 150
    assert heat[mask > 0].min() >= heat[mask == 0].max()
    assert not top_share(torch.zeros(4, 4), 0.5).any()


# ------------------------------------------------------------------------------------------------------------ pictures


def header_of_png(width: int, height: int) -> bytes:
    """A PNG file that claims a size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "bad.png is not an image"),
        (b"a text", "bad.png is not an image"),
        (header_of_png(30_000, 30_000), "bad.png has too many pixels"),
        (header_of_png(12_000, 9_000), "bad.png has too many pixels"),
        (header_of_png(8_000, 7_000), "bad.png has 8000 x 7000 pixels; the most is 50 million"),
        (header_of_png(20, 20), "bad.png could not be read as an image"),
    ],
)
def test_what_is_not_a_picture_gets_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{message}") as error:
        read(path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) not in str(error.value)


def test_a_missing_file_and_a_folder_get_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(ValueError, match=f"^{path.name} could not be read"):
            read(path)


def test_pictures_of_every_kind_are_read(tmp_path: Path) -> None:
    red = Image.new("RGB", (40, 20), "red")
    exif = Image.Exif()
    exif[274] = 6  # rotated by a quarter
    saves: dict[str, Callable[[Path], Any]] = {
        "a.gif": lambda path: red.save(path, save_all=True, append_images=[Image.new("RGB", (40, 20), "blue")]),
        "b.jpg": lambda path: red.convert("CMYK").save(path),
        "c.png": lambda path: Image.fromarray(np.full((20, 40), 40_000, np.uint16)).save(path),
        "d.jpg": lambda path: red.save(path, exif=exif),
        "e.png": lambda path: red.convert("RGBA").save(path),
        "f.webp": lambda path: red.save(path),
    }
    for name, save in saves.items():
        save(tmp_path / name)
        content, image = read(tmp_path / name)
        assert image.mode == "RGB"
        assert image.size == ((20, 40) if name == "d.jpg" else (40, 20))
        assert content == (tmp_path / name).read_bytes()


def test_what_the_network_sees_is_found_from_its_preprocessing() -> None:
    cropped = models.from_module("any", nn.Identity()).preprocess
    squeezed = models.from_module("any", nn.Identity(), whole_image=True).preprocess
    for size in ((800, 400), (500, 500), (100, 900)):
        box = visible_box(cropped, size)
        assert box is not None
        side = min(size) * 224 / 256
        expected = [(size[0] - side) / 2, (size[1] - side) / 2, (size[0] + side) / 2, (size[1] + side) / 2]
        assert box == pytest.approx(expected, abs=max(2, 0.01 * max(size)))
        assert visible_box(squeezed, size) == pytest.approx((0, 0, *size), abs=max(2, 0.01 * max(size)))


def test_other_preprocessing_shows_the_networks_input() -> None:
    from torchvision.transforms import functional as F

    def mirrored(image: Image.Image) -> Tensor:
        return F.to_tensor(F.hflip(image.resize((64, 64))))[None]

    def padded(image: Image.Image) -> Tensor:
        return F.to_tensor(F.pad(image.resize((32, 32)), 16))[None]

    def grey(image: Image.Image) -> Tensor:
        return F.to_tensor(image.resize((32, 32)).convert("L"))[None]

    for preprocess in (mirrored, padded, grey):
        assert visible_box(preprocess, (200, 100)) is None
    loaded = models.from_module("net", nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    opened = Session(loaded._replace(preprocess=mirrored), sources.Source((), {}), "0").open(SCENE)
    assert opened.view.size == (672, 672)
    assert opened.unseen == 0


# ------------------------------------------------------------------------------------------------------------- drawing


@pytest.mark.parametrize("mode", MODES)
def test_maps_are_drawn_in_every_mode(mode: str) -> None:
    view, heats = Image.new("RGB", (90, 60), "olive"), [torch.rand(6, 9), torch.zeros(6, 9)]
    for shared in (False, True):
        for threshold in (0.0, 0.4):
            images = drawing.draw(view, heats, drawing.Display(mode, threshold=threshold, shared=shared))
            assert [image.height for image in images] == [60, 60]
            assert images[0].width >= 90
    assert drawing.side_by_side(images).size[1] == 60
    assert drawing.side_by_side(images * 2).size[1] == 132


def test_a_shared_scale_compares_shares_of_maps() -> None:
    view = Image.new("RGB", (40, 40), "white")
    narrow, wide = torch.zeros(40, 40), torch.ones(40, 40)
    narrow[:4, :4] = 1
    both = drawing.draw(view, [narrow, wide], drawing.Display(shared=True, alpha=1.0))
    alone = drawing.draw(view, [narrow, wide], drawing.Display(alpha=1.0))
    assert np.array_equal(both[0], alone[0])
    assert np.asarray(both[1]).mean() < 10 < np.asarray(alone[1]).mean()  # a hundredth of the map at every position


def test_hidden_parts_are_grey() -> None:
    shown = torch.zeros(2, 2)
    shown[:, 0] = 1
    pixels = np.asarray(drawing.masked(Image.new("RGB", (80, 80), "blue"), shown))
    assert pixels[40, 2].tolist() == [0, 0, 255]
    assert pixels[40, 78].tolist() == [124, 124, 124]


def test_names_are_escaped_in_the_page(session: Session, picture: Picture) -> None:
    names = [f"<script>{index}</script>" for index in range(10)]
    found = session.explain(picture, Question(4, 6), Recipe("grad-cam"))
    table = text.table(names, [4, 6], {"a & b": picture.scores})
    for html in (text.caption(found, names), table, text.note("<b>")):
        assert "<script>" not in html
        assert "<b>" not in html.replace("<b>grad-cam</b>", "")
    assert "a &amp; b" in table


def test_a_map_of_a_class_that_is_not_seen_says_so(session: Session, picture: Picture) -> None:
    absent = int(picture.scores.argmin())
    caption = text.caption(session.explain(picture, Question(absent), Recipe("grad-cam")), session.class_names)
    assert "the map means little" in caption


# ------------------------------------------------------------------------------------------------------------- bundles


def test_a_bundle_reproduces_its_maps(session: Session, picture: Picture, tmp_path: Path, monkeypatch: Any) -> None:
    recipes = [
        Recipe("fusion-cam:theta=20,max_evaluations=8"),
        Recipe(QUICK, "hires-cam", "score-cam"),
        Recipe("integrative-cam"),
        Recipe("rise:n_masks=8"),
    ]
    asked = [Question(4), Question(4, 6), Question(6), Question(4)]
    maps = [session.explain(picture, *pair) for pair in zip(asked, recipes, strict=True)]
    content = bundle.bundle(session, picture, maps, [picture.view] * len(maps))
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        archive.extractall(tmp_path)
    exec(compile(Path("reproduce.py").read_text(), "reproduce.py", "exec"), {"__name__": "reproduce"})
    manifest = json.loads(Path("manifest.json").read_text())
    for number, (entry, made) in enumerate(zip(manifest["maps"], maps, strict=True), 1):
        saved = np.load(entry["file"])
        assert saved.dtype == np.float32
        np.testing.assert_array_equal(saved, made.heat.numpy())
        np.testing.assert_allclose(np.load(f"again_{number}.npy"), saved, atol=1e-4)
    assert manifest["model"]["name"] == "digits"
    assert len(manifest["model"]["weights_hash"]) == 16
    assert manifest["maps"][1]["class"] == {"index": 4, "name": "four"}
    assert manifest["maps"][1]["rather_than"]["name"] == "six"
    assert manifest["maps"][2]["layers"] == ["stage1", "stage2", "stage4"]
    assert manifest["versions"]["captum_fusion"] == captum_fusion.__version__
    assert (tmp_path / "four_and_six.png").read_bytes() == SCENE.read_bytes()


def test_names_in_a_bundle_stay_in_its_folder(session: Session, tmp_path: Path) -> None:
    odd = session.open(SCENE, "../../evil name?.png")
    maps = [session.explain(odd, Question(4), Recipe("grad-cam"))]
    with zipfile.ZipFile(io.BytesIO(bundle.bundle(session, odd, maps))) as archive:
        assert set(archive.namelist()) == {"manifest.json", "reproduce.py", "evil_name_.png", "map_1_grad-cam.npy"}
    assert np.load(io.BytesIO(bundle.arrays(maps))).shape == (96, 96)
    assert np.load(io.BytesIO(bundle.arrays(maps * 2))).shape == (2, 96, 96)


# --------------------------------------------------------------------------------------------------------- the network


def test_networks_of_every_origin() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()

    def preprocess(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image.resize((32, 24)))).permute(2, 0, 1) / 255

    loaded, source = sources.of_any(net, None, preprocess)
    session = Session(sources.with_classes(loaded, ["a", "b", "c"]), source)
    picture = session.open(SCENE)
    assert picture.inputs.shape == (1, 3, 24, 32)
    found = session.explain(picture, Question(1), Recipe("score-cam"))
    expected = LayerScoreCAM(net, net[0]).attribute(picture.inputs, 1)
    torch.testing.assert_close(found.heat, functional.normalize(functional.upsample(expected, (24, 32)))[0, 0])
    assert "from_module('Sequential', model)" in bundle.script(session, picture, [found])
    again, source = sources.of_any(loaded, None, None)
    assert again is loaded
    assert "LoadedModel" in source.lines[0]
    assert sources.of_any(None, None, None)[0].name == "bundled"
    assert sources.of_any(loaded, None, preprocess)[0].preprocess(load_image(SCENE)).shape == (1, 3, 24, 32)
    with pytest.raises(TypeError, match="preprocess must return a tensor, not str"):
        sources.of_any(net, None, lambda image: "no")[0].preprocess(load_image(SCENE))


def test_a_network_with_windows_of_attention_is_explored() -> None:
    """Windows are no grid, so these layers are not offered."""

    class Windows(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).reshape(len(x), -1, 16, x.shape[1])

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.windows = torch.nn.Conv2d(3, 8, 4, stride=4), Windows()
            self.inner, self.head = torch.nn.LayerNorm(8), torch.nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(self.windows(self.conv(x))).mean((1, 2)))

    def preprocess(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image.resize((48, 48)))).permute(2, 0, 1) / 255

    session = Session(*sources.of_any(Net().eval(), None, preprocess), "conv")
    assert set(session.layers) == {"conv"}


@pytest.mark.parametrize("layer", [None, "blocks.0"])
def test_a_transformer_is_explored(layer: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = Transformer(2).eval()

    def preprocess(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image.resize((32, 32)))).permute(2, 0, 1) / 255

    loaded, source = sources.of_any(net, None, preprocess)
    session = Session(loaded, source, None if layer is None else "blocks.0.norm2")
    name = "blocks.1.norm1" if layer is None else "blocks.0.norm2"
    assert session.layer == name
    assert session.layers[name] == (8, 8, 8)
    assert "head" not in session.layers
    picture, grid = session.open(SCENE), TokenGrid(prefix=2)
    found = session.explain(picture, Question(1), Recipe("fusion-cam:preset=best"))
    module = net.get_submodule(name)
    expected = LayerFusionCAM.best(net, module, reshape=grid).attribute(picture.inputs, 1)
    torch.testing.assert_close(found.heat, expected[0, 0].detach())
    mixed = session.explain(picture, Question(1, 2), Recipe("fusion-cam", "grad-cam", "score-cam"))
    assert "gradient_method=ReshapedGradCAM(network, layer, reshape=TokenGrid(prefix=2))" in mixed.code
    assert session.explain(picture, Question(1), Recipe("integrative-cam")).layers == (name,)
    monkeypatch.chdir(tmp_path)
    script = bundle.script(session, picture, [found, mixed]).replace("torch.nn.Module = ...", "torch.nn.Module = net")
    Path(bundle.safe_name(picture.name)).write_bytes(picture.content)
    exec(script.replace("preprocess=...", "preprocess=batched"), {"net": net, "batched": loaded.preprocess})
    for number, made in enumerate([found, mixed], 1):
        np.testing.assert_allclose(np.load(f"again_{number}.npy"), made.heat.numpy(), atol=1e-4)


def test_a_network_without_a_stage_needs_a_layer() -> None:
    net = nn.Sequential(nn.Flatten(), nn.LazyLinear(3)).eval()
    with pytest.raises(ValueError, match="layer: no convolutional stage"):
        Session(*sources.of_any(net, None, None))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, None, None), "model must be a torch.nn.Module, a LoadedModel or a name, not int"),
        ((nn.Identity(), "DEFAULT", None), "weights belong to a model of a name"),
        (("digits", None, lambda image: image), "preprocess belongs to a module"),
        (("nothing", None, None), "there is no model 'nothing'"),
    ],
)
def test_arguments_that_do_not_go_together(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sources.of_any(*arguments)


def test_pictures_to_choose_from(tmp_path: Path) -> None:
    assert [example.path.suffix for example in sources.examples((), "digits")] == [".png"] * 8
    assert all(
        "CC" in example.credit or "public" in example.credit.lower() for example in sources.examples((), "bundled")
    )
    assert [example.path for example in sources.examples([SCENE], "any")] == [SCENE]
    with pytest.raises(ValueError, match="there is no file"):
        sources.examples([tmp_path / "none.png"], "any")


def test_scores_that_are_no_probabilities_have_no_percent() -> None:
    session = Session(*sources.of_name("digits"), score_fn="identity")
    picture = session.open(SCENE)
    found = session.explain(picture, Question(6), Recipe(QUICK))
    rather = session.explain(picture, Question(4, 6), Recipe(QUICK))
    outputs = session.model(picture.inputs)[0]
    assert found.score == pytest.approx(outputs[6].item(), abs=1e-4)
    assert rather.score == pytest.approx((outputs[4] - outputs[6]).item(), abs=1e-4)
    names = session.class_names
    said = [text.caption(one, names, False) for one in (found, rather)]
    said += [*text.steps(found, False), text.table(names, [4, 6], {"whole": picture.scores}, False)]
    assert not any("%" in part for part in said)
    assert f"{outputs[6].item():.3g}" in said[0]
    assert "among these two" in text.caption(rather, names)


def test_words() -> None:
    assert [text.duration(seconds) for seconds in (0.1, 30, 240)] == ["under 1 s", "30 s", "4 min"]
    assert text.title("bundled").startswith("SqueezeNet")
    assert text.note("") == ""


# ------------------------------------------------------------------------------------------------------------ the page


@pytest.fixture
def gradio(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Gradio, whose event loops are closed, as Gradio does not."""
    pytest.importorskip("gradio", reason="the page needs the extra 'app'")
    made, new = [], asyncio.new_event_loop

    def recorded() -> asyncio.AbstractEventLoop:
        made.append(new())
        return made[-1]

    monkeypatch.setattr(asyncio, "new_event_loop", recorded)
    yield
    for loop in made:
        if not loop.is_running():
            loop.close()
    gc.collect()


@pytest.fixture
def page(session: Session, gradio: None) -> Any:
    from captum_fusion.explore.page import Page

    built = Page(session, sources.examples((), "digits"), ["grad-cam"])
    built.blocks()
    return built


def test_a_visit_from_the_first_picture_to_the_downloads(page: Any, picture: Picture) -> None:
    request, display, silent = (
        SimpleNamespace(session_hash="one"),
        drawing.Display(),
        lambda *arguments, **options: None,
    )
    assert "Choose a picture" in page._run(4, -1, ["grad-cam"], "stage4", "", "", request, silent)
    assert page._ask(30, "mean", None, request) == (None, None, "")
    assert "Nothing is painted" in page._brush(None, "mean", request)
    opened = page._open_first(request)
    assert "96 x 96 pixels" in opened[1]
    target = opened[2].value
    assert target == picture.scores.argmax()
    status = page._run(target, -1, ["grad-cam", QUICK], "stage4", "", "", request, silent)
    assert "forward samples" in status
    drawn = page._redraw(*display, request)
    assert len(drawn) == 3 * 4 + 2 * 4 + 2
    assert "grad-cam" in drawn[2]
    only, without, answer = page._ask(30, "mean", QUICK, request)
    assert only.size == without.size == (672, 672)
    assert "Highlighted part hidden" in answer
    layer = Image.new("RGBA", (672, 672))
    layer.paste((230, 48, 138, 255), (0, 0, 336, 672))
    brushed = page._brush({"layers": [layer]}, "mean", request)
    assert "50 % of what the network sees is painted over" in brushed
    files = [button.value["path"] for button in page._files(request)]
    assert [Path(file).suffix for file in files] == [".png", ".npy", ".zip"]
    assert page._add_class(9, target, request)[0].value == 9
    assert page._add_class(None, target, request)[0] == target
    assert "under 1 s" in str(page._prices("stage3", "", "", request).choices)
    priced = {value: label for label, value in page._prices("stage4", "grad-cam", "rise", request).choices}
    assert "4006 samples" in priced["fusion-cam"]
    assert "1 sample," in priced["grad-cam"]
    folder = page._visitor(request).folder
    assert folder.is_dir()
    page._leave(request)
    page._leave(request)
    assert not folder.exists()


def test_a_visitor_sees_one_line_for_each_mistake(page: Any, tmp_path: Path) -> None:
    request, silent = SimpleNamespace(session_hash="two"), lambda *arguments, **options: None
    bad = tmp_path / "notes.txt"
    bad.write_text("no picture")
    assert "notes.txt is not an image" in page._open_upload(str(bad), request)[1]
    assert page._open_upload(None, request)
    page._open_first(request)
    page._pick(SimpleNamespace(index=1), request)
    assert page._visitor(request).wanted == 1
    assert page.examples[1].path.name in page._open_example(request)[1]
    run: Callable[..., str] = page._run
    assert "cf-error" in run(4, 4, ["grad-cam"], "stage4", "", "", request, silent)
    assert "Choose a method" in run(4, -1, [], "stage4", "", "", request, silent)
    failed = run(4, -1, ["cam", "grad-cam"], "stage2", "", "", request, silent)
    assert "cf-error" in failed
    assert "It took" in failed


def test_a_long_run_waits_for_the_button_and_can_be_cancelled(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    request, silent = SimpleNamespace(session_hash="three"), lambda *arguments, **options: None
    page._open_first(request)
    monkeypatch.setattr(page.session, "seconds", 60.0)
    status = page._run_if_quick(6, -1, ["rise:n_masks=999"], "stage4", "", "", request, silent)
    assert "Press Explain for rise:n_masks=999" in status
    page._begin(request)
    statuses: list[str] = []

    def run() -> None:
        statuses.append(
            page._run(6, -1, ["rise:n_masks=100000"], "stage4", "", "", request, lambda *a, **k: started.set())
        )

    started = threading.Event()
    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(60)
    page._cancel(request)
    thread.join(60)
    assert not thread.is_alive()
    assert "Cancelled" in statuses[0]
    assert [button.interactive for button in page._end(request)] == [True, False]


# --------------------------------------------------------------------------------------------------------- the command


def test_without_gradio_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gradio" else found(name, *rest)
    )
    assert main(["explore"]) == 2
    assert capsys.readouterr().err == (
        'captum-fusion: error: the explorer needs Gradio: pip install "captum-fusion[app]"\n'
    )
    with pytest.raises(ImportError, match="captum-fusion\\[app\\]"):
        captum_fusion.explore("digits")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "stag4"], "layer: the model has no layer 'stag4'"),
        (["--methods", "grad-cams"], "methods: there is no method 'grad-cams'; did you mean grad-cam"),
        (["none.png"], "there is no file none.png"),
        (["--model", "nothing"], "there is no model 'nothing'"),
        (["--device", "cuda:77"], "device: cuda:77 is not available here"),
        (["--port", "70000"], "port: it must be from 1 to 65535, not 70000"),
    ],
)
def test_wrong_arguments_get_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], gradio: None
) -> None:
    model = [] if "--model" in arguments else ["--model", "digits"]
    assert main(["explore", *model, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.filterwarnings("ignore:Exception ignored in. <socket.socket:pytest.PytestUnraisableExceptionWarning")
def test_a_port_in_use_gets_one_line(capsys: pytest.CaptureFixture[str], gradio: None) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["explore", "--model", "digits", "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert error == f"captum-fusion: error: port: port {port} is not free; --port names another\n"
