"""Argument checks. Each returns the value or raises an error that names the argument and the valid values.

:func:`printable` is for what names of files and of objects do in messages.
"""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

#: Names at least this long are searched for within other names.
_LONG = 3


def choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """``value`` if it is one of the allowed words.

    Raises:
        ValueError: If it is not.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}")
    return str(value)


def count(name: str, value: Any, least: int = 1) -> int:
    """``value`` if it is an int of at least ``least``.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be an int of at least {least}, not {value!r}")
    return int(value)


def positive(name: str, value: Any, or_zero: bool = False) -> float:
    """``value`` if it is a finite number above 0 (at least 0 with ``or_zero``).

    Raises:
        ValueError: If it is not.
    """
    if not _is_finite(value) or value < 0 or (value == 0 and not or_zero):
        raise ValueError(f"{name} must be a number {'of at least' if or_zero else 'above'} 0, not {value!r}")
    return float(value)


def share(name: str, value: Any, or_zero: bool = True) -> float:
    """``value`` if it is a number from 0 to 1 (0 itself only with ``or_zero``).

    Raises:
        ValueError: If it is not.
    """
    if not _is_finite(value) or not 0 <= value <= 1 or (value == 0 and not or_zero):
        valid = "from 0 to 1" if or_zero else "above 0 and at most 1"
        raise ValueError(f"{name} must be a number {valid}, not {value!r}")
    return float(value)


def percentage(name: str, value: Any) -> float:
    """``value`` if it is a percentile from 0 to 100.

    Raises:
        ValueError: If it is not.
    """
    if not _is_finite(value) or not 0 <= value <= 100:
        raise ValueError(f"{name} must be a percentile from 0 to 100, not {value!r}")
    return float(value)


def near_misses(name: str, names: Iterable[str], most: int = 5) -> list[str]:
    """The known names that a wrong one may stand for: those that contain it, then those that are spelled like it.

    Args:
        name (str): The wrong name.
        names (iterable of str): The known names.
        most (int, optional): The largest number of names to return.
            Default: 5

    Returns:
        list[str]: Empty if there are none.

    Examples::

        >>> near_misses("cam", ["grad-cam", "rise"]), near_misses("raise", ["grad-cam", "rise"])
        (['grad-cam'], ['rise'])
        >>> near_misses("GradCAM", ["xgrad-cam", "grad-cam"])
        ['grad-cam', 'xgrad-cam']
    """
    known: dict[str, list[str]] = {}
    for one in dict.fromkeys(names):
        known.setdefault(_plain(one), []).append(one)
    wanted = _plain(name)
    containing = [one for one in known if len(wanted) >= _LONG and wanted in one]
    near = [*(one for one in containing if one == wanted), *containing[:most]]
    near += difflib.get_close_matches(wanted, known, most, 0.5)
    return [original for one in dict.fromkeys(near) for original in known[one]][:most]


def _plain(name: str) -> str:
    """A name without what people leave out or write in another way: case, hyphens, underscores and spaces."""
    return re.sub("[-_ ]", "", name.casefold())


def _is_finite(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def printable(text: str) -> str:
    r"""Text whose control characters, which a terminal would obey, are written out.

    Examples::

        >>> print(printable("a\x1b[2Jb.png"))
        a\x1b[2Jb.png
    """
    control = ("Cc", "Cf", "Cs")  # control, format (such as a change of direction) and lone surrogates
    return "".join(
        c.encode("unicode_escape").decode() if c != "\n" and unicodedata.category(c) in control else c for c in text
    )
