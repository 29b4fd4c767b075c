"""The evaluation: what it measures is what the metrics say, nothing is lost, and nothing depends on how it was run."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam, NoiseTunnel, Saliency
from PIL import Image
from torch import Tensor, nn

from captum_fusion import (
    LayerFusionCAM,
    LayerGroupCAM,
    LayerISCAM,
    LayerLayerCAM,
    LayerScoreCAM,
    LayerUnionCAM,
    metrics,
    models,
)
from captum_fusion.evaluation import METRICS, PRESETS, Example, Region, evaluate, open_dataset
from captum_fusion.evaluation.data import as_dataset
from captum_fusion.evaluation.methods import ExplainedLayers, Stage, build, fingerprint, parse, split
from captum_fusion.evaluation.network import Meter
from captum_fusion.evaluation.store import Store
from captum_fusion.functional import normalize, upsample
from captum_fusion.metrics import average_drop, average_increase, complexity, deletion, energy_pointing_game, insertion
from tests.networks import FlatHead, Net, WithBatchNorm, hooks_on, images, make

METRICS_OF_TABLE = ["average_drop", "average_increase", "complexity"]


def small(name: str = "small", kind: type[nn.Module] = Net, **options: Any) -> models.LoadedModel:
    """A network for 16 x 16 pictures."""

    def preprocess(image: Image.Image) -> Tensor:
        return torch.tensor(np.asarray(image.resize((16, 16))), dtype=torch.float32).permute(2, 0, 1)[None] / 255

    return models.LoadedModel(name, make(kind, **options), preprocess, lambda inputs: inputs.clamp(0, 1), None)


def dataset(number: int = 4, labels: bool = True) -> list[Example]:
    return [
        Example(f"image {i}", x, (i % 5,) if labels else ()) for i, x in enumerate(images(number, 3, 16, 16, seed=3))
    ]


def run(folder: Path, data: Any = None, model: Any = None, **options: Any) -> Any:
    return evaluate(
        dataset() if data is None else data,
        small() if model is None else model,
        output=folder,
        **{"methods": ["grad-cam", "score-cam"], "pictures": 0, "show_progress": False, **options},
    )


def values(rows: list[dict[str, Any]], method: str, metric: str) -> list[Any]:
    return [row["value"] for row in rows if row["method"] == method and row["metric"] == metric]


def content(folder: Path, *suffixes: str) -> dict[str, bytes]:
    """The tables that must not depend on how a run went."""
    files = [path for path in (folder / "tables").iterdir() if "cost" not in path.name]
    assert files
    return {path.name: path.read_bytes() for path in files}


# ------------------------------------------------------------------------------------------------------------- numbers


def test_rows_hold_what_the_metrics_say_of_the_very_maps(tmp_path: Path) -> None:
    data, loaded = dataset(), small()
    metrics = [*METRICS_OF_TABLE, "insertion:steps=5", "deletion"]
    found = run(tmp_path, data, loaded, metrics=metrics)
    model = loaded.model
    for i, example in enumerate(data):
        x = example.image[None].contiguous(memory_format=torch.channels_last)
        target = int(model(x).argmax())
        maps = LayerScoreCAM(model, model.conv2).attribute(x, target)
        expected = {
            "average_drop": average_drop(model, x, maps, target),
            "average_increase": average_increase(model, x, maps, target),
            "insertion:steps=5": insertion(model, x, maps, target, steps=5).auc,
            "deletion": deletion(model, x, maps, target).auc,
        }
        for metric, value in expected.items():
            assert values(found.rows, "score-cam", metric)[i] == pytest.approx(float(value), abs=1e-5), metric
    curve = next(row for row in found.rows if row["metric"] == "insertion:steps=5")
    assert len(curve["curve"]) == len(curve["shares"]) == 6
    assert {row["target"] for row in found.rows} <= set(range(5))


def test_example_maps_show_where_the_objects_are(tmp_path: Path) -> None:
    def outlined(*regions: Region) -> tuple[bool, str]:
        data = [Example("a", images(1, 3, 16, 16)[0], (1,), regions)]
        run(tmp_path, data, explain="label", methods=["grad-cam"], metrics=["complexity"], pictures=1)
        page = (tmp_path / "index.html").read_text()
        drawn = (tmp_path / "maps").iterdir()
        file = next(file for file in drawn if base64.b64encode(file.read_bytes()).decode() in page)
        pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
        return bool((np.abs(pixels - (0x7D, 0xF9, 0xFF)).max(2) < 20).any()), file.name

    without, name = outlined()
    with_box, other = outlined(Region((1,), ((4, 4, 12, 12),)))
    assert not without
    assert with_box
    assert name != other, "drawn again, since the region is new"
    assert not outlined(Region((2,), ((4, 4, 12, 12),)))[0], "of another class"


def test_area_is_that_of_the_mask_in_the_pictures_size(tmp_path: Path) -> None:
    found = run(tmp_path, metrics=["complexity"])
    loaded = small()
    x = dataset()[0].image[None]
    maps = LayerScoreCAM(loaded.model, loaded.model.conv2).attribute(x, int(loaded.model(x).argmax()))
    whole = nn.functional.interpolate(maps, (16, 16), mode="bilinear")
    assert values(found.rows, "score-cam", "complexity")[0] == pytest.approx(float(complexity(whole)), abs=1e-5)


def test_the_page_says_what_the_metrics_were_computed_with(tmp_path: Path) -> None:
    def own(forward_func: Any, inputs: Tensor, attributions: Tensor, target: Any) -> Tensor:
        return attributions.mean((1, 2, 3))

    run(tmp_path, metrics={"drop": "average_drop:baselines=0.5", "half": "insertion:steps=5", "own": own})
    page = (tmp_path / "index.html").read_text()
    assert "<dt>metric drop</dt><dd>baselines 0.5, normalize True</dd>" in page
    assert "<dt>metric half</dt><dd>preset groupcam_head, baselines blur, steps 5</dd>" in page
    assert "<dt>metric own</dt>" not in page, "it has no options"


def test_a_drop_never_comes_without_the_masks_area(tmp_path: Path) -> None:
    found = run(tmp_path, metrics=["average_drop"])
    assert {row["metric"] for row in found.rows} >= {"average_drop", "complexity"}
    assert "area" in next((tmp_path / "tables").glob("*.md")).read_text()


def test_costs_are_those_of_each_method_alone(tmp_path: Path) -> None:
    methods = ["grad-cam", "score-cam", "union-cam", "fusion-cam", "ablation-cam"]
    shared = run(tmp_path / "a", methods=methods, metrics=["complexity"])
    alone = {each: run(tmp_path / each, methods=[each], metrics=["complexity"]).rows for each in methods}
    for method in methods:
        for cost in ("forward_samples", "backward_samples"):
            assert values(shared.rows, method, cost) == values(alone[method], method, cost), (method, cost)
        assert min(values(shared.rows, method, "seconds")) > 0
    assert set(values(shared.rows, "fusion-cam", "forward_samples")) == {8 + 5}
    assert set(values(shared.rows, "fusion-cam", "backward_samples")) == {1}
    assert set(values(shared.rows, "score-cam", "forward_samples")) == {8 + 1}


def test_seconds_end_when_the_accelerator_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls only queue work on a device; the work is done when somebody waits for it."""
    clock = {"now": 0.0, "queued": 5.0}  # what an earlier method has left

    def wait(device: torch.device) -> None:
        clock["now"], clock["queued"] = clock["now"] + clock["queued"], 0.0

    monkeypatch.setattr(torch.accelerator, "synchronize", wait)
    monkeypatch.setattr("time.perf_counter", lambda: clock["now"])
    model = make()
    with Meter(model, torch.device("cuda")) as meter:
        model(images(3, 3, 8, 8)).sum().backward()
        clock["queued"] += 2.0
    assert meter.costs == {"forward_samples": 3, "backward_samples": 3, "seconds": 2.0}
    assert hooks_on(model) == 0


def test_labels_are_explained_if_asked_for(tmp_path: Path) -> None:
    found = run(tmp_path, explain="label", metrics=["complexity"])
    targets = {row["image"]: row["target"] for row in found.rows}
    assert targets == {f"image {i}": i % 5 for i in range(4)}
    with pytest.raises(ValueError, match=r"none of the 4 pictures could be explained.*it has no label"):
        run(tmp_path / "b", dataset(labels=False), explain="label", metrics=["complexity"])


def test_labels_of_one_picture_are_one_picture_to_an_interval(tmp_path: Path) -> None:
    one, two = (example.image for example in dataset(2))
    several = [Example("a#1", one, (1,)), Example("a#2", one, (3,))]
    found = run(tmp_path / "one", several, explain="label", metrics=["complexity"])
    assert all(cell.low is None for cell in found.cells if cell.count), "there is one picture only"
    found = run(tmp_path / "two", [*several, Example("b", two, (2,))], explain="label", metrics=["complexity"])
    by_image = dict(zip(("a#1", "a#2", "b"), values(found.rows, "score-cam", "complexity"), strict=True))
    (cell,) = [each for each in found.cells if (each.method, each.metric) == ("score-cam", "complexity")]
    ends = sorted([(by_image["a#1"] + by_image["a#2"]) / 2, by_image["b"]])
    assert (cell.low, cell.high) == pytest.approx(ends)

    for name in ("a", "b"):
        Image.new("RGB", (20, 20), "red").save(tmp_path / f"{name}.png")
    (tmp_path / "list.csv").write_text("file,label\na.png,1\na.png,2\n")
    found = run(tmp_path / "csv", tmp_path / "list.csv", explain="label", metrics=["complexity"])
    assert {row["image"] for row in found.rows} == {"a.png#1", "a.png#2"}
    assert all(cell.low is None for cell in found.cells if cell.count)


def test_of_several_right_labels_the_networks_best_counts(tmp_path: Path) -> None:
    loaded = small()
    (example,) = dataset(1)
    best = int(loaded.model(example.image[None])[0, [1, 3]].argmax())
    found = run(tmp_path, [Example("a", example.image, (1, 3))], loaded, explain="label", metrics=["complexity"])
    assert {row["target"] for row in found.rows} == {(1, 3)[best]}


def test_labels_by_name_and_by_the_order_of_folders(tmp_path: Path) -> None:
    data = [Example(f"{name}.png", x, (name,)) for name, x in zip("edcba", images(5, 3, 16, 16), strict=True)]
    by_order = run(tmp_path / "a", data, explain="label", metrics=["complexity"])
    assert {row["image"]: row["target"] for row in by_order.rows} == {f"{n}.png": i for i, n in enumerate("abcde")}
    named = small()._replace(class_names=["e", "D", "c", "b", "a"])
    by_name = run(tmp_path / "b", data, named, explain="label", metrics=["complexity"])
    assert {row["image"]: row["target"] for row in by_name.rows} == {f"{n}.png": i for i, n in enumerate("edcba")}
    with pytest.raises(ValueError, match="its label 'e' is none of the network's classes"):
        run(tmp_path / "c", data[:3], explain="label", metrics=["complexity"])  # three folders are not the five outputs
    mixed = small()._replace(class_names=["e", "x", "c", "b", "a"])  # then the folder "d" is not the fourth class
    found = run(tmp_path / "d", data, mixed, explain="label", metrics=["complexity"])
    assert {row["image"] for row in found.rows} == {"a.png", "b.png", "c.png", "e.png"}


def test_places_go_through_the_preprocessing(tmp_path: Path) -> None:
    image = Image.new("RGB", (32, 64), "red")  # squeezed to 16 x 16
    region = Region((2,), ((0.0, 0.0, 16.0, 32.0),))
    data = [Example("a", image, (2,), (region,)), Example("b", image, (3,), (region,)), Example("c", image, (2,))]

    def corner(model: Any, layer: Any, inputs: Tensor, target: int) -> Tensor:
        return nn.functional.pad(torch.ones(1, 1, 8, 8), (0, 8, 0, 8))

    metrics = ["pointing_game:tolerance=0", "energy_pointing_game", "localization_iou", "segmentation_iou"]
    found = run(tmp_path, data, methods={"corner": corner}, metrics=metrics, explain="label")
    for metric in metrics:
        known, other_class, nowhere = values(found.rows, "corner", metric)
        assert known == pytest.approx(100.0 if "pointing_game:" in metric else 1.0)
        assert other_class is None
        assert nowhere is None
    assert {row.get("error") for row in found.rows if row["image"] == "b" and row["metric"] in metrics} == {
        "only objects of classes that are not explained are known"
    }
    assert {row.get("error") for row in found.rows if row["image"] == "c" and row["metric"] in metrics} == {
        "the object's location is not known"
    }


def test_every_metric_runs(tmp_path: Path) -> None:
    found = evaluate(
        "digits", "digits", output=tmp_path, methods=["fusion-cam", "xgrad-cam"], metrics=list(METRICS), limit=1,
        pictures=1, show_progress=False, explain="label",
    )  # fmt: skip
    assert not [row for row in found.rows if row["value"] is None]
    assert list((tmp_path / "maps").rglob("*.png"))


def test_each_name_is_the_metric_of_that_name(tmp_path: Path) -> None:
    """Every metric of a table equals its function, called by hand with the same options."""
    loaded, mask = small(), np.zeros((16, 16), bool)
    mask[3:12, 2:9] = True
    x = dataset()[1].image
    target = int(loaded.model(x[None]).argmax())
    attributions = LayerGradCam(loaded.model, loaded.model.conv2).attribute(x[None], target)
    example = Example("it", x, (), (Region((target,), mask=mask),))
    labels = {name: name for name in METRICS if name != "win_rate"}
    labels["overall"] = "overall:steps=5,insertion_baselines=0.5,deletion_baselines=0.25"
    found = run(tmp_path, [example], methods=["grad-cam"], metrics=labels, score_fn="sigmoid", seed=5)
    arguments = (loaded.model, x[None], attributions, target)
    explain = LayerGradCam(loaded.model, loaded.model.conv2).attribute
    both = metrics.adcc(*arguments, explanation_func=explain, score_fn="sigmoid")
    box = torch.tensor([[2.0, 3.0, 9.0, 12.0]])
    size, region = (16, 16), torch.from_numpy(mask)[None]
    expected = {
        "average_drop": average_drop(*arguments, score_fn="sigmoid"),
        "average_increase": average_increase(*arguments, score_fn="sigmoid"),
        "average_gain": metrics.average_gain(*arguments, score_fn="sigmoid"),
        "complexity": complexity(upsample(attributions, size)),
        "insertion": insertion(*arguments, score_fn="sigmoid").auc,
        "deletion": deletion(*arguments, score_fn="sigmoid").auc,
        "overall": metrics.overall(
            *arguments, steps=5, insertion_baselines=0.5, deletion_baselines=0.25, score_fn="sigmoid"
        ),
        "coherency": both.coherency,
        "adcc": both.adcc,
        "road": metrics.road(*arguments, score_fn="sigmoid", seed=5).combined,
        "pointing_game": 100 * metrics.pointing_game(attributions, region),
        "energy_pointing_game": energy_pointing_game(attributions, region),
        "localization_iou": metrics.localization_iou(attributions, [box], size),
        "segmentation_iou": metrics.segmentation_iou(attributions, region),
    }
    assert set(expected) == set(labels)
    for name, value in expected.items():
        assert values(found.rows, "grad-cam", name) == pytest.approx([float(value)], abs=1e-5), name
    assert float(expected["road"]) != pytest.approx(float(metrics.road(*arguments, score_fn="sigmoid").combined)), (
        "seed"
    )
    assert float(expected["coherency"]) != pytest.approx(float(expected["adcc"]))


def test_options_reach_methods_and_metrics_of_ones_own(tmp_path: Path) -> None:
    def told(forward_func: Any, inputs: Tensor, attributions: Tensor, target: int, *, score_fn: str, seed: int,
             perturbations_per_eval: int) -> float:  # fmt: skip
        assert score_fn == "sigmoid"
        return seed + perturbations_per_eval / 10

    class Told(Saliency):
        def attribute(self, inputs: Tensor, target: Any, perturbations_per_eval: int = 0, seed: int = 0) -> Tensor:
            return torch.full_like(inputs[:, :1], perturbations_per_eval + seed / 10)

    def mean(forward_func: Any, inputs: Tensor, attributions: Tensor, target: int) -> Tensor:
        return attributions.mean()

    network = small()
    found = run(
        tmp_path, model=network, limit=1, methods={"told": Told(network.model), "score": "score-cam"},
        metrics=[told, mean, "average_drop"], score_fn="sigmoid", seed=7, perturbations_per_eval=3,
    )  # fmt: skip
    assert values(found.rows, "told", "told") == [7.3]
    assert values(found.rows, "told", "mean") == pytest.approx([3.7])
    x = dataset()[0].image[None]
    target = int(network.model(x).argmax())
    maps = LayerScoreCAM(network.model, network.model.conv2, score_fn="sigmoid").attribute(x, target)
    assert values(found.rows, "score", "mean") == pytest.approx([float(maps.mean())], abs=1e-6)


def test_the_packages_own_functions_are_its_metrics(tmp_path: Path) -> None:
    by_name = run(tmp_path / "a", limit=2, metrics=["average_drop", "road"], score_fn="identity")
    functions = [average_drop, "captum_fusion.metrics:road"]
    given = run(tmp_path / "b", limit=2, metrics=functions, score_fn="identity")
    for method in ("grad-cam", "score-cam"):
        assert values(given.rows, method, "average_drop") == values(by_name.rows, method, "average_drop")
        assert values(given.rows, method, "captum_fusion.metrics:road") == values(by_name.rows, method, "road")
        assert len(values(given.rows, method, "complexity")) == 2, "with the area beside it"


def test_wins_are_against_the_reference(tmp_path: Path) -> None:
    found = run(tmp_path, metrics=["average_drop", "win_rate"], reference="score-cam")
    drops = [values(found.rows, method, "average_drop") for method in ("grad-cam", "score-cam")]
    wins = [100.0 * (a < b) for a, b in zip(*drops, strict=True)]
    assert values(found.rows, "grad-cam", "win_rate") == wins
    assert values(found.rows, "score-cam", "win_rate") == [0.0] * 4
    other = run(tmp_path, metrics=["average_drop", "win_rate"], reference="grad-cam")
    assert values(other.rows, "score-cam", "win_rate") == [100.0 * (b < a) for a, b in zip(*drops, strict=True)]
    again = run(tmp_path, metrics=["average_drop", "win_rate"], reference="score-cam")
    assert values(again.rows, "grad-cam", "win_rate") == wins
    named = {"wr": "win_rate", "sw": "win_rate:score_fn=sigmoid", "drop": "average_drop:score_fn=sigmoid"}
    options = run(tmp_path / "b", metrics=named, reference="score-cam")
    assert values(options.rows, "grad-cam", "wr") == wins
    drops = [values(options.rows, method, "drop") for method in ("grad-cam", "score-cam")]
    assert values(options.rows, "grad-cam", "sw") == [100.0 * (a < b) for a, b in zip(*drops, strict=True)]


# ------------------------------------------------------------------------------------------------------------- methods


def test_words() -> None:
    assert parse("score-cam") == ("score-cam", {})
    assert parse("score-cam:weighting=increase").options == {"weighting": "increase"}
    assert parse("a.b:c:x=1,y=None") == ("a.b:c", {"x": 1, "y": None})
    assert split(["a:x=1,y=2,b", "c:d", "a:x=1,y=2"]) == ["a:x=1,y=2", "b", "c:d"]
    assert split(["a:b:x=(3,4),y=[1,2],c", "d"]) == ["a:b:x=(3,4),y=[1,2]", "c", "d"]
    assert parse("a:b:x=(3,4),y=[1,2]").options == {"x": (3, 4), "y": [1, 2]}
    with pytest.raises(ValueError, match="is not option=value"):
        parse("fusion-cam:theta=1,raw")


def test_theta_makes_a_method_of_each_value(tmp_path: Path) -> None:
    found = run(tmp_path, methods=["grad-cam", "fusion-cam:weighting=raw"], theta=[0, 50], metrics=["complexity"])
    labels = {row["method"] for row in found.rows}
    assert labels == {"grad-cam", "fusion-cam:weighting=raw,theta=0", "fusion-cam:weighting=raw,theta=50"}
    fixed = run(tmp_path / "b", methods=["fusion-cam:theta=5", "union-cam"], theta=[9], metrics=["complexity"])
    assert {row["method"] for row in fixed.rows} == {"fusion-cam:theta=5", "union-cam:theta=9"}


def test_stages_of_a_fusion() -> None:
    model, x = make(FlatHead), images(1, 3, 8, 8)
    for cls, name in ((LayerFusionCAM, "fusion-cam"), (LayerUnionCAM, "union-cam")):
        fusion = cls(model, model.conv2, theta=60)
        full, details = fusion.attribute(x, 1, return_details=True)
        assert torch.allclose(Stage(fusion, "full").attribute(x, 1), full, atol=1e-6)
        assert torch.allclose(Stage(fusion, "union").attribute(x, 1), details.union_map, atol=1e-6)
        plain = Stage(fusion, "sum").attribute(x, 1)
        assert torch.allclose(plain, normalize(details.gradient_map + details.region_map), atol=1e-6)
        denoised = Stage(fusion, "denoised").attribute(x, 1)
        assert torch.allclose(denoised, normalize(details.denoised_map + details.region_map), atol=1e-6)
        explained = ExplainedLayers(model, [model.conv2])
        built = build(f"{name}:stage=sum,theta=60", explained, {}, {})(x, 1)
        assert torch.allclose(built, plain, atol=1e-6) == (name == "fusion-cam"), "UnionCAM's gradients undenoised"


def test_presets_and_components_of_a_fusion() -> None:
    model, x = make(FlatHead), images(1, 3, 8, 8)
    explained, defaults = ExplainedLayers(model, [model.conv2]), {"score_fn": "sigmoid"}
    expected = {
        "fusion-cam:preset=best": LayerFusionCAM.best(model, model.conv2, score_fn="sigmoid"),
        "fusion-cam:preset=fast,theta=60": LayerFusionCAM.fast(model, model.conv2, theta=60, score_fn="sigmoid"),
        "fusion-cam:gradient_method=layer-cam,region_method=group-cam": LayerFusionCAM(
            model,
            model.conv2,
            gradient_method=LayerLayerCAM(model, model.conv2),
            region_method=LayerGroupCAM(model, model.conv2, score_fn="sigmoid"),
            score_fn="sigmoid",
        ),
    }
    for spec, method in expected.items():
        assert torch.allclose(build(spec, explained, defaults, {})(x, 1), method.attribute(x, 1), atol=1e-6), spec


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require")
def test_methods_and_metrics_of_ones_own(tmp_path: Path) -> None:
    def brightness(model: Any, layer: Any, inputs: Tensor, target: Any) -> Tensor:
        assert isinstance(layer, nn.Module)
        return inputs.abs().mean(1, keepdim=True)

    def peak(forward_func: Any, inputs: Tensor, attributions: Tensor, target: Any, example: Any) -> Tensor:
        """Largest value."""
        assert example.name.startswith("image")
        return attributions.flatten(1).amax(1)

    loaded = small()
    found = run(
        tmp_path, None, loaded, methods={"grad": "grad-cam", "mine": brightness, "saliency": Saliency(loaded.model)},
        metrics=["average_drop", peak],
    )  # fmt: skip
    expected = [float(example.image.abs().mean(0).max()) for example in dataset()]
    assert values(found.rows, "mine", "peak") == pytest.approx(expected)
    drops = values(found.rows, "saliency", "average_drop")
    assert len(drops) == 4
    assert None not in drops
    assert "mine" in (tmp_path / "index.html").read_text()


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require")
def test_by_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_cams.py").write_text(
        "def ones(model, layer, inputs, target, value=1.0):\n    return inputs[:, :1] * 0 + value\n"
        "def area(forward_func, inputs, attributions, target):\n    return attributions.mean((1, 2, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    found = run(
        tmp_path / "out",
        methods=["my_cams:ones", "my_cams:ones:value=3", "captum.attr:Saliency:abs=False"],
        metrics=["my_cams:area"],
    )
    assert values(found.rows, "my_cams:ones", "my_cams:area") == [1.0] * 4
    assert values(found.rows, "my_cams:ones:value=3", "my_cams:area") == [3.0] * 4
    areas = values(found.rows, "captum.attr:Saliency:abs=False", "my_cams:area")
    assert len(areas) == 4
    assert None not in areas


def test_datasets_know_what_can_be_known_without_opening_them(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "maps").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "maps" / "drawn.png")
    folder = open_dataset(tmp_path)
    assert (folder.names(), folder.source) == (["maps/drawn.png", "a.png"], str(tmp_path))
    assert folder.without([tmp_path / "maps"]).names() == ["a.png"], "an earlier run's drawings are not pictures"
    assert folder.first(1).without([tmp_path / "elsewhere"]).names() == ["maps/drawn.png"]
    assert [example.name for example in folder.first(1)] == folder.first(1).names() == ["maps/drawn.png"]
    assert folder.first(1).class_names() == folder.first(9).class_names() == ["maps"]
    pairs = as_dataset([(dataset()[0].image, 1), (dataset()[1].image, 2)])
    assert pairs.names() == ["0", "1"]
    assert pairs[0].identity(True) != pairs[0].identity(False)
    late = as_dataset(Tensors())
    assert (late.source, late.names()[:2]) == ("Tensors", ["0", "1"])
    with pytest.raises(IndexError):
        folder[2]


def test_a_method_that_fails_fails_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def moody(model: Any, layer: Any, inputs: Tensor, target: Any) -> Any:
        if float(inputs[0, 0, 0, 0]) == float(dataset()[1].image[0, 0, 0]):
            raise RuntimeError("not this one")
        return inputs[:, :1]

    def wrong(forward_func: Any, inputs: Tensor, attributions: Tensor, target: Any) -> Tensor:
        return torch.tensor(float("nan"))

    found = run(tmp_path, methods={"moody": moody, "grad": "grad-cam"}, metrics=["complexity", wrong])
    failed = [row for row in found.rows if row.get("error", "").startswith("RuntimeError")]
    assert {(row["image"], row["method"]) for row in failed} == {("image 1", "moody")}
    assert {row["error"] for row in found.rows if row["metric"] == "wrong" and row["method"] == "grad"} == {
        "not finite"
    }
    assert "moody fails on image 1: RuntimeError: not this one" in capsys.readouterr().out
    assert len([value for value in values(found.rows, "grad", "complexity") if value is not None]) == 4


class Asserting(Net):
    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("wrong height")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["fusion-cat"]}, "no method 'fusion-cat'.*fusion-cam"),
        ({"methods": ["fusion-cam:teta=3"]}, "no option 'teta'.*theta"),
        ({"methods": ["fusion-cam:theta=300"]}, "theta must be a percentile"),
        ({"methods": ["fusion-cam:preset=bets"]}, "fusion-cam: preset must be one of fast, best, not 'bets'"),
        ({"methods": ["score-cam:preset=best"]}, "score-cam has no option 'preset'"),
        ({"methods": ["fusion-cam:preset=best,max_evaluations=9"]}, "max_evaluations is set by LayerFusionCAM.best"),
        ({"methods": ["union-cam:region_method=regresion-cam"]}, "no method 'regresion-cam'.*regression-cam"),
        ({"metrics": ["average_drop:area=5"]}, "average_drop:area=5: area must be a number"),
        ({"methods": []}, "methods: there is none"),
        ({"methods": {"x": 3}}, "methods: '3' must be an attribution or a function"),
        ({"methods": ["captum.attr:Saliency:asb=False"]}, "methods: captum.attr:Saliency has no option 'asb'"),
        ({"methods": ["nowhere.to_be:found"]}, "nowhere.to_be:found could not be imported"),
        ({"metrics": ["average_dop"]}, "no metric 'average_dop'.*average_drop"),
        ({"metrics": ["insertion:stops=3"]}, "insertion has no option 'stops'"),
        ({"metrics": ["insertion:steps=-3"]}, "metrics: insertion:steps=-3: steps must be"),
        ({"metrics": {"average_drop": "average_drop", "complexity": average_drop}}, "name yours otherwise"),
        ({"metrics": ["insertion:steps"]}, "options are written option=value"),
        ({"metrics": ["pointing_game:tolerance=-1"]}, "metrics: pointing_game:tolerance=-1: tolerance"),
        ({"metrics": ["tests.networks:images:zzz=3"]}, "tests.networks:images has no option 'zzz'"),
        ({"metrics": {"seconds": "complexity"}}, "metrics: 'seconds' is always measured"),
        ({"methods": {1: "grad-cam"}}, "methods: a label must be a text, not 1"),
        ({"methods": ["grad-cam:theta"]}, "options are written option=value"),
        ({"methods": ["captum.attr:NoiseTunnel"]}, "captum.attr:NoiseTunnel could not be made"),
        ({"theta": 20}, "theta must be a sequence of numbers, not 20"),
        ({"theta": ["a"]}, "theta must be a sequence of numbers"),
        ({"theta": [3]}, "theta: none of the methods grad-cam has it"),
        ({"seed": -1}, "seed must be an int of at least 0"),
        ({"data": "n" * 300}, "dataset: there is no file or folder n"),
        ({"model": small(kind=Asserting)}, "does not take an input of shape .*wrong height"),
        ({"pictures": -1}, "pictures must be an int of at least 0"),
        ({"weights": "DEFAULT"}, "this one is loaded already"),
        ({"model": small()._replace(class_names=["a"])}, "classes: there are 1 names for 5 outputs"),
        ({"model": [small("a"), small("b")], "methods": {"x": Saliency(nn.Identity())}}, "explains one model"),
        ({"model": ["digits", "tests.networks:nothing"]}, "model: tests.networks:nothing could not be imported"),
        ({"preset": "fusion"}, "no preset 'fusion'.*fusioncam-table"),
        ({"reference": "rise"}, "reference must be one of the methods"),
        ({"explain": "best"}, "explain must be one of"),
        ({"limit": 0}, "limit must be an int of at least 1"),
        ({"threads": 0}, "threads must be"),
        ({"perturbations_per_eval": 0}, "perturbations_per_eval must be"),
        ({"layer": "conv7"}, "layer: .*conv7"),
        ({"layer": ["a", "b"]}, "layer: there are 2 names for 1 models"),
        ({"score_fn": "sofmax"}, "sofmax"),
        ({"weights": ["a", "b"]}, "weights: there are 2 for 1 models"),
        ({"data": []}, "dataset: it is empty"),
        ({"data": "/nowhere"}, "dataset: there is no file or folder"),
        ({"model": 3}, "model must be"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_run(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", **{"methods": ["grad-cam"], **options})
    assert not (tmp_path / "out").exists()


def test_pictures_that_are_broken_are_counted_and_named(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    found = run(tmp_path / "out", tmp_path, metrics=["complexity"])
    assert {row["image"] for row in found.rows} == {"a.png"}
    assert "b.png" in (tmp_path / "out/index.html").read_text()
    Image.new("RGB", (20, 20), "blue").save(tmp_path / "b.png")
    assert {row["image"] for row in run(tmp_path / "out", tmp_path, metrics=["complexity"]).rows} == {"a.png", "b.png"}


class Views(Net):
    """Takes contiguous activations only."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu2(self.conv2(self.relu1(self.conv1(x))))
        return self.head(x.view(len(x), -1).unflatten(1, (8, -1)).mean(2))


class Tensors:
    """A dataset of the user's, with items that are wrong in all kinds of ways."""

    def __init__(self) -> None:
        good, region = images(1, 3, 16, 16)[0], Region((2,), mask="/nowhere.png")
        self.items: list[Any] = [
            "/broken.png",
            (good, 2),  # what a network takes is found out with the first that can be read
            (torch.zeros(3, 16, 16, dtype=torch.uint8), 1),
            (good[:1], 1),
            (good, torch.eye(5)[2]),
            Example("x", Image.new("RGB", (20, 20), "red"), (2,), (region,)),
            Example("y", Image.new("RGB", (20, 20), "red"), (2,), (Region((2,), ((float("nan"), 0, 5, 5),)),)),
        ]

    def __len__(self) -> int:
        return len(self.items) + 1

    def __getitem__(self, index: int) -> Any:
        return self.items[index] if index < len(self.items) else 1 // 0


def test_no_picture_is_the_run(tmp_path: Path) -> None:
    found = run(tmp_path, Tensors(), metrics=["average_drop", "pointing_game"], explain="label", pictures=9)
    assert {row["image"] for row in found.rows} == {"1", "5", "6"}
    reasons = {row["image"]: row["error"] for row in found.rows if row["metric"] == "pointing_game"}
    assert "nowhere.png could not be read" in reasons["5"]
    assert "not finite" in reasons["6"]
    assert reasons["1"] == "the object's location is not known"
    page = (tmp_path / "index.html").read_text()
    for why in ("no file /broken.png", "floating point", "does not take an input", "index or name", "division"):
        assert why in page, why


def test_masks_count_before_boxes(tmp_path: Path) -> None:
    inside = np.zeros((16, 16), bool)
    inside[:8, :8] = True
    region = Region((2,), ((0.0, 0.0, 16.0, 8.0),), inside)

    def corner(model: Any, layer: Any, inputs: Tensor, target: int) -> Tensor:
        return torch.from_numpy(inside[None, None].astype(np.float32))

    data = [Example("a", Image.new("RGB", (16, 16), "red"), (2,), (region,))]
    metrics = ["segmentation_iou", "localization_iou"]
    found = run(tmp_path, data, methods={"corner": corner}, metrics=metrics, explain="label")
    assert values(found.rows, "corner", "segmentation_iou") == [1.0]
    assert values(found.rows, "corner", "localization_iou") == [0.5]


def test_maps_that_are_not_finite_are_no_maps(tmp_path: Path) -> None:
    def broken(model: Any, layer: Any, inputs: Tensor, target: int) -> Tensor:
        inputs.zero_()  # and it spoils nobody else's inputs
        return inputs[:, :1] * float("nan")

    found = run(tmp_path, methods={"broken": broken, "grad-cam": "grad-cam"}, metrics=["complexity"])
    alone = run(tmp_path / "b", methods=["grad-cam"], metrics=["complexity"])
    assert values(found.rows, "broken", "complexity") == [None] * 4
    assert values(found.rows, "grad-cam", "complexity") == values(alone.rows, "grad-cam", "complexity")


def test_a_network_in_train_mode_is_measured_in_eval_mode_and_left_in_train_mode(tmp_path: Path) -> None:
    model = make(WithBatchNorm)
    reference = run(tmp_path / "a", model=small()._replace(model=model), metrics=["complexity"])
    model.train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found = run(tmp_path / "b", model=small()._replace(model=model), metrics=["complexity"])
    assert values(found.rows, "score-cam", "complexity") == values(reference.rows, "score-cam", "complexity")
    assert model.training
    assert model.norm.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_networks_that_refuse_channels_last(tmp_path: Path) -> None:
    found = run(tmp_path, model=small(kind=Views), metrics=["complexity"])
    assert not [row for row in found.rows if "error" in row]
    assert "contiguous" in (tmp_path / "run.json").read_text()


def test_several_models(tmp_path: Path) -> None:
    found = run(tmp_path, model=[small("first"), small("second", seed=5)], metrics=["complexity"])
    assert {row["model"] for row in found.rows} == {"first", "second"}
    assert len(list((tmp_path / "tables").glob("*.csv"))) == 4
    with pytest.raises(ValueError, match="two called 'first'"):
        run(tmp_path / "b", model=[small("first"), small("first")])


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    loaded = small()
    before = torch.get_num_threads()
    run(tmp_path, model=loaded, metrics=["average_drop"], threads=2)
    assert hooks_on(loaded.model) == 0
    assert torch.get_num_threads() == before
    assert all(parameter.grad is None for parameter in loaded.model.parameters())


# -------------------------------------------------------------------------------------------------------- interrupted


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    methods = ["grad-cam", "score-cam", "union-cam", "fusion-cam"]
    metrics = [*METRICS_OF_TABLE, "deletion:steps=4"]
    whole = run(tmp_path / "whole", methods=methods, metrics=metrics)
    path = tmp_path / "part" / "rows" / "rank-0.jsonl"
    run(tmp_path / "part", methods=methods, metrics=metrics)
    lines = path.read_bytes().splitlines(keepends=True)
    for cut in (0, 1, 7, 20, 33, len(lines) - 1):
        path.write_bytes(b"".join(lines[:cut]) + lines[cut][:-5])  # killed in the middle of a line
        part = run(tmp_path / "part", methods=methods, metrics=metrics)
        pairs = zip(part.rows, whole.rows, strict=True)
        assert all(a == b for a, b in pairs if a["metric"] != "seconds"), cut
        assert content(tmp_path / "part") == content(tmp_path / "whole")
        assert len(path.read_bytes().splitlines()) == len(lines), "nothing is run twice"


def test_more_images_methods_and_metrics_are_added(tmp_path: Path) -> None:
    run(tmp_path, limit=2, metrics=["complexity"])
    run(tmp_path, limit=3, metrics=["complexity", "average_drop"])
    found = run(tmp_path, methods=["grad-cam", "score-cam", "xgrad-cam"], metrics=["complexity", "average_drop"])
    whole = run(tmp_path / "b", methods=["grad-cam", "score-cam", "xgrad-cam"], metrics=["complexity", "average_drop"])
    assert content(tmp_path) == content(tmp_path / "b")
    fewer = run(tmp_path, limit=2, metrics=["complexity"])
    assert len(found.rows) == len(whole.rows) == 4 * 3 * (2 + 3)
    assert len(fewer.rows) == 2 * 2 * (1 + 3), "a report is of what was asked for"


@pytest.mark.parametrize(
    "change",
    [{"perturbations_per_eval": 2}, {"explain": "label"}, {"seed": 3}, {"threads": 2}, {"score_fn": "sigmoid"}],
)
def test_rows_of_other_settings_are_not_mixed(tmp_path: Path, change: dict[str, Any]) -> None:
    run(tmp_path, limit=1, metrics=["complexity"])
    with pytest.raises(ValueError, match=f"made with {next(iter(change))} = .* choose another folder"):
        run(tmp_path, limit=1, metrics=["complexity"], **change)


def test_rows_of_another_folder_or_crop_are_not_mixed(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (20, 20), "red").save(tmp_path / folder / "x.png")
    run(tmp_path / "out", tmp_path / "a", metrics=["complexity"])
    with pytest.raises(ValueError, match="made with dataset"):
        run(tmp_path / "out", tmp_path / "b", metrics=["complexity"])
    options: dict[str, Any] = {"methods": ["grad-cam"], "limit": 1, "pictures": 0, "show_progress": False}
    evaluate("digits", "digits", output=tmp_path / "c", metrics=["complexity"], **options)
    with pytest.raises(ValueError, match="made with whole_image"):
        evaluate("digits", "digits", output=tmp_path / "c", metrics=["complexity"], whole_image=True, **options)


def test_rows_of_other_weights_are_not_mixed(tmp_path: Path) -> None:
    run(tmp_path, limit=1, metrics=["complexity"])
    with pytest.raises(ValueError, match="made with weights"):
        run(tmp_path, limit=1, metrics=["complexity"], model=small(seed=9))
    with pytest.raises(ValueError, match="made with layer"):
        run(tmp_path, limit=1, metrics=["complexity"], layer="conv1")
    broken = [Example("image 0", dataset()[0].image), Example("broken", "/nowhere.png")]
    with pytest.raises(ValueError, match="made with"):
        run(tmp_path, broken, metrics=["complexity"], model=small(seed=9))
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match="what they were made with could not be read"):
        run(tmp_path, limit=1, metrics=["complexity"])


def test_a_label_stands_for_one_thing(tmp_path: Path) -> None:
    run(tmp_path, limit=1, methods={"f": "grad-cam"}, metrics=["complexity"])
    with pytest.raises(ValueError, match="made with methods 'f' = 'grad-cam'"):
        run(tmp_path, limit=1, methods={"f": "score-cam"}, metrics=["complexity"])
    with pytest.raises(ValueError, match="made with metrics 'complexity'"):
        run(tmp_path, limit=1, methods={"f": "grad-cam"}, metrics={"complexity": lambda *arguments: 3.0})
    (tmp_path / "run.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="it holds no settings"):
        run(tmp_path, limit=1, methods={"f": "grad-cam"}, metrics=["complexity"])
    run(tmp_path / "b", limit=1, methods={"f": "grad-cam"}, metrics=["complexity"])
    found = run(tmp_path / "b", limit=1, methods={"f": "grad-cam", "g": "score-cam"}, metrics=["complexity"])
    assert {row["method"] for row in found.rows} == {"f", "g"}


def test_a_setting_that_was_not_recorded_counts_as_another_one(tmp_path: Path) -> None:
    run(tmp_path, methods=["grad-cam"], metrics=["complexity"])
    recorded = json.loads((tmp_path / "run.json").read_text())
    assert recorded["run"].pop("explain") == "prediction"
    (tmp_path / "run.json").write_text(json.dumps(recorded))
    with pytest.raises(ValueError, match="made with explain = 'not recorded' and would now be made with 'prediction'"):
        run(tmp_path, methods=["grad-cam"], metrics=["complexity"])


def test_a_mistake_locks_no_folder(tmp_path: Path) -> None:
    for wrong in ({"methods": ["grad-can"]}, {"layer": "nowhere"}, {"model": small()._replace(class_names=["a"])}):
        with pytest.raises(ValueError, match=r"grad-can|nowhere|classes"):
            run(tmp_path / "out", **wrong)
    run(tmp_path / "out", limit=1, explain="label", metrics=["complexity"])


class Counted:
    """Counts its calls."""

    calls = 0

    @staticmethod
    def explain(model: Any, layer: Any, inputs: Tensor, target: int) -> Tensor:
        Counted.calls += 1
        return inputs[:, :1]


def test_what_cannot_be_measured_is_not_tried_again(tmp_path: Path) -> None:
    Counted.calls = 0
    for _ in range(3):
        run(tmp_path, methods={"counted": Counted.explain}, metrics=["pointing_game", "complexity"])
    assert Counted.calls == 4


def test_what_may_work_next_time_is_tried_again(tmp_path: Path) -> None:
    Moody.fails = True
    first = run(tmp_path, methods={"moody": moody, "grad": "grad-cam"}, metrics=["win_rate"], reference="moody")
    assert {row["error"] for row in first.rows if row["metric"] == "win_rate"} == {
        "RuntimeError: not now", "RuntimeError: the reference method has failed",
    }  # fmt: skip
    Moody.fails = False
    second = run(tmp_path, methods={"moody": moody, "grad": "grad-cam"}, metrics=["win_rate"], reference="moody")
    fresh = run(tmp_path / "b", methods={"moody": moody, "grad": "grad-cam"}, metrics=["win_rate"], reference="moody")
    assert values(second.rows, "grad", "win_rate") == values(fresh.rows, "grad", "win_rate")
    assert len(second.rows) == len(fresh.rows) == 4 * 2 * 4


class Moody:
    fails = False


def moody(model: Any, layer: Any, inputs: Tensor, target: int) -> Tensor:
    if Moody.fails:
        raise RuntimeError("not now")
    return inputs[:, :1]


def test_a_label_stands_for_one_function_with_all_that_it_encloses(tmp_path: Path) -> None:
    model = small().model

    def power(k: int) -> Any:
        return lambda model, layer, inputs, target: inputs[:, :1].abs() ** k

    def either(k: int, model: Any, layer: Any, inputs: Tensor, target: int) -> Tensor:
        return inputs[:, :1].abs() ** k

    class Scaled:
        def __init__(self, factor: Any) -> None:
            self.factor = factor

        def __call__(self, model: Any, layer: Any, inputs: Tensor, target: Any) -> Tensor:
            return inputs[:, :1].abs() * self.factor

    def recursive(k: int) -> Any:
        def explain(model: Any, layer: Any, inputs: Tensor, target: Any, depth: int = k) -> Tensor:
            return inputs[:, :1].abs() if depth == 0 else explain(model, layer, inputs, target, depth - 1)

        return explain

    cam = partial(LayerFusionCAM, model)
    for number, (one, same, other) in enumerate(
        [
            (power(1), power(1), power(3)),
            (partial(either, 1), partial(either, 1), partial(either, 3)),
            (recursive(1), recursive(1), recursive(2)),
            (Scaled(2.0), Scaled(2.0), Scaled(3.0)),
            (Scaled(torch.ones(2)), Scaled(torch.ones(2)), Scaled(torch.zeros(2))),
            (Scaled(2.0).__call__, Scaled(2.0).__call__, Scaled(3.0).__call__),
            (Stage(cam(model.conv2), "union"), Stage(cam(model.conv2), "union"), Stage(cam(model.conv1), "union")),
            (cam(model.conv2), cam(model.conv2), cam(model.conv1)),
            (cam(model.conv2), cam(model.conv2), cam(model.conv2, region_method=LayerISCAM(model, model.conv2))),
            (NoiseTunnel(cam(model.conv2)), NoiseTunnel(cam(model.conv2)), NoiseTunnel(cam(model.conv2, theta=3))),
        ]
    ):
        assert fingerprint(one) == fingerprint(same), number
        assert fingerprint(one) != fingerprint(other), number
    run(tmp_path, limit=1, methods={"f": power(1)}, metrics=["complexity"])
    with pytest.raises(ValueError, match="made with methods 'f'"):
        run(tmp_path, methods={"f": power(3)}, metrics=["complexity"])


def test_rows_of_other_pictures_are_not_taken_for_these(tmp_path: Path) -> None:
    """Whatever changes under the same name is measured again, and nothing else is."""
    data, other = dataset(), [Example(f"image {i}", x) for i, x in enumerate(images(4, 3, 16, 16, seed=9))]
    run(tmp_path, data, metrics=["complexity"])
    mixed = [*data[:2], *other[2:]]
    found = run(tmp_path, mixed, metrics=["complexity"])
    assert content_of(found) == content_of(run(tmp_path / "b", mixed, metrics=["complexity"]))
    assert len((tmp_path / "rows/rank-0.jsonl").read_text().splitlines()) == (4 + 2) * 2 * 4
    pairs = [(each.image, i) for i, each in enumerate(data)]
    run(tmp_path / "pairs", pairs, metrics=["complexity"], limit=2)
    changed = [pairs[0], (other[1].image, 1)]
    again = run(tmp_path / "pairs", changed, metrics=["complexity"])
    assert content_of(again) == content_of(run(tmp_path / "pairs b", changed, metrics=["complexity"]))

    seen: dict[str, Any] = {"explain": "label", "metrics": ["complexity"]}
    before = run(tmp_path / "c", data, **seen)
    labelled = [data[0], Example("image 1", data[1].image, (4,)), *data[2:]]
    after = run(tmp_path / "c", labelled, **seen)
    assert {row["target"] for row in before.rows if row["image"] == "image 1"} == {1}
    assert {row["target"] for row in after.rows if row["image"] == "image 1"} == {4}

    mask = np.zeros((16, 16), bool)
    mask[:, :8] = True
    located = [Example(each.name, each.image, (), (Region(tuple(range(5)), mask=mask),)) for each in data]
    places: dict[str, Any] = {"metrics": ["complexity", "energy_pointing_game"]}
    assert set(values(run(tmp_path / "d", data, **places).rows, "grad-cam", "energy_pointing_game")) == {None}
    there = run(tmp_path / "d", located, **places)
    energies = values(there.rows, "grad-cam", "energy_pointing_game")
    model = small().model
    maps = LayerGradCam(model, model.conv2)
    expected = [
        energy_pointing_game(
            maps.attribute(x.image[None], int(model(x.image[None]).argmax())), torch.from_numpy(mask)[None]
        )
        for x in data
    ]
    assert energies == pytest.approx([float(each) for each in expected], abs=1e-5), "a tensor's masks are in its pixels"
    lines = (tmp_path / "d/rows/rank-0.jsonl").read_text().splitlines()
    assert len(lines) == 4 * 2 * 5 + 4 * 2, "only what sees the places is measured again"


def content_of(found: Any) -> list[Any]:
    return [
        (row["image"], row["method"], row["metric"], row["value"]) for row in found.rows if row["metric"] != "seconds"
    ]


def test_a_dataset_that_is_opened_late_may_grow_and_change(tmp_path: Path) -> None:
    class Late(torch.utils.data.Dataset[Any]):
        def __init__(self, seed: int, number: int) -> None:
            self.x = images(4, 3, 16, 16, seed=seed)[:number]

        def __len__(self) -> int:
            return len(self.x)

        def __getitem__(self, index: int) -> Any:
            return self.x[index], 0

    run(tmp_path, Late(3, 2), metrics=["complexity"])
    assert len(run(tmp_path, Late(3, 4), metrics=["complexity"]).rows) == 4 * 2 * 4
    changed = run(tmp_path, Late(4, 4), metrics=["complexity"])
    assert content_of(changed) == content_of(run(tmp_path / "new", Late(4, 4), metrics=["complexity"]))
    darker = small()._replace(preprocess=lambda image: small().preprocess(image) / 2)
    evaluate("digits", small(), output=tmp_path / "b", methods=["grad-cam"], limit=1, show_progress=False)
    with pytest.raises(ValueError, match="made with preprocessing of"):
        evaluate("digits", darker, output=tmp_path / "b", methods=["grad-cam"], limit=2, show_progress=False)


def test_integrative_cams_layers_are_remembered(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "output": tmp_path, "metrics": ["complexity"], "limit": 1, "pictures": 0, "show_progress": False,
    }  # fmt: skip
    evaluate("digits", "digits", methods=["grad-cam"], **options)
    evaluate("digits", "digits", methods=["integrative-cam"], **options)
    evaluate("digits", "digits", methods=["grad-cam"], layer="stage4", **options)
    with pytest.raises(ValueError, match="made with layers 'integrative-cam'"):
        evaluate("digits", "digits", methods=["integrative-cam"], layer="stage4", **options)


def test_a_refused_process_writes_nothing(tmp_path: Path) -> None:
    subprocess.run(command(*DIGITS, "--limit", "1", "--output", tmp_path), check=True, env=ENVIRONMENT)
    before = sorted((path.name, path.read_bytes()) for path in (tmp_path / "rows").glob("*.jsonl"))
    done = torchrun(2, "-m", "captum_fusion", *DIGITS, "--layer", "stage3", "--output", tmp_path, timeout=120)
    assert done.returncode != 0
    assert "made with layer" in done.stderr
    after = sorted((path.name, path.read_bytes()) for path in (tmp_path / "rows").glob("*.jsonl"))
    assert [each for each in after if each[1]] == before


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    with (
        Store(tmp_path / "rows"),
        pytest.raises(ValueError, match="another run is writing"),
    ):
        run(tmp_path, limit=1)
    run(tmp_path, limit=1)


def test_rows_on_disk(tmp_path: Path) -> None:
    row = {"model": "m", "image": "i", "method": "x", "metric": "y", "value": 1.0}
    with Store(tmp_path, 0) as store:
        store.append([row, {**row, "image": "j", "value": None, "error": "once"}])
    with Store(tmp_path, 3) as store:
        store.append([{**row, "value": None, "error": "late"}, {**row, "image": "j", "value": 2.0}])
    with (tmp_path / "rank-0.jsonl").open("ab") as file:
        file.write(b'not json\n["a"]\n{"model": "m", "image"')
    assert {each["image"]: each["value"] for each in Store(tmp_path).rows()} == {"i": 1.0, "j": 2.0}
    with Store(tmp_path, 0) as store:
        store.append([{**row, "image": "k"}])
        assert {each["image"] for each in store.rows()} == {"i", "j", "k"}
    with pytest.raises(ValueError, match=r"nan|JSON"), Store(tmp_path, 0) as store:
        store.append([{**row, "value": float("nan")}])


DIGITS = ["evaluate", "digits", "--model", "digits", "--preset", "fusioncam-table", "--pictures", "0"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "captum_fusion", *map(str, arguments)]


def torchrun(processes: int, *program: str | Path, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    """A program, ``-m module`` or a file with its arguments, in so many processes, whether or not it succeeds."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [sys.executable, *launcher, *map(str, program)],
        check=False,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_killed_and_divided_runs_give_the_same_tables(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    subprocess.run(command(*DIGITS, "--output", whole), check=True, env=ENVIRONMENT, capture_output=True)

    killed, rows = tmp_path / "killed", tmp_path / "killed/rows/rank-0.jsonl"
    process = subprocess.Popen(
        command(*DIGITS, "--output", killed), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 120
    while (not rows.exists() or rows.read_bytes().count(b"\n") < 60) and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    written = rows.read_bytes()
    assert 60 <= written.count(b"\n") < (whole / "rows/rank-0.jsonl").read_bytes().count(b"\n"), "killed in the middle"
    subprocess.run(command(*DIGITS, "--output", killed), check=True, env=ENVIRONMENT, capture_output=True)
    assert content(killed) == content(whole)
    kept = written[: written.rfind(b"\n") + 1]
    assert rows.read_bytes().startswith(kept), "nothing finished is run again"

    divided = tmp_path / "divided"
    done = torchrun(2, "-m", "captum_fusion", *DIGITS, "--output", divided)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (divided / "rows").glob("*.jsonl")) == ["rank-0.jsonl", "rank-1.jsonl"]
    assert content(divided) == content(whole)
    again = subprocess.run(
        command(*DIGITS, "--output", divided), check=True, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert "AD" in again.stdout, "one process goes on where two were, and prints the table"
    assert content(divided) == content(whole)
    images = [
        {json.loads(line)["image"] for line in path.read_text().splitlines()}
        for path in sorted((divided / "rows").glob("*.jsonl"))
    ]
    assert images[0].isdisjoint(images[1])


def test_nothing_of_the_process_group_outlives_the_run(tmp_path: Path) -> None:
    """Threads that the group leaves behind abort the interpreter now and then, as it ends."""
    script = tmp_path / "one.py"
    script.write_text(
        "import weakref\nimport torch\nfrom captum_fusion.evaluation.processes import processes\n"
        "with processes('cpu') as group:\n"
        "    import torch.distributed.nn.functional\n"
        "    alive = weakref.ref(torch.distributed.group.WORLD)\n"
        "    assert alive() is not None and group.gather(1) == [1]\n"
        "assert alive() is None\n"
    )
    done = torchrun(1, script, timeout=120)
    assert done.returncode == 0, done.stderr


def test_an_error_ends_all_processes(tmp_path: Path) -> None:
    done = torchrun(2, "-m", "captum_fusion", *DIGITS, "--layer", "nowhere", "--output", tmp_path, timeout=120)
    assert done.returncode != 0
    assert "layer: " in done.stderr


# ------------------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_run(tmp_path: Path, preset: str) -> None:
    found = evaluate(
        open_dataset("digits"), small_demo(), output=tmp_path, preset=preset, limit=1, pictures=0, show_progress=False
    )
    failed = {(row["method"], row["metric"], row["error"]) for row in found.rows if "error" in row}
    assert not failed
    assert (tmp_path / "index.html").is_file()


def small_demo() -> models.LoadedModel:
    """The digit network on pictures of half the size."""
    loaded = models.load_model("digits")

    def preprocess(image: Image.Image) -> Tensor:
        return nn.functional.interpolate(loaded.preprocess(image), scale_factor=0.5)

    return loaded._replace(name="half", preprocess=preprocess)


def test_the_command_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from captum_fusion.__main__ import main

    words = ["evaluate", "digits", "--model", "digits", "--methods", "grad-cam,hires-cam", "--limit", "1"]
    words += ["--metrics", "complexity,energy_pointing_game", "--output", str(tmp_path), "--pictures", "0"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "hires-cam" in printed
    assert "index.html" in printed
    assert "captum-fusion evaluate digits" in (tmp_path / "index.html").read_text()
    with pytest.raises(SystemExit, match="1"):
        main([*words, "--methods", "grad-cam", "captum.attr:Occlusion"])
    assert "digits: captum.attr:Occlusion failed on 1 of 1 pictures" in capsys.readouterr().err
    main([*words, "--preset", "time", "--methods", "grad-cam", "--output", str(tmp_path / "time")])
    printed = capsys.readouterr().out
    assert "seconds, median" in printed
    assert "\\_" not in printed
    assert main([*words, "--layer", "nowhere"]) == 2
    assert "layer: " in capsys.readouterr().err


def test_the_command_stopped_or_out_of_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from captum_fusion.__main__ import main

    words = ["evaluate", "digits", "--model", "digits", "--methods", "grad-cam", "--limit", "1", "--pictures", "0"]
    (tmp_path / "tables").write_text("a file where a folder is to be")
    assert main([*words, "--output", str(tmp_path)]) == 2
    assert "output: " in capsys.readouterr().err

    def stopped(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("captum_fusion._commands.evaluate.evaluate", stopped)
    with pytest.raises(SystemExit) as ended:
        main([*words, "--output", str(tmp_path)])
    assert ended.value.code == 130
    assert "the same command continues" in capsys.readouterr().err


def test_names_that_are_not_unicode(tmp_path: Path) -> None:
    broken = tmp_path / "bad\udcff.png"
    try:
        broken.write_bytes(b"no picture")
    except (OSError, UnicodeError):
        pytest.skip("this file system has no such names")
    Image.new("RGB", (20, 20), "red").save(tmp_path / "good.png")
    found = run(tmp_path / "out", tmp_path, metrics=["complexity"])
    assert {row["image"] for row in found.rows} == {"good.png"}
    assert "bad" in (tmp_path / "out/index.html").read_text()


def test_machines_with_disks_of_their_own(tmp_path: Path) -> None:
    """Two machines, the second with two processes of which one is slow; each machine looks after its own disk."""
    script = tmp_path / "each.py"
    script.write_text(
        "import os, sys, time\nfrom captum_fusion.evaluation import evaluate\n"
        "rank = int(os.environ['RANK'])\n"
        "os.environ['LOCAL_RANK'] = '001'[rank]\n"
        "def slow(model, layer, inputs, target):\n"
        "    time.sleep(1.5 * (rank == 2))\n"
        "    return inputs[:, :1].abs()\n"
        "evaluate('digits', 'digits', output=os.path.join(sys.argv[1], 'abb'[rank]), score_fn=sys.argv[2],\n"
        "         methods={'grad-cam': 'grad-cam', 'slow': slow}, metrics=['complexity', 'deletion:steps=3'],\n"
        "         pictures=0, limit=6)\n"
    )

    done = torchrun(3, script, tmp_path, "softmax")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "a" / "rows").glob("*.jsonl"))) == 1
    assert len(list((tmp_path / "b" / "rows").glob("*.jsonl"))) == 2
    assert (tmp_path / "b" / "run.json").is_file()
    assert not (tmp_path / "b" / "tables").exists()
    evaluate(
        "digits", "digits", output=tmp_path / "one", methods={"grad-cam": "grad-cam", "slow": brightness},
        metrics=["complexity", "deletion:steps=3"], score_fn="softmax", pictures=0, limit=6, show_progress=False,
    )  # fmt: skip
    assert content(tmp_path / "a") == content(tmp_path / "one")
    shutil.rmtree(tmp_path / "a")  # a new disk in the first machine; the second has rows of other settings
    done = torchrun(3, script, tmp_path, "identity")
    assert done.returncode != 0
    assert "made with score_fn" in done.stderr


def brightness(model: Any, layer: Any, inputs: Tensor, target: int) -> Tensor:
    return inputs[:, :1].abs()


def test_what_others_left_out_is_said_by_the_first(tmp_path: Path) -> None:
    for name in "ac":
        Image.new("RGB", (96, 96), "red").save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    words = ["evaluate", tmp_path, "--model", "digits", "--methods", "grad-cam", "--metrics", "complexity"]
    done = torchrun(2, "-m", "captum_fusion", *words, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "b.png" in (tmp_path / "out/index.html").read_text()
