"""The examples of CONTRIBUTING.md work as they stand there, and pass the tests of every method without being listed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest

import captum_fusion
from captum_fusion.__main__ import main
from captum_fusion.attr import catalog, gradient, region
from captum_fusion.evaluation import evaluate
from tests import test_contract, test_matrix
from tests.docs_tables import GENERATED, ROOT, rewritten
from tests.test_contract import x as x
from tests.test_special_methods import test_the_catalogue_states_the_cost_of_a_method as check_cost

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)

#: Each class with the module that it is added to, its code, and its test.
EXAMPLES = {
    "LayerTopScoreCAM": (region, BLOCKS[0], BLOCKS[1]),
    "LayerAbsGradCAM": (gradient, BLOCKS[2], BLOCKS[3]),
}


@pytest.fixture(autouse=True, scope="module")
def classes() -> Iterator[dict[str, Any]]:
    """The classes, as parts of the package until the tests of this module are done."""
    if any(hasattr(captum_fusion, name) for name in EXAMPLES):
        pytest.skip("the examples are tried out in this checkout")
    for name, (module, code, _) in EXAMPLES.items():
        exec(compile(code, "CONTRIBUTING.md", "exec"), vars(module))
        setattr(captum_fusion, name, vars(module)[name])
        catalog.register(vars(module)[name])
    yield {name: getattr(captum_fusion, name) for name in EXAMPLES}
    for name, (module, _, _) in EXAMPLES.items():
        del catalog.METHODS[vars(module)[name].info.name]
        delattr(captum_fusion, name)
        delattr(module, name)


@pytest.fixture(params=EXAMPLES)
def cls(request: pytest.FixtureRequest, classes: dict[str, Any]) -> Any:
    """Stands in for the classes that the contract's tests run on."""
    return classes[request.param]


def _is_contract(function: Any) -> bool:
    """Whether a test runs on every class."""
    marks = [mark.args[0] for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
    return "cls" in inspect.signature(function).parameters and "cls" not in marks


# The tests of the contract and of the matrix, collected here once more for the classes of this module.
globals().update(
    {
        name: value
        for module in (test_contract, test_matrix)
        for name, value in vars(module).items()
        if name.startswith("test_") and _is_contract(value)
    }
)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_tests_pass(name: str) -> None:
    names: dict[str, Any] = {}
    exec(compile(EXAMPLES[name][2], "CONTRIBUTING.md", "exec"), names)
    tests = [value for key, value in names.items() if key.startswith("test_")]
    assert len(tests) == 1
    tests[0]()


def test_they_cost_what_they_say(cls: Any) -> None:
    check_cost(cls.info.name)


def test_the_command_line_and_the_evaluation_know_them(
    cls: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["methods"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [cls.info.family, *cls.info.cost.split()] in [line[1 : 2 + len(cls.info.cost.split())] for line in lines]
    assert cls.info.name in [line[0] for line in lines if line]
    results = evaluate(
        "digits",
        "digits",
        output=tmp_path,
        methods=[cls.info.name],
        metrics=["complexity"],
        limit=1,
        pictures=0,
        show_progress=False,
    )
    assert next(row["value"] for row in results.rows if row["metric"] == "complexity") > 0


@pytest.mark.parametrize("name", GENERATED)
def test_the_generated_tables_take_them_in(name: str, classes: dict[str, Any]) -> None:
    assert all(cls in rewritten(name) for cls in classes)
    assert rewritten(name) != (ROOT / name).read_text(encoding="utf-8")


def test_a_name_belongs_to_one_class(classes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="'abs-grad-cam' belongs to LayerAbsGradCAM"):
        catalog.register(classes["LayerTopScoreCAM"], classes["LayerAbsGradCAM"].info)
