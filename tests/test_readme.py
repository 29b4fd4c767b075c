"""What README and the first page of the site show is what happens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from captum_fusion.__main__ import main

ROOT = Path(__file__).parents[1]


def block(language: str, number: int = 0, page: str = "README.md") -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)[number]


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require")
def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(block("python"), names)
    exec(block("python", 1), names)
    assert "torch.Size([2, 1, 224, 224])" in capsys.readouterr().out
    assert (tmp_path / "why.png").exists()


def test_the_demo_prints_what_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 0
    printed, shown = capsys.readouterr().out, block("text", page="docs/getting_started.md")
    number = r"[0-9.]+"
    assert re.split(number, printed) == re.split(number, shown)
    numbers = [[float(each) for each in re.findall(r"[0-9]+(?:\.[0-9]+)?", text)] for text in (printed, shown)]
    for found, expected in zip(*numbers, strict=True):
        assert found == pytest.approx(expected, abs=0.011 if expected < 1 else 1.1)
