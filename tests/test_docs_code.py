"""The Python code of the documentation's pages runs, offline."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torchvision.models import WeightsEnum

from tests.docs_tables import ROOT
from tests.networks import correlations

#: Pages whose blocks run one after the other, as one program.
PAGES = ("getting_started.md", "coming_from.md", "targets.md", "faq.md", "troubleshooting.md")
#: Blocks with these words need a package or a download that the tests do without; they have tests of their own.
ELSEWHERE = ("pytorch_grad_cam", "transformers", "xplaincam", "quantus")


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)


def random_weights(weights: WeightsEnum, *arguments: Any, **options: Any) -> Any:
    """Weights of the right shapes instead of a download."""
    name = type(weights).__name__.removesuffix("_Weights").lower()
    builder = torchvision.models.get_model_builder(name)
    backbone = {"weights_backbone": None} if "weights_backbone" in inspect.signature(builder).parameters else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return builder(weights=None, **backbone).state_dict()


def run(page: str, code: list[str]) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for number, block in enumerate(code):
        exec(compile(block, f"{page}, block {number}", "exec"), names)
    return names


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require")
@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(WeightsEnum, "get_state_dict", random_weights)
    code = [block for block in blocks(page) if not any(word in block for word in ELSEWHERE)]
    run(page, [block.replace("n_masks=5000", "n_masks=4") for block in code])


@pytest.mark.filterwarnings("ignore")  # of the other library
@pytest.mark.parametrize(
    ("library", "theirs", "ours"), [("pytorch_grad_cam", "theirs", "ours"), ("torchcam", "maps", "layer_cam")]
)
def test_the_other_librarys_code_gives_the_same_map(library: str, theirs: str, ours: str) -> None:
    pytest.importorskip(library)
    code = blocks("coming_from.md")
    first = next(number for number, block in enumerate(code) if library in block)
    names = run("coming_from.md", [code[0], *code[first : first + 2]])
    found = names[theirs]
    found = torch.as_tensor(found[0] if isinstance(found, list) else found)
    assert min(correlations(found, names[ours])) > 0.99


def test_the_steps_of_fusion_cam_have_the_numbers_that_the_page_gives() -> None:
    page = "how_it_works.md"
    names = run(page, blocks(page))
    details = names["details"]
    steps = (details.score, details.gradient_contribution, details.region_contribution, details.union_weights)
    steps += (details.union_contribution, details.fusion_weights)
    table = (ROOT / "docs" / page).read_text(encoding="utf-8").partition("| quantity |")[2].partition("\n\n")[0]
    given = [float(number) for number in re.findall(r"\b0\.\d\d\b", table)]
    # The page scores every channel, and its code the 56 that matter most.
    assert given == pytest.approx(torch.cat([step.flatten() for step in steps]).tolist(), abs=0.011)
