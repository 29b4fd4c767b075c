"""The tutorials as they are stored: executed in order, without errors or warnings, small, linked. Nothing is run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.docs_tables import ROOT

TUTORIALS = sorted((ROOT / "tutorials").glob("*.ipynb"))
LARGEST = 1_500_000  # bytes


def _cells(tutorial: Path) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads(tutorial.read_text(encoding="utf-8"))["cells"]
    return cells


def _text(tutorial: Path) -> str:
    return "\n".join("".join(cell["source"]) for cell in _cells(tutorial) if cell["cell_type"] == "markdown")


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
class TestTutorial:
    def test_it_was_executed_from_top_to_bottom(self, tutorial: Path) -> None:
        code = [cell for cell in _cells(tutorial) if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))

    def test_its_outputs_have_no_errors_and_no_warnings(self, tutorial: Path) -> None:
        for cell in _cells(tutorial):
            for output in cell.get("outputs", ()):
                assert output["output_type"] != "error"
                assert output.get("name") != "stderr", "".join(output["text"])

    def test_it_is_small_and_has_figures(self, tutorial: Path) -> None:
        assert tutorial.stat().st_size < LARGEST
        assert re.search(r'"image/(jpeg|png)"', tutorial.read_text(encoding="utf-8"))

    def test_it_has_the_common_outline(self, tutorial: Path) -> None:
        text = _text(tutorial)
        assert text.startswith("# ")
        for part in ("**Task**", "**Model**", "**Data**", "\n## 1. ", "\n## What to read next"):
            assert part in text, part

    def test_the_site_has_it(self, tutorial: Path) -> None:
        assert f"tutorials/{tutorial.stem}" in (ROOT / "docs" / "index.md").read_text(encoding="utf-8").split()

    def test_the_files_that_it_names_exist(self, tutorial: Path) -> None:
        for name in re.findall(r"`([\w/]+\.(?:md|ipynb))`", _text(tutorial)):
            folder = ROOT if "/" in name else ROOT / "tutorials"
            assert (folder / name).is_file(), name
