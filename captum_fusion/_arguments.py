"""Argument checks. Each returns the value or raises an error that names the argument and the valid values."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any


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
        raise ValueError(f"{name} must be a number {'from' if or_zero else 'above'} 0 to 1, not {value!r}")
    return float(value)


def percentage(name: str, value: Any) -> float:
    """``value`` if it is a percentile from 0 to 100.

    Raises:
        ValueError: If it is not.
    """
    if not _is_finite(value) or not 0 <= value <= 100:
        raise ValueError(f"{name} must be a percentile from 0 to 100, not {value!r}")
    return float(value)


def near_misses(name: str, known: Iterable[str], at_most: int = 3) -> list[str]:
    """The known names closest to a misspelt one, best match first.

    Examples::

        >>> near_misses("fuson-cam", ["fusion-cam", "score-cam", "rise"])
        ['fusion-cam', 'score-cam']
    """
    return difflib.get_close_matches(name, list(known), n=at_most, cutoff=0.5)


def _is_finite(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
