"""Every public class under every condition of the matrix: the map is right, or the error is the one stated here."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from captum_fusion import LayerAugmentedGradCAM, LayerLinearCAM, LayerScoreCAM
from tests.classes import EVERY_CLASS, INPUT_SPACE
from tests.docs_tables import ROOT
from tests.matrix import CONDITIONS, NOT_APPLICABLE, CellError, Explain, cell, ours
from tests.matrix_table import PAGE

#: The conditions in which every class raises, with the message. In all others it returns a right map.
ERRORS = {
    "an empty batch": "inputs: the batch is empty",
    "one example without a batch dimension": r"add a batch dimension: inputs\.unsqueeze\(0\)",
    "a target out of range": r"out of (bounds|range)",
    "a negative target": "Target must not be negative",
}
#: The classes that differ.
EXCEPTIONS = {
    (LayerAugmentedGradCAM, "1-D"): "needs inputs with two spatial dimensions, not 1",
    (LayerAugmentedGradCAM, "3-D"): "needs inputs with two spatial dimensions, not 3",
    (
        LayerLinearCAM,
        "a convolution before an in-place ReLU",
    ): "CAM needs a network that ends in global average pooling",
}
DTYPES = {"float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.filterwarnings("ignore:the model is in train mode")
@pytest.mark.parametrize("name", CONDITIONS)
def test_cell(every_cls: Any, name: str) -> None:
    if (every_cls, name) in NOT_APPLICABLE:
        pytest.skip("not applicable")
    message = EXCEPTIONS.get((every_cls, name), ERRORS.get(name))
    found = cell(CONDITIONS[name], ours(every_cls))
    if found.kind == "fails":
        raise AssertionError(found.why) from found.error
    assert found.kind == ("works" if message is None else "error"), found.error or "no error"
    if message is not None:
        assert re.search(message, str(found.error))
        assert isinstance(found.error, (ValueError, AssertionError, IndexError, RuntimeError))
        return
    maps = found.result
    assert maps is not None
    assert maps.dtype is DTYPES.get(name, torch.float32)
    assert not maps.requires_grad
    assert maps.is_contiguous()
    if every_cls in INPUT_SPACE:
        finite = maps[maps.isfinite()]
        assert ((finite >= 0) & (finite <= 1)).all()


# ------------------------------------------------------------------------------------------- every condition can fail


Flaw = Callable[[Explain, Any, Any, Tensor, Any], Any]


def spoiled(when: Callable[[Any, Tensor], Any]) -> Flaw:
    """The maps are NaN if something holds of the network or the input."""
    return lambda explain, model, layer, x, target: (
        explain(model, layer, x, target) * (torch.nan if when(model, x) else 1)
    )


def reversed_maps(when: Callable[[Any, Tensor], Any]) -> Flaw:
    """The maps are of each other's examples and mirrored, if something holds of the network or the input."""
    return lambda explain, model, layer, x, target: (
        explain(model, layer, x, target).flip(0, -1) if when(model, x) else explain(model, layer, x, target)
    )


def after(act: Callable[[Any, Any, Tensor], Any]) -> Flaw:
    """Something is done to the network or the layer before the maps are made."""

    def flaw(explain: Explain, model: Any, layer: Any, x: Tensor, target: Any) -> Tensor:
        act(model, layer, x)
        return explain(model, layer, x, target)

    return flaw


def other_target(change: Callable[[Any], Any]) -> Flaw:
    return lambda explain, model, layer, x, target: explain(model, layer, x, change(target))


FLAWS: dict[str, Flaw] = {
    "train mode is kept": after(lambda model, layer, x: model.eval()),
    "`.grad` and `requires_grad` are kept": after(lambda model, layer, x: model(x).sum().backward()),
    "full backward hooks work afterwards": after(
        lambda model, layer, x: layer.register_forward_hook(lambda module, inputs, output: output.detach())
    ),
    "frozen parameters": after(lambda model, layer, x: model.requires_grad_(True)),
    "under `no_grad`": reversed_maps(lambda model, x: not torch.is_grad_enabled()),
    "under `inference_mode`": reversed_maps(lambda model, x: torch.is_inference_mode_enabled()),
    "a batch equals single examples": reversed_maps(lambda model, x: len(x) > 1),
    "a constant input": spoiled(lambda model, x: x.std() == 0),
    "a dead layer": lambda explain, model, layer, x, target: x[:, :1],
    "an input that is not square": lambda explain, model, layer, x, target: explain(model, layer, x, target).mT,
    "an input of one channel": spoiled(lambda model, x: x.shape[1] == 1),
    **{name: reversed_maps(lambda model, x, dtype=dtype: x.dtype is dtype) for name, dtype in DTYPES.items()},
    "a convolution before an in-place ReLU": lambda explain, model, layer, x, target: explain(
        model, {model.conv1: model.relu1, model.conv2: model.relu2}[layer] if model.relu1.inplace else layer, x, target
    ),
    "1-D": spoiled(lambda model, x: x.dim() == 3),
    "3-D": spoiled(lambda model, x: x.dim() == 5),
    "NaN in one example of a batch": lambda explain, *given: explain(*given).nan_to_num(),
    "an empty batch": lambda explain, model, layer, x, target: explain(
        model, layer, x if len(x) else x.new_zeros(1, 3, 8, 8), target
    ),
    "one example without a batch dimension": lambda explain, model, layer, x, target: explain(
        model, layer, x if x.dim() == 4 else x.flip(-1)[None], target
    ),
    "a target out of range": other_target(lambda target: 0 if target in (7, [7, 7]) else target),
    "a negative target": other_target(lambda target: 4 if target == -1 else [0, 0] if target == [-1, -1] else target),
}


@pytest.mark.filterwarnings("ignore:the model is in train mode")
@pytest.mark.parametrize("name", CONDITIONS)
def test_every_condition_can_fail(name: str) -> None:
    right, flaw = ours(LayerScoreCAM), FLAWS[name]
    assert cell(CONDITIONS[name], right).kind in ("works", "error")
    found = cell(CONDITIONS[name], lambda *given: flaw(right, *given))
    assert found.kind == "fails", "the condition does not notice a wrong result"
    assert isinstance(found.error, CellError), found.error


def test_hooks_that_are_left_after_an_error_fail_a_cell() -> None:
    def leaves(model: Any, layer: Any, x: Tensor, target: Any) -> Tensor:
        layer.register_forward_hook(lambda *given: None)
        raise IndexError("out of bounds")

    assert cell(CONDITIONS["a target out of range"], leaves).why == "leaves hooks on the network"


# ------------------------------------------------------------------------------------------------------------ the table


def test_the_page_has_the_table_of_these_conditions() -> None:
    """Outcomes depend on the peers' releases; the conditions and this package's column do not."""
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    shown = page.partition("<!-- generated: matrix -->")[2].partition("<!-- end: matrix -->")[0].strip().splitlines()
    rows = [[part.strip() for part in line.strip("| ").split(" | ")] for line in shown if line.startswith("|")]
    assert [row[0] for row in rows[2:-1]] == list(CONDITIONS)
    assert rows[0][1] == f"captum_fusion, {len(EVERY_CLASS)} classes"
    for row in rows[2:-1]:
        tried = [cls for cls in EVERY_CLASS if (cls, row[0]) not in NOT_APPLICABLE]
        errors = sum((cls, row[0]) in EXCEPTIONS or row[0] in ERRORS for cls in tried)
        expected = [f"{len(tried) - errors} work"] * (errors < len(tried))
        expected += [f"{errors} clear error{'s' if errors > 1 else ''}"] * (errors > 0)
        assert row[1] == ", ".join(expected), row[0]
    assert rows[-1][1] == "0"
