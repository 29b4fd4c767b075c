"""Captum's private names: which we use, that one module imports them, and which of them a new release has changed."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1] / "captum_fusion"

#: The names, each with the arguments that we pass: by position up to ``/``, by keyword after it.
USED = {
    "captum._utils.common._format_additional_forward_args": ["additional_forward_args", "/"],
    "captum._utils.common._format_output": ["is_inputs_tuple", "output", "/"],
    "captum._utils.common._run_forward": ["forward_func", "inputs", "target", "additional_forward_args", "/"],
    "captum._utils.common._select_targets": ["output", "target", "/"],
    "captum._utils.gradient._extract_device_ids": ["forward_fn", "saved_layer", "device_ids", "/"],
    "captum._utils.gradient._forward_layer_distributed_eval": [
        *("forward_fn", "inputs", "layer", "/"),
        *("additional_forward_args", "attribute_to_layer_input", "forward_hook_with_return", "require_layer_grads"),
    ],
    "captum._utils.gradient._gather_distributed_tensors": ["saved_layer", "/", "key_list"],
    "captum._utils.gradient._sort_key_list": ["keys", "device_ids", "/"],
    "captum._utils.progress.NullProgress": ["/"],
    "captum._utils.progress.progress": ["/", "desc", "total"],
    "captum.attr._utils.approximation_methods.approximation_parameters": ["method", "/"],
    "captum.log.log_usage": ["/"],
}


def imports(path: Path) -> set[str]:
    """The names that a module imports from captum."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "captum":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "captum"}
    return found


def problem_with(function: Any, arguments: list[str]) -> str | None:
    """Why a function cannot be called as we do, or None."""
    parameters = inspect.signature(function).parameters
    cut = arguments.index("/")
    positional, keywords = arguments[:cut], arguments[cut + 1 :]
    if list(parameters)[: len(positional)] != positional:
        return f"its first parameters are {list(parameters)[: len(positional)]}, not {positional}"
    missing = [name for name in keywords if name not in parameters]
    if missing:
        return f"it has no parameter {', '.join(missing)}"
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    given = {*positional, *keywords}
    wanted = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and parameter.kind not in variadic and name not in given
    ]
    return f"it needs {', '.join(wanted)}" if wanted else None


@pytest.mark.parametrize("name", USED)
def test_a_name_is_as_we_call_it(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"captum has no {name} any more; captum_fusion/_captum.py uses it ({error})")
    problem = problem_with(function, USED[name])
    assert problem is None, f"captum has changed {name}, which captum_fusion/_captum.py uses: {problem}"


def test_one_module_imports_private_names() -> None:
    assert imports(ROOT / "_captum.py") == set(USED), "USED must list what captum_fusion/_captum.py imports"
    for path in ROOT.rglob("*.py"):
        if path != ROOT / "_captum.py":
            private = [name for name in imports(path) if any(part.startswith("_") for part in name.split("."))]
            assert not private, f"{path}: only captum_fusion/_captum.py imports {', '.join(private)}"


def test_changes_are_noticed() -> None:
    arguments = ["forward_fn", "inputs", "/", "flag"]
    assert problem_with(lambda forward_fn, inputs, other=1, flag=0: None, arguments) is None
    assert "first parameters" in str(problem_with(lambda inputs, forward_fn, flag=0: None, arguments))
    assert "no parameter flag" in str(problem_with(lambda forward_fn, inputs: None, arguments))
    assert "it needs more" in str(problem_with(lambda forward_fn, inputs, more, flag=0: None, arguments))
