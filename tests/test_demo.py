"""The bundled networks and pictures have the properties that the demonstration documents."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from captum.attr import LayerAttribution, LayerGradCam
from PIL import Image

from captum_fusion.demo import digits

pytest.importorskip("sklearn", reason="drawing scenes needs scikit-learn")

from captum_fusion.demo.digits import train
from captum_fusion.demo.digits.drawing import load_digits


def test_the_network_recognises_the_digits_of_new_scenes() -> None:
    model, test_digits = digits.load_model(), load_digits()[1]
    assert train.accuracy(model, test_digits, 1, seed=3, scenes=200) > 0.95
    assert train.accuracy(model, test_digits, 2, seed=3, scenes=200) > 0.9


def test_an_empty_scene_is_neutral() -> None:
    with torch.no_grad():
        probabilities = digits.load_model()(torch.zeros(1, 3, 96, 96)).softmax(1)
    assert (probabilities - 0.1).abs().max() < 0.02


def test_masks_lie_on_their_digits() -> None:
    model = digits.load_model()
    for scene in digits.load_scenes():
        assert len(scene.masks) == len(scene.labels)
        for label, mask in zip(scene.labels, scene.masks, strict=True):
            assert 0.005 < mask.float().mean() < 0.2
            heat = LayerGradCam(model, model.stage4).attribute(digits.preprocess(scene.image), label).detach()
            peak = LayerAttribution.interpolate(heat, (96, 96), "bilinear")[0, 0].flatten().argmax()
            rows, columns = mask.nonzero(as_tuple=True)
            assert rows.min() - 6 <= peak // 96 <= rows.max() + 6
            assert columns.min() - 6 <= peak % 96 <= columns.max() + 6
        if len(scene.masks) == 2:
            assert not (scene.masks[0] & scene.masks[1]).any()


def test_the_script_draws_the_bundled_scenes(tmp_path: Path) -> None:
    (tmp_path / "holiday.png").touch()
    for _ in range(2):
        train.bundle(digits.load_model(), load_digits()[1], tmp_path, seed=0)
    names = [entry["name"] for entry in json.loads((tmp_path / "scenes.json").read_text())]
    assert names == [scene.name for scene in digits.load_scenes()]
    files = tmp_path / f"{names[0]}.png", digits.scene_path(names[0])
    drawn, bundled = (np.asarray(Image.open(file), float) for file in files)
    assert np.abs(drawn - bundled).mean() < 2
    assert (tmp_path / "holiday.png").exists(), "other files in the folder are not touched"


def test_the_script_writes_weights_and_scenes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "accuracy", lambda *args: 0.5)
    monkeypatch.setattr(train, "named", lambda model, scenes: [True] * len(scenes))
    weights, scenes = tmp_path / "w.safetensors", tmp_path / "scenes"
    monkeypatch.setattr(sys, "argv", ["train", "--steps", "2", "--output", str(weights), "--scenes", str(scenes)])
    train.main()
    assert "test scenes with two digits recognised: 50.0%" in capsys.readouterr().out
    assert weights.stat().st_size < 2e6
    assert len(list(scenes.glob("*.png"))) == 8 + 12
