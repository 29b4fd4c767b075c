"""Hints for wrong arguments."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

#: Names at least this long are searched for within other names.
_LONG = 3


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
    """
    known = list(dict.fromkeys(names))
    containing = [one for one in known if len(name) >= _LONG and name.casefold() in one.casefold()]
    return list(dict.fromkeys([*containing[:most], *difflib.get_close_matches(name, known, most, 0.5)]))[:most]
