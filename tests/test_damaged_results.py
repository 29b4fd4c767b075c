"""Results that are damaged or of other pictures are measured again; one bad number is one bad cell."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from captum_fusion.evaluation import Example, Region, evaluate
from captum_fusion.evaluation.data import load_image
from captum_fusion.evaluation.store import Store, write_whole
from captum_fusion.metrics import Curve
from tests.networks import Net
from tests.test_evaluation import content_of, dataset, run, small, values


class NotANumberOnDarkInputs(Net):
    """NaN for inputs of which nothing or little is shown, as overflowing networks are."""

    def forward(self, x: Tensor, scale: Tensor | None = None, power: int = 1) -> Tensor:
        out = super().forward(x, scale, power)
        return torch.where(x.abs().mean((1, 2, 3), keepdim=True)[:, :, 0, 0] < 0.4, torch.nan, out)


def errors(rows: Any, metric: str) -> set[Any]:
    return {row.get("error") for row in rows if row["metric"] == metric}


def test_a_cell_that_is_not_finite_is_an_error_and_nothing_else_is_lost(tmp_path: Path) -> None:
    model, methods = small(kind=NotANumberOnDarkInputs), ["grad-cam", "layer-cam"]
    found = run(tmp_path, model=model, methods=methods, metrics=["deletion:steps=4", "complexity"])
    assert errors(found.rows, "deletion:steps=4") == {"not finite"}
    for method in methods:  # also the method that had not run yet
        assert None not in values(found.rows, method, "complexity")


@pytest.mark.parametrize(
    ("auc", "scores", "error"),
    [
        (torch.tensor([0.5]), torch.tensor([[0.0, torch.nan]]), "not finite"),
        (torch.tensor([torch.inf]), torch.zeros(1, 2), "not finite"),
        (torch.zeros(2), torch.zeros(1, 2), "only one element"),
        (torch.zeros(1), torch.zeros(1, 3), "as many scores as shares"),
    ],
)
def test_a_curve_of_the_users_that_is_no_curve(tmp_path: Path, auc: Tensor, scores: Tensor, error: str) -> None:
    def own(forward_func: Any, inputs: Tensor, attributions: Tensor, target: Any) -> Curve:
        return Curve(auc, torch.tensor([0.0, 1.0]), scores)

    found = run(tmp_path, metrics={"own": own, "area": "complexity"})
    (why,) = errors(found.rows, "own")
    assert error in why
    assert None not in values(found.rows, "score-cam", "area")


_ODD = [
    b'{"model": "small", "image": "image 0", "method": "grad-cam", "metric": "complexity", "value": null}',
    b'{"model": "small", "image": "image 0", "method": "grad-cam", "metric": "complexity", "value": NaN}',
    b'{"model": "small", "image": "image 0", "method": "grad-cam", "metric": "complexity", "value": 1e999}',
    b'{"model": "small", "image": "image 0", "method": "grad-cam", "metric": "complexity"}',
    b'{"model": "small", "image": "image 0", "method": "grad-cam", "metric": "complexity", "value": "0.5"}',
    b'{"model": "small", "image": "image 0", "method": "grad-cam", "metric": "complexity", "value": true}',
    b'{"model": "small", "image": "image 0", "method": "grad-cam", "metric": "complexity", "value": 1'
    + b"0" * 400
    + b"}",
    b'{"model": "small", "image": "image 0", "method": "grad-cam", "metric": "complexity", "value": 1, "error": "x"}',
    b'{"model": "small", "image": "image 0", "method": "grad-cam", "metric": "complexity", "value": 1, "curve": [1]}',
    b'{"model": "small", "image": "image 0", "method": "grad-cam", "metric": "complexity", "value": 1, "target": {}}',
    b'{"model": ["small"], "image": {}, "method": 3, "metric": null, "value": 1}',
    b'["model", "image", "method", "metric"]',
    b"[" * 200_000,
    b"\xff\xfe",
]


def test_odd_lines_are_set_aside_counted_and_measured_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(tmp_path, metrics=["complexity"])
    file = tmp_path / "rows" / "rank-0.jsonl"
    rows = file.read_bytes().splitlines()
    capsys.readouterr()
    file.write_bytes(b"\n".join([*rows, *_ODD]) + b"\n")
    assert content_of(run(tmp_path, metrics=["complexity"])) == content_of(first), "an odd line replaces no good one"
    out = capsys.readouterr()
    assert (
        f"{len(_ODD)} lines are no valid rows and are set aside, the first is line {len(rows) + 1}" in out.out + out.err
    )
    kept = [row for row in rows if b"grad-cam" not in row]
    for odd in _ODD:
        file.write_bytes(b"\n".join([*kept, odd]) + b"\n")
        assert content_of(run(tmp_path, metrics=["complexity"])) == content_of(first), odd[:120]


@pytest.mark.parametrize(
    "part", ["format", "run", "versions", "run/methods", "model small", "run/methods!", "model small!"]
)
def test_settings_that_are_missing_or_odd_are_other_settings(tmp_path: Path, part: str) -> None:
    run(tmp_path, limit=1, metrics=["complexity"])
    path = tmp_path / "run.json"
    recorded = json.loads(path.read_text())
    outer, _, inner = part.rstrip("!").partition("/")
    holder = recorded[outer] if inner else recorded
    if part.endswith("!"):
        holder[inner or outer] = 3
    elif part == "model small":
        del recorded[outer]["weights"]
    else:
        del holder[inner or outer]
    path.write_text(json.dumps(recorded))
    with pytest.raises(ValueError, match="choose another folder"):
        run(tmp_path, limit=1, metrics=["complexity"])


def test_a_file_that_is_replaced_by_one_of_the_same_size_and_end_is_measured_again(tmp_path: Path) -> None:
    """Uncompressed pictures with a white border have the same size and the same last kilobytes."""

    def picture(seed: int) -> Path:
        pixels = np.full((64, 64, 3), 255, np.uint8)
        pixels[:20] = np.random.default_rng(seed).integers(0, 255, (20, 64, 3))
        path = tmp_path / "a.ppm"
        Image.fromarray(pixels).save(path)
        return path

    path = picture(1)
    before, stat = run(tmp_path / "out", [Example("a", path)], metrics=["complexity"]), path.stat()
    picture(2)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    after = run(tmp_path / "out", [Example("a", path)], metrics=["complexity"])
    assert content_of(after) != content_of(before)
    assert content_of(after) == content_of(run(tmp_path / "new", [Example("a", path)], metrics=["complexity"]))


def test_items_of_a_dataset_object_that_change_are_measured_again(tmp_path: Path) -> None:
    x = torch.stack([example.image for example in dataset()])
    data = torch.utils.data.TensorDataset(x, torch.arange(4))
    before = content_of(run(tmp_path, data, metrics=["complexity"]))
    x[2] = -x[2]
    lines = len((tmp_path / "rows" / "rank-0.jsonl").read_text().splitlines())
    after = content_of(run(tmp_path, data, metrics=["complexity"]))
    assert {old[0] for old, new in zip(before, after, strict=True) if old != new} == {"2"}
    assert len((tmp_path / "rows" / "rank-0.jsonl").read_text().splitlines()) == lines * 5 // 4


def test_the_palette_of_a_picture_is_content() -> None:
    pictures = [Image.new("P", (4, 4)) for _ in range(2)]
    pictures[0].putpalette([0, 0, 0] * 256)
    pictures[1].putpalette([255, 0, 0] * 256)
    first, second = (Example("a", picture).identity(False) for picture in pictures)
    assert first != second


# ------------------------------------------------------------------------------------------------------ odd files


def test_devices_and_pipes_are_no_pictures(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in ("/dev/zero", tmp_path / "pipe.png", tmp_path):
        with pytest.raises(ValueError, match="is not a regular file"):
            load_image(path)
        with pytest.raises(ValueError, match="is not a regular file"):
            Region((0,), mask=path).paint_mask((8, 8))
        Example("a", path).identity(False)
    (tmp_path / "labels.csv").write_text("file,mask\n/dev/zero,\na.png,pipe.png\n")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    found = evaluate(
        tmp_path, small(), output=tmp_path / "out", methods=["grad-cam"], metrics=["complexity"], show_progress=False
    )
    assert {row["image"] for row in found.rows} == {"a.png"}


def test_a_mask_that_is_a_bomb_leaves_out_what_needs_the_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (300, 300)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    data = [Example("a", dataset()[0].image, (), (Region(tuple(range(5)), mask=tmp_path / "bomb.png"),))]
    found = run(tmp_path / "out", data, metrics=["complexity", "energy_pointing_game"])
    assert None not in values(found.rows, "grad-cam", "complexity")
    assert "could not be read" in errors(found.rows, "energy_pointing_game").pop()


def test_what_is_written_whole_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
    write_whole(tmp_path / "file", b"content")
    assert [Path(path).parent for path in synced] == [tmp_path, tmp_path.parent]
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_store_that_says_nothing_still_sets_aside(tmp_path: Path) -> None:
    (tmp_path / "rank-0.jsonl").write_bytes(b"\n".join(_ODD) + b"\n")
    assert not list(Store(tmp_path).rows())
