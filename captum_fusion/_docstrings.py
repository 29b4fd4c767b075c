"""Docstrings that share paragraphs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def fill_docstring(function: F, parts: Mapping[str, str]) -> F:
    """Replace each line that is a name in braces by the paragraph of that name, at the indentation of the line.

    A constructor's docstring may begin with ``Args:``; what follows is then indented as its section.
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
    function.__doc__ = "\n".join(lines)
    return function
