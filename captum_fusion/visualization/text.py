"""Texts of figures: titles that fit their panel, labels of rows, colour bars and legends."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure

_SIZES = (8.5, 8.0, 7.5, 7.0, 6.5, 6.0)  # of titles, in points
_LEGEND = 7.5  # size of a legend, in points
_LINES = 3  # a longer title gets a smaller font
_ASPECT = 0.56  # mean width of a character divided by its height


def fitted(text: str, inches: float, lines: int = _LINES) -> tuple[str, float]:
    r"""Wrap a text, and shrink it if it has too many lines.

    Args:
        text (str): The text. Its line breaks are kept.
        inches (float): The available width.
        lines (int): Lines that a text may have before it is shrunk.

    Returns:
        tuple[str, float]: The wrapped text and its font size in points.

    Examples::

        >>> fitted("tabby: p = 0.98", 2.4)
        ('tabby: p = 0.98', 8.5)
        >>> fitted("soft-coated wheaten terrier: p = 0.98", 2.0)
        ('soft-coated wheaten terrier: p\n= 0.98', 8.5)
    """
    for size in _SIZES:
        width = max(8, int(inches * 72 / (size * _ASPECT)))
        wrapped = [part for line in text.split("\n") for part in textwrap.wrap(line, width) or [""]]
        if len(wrapped) <= max(lines, text.count("\n") + 1):
            break
    return "\n".join(wrapped), size


def set_title(axis: Axes, text: str, inches: float, **style: Any) -> None:
    """Give axes a title that fits."""
    wrapped, size = fitted(text, inches)
    axis.set_title(wrapped, fontsize=size, parse_math=False, **style)


def label_row(axis: Axes, text: str, inches: float) -> None:
    """Write a text to the left of axes, upwards."""
    wrapped, size = fitted(text, inches)
    axis.annotate(
        wrapped,
        (0, 0.5),
        (-4, 0),
        xycoords="axes fraction",
        textcoords="offset points",
        rotation=90,
        ha="right",
        va="center",
        fontsize=size,
        fontweight="bold",
        multialignment="center",
        parse_math=False,
    )


def colour_bar(
    figure: Figure | SubFigure,
    axes: Sequence[Axes],
    cmap: str,
    limits: tuple[float, float],
    label: str,
    is_clipped: bool = False,
) -> None:
    """Draw one colour bar below axes. It says which values the ends of the colour map stand for.

    If there are values beyond the end, ``is_clipped``, the bar ends in an arrow.
    """
    bar = figure.colorbar(
        ScalarMappable(Normalize(*limits), cmap),
        ax=list(axes),
        location="bottom",
        extend=("both" if limits[0] < 0 else "max") if is_clipped else "neither",
        fraction=0.05,
        aspect=40 if len(axes) > 1 else 25,
        shrink=0.5 if len(axes) > 1 else 0.9,
    )
    low, high = limits
    ticks = [low, 0, high] if low < 0 else [low, (low + high) / 2, high]
    bar.set_ticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])
    bar.ax.tick_params(labelsize=7)
    bar.set_label(label, fontsize=7.5)


def height(legend: str | None, inches: float) -> float:
    """Inches that a legend needs below a figure of a width."""
    return 0.0 if legend is None else 0.1 + 0.15 * len(_legend_lines(legend, inches))


def _legend_lines(legend: str, inches: float) -> list[str]:
    return textwrap.wrap(legend, max(20, int(inches * 72 / (_LEGEND * _ASPECT))))


def legend_below(figure: Figure | SubFigure, text: str, inches: float) -> None:
    """Write a line of explanation below a figure."""
    figure.supxlabel("\n".join(_legend_lines(text, inches)), fontsize=_LEGEND, parse_math=False)
