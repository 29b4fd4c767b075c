"""The generated parts of the documentation, made from the catalogue of methods and from measurements.

``python -m tests.docs_tables`` names the files that are out of date, and ``python -m tests.docs_tables --write``
rewrites them. A generated part stands between ``<!-- generated: NAME -->`` and ``<!-- end: NAME -->``.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from captum.attr import LayerAttribution, PerturbationAttribution

from captum_fusion import GuidedFusionCAM, LayerAugmentedGradCAM, LayerLinearCAM
from captum_fusion.attr._bases import BackgroundCAM, ReplacedCAM
from captum_fusion.attr._info import FAMILIES
from captum_fusion.attr.catalog import METHODS, Method

ROOT = Path(__file__).parents[1]
SAMPLES = Path(__file__).with_name("docs_samples.json")


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


#: The decision table: what is wanted, a row of docs/faithfulness.md, the call, and the name in docs/cost.md.
CHOICES = (
    ("Fusion-CAM as published", "Fusion-CAM", "`LayerFusionCAM`", "fusion-cam"),
    ("nearly the same map at a constant cost", "Fusion-CAM, fast", "`LayerFusionCAM.fast`", "fusion-cam:preset=fast"),
    ("faithfulness first, at a constant cost", "Fusion-CAM, best", "`LayerFusionCAM.best`", "fusion-cam:preset=best"),
    ("the same for fewer samples", "Fusion-CAM, 128 cell masks", "it with 128 masks", None),
    ("the importance of each cell, with errors", "cell regression", "`LayerRegressionCAM`", None),
    ("a first look, in one pass", "Grad-CAM", "captum's `LayerGradCam`", None),
    ("a region map for few samples", "Group-CAM", "`LayerGroupCAM`", "group-cam"),
    ("a map without gradients", "Score-CAM", "`LayerScoreCAM`", "score-cam"),
    ("UnionCAM as published", "UnionCAM", "`LayerUnionCAM`", "union-cam"),
)
#: Columns of docs/faithfulness.md that the decision table repeats, and their headings in it.
MEASURED = {
    "forward samples, first photograph": "samples",
    "ins - del ↑": "ins - del ↑",
    "AD % at equal area ↓": "AD ↓",
    "ROAD ↑": "ROAD ↑",
    "energy in box ↑": "energy ↑",
    "area": "area",
}


def decision_table() -> str:
    """What to use for what, with the measurements of docs/faithfulness.md and docs/cost.md."""
    lines = (ROOT / "docs" / "faithfulness.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| method | forward samples"))
    header, *rows = [_cells(line) for line in lines[start : lines.index("", start)] if not line.startswith("| ---")]
    measured = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    return table(
        ("wanted, and the method", *MEASURED.values(), "time"),
        (
            (f"{wanted}: {called}", *(measured[row][column] for column in MEASURED), _ratio(timed))
            for wanted, row, called, timed in CHOICES
        ),
    )


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _ratio(name: str | None) -> str:
    """The smallest and largest median of a method's time, in plain forward passes of its samples."""
    text = (ROOT / "docs" / "cost.md").read_text(encoding="utf-8")
    found = (
        re.findall(rf"^\| [^|]+ \| {name}, batch [^|]+\|[^|]+\| \*\*([\d.]+)\*\*", text, re.MULTILINE) if name else []
    )
    return f"{min(found, key=float)} to {max(found, key=float)}" if found else "not measured"


def comparison_matrix() -> str:
    """Every method in the columns of captum's comparison matrix."""
    counted = json.loads(SAMPLES.read_text(encoding="utf-8"))["samples"]
    header = ("algorithm", "type", "application", "space", "passes", "samples", "counted", "baseline", "random")
    return table(header, (_matrix_row(method, counted.get(method.info.name)) for method in METHODS.values()))


def _matrix_row(method: Method, counted: dict[str, int] | None) -> tuple[str, ...]:
    cls, cost = method.cls, method.info.cost
    arguments = inspect.signature(cls.attribute).parameters
    perturbs = issubclass(cls, PerturbationAttribution) or cls is GuidedFusionCAM
    kinds = ["gradient"] * (" b" in cost) + ["perturbation"] * perturbs
    chunks = "perturbations_per_eval" in arguments or cls is GuidedFusionCAM
    return (
        _shown(method),
        (kinds[0] if len(kinds) == 1 else "both") if kinds else "activation",
        _application(cls, " b" in cost),
        "N F" + " P" * chunks,
        "both" if " b" in cost else "forward",
        cost,
        "none" if counted is None else _counted(counted),
        _baseline(cls, arguments),
        "yes" if "seed" in inspect.signature(cls.__init__).parameters else "no",
    )


def _shown(method: Method) -> str:
    name = method.cls.__name__
    return f"{{class}}`~captum_fusion.{name}`" if _is_ours(method) else f"captum's `{name}`"


def _application(cls: type[Any], gradients: bool) -> str:
    if cls is LayerLinearCAM:
        return "pooling, then one linear layer"
    if cls is GuidedFusionCAM:
        return "ReLUs that are modules"
    if not issubclass(cls, LayerAttribution):
        return "any function"
    if cls is LayerAugmentedGradCAM:
        return "differentiable, pictures"
    return "differentiable" if gradients else "any layer"


def _counted(counts: dict[str, int]) -> str:
    """Samples through the network's last layers; if the first layers saw fewer, how many they saw; backward samples."""
    text = f"{counts['above']}"
    if counts["below"] != counts["above"]:
        text += f" ({counts['below']} below)"
    return text + f", {counts['backward']} b" * (counts["backward"] > 0)


def _baseline(cls: type[Any], arguments: Any) -> str:
    if cls is GuidedFusionCAM:
        return "input, 0"
    if "baselines" not in arguments:
        return "no"
    if issubclass(cls, BackgroundCAM):
        return "blurred input"
    return f"{'layer' if issubclass(cls, ReplacedCAM) else 'input'}, {arguments['baselines'].default}"


#: What stands between the markers of each file.
GENERATED: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"families": families_table},
    "docs/methods.md": {"methods": methods_table},
    "docs/api.md": {"classes": class_reference},
    "docs/choosing.md": {"decision": decision_table, "matrix": comparison_matrix},
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
    info, space = method.info, method.info.space
    if info.signed:
        space += ", signed"
    elif space == "input" and issubclass(method.cls, LayerAttribution):
        space += ", [0, 1]"
    return (
        _shown(method),
        f"`{info.name}`",
        info.family,
        info.cost,
        space,
        f"[{info.citation}]({info.url}){_note(method)}",
    )


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
