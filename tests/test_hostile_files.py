"""Files and names from strangers: nothing runs, nothing asks for the machine's memory, nothing reaches the terminal."""

from __future__ import annotations

import csv
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from captum_fusion.__main__ import main
from captum_fusion.evaluation import Example, evaluate
from captum_fusion.evaluation.methods import import_object
from captum_fusion.models import load_model
from tests.networks import make
from tests.test_evaluation import dataset, run, small

MAKE = "tests.networks:make"


def state(**changed: Any) -> dict[str, Any]:
    return {**make().state_dict(), **{key.replace("__", "."): value for key, value in changed.items()}}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(1).expand(5), "repeats its values to the shape"),
        (torch.full((5,), torch.nan), "holds NaN"),
        (torch.zeros(5).to_sparse(), "(is sparse|could not be read)"),
        (torch.zeros(5, device="meta"), "without values"),
        (torch.zeros(5, dtype=torch.int8), "of another type"),
        (torch.zeros(5, dtype=torch.complex64), "of another type"),
    ],
)
def test_tensors_that_are_no_weights(tmp_path: Path, value: torch.Tensor, message: str) -> None:
    torch.save(state(head__bias=value), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=rf"weights: .*{message}"):
        load_model(MAKE, str(tmp_path / "a.pt"))


def test_half_precision_and_infinite_buffers_are_weights(tmp_path: Path) -> None:
    torch.save(
        {key: value.half() for key, value in state(head__bias=torch.full((5,), torch.inf)).items()}, tmp_path / "a.pt"
    )
    assert load_model(MAKE, str(tmp_path / "a.pt")).model.head.bias.tolist() == [torch.inf] * 5


def test_a_small_file_cannot_ask_for_a_large_network(tmp_path: Path) -> None:
    """The number of classes is read from the file; one stored number must not stand for 2**39 classes."""
    torch.save({"classifier.1.bias": torch.zeros(1).expand(2**39)}, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 10_000
    with pytest.raises(ValueError, match="repeats its values"):
        load_model("squeezenet1_1", str(tmp_path / "a.pt"))


def test_a_compressed_file_cannot_unpack_to_much_more(tmp_path: Path) -> None:
    torch.save(state(head__bias=torch.zeros(10**7)), tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as plain,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert (tmp_path / "b.pt").stat().st_size < 10**6
    with pytest.raises(ValueError, match=r"weights: .*would unpack to 4\d{7} bytes"):
        load_model(MAKE, str(tmp_path / "b.pt"))


def test_a_class_file_without_an_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "classes.txt")
    for file in (tmp_path / "classes.txt", Path("/dev/zero")):
        with pytest.raises(ValueError, match=r"classes: .*not a regular file"):
            load_model("bundled", classes=str(file))


def test_a_file_in_the_current_folder_replaces_no_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    (tmp_path / "tabulate.py").write_text("raise SystemExit('executed')")
    (tmp_path / "mine.py").write_text("from tests.networks import make\nfunction = make")
    monkeypatch.delitem(sys.modules, "tabulate", raising=False)
    load_model("mine:function")
    assert import_object("mine:function") is make
    import tabulate

    assert Path(str(tabulate.__file__)).parent != tmp_path
    monkeypatch.delitem(sys.modules, "mine")


@pytest.mark.parametrize("name", ["sys:exit", "tests.hostile:function"])
def test_a_model_that_ends_the_program_is_an_error(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "ends.py").write_text("raise SystemExit(0)")
    name = name.replace("tests.hostile", "ends")
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    assert main(["explain", str(tmp_path / "a.png"), "--model", name, "--output", str(tmp_path)]) == 2
    assert "error: model: " in capsys.readouterr().err
    with pytest.raises(ValueError, match="could not be imported"):
        import_object("ends:function")


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "a\x1b[2J\x1b]0;title\x07b\x9b31m.png"
    (tmp_path / evil).write_bytes(b"no picture")
    Image.new("RGB", (20, 20)).save(tmp_path / "z.png")
    run(tmp_path / "out", [Example(evil, tmp_path / evil), Example("z", tmp_path / "z.png")], metrics=["complexity"])
    main(
        [
            "explain",
            str(tmp_path / evil),
            str(tmp_path / "z.png"),
            "--model",
            "bundled",
            "--output",
            str(tmp_path / "o"),
        ]
    )
    main(["evaluate", str(tmp_path / evil), "--model", "bundled", "--output", str(tmp_path / "o")])
    shown = capsys.readouterr()
    for text in (shown.out, shown.err, (tmp_path / "out" / "index.html").read_text()):
        assert not {"\x1b", "\x07", "\x9b"} & set(text)
    assert "a\\x1b[2J" in shown.out + shown.err
    for table in (tmp_path / "out" / "tables").iterdir():
        assert "\x1b" not in table.read_text()


@pytest.mark.parametrize("label", ["=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", " =1", "\t=1"])
def test_labels_are_no_formulas_of_a_spreadsheet(tmp_path: Path, label: str) -> None:
    run(tmp_path, methods={label: "grad-cam", "other": "layer-cam"}, metrics={"=1+1": "complexity"}, limit=2)
    for table in (tmp_path / "tables").glob("*.csv"):
        with table.open(newline="") as file:
            for line in csv.reader(file):
                for cell in line:
                    assert cell.lstrip()[:1] not in ("=", "@")
                    if cell[:1] in ("+", "-"):
                        float(cell)


def test_weights_without_values_and_sparse_weights(tmp_path: Path) -> None:
    broken = small()
    broken.model.to("meta")
    with pytest.raises(ValueError, match=r"model: .*meta device"):
        run(tmp_path, model=broken)
    sparse = small()
    sparse.model.register_buffer("mask", torch.eye(3).to_sparse())
    found = evaluate(dataset(2), sparse, output=tmp_path / "b", methods=["score-cam"], show_progress=False, pictures=0)
    assert None not in [row["value"] for row in found.rows]
