"""The files of a report: tables, figures, and a page that shows all of them.

The same rows, in any order, give the same bytes.
"""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from captum_fusion._arguments import printable
from captum_fusion.evaluation.fingerprints import fingerprint_of
from captum_fusion.evaluation.measures import METRICS
from captum_fusion.evaluation.report import figures, tables
from captum_fusion.evaluation.report.statistics import Cell, Outline, Results, spec_of
from captum_fusion.evaluation.store import Row, write_whole

#: At most this many errors and skipped pictures are listed.
_LISTED = 100


def write(folder: str | Path, rows: Iterable[Row], outline: Outline, *, cells: Sequence[Cell] = ()) -> list[Path]:
    """Write tables, figures and a page that shows all of them.

    ``tables/`` holds a ``.md``, ``.csv`` and ``.tex`` file for each network, with means, intervals and paired
    differences, which repeat byte for byte between runs; files with ``_cost`` in their names also show seconds.
    ``figures/`` holds bars, curves and the dependence on ``theta`` as PNG and SVG; figures of an earlier report that no
    longer apply are removed. ``index.html`` needs no other file. Each file is written whole or not at all.

    Args:
        folder (str or Path): Created if missing.
        rows (iterable of dict): As of :func:`summarize`; curves also have ``curve`` and ``shares``.
        outline (Outline): What the report shows.
        cells (sequence of Cell, optional): What :func:`summarize` returned. Default: () (computed here)

    Returns:
        list[Path]: The files.

    Raises:
        ValueError: If the outline has average drop without complexity: a mask that shows everything drops nothing, so
            the mask's area is always shown beside it.

    Examples::

        >>> import tempfile
        >>> outline = Outline("a study", ["net"], ["a"], ["insertion"], reference=None, images=1)
        >>> row = {"model": "net", "image": "1.png", "method": "a", "metric": "insertion", "value": 0.25}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files = write(folder, [row], outline)
        ...     print((Path(folder) / "tables/net.csv").read_text().splitlines()[1])
        net,a,0.25,,,1,0,1,0
        >>> [file.name for file in files if file.suffix == ".md"], files[-1].name
        (['net.md', 'net_cost.md'], 'index.html')
    """
    metrics = {spec_of(metric).name for metric in outline.metrics}
    if "average_drop" in metrics and "complexity" not in metrics:
        raise ValueError("metrics: average_drop needs complexity beside it; a mask that shows everything drops nothing")
    results = Results(rows, outline, cells)
    written: list[Path] = []

    def save(name: str, content: str | bytes) -> None:
        path = Path(folder) / name
        write_whole(path, content if isinstance(content, bytes) else printable(content).encode())
        written.append(path)

    sections = []
    for model, name in _file_names(outline.models).items():
        model_tables = tables.tables_of(results, model)
        for ending, text in tables.documents(results, model, model_tables):
            save(f"tables/{name}{ending}", text)
        drawings = figures.draw(results, model)
        for kind in figures.KINDS:
            for format in figures.FORMATS:
                file = f"figures/{name}_{kind}.{format}"
                if kind in drawings:
                    save(file, drawings[kind].files[format])
                else:
                    (Path(folder) / file).unlink(missing_ok=True)
        sections.append(_section(results, model, name, model_tables, drawings))
    save("index.html", _page(results, sections))
    return written


def _section(
    results: Results,
    model: str,
    name: str,
    model_tables: tables.ModelTables,
    drawings: Mapping[str, figures.Drawing],
) -> dict[str, Any]:
    """What the page shows of a network."""
    examples = [path for path in results.outline.examples.get(model, ()) if path.is_file()]
    return {
        "name": model,
        "id": name,
        "count": results.count(model),
        "tables": model_tables,
        "figures": [
            (figures.KINDS[kind], drawing.note, base64.b64encode(drawing.files["svg"]).decode())
            for kind, drawing in drawings.items()
        ],
        "examples": [base64.b64encode(path.read_bytes()).decode() for path in examples],
    }


def _page(results: Results, sections: Sequence[Mapping[str, Any]]) -> str:
    outline = results.outline
    meanings = [
        (*results.heading(metric), METRICS[name].meaning if name in METRICS else "")
        for metric in outline.metrics
        for name in [spec_of(metric).name]
    ]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["minus"] = lambda text: text.replace("-", tables.MINUS)
    environment.filters["breakable"] = _breakable
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        outline=outline,
        sections=sections,
        meanings=meanings,
        arrows=tables.ARROWS,
        drop_note=tables.drop_note(outline),
        cost_note=tables.COST_NOTE,
        published=tables.published(results),
        errors=results.errors(),
        listed=_LISTED,
    )


def _breakable(text: str) -> Markup:
    """HTML in which a line may break after the punctuation of a name and its options."""
    return Markup("<wbr>").join(re.findall(r"[^:,_/]*[:,_/]|[^:,_/]+", str(text)))


def _file_names(models: Sequence[str]) -> dict[str, str]:
    """A file name for each network, distinct on file systems that ignore case."""
    safe = {model: re.sub(r"[^A-Za-z0-9._-]", "_", model)[:80].lstrip(".-") for model in models}
    often = Counter(name.lower() for model, name in safe.items() if name == model)
    return {
        model: name
        if name == model and often[name.lower()] == 1 and not name.lower().endswith("_cost")
        else f"{name or 'model'}-{fingerprint_of(model)[:6]}"
        for model, name in safe.items()
    }
