"""The documentation's lists are those of the code."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
from typing import Any

import pytest

from captum_fusion.attr import _bases, catalog
from captum_fusion.attr.catalog import METHODS
from captum_fusion.evaluation.cost import cost
from tests.docs_samples import count, size
from tests.docs_tables import GENERATED, ROOT, SAMPLES, families_table, methods_table, rewritten

#: The packages whose public classes the API reference must have.
PUBLIC = (
    "captum_fusion",
    "captum_fusion.metrics",
    "captum_fusion.evaluation",
    "captum_fusion.demo.photographs",
    "captum_fusion.demo.digits",
    "captum_fusion.targets",
)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", GENERATED)
def test_generated_parts_are_up_to_date(name: str) -> None:
    assert read(name) == rewritten(name), f"{name} is out of date; run: python -m tests.docs_tables --write"


def test_the_tables_have_every_method() -> None:
    lines = methods_table().splitlines()[2:]
    for line, method in zip(lines, METHODS.values(), strict=True):
        info = method.info
        assert all(f" {part} " in line for part in (f"`{info.name}`", info.family, info.cost))
        assert f"[{info.citation}]({info.url})" in line
    named = re.findall(r"`(\w+)`", families_table())
    assert sorted(named) == sorted(method.cls.__name__ for method in METHODS.values())


def test_the_classes_that_can_follow_the_authors_code() -> None:
    """docs/methods.md has them all in one table."""
    section = read("docs/methods.md").partition("## The authors' published code")[2].partition("\n## ")[0]
    named = re.findall(r"^\| {class}`~captum_fusion\.(\w+)`", section, re.MULTILINE)
    takes = [m.cls for m in METHODS.values() if "authors_code" in inspect.signature(m.cls.__init__).parameters]
    assert sorted(named) == sorted(cls.__name__ for cls in takes)


def test_the_formulas_have_the_options_and_costs_of_the_classes() -> None:
    checked = set()
    for section in re.split(r"^### ", read("docs/formulas.md"), flags=re.MULTILINE)[1:]:
        if "**Samples for each example:**" not in section:
            continue  # a way to combine methods
        heading, text = section.partition("\n")[0], " ".join(section.split())
        classes = {m.cls.__name__: m for m in METHODS.values()}
        method = classes[next(name for name in re.findall(r"\w+", text) if name in classes)]
        checked.add(method.cls.__name__)
        for fact in facts(method):
            assert fact in text, f"docs/formulas.md, {heading}: {fact}"
    assert len(checked) >= 25


def facts(method: catalog.Method) -> list[str]:
    """The lines below a method's formula: its options with their defaults, cost and paper."""
    common = {"self", "forward_func", "model", "layer", "device_ids", "reshape"}
    options = [p for p in inspect.signature(method.cls.__init__).parameters.values() if p.name not in common]
    shown = [f"`{p.name}={literal(p.default)}`" for p in options]
    lines = [f"- **Options:** {', '.join(shown)}. -"] if shown else []
    info = method.info
    return [*lines, f"- **Samples for each example:** {info.cost}. -", f"- **Paper:** [{info.citation}]({info.url})"]


def test_the_counted_samples_are_those_of_the_formulas() -> None:
    stored = json.loads(SAMPLES.read_text(encoding="utf-8"))
    assert len(stored["samples"]) >= 25
    for name, counts in stored["samples"].items():
        expected = cost(name, stored["K"], stored["Z"])
        if counts is None:
            assert name == "cam"
            continue
        assert expected is not None
        assert counts["backward"] == expected.backward_samples
        found, most = counts["above"], expected.forward_samples + expected.layer_samples
        assert found <= most
        # Constant groups and components cost nothing, nor does FD-CAM's empty group.
        assert found == most or name in ("group-cam", "decom-cam", "fd-cam"), name
    assert size() == (stored["K"], stored["Z"])
    for name in ("grad-cam", "group-cam"):
        assert count(name) == stored["samples"][name]


def literal(value: Any) -> str:
    """A default as the pages write it."""
    if isinstance(value, str):
        return f'"{value}"'
    return "30 / 224" if value == 30 / 224 else repr(value)


def directives() -> list[tuple[str, str, dict[str, str]]]:
    """Kind, argument and options of every autodoc directive of the API reference."""
    found = []
    for match in re.finditer(r"^\.\. auto(\w+):: (\S+)\n((?:   .*\n|\n(?=   ))*)", read("docs/api.md"), re.MULTILINE):
        options = dict(re.findall(r"^   :([\w-]+): ?(.*)$", match[3], re.MULTILINE))
        found.append((match[1], match[2], options))
    return found


def documented() -> list[Any]:
    """Every object of the API reference."""
    found = []
    for kind, path, options in directives():
        target = pkgutil.resolve_name(path)
        if kind != "module":
            found.append(target)
            continue
        public = getattr(target, "__all__", None) or [
            name for name, value in vars(target).items() if getattr(value, "__module__", None) == path
        ]
        chosen = [name.strip() for name in options.get("members", "").split(",") if name.strip()] or public
        left_out = [name.strip() for name in options.get("exclude-members", "").split(",")]
        found += [getattr(target, name) for name in chosen if name not in left_out and not name.startswith("_")]
    return found


@pytest.mark.parametrize("package", PUBLIC)
def test_the_reference_has_every_public_class(package: str) -> None:
    module = importlib.import_module(package)
    names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    classes = {value for name in names if inspect.isclass(value := getattr(module, name))}
    missing = classes - {value for value in documented() if inspect.isclass(value)}
    assert not missing, f"docs/api.md lacks {', '.join(sorted(cls.__name__ for cls in missing))}"


def test_the_reference_has_the_catalogue() -> None:
    found = documented()
    assert {catalog.register, catalog.MethodInfo, catalog.Method} <= {value for value in found if callable(value)}


def test_every_object_that_the_pages_refer_to_exists() -> None:
    for file in sorted((ROOT / "docs").glob("*.md")):
        for path in re.findall(r"{(?:class|func|meth|data)}`~?([\w.]+)`", file.read_text(encoding="utf-8")):
            pkgutil.resolve_name(path)  # raises where there is no such object


def test_every_message_of_the_troubleshooting_page_exists() -> None:
    table = read("docs/troubleshooting.md").partition("| message | what to do |")[2].partition("\n## ")[0]
    messages = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)
    sources = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "captum_fusion").rglob("*.py"))
    assert len(messages) == 5
    for message in messages:
        assert message in sources, message


def test_every_link_between_the_pages_exists() -> None:
    for page in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "docs" / "llms.txt",
        *(ROOT / "docs").glob("*.md"),
    ):
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_contributors_guide_has_every_base() -> None:
    section = read("CONTRIBUTING.md").partition("### Which base do I need?")[2].partition("\n#")[0]
    named = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    bases = [cls.__name__ for cls in vars(_bases).values() if inspect.isclass(cls) and issubclass(cls, _bases.CAM)]
    assert sorted(named) == sorted(bases)


def test_every_file_that_the_contributors_guide_names_exists() -> None:
    text = read("CONTRIBUTING.md")
    rooms = text.partition("## Adding a method")[0]
    named = re.findall(r"`((?:captum_fusion|tests|docs|tutorials)/[\w/.]*)`", rooms)
    named += [
        f"captum_fusion/{path}" for path in re.findall(r"`((?:_passes|attr|functional|evaluation)/\w+\.py)`", text)
    ]
    assert len(named) > 20
    for path in named:
        assert (ROOT / path).exists(), path


def documented_defaults() -> dict[str, tuple[Any, str]]:
    """The default of every argument of public functions and classes, and the one in the docstring."""
    functions = {}
    for package in ("captum_fusion", "captum_fusion.functional", "captum_fusion.metrics"):
        for name, value in vars(importlib.import_module(package)).items():
            if inspect.isfunction(value):
                functions[name] = value
            elif inspect.isclass(value):
                own = vars(value).keys() & {"__init__", "attribute", "consensus"}
                functions.update({f"{name}.{key}": getattr(value, key) for key in own})
    found = {}
    for name, function in functions.items():
        entries = re.split(r"^ *(\w+) \([^\n]*\): ", inspect.getdoc(function) or "", flags=re.MULTILINE)
        for argument, text in zip(entries[1::2], entries[2::2], strict=True):
            stated = re.search(r"Default: (\S+)", text)
            parameter = inspect.signature(function).parameters.get(argument)
            if stated and parameter is not None:
                found[f"{name}({argument})"] = parameter.default, stated[1].strip('`".,')
    return found


def test_documented_defaults_are_those_of_the_code() -> None:
    found = {name: pair for name, pair in documented_defaults().items() if isinstance(pair[0], (int, float, str))}
    assert found.pop("LayerShapCAM.attribute(baselines)") == ("mean", "0"), 'the text goes on: of LayerShapCAM "mean"'
    assert found.pop("LayerAugmentedGradCAM.__init__(shift)") == (30 / 224, "30"), "the text goes on: / 224"
    assert len(found) > 150
    for name, (value, text) in found.items():
        assert text == str(value) or (not isinstance(value, (bool, str)) and float(text) == value), name
