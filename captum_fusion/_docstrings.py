"""Shared paragraphs for docstrings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def fill_docstring(function: F, parts: Mapping[str, str]) -> F:
    """Replace each line that consists of a name in braces with the paragraph of that name, keeping the indentation.

    If a docstring starts with ``Args:``, as those of constructors do, the lines after it are indented as its section.
    """
    lines: list[str] = []
    text = inspect.cleandoc(function.__doc__ or "")
    if text.startswith("Args:\n"):
        text = text.replace("\n", "\n    ")
    for line in text.splitlines():
        name = line.strip().strip("{}")
        if line.strip() == "{" + name + "}" and name in parts:
            indent = line[: len(line) - len(line.lstrip())]
            lines += [indent + part for part in parts[name].splitlines()]
        else:
            lines.append(line)
    # inspect.getdoc() ignores the first line when it removes the common indentation. A blank one keeps "Args:" in it.
    function.__doc__ = "\n" + "\n".join(lines)
    return function
