"""One self-contained page of a run: pictures, classes, maps with adjustable opacity, and the numbers."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image
from torch import Tensor

from captum_fusion import __version__
from captum_fusion._commands.common import write
from captum_fusion._commands.explain.compute import Explained
from captum_fusion._commands.explain.plan import Plan
from captum_fusion._commands.explain.writing import WHOLE, Result, Writer, is_faint

_SHOWN = 900  # the longer side of a picture in the page, in pixels


def write_page(writer: Writer, plan: Plan, results: Sequence[Result]) -> Path:
    """Write the page of all pictures."""
    path = writer.path("explanations.html")
    content = render(plan, results, writer.style.cmap, writer.style.alpha, writer.style.threshold)
    write(path, lambda file: file.write(content.encode()))
    writer.pages.append(path)
    return path


def render(
    plan: Plan, results: Sequence[Result], cmap: str | None, alpha: float | None, threshold: float | None
) -> str:
    """The page as HTML. Every text is escaped, and nothing is loaded from outside."""
    from captum_fusion.visualization.colours import CMAP
    from captum_fusion.visualization.pictures import ALPHA

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    pictures = [
        {
            "name": result.file.name,
            "size": result.image.size,
            "source": _jpeg(result.image),
            "seen": result.seen,
            "frame": None if result.seen >= WHOLE else _frame(result),
            "classes": [
                {
                    "label": one.label,
                    "score": f"{one.score:.3f}",
                    "is_faint": is_faint(plan, one),
                    "maps": [
                        entry for title in one.maps for entry in _entries(title, one, cmap or CMAP, threshold or 0.0)
                    ],
                }
                for one in result.explained
            ],
        }
        for result in results
    ]
    return environment.get_template("page.html").render(
        pictures=pictures,
        model=plan.loaded.name,
        layers=plan.layers,
        score="p" if plan.is_probability else "score",
        alpha=ALPHA if alpha is None else alpha,
        version=__version__,
    )


def _entries(title: str, one: Explained, cmap: str, threshold: float) -> Iterator[dict[str, str]]:
    """A map with its caption; before that of a fusion, its components."""
    from captum_fusion.visualization.fusion import kept

    found = one.maps[title]
    if found.details is not None:
        score, baseline = float(found.details.score), float(found.details.baseline_score)
        for name, field, heat in (
            ("gradient map", "gradient", found.details.denoised_map),
            ("region map", "region", found.details.region_map),
            ("union", "union", found.details.union_map),
        ):
            alone = float(getattr(found.details, f"{field}_contribution")) + baseline
            yield {"title": name, "kept": kept(alone, score), "source": _png(heat, cmap, threshold)}
    yield {"title": title, "kept": kept(found.alone, one.score), "source": _png(found.heat, cmap, threshold)}


def _frame(result: Result) -> dict[str, str]:
    """The part of the picture that the network sees, in percent of its size."""
    assert result.box is not None
    left, top, right, bottom = result.box
    width, height = result.image.size
    edges = {
        "left": left / width,
        "top": top / height,
        "width": (right - left) / width,
        "height": (bottom - top) / height,
    }
    return {name: f"{100 * value:.3f}%" for name, value in edges.items()}


def _jpeg(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((_SHOWN, _SHOWN), Image.Resampling.LANCZOS)
    return _data(small, "jpeg", quality=88)


def _png(heat: Tensor, cmap: str, threshold: float) -> str:
    """A map in its colours; values below the threshold are transparent."""
    from captum_fusion.visualization.colours import colours
    from captum_fusion.visualization.pictures import to_bytes

    values = heat[0, 0].float().cpu().numpy()
    top = float(values.max()) or 1.0
    opaque = np.where(values >= threshold * top, np.uint8(255), np.uint8(0))[..., None]
    return _data(Image.fromarray(np.concatenate([to_bytes(colours(values / np.float32(top), cmap)), opaque], 2)), "png")


def _data(image: Image.Image, kind: str, **options: Any) -> str:
    content = BytesIO()
    image.save(content, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
