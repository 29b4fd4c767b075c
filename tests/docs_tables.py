"""The generated parts of the documentation, made from the catalogue of methods.

``python -m tests.docs_tables`` names the files that are out of date, and ``python -m tests.docs_tables --write``
rewrites them. A generated part stands between ``<!-- generated: NAME -->`` and ``<!-- end: NAME -->``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

from captum.attr import LayerAttribution

from captum_fusion.attr._info import FAMILIES
from captum_fusion.attr.catalog import METHODS, Method

ROOT = Path(__file__).parents[1]


def methods_table() -> str:
    """Every method, with its cost and paper."""
    header = ("class", "`--methods`", "family", "samples for each example", "map", "paper")
    return table(header, (_methods_row(method) for method in METHODS.values()))


def families_table() -> str:
    """The classes of each family."""
    return table(("family", "classes"), ((family, ", ".join(_names(family))) for family in FAMILIES))


def class_reference() -> str:
    """The reference of every class, by family."""
    sections = []
    for family in FAMILIES:
        blocks = [
            f".. autoclass:: captum_fusion.{method.cls.__name__}\n"
            "   :special-members: __init__\n\n"
            "   .. automethod:: attribute\n"
            for method in _of(family)
            if _is_ours(method)
        ]
        body = "\n".join(blocks)
        sections.append(f"### {family.capitalize()} methods\n\n```{{eval-rst}}\n{body}```\n")
    return "\n".join(sections)


#: What stands between the markers of each file.
GENERATED: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"families": families_table},
    "docs/methods.md": {"methods": methods_table},
    "docs/api.md": {"classes": class_reference},
}


def rewritten(name: str) -> str:
    """A file's text with its generated parts up to date.

    Args:
        name (str): One of :data:`GENERATED`.
    """
    text = (ROOT / name).read_text(encoding="utf-8")
    for part, make in GENERATED[name].items():
        text = replaced(text, part, make())
    return text


def replaced(text: str, part: str, made: str) -> str:
    """A page's text with another generated part."""
    start, end = f"<!-- generated: {part} -->", f"<!-- end: {part} -->"
    assert text.count(start) == text.count(end) == 1, f"the page must have the markers {start} and {end} once"
    before, _, rest = text.partition(start)
    return f"{before}{start}\n\n{made}\n{end}{rest.partition(end)[2]}"


def _of(family: str) -> list[Method]:
    return [method for method in METHODS.values() if method.info.family == family]


def _is_ours(method: Method) -> bool:
    return method.cls.__module__.startswith("captum_fusion")


def _names(family: str) -> Iterable[str]:
    for m in _of(family):
        name = f"`{m.cls.__name__}`" if _is_ours(m) else f"captum's `{m.cls.__name__}`"
        yield name + _note(m)


def _note(method: Method) -> str:
    return f" ({method.info.note})" if method.info.note else ""


def _methods_row(method: Method) -> tuple[str, ...]:
    name, info = method.cls.__name__, method.info
    space = info.space
    if info.signed:
        space += ", signed"
    elif space == "input" and issubclass(method.cls, LayerAttribution):
        space += ", [0, 1]"
    shown = f"{{class}}`~captum_fusion.{name}`" if _is_ours(method) else f"captum's `{name}`"
    return shown, f"`{info.name}`", info.family, info.cost, space, f"[{info.citation}]({info.url}){_note(method)}"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> int:
    """Say which files are out of date, or rewrite them."""
    parser = argparse.ArgumentParser(prog="python -m tests.docs_tables", description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="rewrite the files that are out of date")
    write = parser.parse_args().write
    outdated = [name for name in GENERATED if rewritten(name) != (ROOT / name).read_text(encoding="utf-8")]
    for name in outdated:
        if write:
            (ROOT / name).write_text(rewritten(name), encoding="utf-8")
        print(f"{name}: {'rewritten' if write else 'out of date'}")
    return int(bool(outdated) and not write)


if __name__ == "__main__":
    raise SystemExit(main())
