"""Writing figures, overlays, maps and JSON, and the sentences that are printed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from captum_fusion import FusionDetails, __version__
from captum_fusion._arguments import count, share
from captum_fusion._commands.common import write, write_figure
from captum_fusion._commands.explain.compute import Explained
from captum_fusion._commands.explain.inputs import frames
from captum_fusion._commands.explain.plan import Plan
from captum_fusion.evaluation.methods import FAINT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: If the network sees less than this part of a picture, the user is told.
WHOLE = 0.97

_COLUMNS = 5  # panels in a row of a figure of several methods
_SHOWN = 1000  # the longer side of a picture in a figure, in pixels
_CROPPED = "Dashed: the part of the picture that the network sees (--whole-image shows it all)."


class Style(NamedTuple):
    """How maps are drawn; None for the defaults of :mod:`captum_fusion.visualization`."""

    cmap: str | None
    alpha: float | None
    threshold: float | None
    colorbar: bool
    dpi: int

    def check(self) -> Style:
        """Check the values, and return them.

        Raises:
            ValueError: If one is not valid; the message names it.
        """
        from captum_fusion.visualization.colours import colour_map

        colour_map(self.cmap, "positive")
        for name in ("alpha", "threshold"):
            if getattr(self, name) is not None:
                share(name, getattr(self, name))
        count("dpi", self.dpi, 10)
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The options that figures and overlays share."""
        given = {"cmap": self.cmap, "alpha_overlay": self.alpha, "threshold": self.threshold}
        return {name: value for name, value in given.items() if value is not None}


class Result(NamedTuple):
    """An explained picture.

    Attributes:
        file: The picture's file.
        image: The picture.
        box: The part that the network sees, in pixels; None if that is not known.
        explained: Its classes and their maps.
        files: The names of the written files: ``"figure"``, and for every class and method ``"overlay"`` and ``"map"``.
    """

    file: Path
    image: Image.Image
    box: tuple[float, float, float, float] | None
    explained: Sequence[Explained]
    files: Mapping[Any, str]

    @property
    def seen(self) -> float:
        """The fraction of the picture that the network sees."""
        if self.box is None:
            return 1.0
        left, top, right, bottom = self.box
        return (right - left) * (bottom - top) / (self.image.width * self.image.height)


class Writer:
    """Writes the files of a run into a folder, and never overwrites one.

    Args:
        folder (Path): The folder.
        stem (str, optional): The figure's name without its ending; None for the picture's and the method's names.
        suffix (str): The format of figures.
        style (Style): How maps are drawn.
        overlays (bool): Whether to write overlays.
        maps (bool): Whether to write maps.
    """

    def __init__(self, folder: Path, stem: str | None, suffix: str, style: Style, overlays: bool, maps: bool) -> None:
        self.folder, self.style = folder, style
        self._stem, self._suffix, self._overlays, self._maps = stem, suffix, overlays, maps
        self.figures: list[Path] = []
        self.pages: list[Path] = []

    def write(self, plan: Plan, result: Result) -> Result:
        """Write all files of a picture, and return the result with their names."""
        several = len({one.target for one in result.explained}) > 1 or len(plan.targets) > 1
        single_method = len(plan.methods) == 1
        names: dict[Any, str] = {}
        stem = self._stem or result.file.stem
        if self._stem is None:
            names["figure"] = f"{stem}_{next(iter(plan.methods.values())).file if single_method else 'methods'}"
        else:
            names["figure"] = stem
        names["figure"] += f".{self._suffix}"
        for one in result.explained:
            for title in one.maps:
                name = f"{stem}_{plan.methods[title].file}" + (f"_{one.target}" if several else "")
                if self._maps:
                    names["map", one.target, title] = f"{name}.npy"
                if self._overlays:
                    names["overlay", one.target, title] = f"{name}_overlay.png"
        names = self._free(names, stem)
        for key, name in names.items():
            path = self.folder / name
            if key == "figure":
                write_figure(path, draw(plan, result, self.style), self._suffix, self.style.dpi)
                self.figures.append(path)
                continue
            kind, index, title = key
            heat = next(one for one in result.explained if one.target == index).maps[title].heat[0, 0].float().numpy()
            if kind == "map":
                write(path, partial(np.save, arr=heat))
            else:
                picture = Image.fromarray(self._overlay(result, heat))
                write(path, partial(picture.save, format="png"))
        return result._replace(files=names)

    def _overlay(self, result: Result, heat: np.ndarray[Any, Any]) -> Any:
        from captum_fusion.visualization import overlay

        return overlay(result.image, heat, box=result.box if result.seen < WHOLE else None, **self.style.options)

    def _free(self, names: dict[Any, str], stem: str) -> dict[Any, str]:
        """The names with the first number for which none of the files exists."""
        number, free = 1, names
        while any((self.folder / name).exists() for name in free.values()):
            number += 1
            free = {key: f"{stem}_{number}{name.removeprefix(stem)}" for key, name in names.items()}
        return free

    def path(self, name: str) -> Path:
        """A path in the folder that does not exist yet."""
        return self.folder / self._free({name: name}, Path(name).stem)[name]

    def write_json(self, plan: Plan, results: Sequence[Result]) -> Path:
        """Write classes, scores, contributions and names of files."""
        path = self.path("explanations.json")
        content = {
            "captum_fusion": __version__,
            "model": plan.loaded.name,
            "layers": list(plan.layers),
            "pictures": [_as_json(plan, result) for result in results],
        }
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        write(path, lambda file: file.write(text.encode()))
        return path


# -------------------------------------------------------------------------------------------------------------- figures


def draw(plan: Plan, result: Result, style: Style) -> Figure:
    """A figure of all classes and methods; of one fusion alone, how it came about."""
    from captum_fusion.visualization import visualize_fusion, visualize_grid
    from captum_fusion.visualization.fusion import LEGEND, kept

    image, box = _reduced(result)
    style_options: dict[str, Any] = {**style.options, "show_colorbar": style.colorbar}
    legend = " ".join([LEGEND, *([_CROPPED] if box is not None else [])])
    fused = [found for one in result.explained for found in one.maps.values() if found.details is not None]
    if len(plan.methods) == 1 and fused:
        columns: list[Any] = list(zip(*(found.details for found in fused if found.details), strict=True))
        fields: list[Any] = [None if column[0] is None else torch.cat(column) for column in columns]
        shown = [one for one in result.explained if one.maps]
        return visualize_fusion(
            [image] * len(fused),
            torch.cat([found.heat for found in fused]),
            FusionDetails(*fields),
            titles=[caption(plan, one) for one in shown],
            name=next(iter(plan.methods)),
            alone=[found.alone for found in fused],
            boxes=[box] * len(fused),
            legend=legend,
            **style_options,
        )
    rows, labels = [], []
    for one in result.explained:
        panels: list[tuple[torch.Tensor | None, str]] = [(None, "picture")]
        panels += [(m.heat, f"{title}\n{kept(m.alone, one.score)}") for title, m in one.maps.items()]
        parts = [panels[i : i + _COLUMNS] for i in range(0, len(panels), _COLUMNS)]
        rows += [(image, part) for part in parts]
        labels += [caption(plan, one), *[""] * (len(parts) - 1)]
    return visualize_grid(rows, labels=labels, boxes=[box] * len(rows), legend=legend, **style_options)


def _reduced(result: Result) -> tuple[Image.Image, tuple[float, float, float, float] | None]:
    """The picture in the size of a figure, and the part that the network sees where it is not the whole."""
    scale = min(1.0, _SHOWN / max(result.image.size))
    size = tuple(max(1, round(side * scale)) for side in result.image.size)
    image = result.image.resize((size[0], size[1]), Image.Resampling.LANCZOS) if scale < 1 else result.image
    if result.box is None or result.seen >= WHOLE:
        return image, None
    left, top, right, bottom = result.box
    across, down = size[0] / result.image.width, size[1] / result.image.height
    return image, (left * across, top * down, right * across, bottom * down)


def caption(plan: Plan, one: Explained) -> str:
    """A class and its score."""
    score = f"p = {one.score:.2f}" if plan.is_probability else f"score {one.score:.3g}"
    return f"{one.label}\n{score}" + ("\ntoo small to be explained" if is_faint(plan, one) else "")


def is_faint(plan: Plan, one: Explained) -> bool:
    """Whether the score is too small for a map to mean anything."""
    return plan.is_probability and one.score < FAINT


# ------------------------------------------------------------------------------------------------------------ sentences


def sentences(plan: Plan, result: Result, folder: Path) -> Iterator[str]:
    """What was found, in a line for each picture, and warnings."""
    from captum_fusion.visualization.fusion import kept

    word = "probability" if plan.is_probability else "score"
    parts = []
    for one in result.explained:
        result_text = f"{len(one.maps)} methods"
        if len(plan.methods) == 1 and one.maps:
            alone = next(iter(one.maps.values())).alone
            result_text = f"the highlighted part alone {kept(alone, one.score)}"
        parts.append(f"{one.label} ({one.target}), {word} {one.score:.3f}, {result_text}")
    others = len(result.files) - 1
    more = f" and {others} other file{'s' * (others > 1)}" if others else ""
    yield f"{result.file}: {'; '.join(parts)}; wrote {folder / result.files['figure']}{more}"
    for one in result.explained:
        if is_faint(plan, one):
            yield (
                f"warning: {result.file.name}: the score of {one.label} is {one.score:.2g}, too small for the map to "
                "mean anything"
            )
        for title, found in one.maps.items():
            if not found.heat.any():
                yield f"warning: {result.file.name}: the map of {title} is zero everywhere ({_why(plan, title)})"
    if result.seen < WHOLE:
        part = f"{result.seen:.0%}".replace("%", " %")
        yield (
            f"{result.file.name}: the network sees {part} of the picture, the part in the dashed frame "
            "(--whole-image squeezes all of it into the input)"
        )
    if (number := frames(result.file)) > 1:
        yield f"{result.file.name}: the first of {number} pictures in the file is explained"


def _why(plan: Plan, title: str) -> str:
    """Why a map may be zero everywhere."""
    for name in plan.methods[title].layers:
        if plan.sizes.get(name, (0, 2))[1] == 1:
            return f"layer {name} has a single position: choose one before the pooling"
    return "nothing speaks for the class, or the layer's channels do not vary over space"


def _as_json(plan: Plan, result: Result) -> dict[str, Any]:
    """A picture with its classes, scores, contributions and files."""
    classes = []
    for one in result.explained:
        maps = []
        for title, found in one.maps.items():
            entry: dict[str, Any] = {
                "method": plan.methods[title].spec,
                "layers": list(plan.methods[title].layers),
                "score_of_highlighted_part": _finite(found.alone),
            }
            if found.details is not None:
                names = ("gradient", "region", "union")
                values = (getattr(found.details, f"{name}_contribution") for name in names)
                entry["contributions"] = {
                    name: _finite(float(value)) for name, value in zip(names, values, strict=True)
                }
            entry["files"] = {
                kind: result.files[kind, one.target, title]
                for kind in ("map", "overlay")
                if (kind, one.target, title) in result.files
            }
            maps.append(entry)
        entry = {"class": one.label, "index": one.target, "score": _finite(one.score)}
        classes.append({**entry, "is_too_small": is_faint(plan, one), "maps": maps})
    return {
        "picture": str(result.file),
        "size": list(result.image.size),
        "seen": None if result.box is None else [round(edge, 2) for edge in result.box],
        "figure": result.files["figure"],
        "classes": classes,
    }


def _finite(value: float) -> float | None:
    """A number that JSON has."""
    return value if math.isfinite(value) else None
