"""The paper draft has what the Journal of Open Source Software requires."""

from __future__ import annotations

import re

import pytest

from tests.docs_tables import ROOT

PAPER = (ROOT / "docs" / "paper" / "paper.md").read_text(encoding="utf-8")
BIBLIOGRAPHY = (ROOT / "docs" / "paper" / "paper.bib").read_text(encoding="utf-8")
_, HEADER, BODY = PAPER.split("---\n", 2)

#: Of https://joss.readthedocs.io/en/latest/paper.html, in its order.
SECTIONS = [
    "Summary",
    "Statement of need",
    "State of the field",
    "Software design",
    "Research impact statement",
    "AI usage disclosure",
    "Acknowledgements",
    "References",
]


def test_it_has_the_required_sections() -> None:
    assert re.findall(r"^# (.+)$", BODY, re.MULTILINE) == SECTIONS


@pytest.mark.parametrize("field", ["title", "tags", "authors", "affiliations", "date", "bibliography"])
def test_it_has_the_required_fields(field: str) -> None:
    assert re.search(rf"^{field}:", HEADER, re.MULTILINE)


def test_it_has_the_required_length() -> None:
    assert 750 <= len(BODY.split()) <= 1750


def test_the_bibliography_has_the_citations_and_no_others() -> None:
    cited = set(re.findall(r"@([\w-]+)", BODY))
    assert cited == set(re.findall(r"^@\w+\{([\w-]+),$", BIBLIOGRAPHY, re.MULTILINE))
