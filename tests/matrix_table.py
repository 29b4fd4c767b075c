"""The table of docs/robustness.md: this package and its peers under the conditions of tests/matrix.py.

``python -m tests.matrix_table`` prints the table for this package. ``--peers`` adds captum's Grad-CAM and the libraries
of the extra ``benchmark`` (``pip install -e ".[test,benchmark]"``), and ``--write`` puts this larger table into the
page.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn

from tests.classes import EVERY_CLASS
from tests.docs_tables import ROOT, replaced, table
from tests.matrix import CONDITIONS, NOT_APPLICABLE, Cell, Explain, cell, expect, ours

PAGE = "docs/robustness.md"
PART = "matrix"


def captums(model: nn.Module, layer: nn.Module, x: Tensor, target: Any) -> Tensor:
    """Captum's Grad-CAM."""
    maps: Tensor = LayerGradCam(model, layer).attribute(x, target)
    return maps


def torchcams(name: str) -> Explain:
    """A method of torchcam, used as its documentation does."""

    def explain(model: nn.Module, layer: nn.Module, x: Tensor, target: Any) -> Tensor:
        from torchcam import methods

        with getattr(methods, name)(model, layer) as extractor:
            scores = model(x)
            maps: Tensor = extractor(target, scores)[0]
        return maps.unsqueeze(1)

    return explain


def grad_cams(name: str) -> Explain:
    """A method of pytorch-grad-cam, used as its documentation does."""

    def explain(model: nn.Module, layer: nn.Module, x: Tensor, target: Any) -> Tensor:
        import pytorch_grad_cam
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        indices = target if isinstance(target, list) else [target] * len(x)
        maps = None
        with getattr(pytorch_grad_cam, name)(model=model, target_layers=[layer]) as cam:
            maps = cam(input_tensor=x, targets=[ClassifierOutputTarget(index) for index in indices])
        expect(maps is not None, "prints the error and goes on")  # as its context manager does with an IndexError
        return torch.as_tensor(maps).unsqueeze(1)

    return explain


#: The columns of the peers: library, method, and how it explains.
PEERS: list[tuple[str, str, Explain]] = [
    ("captum", "LayerGradCam", captums),
    *(("torchcam", name, torchcams(name)) for name in ("GradCAM", "LayerCAM", "ScoreCAM")),
    *(("grad-cam", name, grad_cams(name)) for name in ("GradCAM", "ScoreCAM", "AblationCAM")),
]


def quiet_cell(name: str, explain: Explain) -> Cell:
    """The outcome of a condition, without warnings and progress bars."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        return cell(CONDITIONS[name], explain)


def our_row(name: str) -> str:
    """The cell of all classes of this package."""
    tried = [cls for cls in EVERY_CLASS if (cls, name) not in NOT_APPLICABLE]
    cells = {cls.__name__: quiet_cell(name, ours(cls)) for cls in tried}
    kinds = {kind: [cls for cls, found in cells.items() if found.kind == kind] for kind in ("works", "error", "fails")}
    texts = [f"{len(kinds['works'])} work"] if kinds["works"] else []
    if kinds["error"]:
        texts.append(f"{len(kinds['error'])} clear error{'s' if len(kinds['error']) > 1 else ''}")
    texts += [f"**{cls} fails**: {cells[cls].why}" for cls in kinds["fails"]]
    return ", ".join(texts)


def peers_cell(found: Cell) -> str:
    return {"works": "works", "error": "clear error", "fails": f"**fails**: {found.why}"}[found.kind]


def matrix_table(peers: bool) -> str:
    """The table as Markdown, with the number of conditions that fail in the last row."""
    columns = PEERS if peers else []
    header = ["condition", f"captum_fusion, {len(EVERY_CLASS)} classes", *(f"{lib} {name}" for lib, name, _ in columns)]
    rows, failures = [], [0] * len(columns)
    for name in CONDITIONS:
        cells = [quiet_cell(name, explain) for _, _, explain in columns]
        failures = [total + (found.kind == "fails") for total, found in zip(failures, cells, strict=True)]
        rows.append([name, our_row(name), *map(peers_cell, cells)])
    total = sum("fails" in row[1] for row in rows)
    rows.append([f"**cells of {len(CONDITIONS)} that fail**", str(total), *map(str, failures)])
    return table(header, rows) + (f"\n{versions()}\n" if peers else "")


def versions() -> str:
    """The releases that the table was made with."""
    names: Iterable[str] = dict.fromkeys(["torch", *(lib for lib, _, _ in PEERS)])
    return "Releases: " + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names) + "."


def main() -> int:
    """Print the table, or write it into the page."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix_table", description=__doc__.partition("\n")[0])
    parser.add_argument("--peers", action="store_true", help="add captum, torchcam and pytorch-grad-cam")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE} (with the peers)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    made = matrix_table(options.peers or options.write)
    print(made)
    if options.write:
        path = ROOT / PAGE
        path.write_text(replaced(path.read_text(encoding="utf-8"), PART, made), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
