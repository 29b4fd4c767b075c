"""Rows: on disk a line of JSON for each finished cell, written once and never lost; in memory columns."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, repeat
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, overload

import numpy as np
import orjson
from filelock import FileLock, Timeout
from numpy.typing import NDArray

Row = dict[str, Any]
Key = tuple[str, str, str, str, str]

#: What identifies a row: the reference belongs to metrics that have one.
_KEY = ("model", "image", "method", "metric", "reference")

#: The fields that hold lists.
_CURVE = ("curve", "shares")


def key_of(row: Row) -> Key:
    """The key of a row: model, image, method and metric, and the reference of a metric that has one."""
    return row["model"], row["image"], row["method"], row["metric"], row.get("reference", "")


def is_done(row: Row) -> bool:
    """Whether a row is final: it has a value, or a reason why there is none. Failures are tried again."""
    return "error" not in row or bool(row.get("final"))


class _Codes(dict[Any, int]):
    """A code for each distinct value, in the order in which they are first asked for."""

    def __missing__(self, value: Any) -> int:
        self[value] = code = len(self)
        return code


class Rows(Sequence[Row]):
    """Rows in columns: a sequence of dicts in a fraction of their memory.

    Each field is an array of codes into its distinct values, but for ``value``, an array of numbers (so that an
    integer comes back as a float), and ``curve``, whose numbers stand one after another in a single array. Rows do not
    change; a slice is a view of the same categories and curves.

    Args:
        rows (iterable of dict): Their values must be hashable, or lists of hashable values. Default: ()

    Examples::

        >>> rows = Rows([{"image": "a.png", "value": 0.5}, {"image": "b.png", "value": None, "error": "why"}])
        >>> rows[1]
        {'value': None, 'image': 'b.png', 'error': 'why'}
        >>> rows.values, rows.column("error")
        (array([0.5, nan]), (array([-1,  0], dtype=int32), ['why']))
    """

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        values, curves, ends = array("d"), array("d"), array("q", [0])
        columns: dict[str, tuple[array[int], _Codes]] = {}
        for number, row in enumerate(rows):
            value = row.get("value")
            values.append(math.nan if value is None else value)
            for name, value in row.items():
                if name == "value":
                    continue
                if name not in columns:
                    columns[name] = array("i"), _Codes()
                codes, code_of = columns[name]
                if len(codes) < number:  # earlier rows have no such field
                    codes.extend(repeat(-1, number - len(codes)))
                if name == "curve":
                    codes.append(len(ends) - 1)
                    curves.extend(value)
                    ends.append(len(curves))
                else:
                    codes.append(code_of[tuple(value) if isinstance(value, list) else value])
        for codes, _ in columns.values():
            codes.extend(repeat(-1, len(values) - len(codes)))
        self.values: NDArray[np.float64] = np.asarray(values)
        self._codes = {name: np.asarray(codes) for name, (codes, _) in columns.items()}
        self._categories = {name: list(known) for name, (_, known) in columns.items()}
        self._curves, self._ends = np.asarray(curves), np.asarray(ends)

    def __len__(self) -> int:
        return len(self.values)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice | NDArray[Any]) -> Rows: ...

    def __getitem__(self, index: int | slice | NDArray[Any]) -> Row | Rows:
        if isinstance(index, (slice, np.ndarray)):
            chosen = Rows()
            chosen.values = self.values[index]
            chosen._codes = {name: codes[index] for name, codes in self._codes.items()}
            chosen._categories, chosen._curves, chosen._ends = self._categories, self._curves, self._ends
            return chosen
        value = float(self.values[index])
        row: Row = {"value": None if value != value else value}
        for name, codes in self._codes.items():
            code = codes[index]
            if code < 0:
                continue
            found = self.curve(index).tolist() if name == "curve" else self._categories[name][code]
            row[name] = list(found) if isinstance(found, tuple) else found
        return row

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(dict.__eq__, self, other))

    def __repr__(self) -> str:
        return f"<{len(self)} rows>"

    def column(self, name: str) -> tuple[NDArray[np.int32], list[Any]]:
        """A field's codes, -1 where a row has none, and its distinct values."""
        if name not in self._codes:
            return np.full(len(self), -1, np.int32), []
        return self._codes[name], self._categories[name]

    def curve(self, index: int) -> NDArray[np.float64]:
        """The curve of a row; empty without one."""
        code = self._codes["curve"][index] if "curve" in self._codes else -1
        return self._curves[self._ends[code] : self._ends[code + 1]] if code >= 0 else self._curves[:0]

    def latest(self) -> Rows:
        """For each key the latest row that is done, or the latest row if none is; sorted by the keys."""
        ranks = []
        for name in _KEY:
            codes, categories = self.column(name)
            rank_of = {category: rank for rank, category in enumerate(sorted({*categories, ""}))}
            ranks.append(np.array([*map(rank_of.__getitem__, categories), rank_of[""]])[codes])
        keys = np.ravel_multi_index(ranks, [int(rank.max(initial=0)) + 1 for rank in ranks])
        final, meanings = self.column("final")
        done = (self.column("error")[0] < 0) | np.array([*map(bool, meanings), False])[final]
        order: NDArray[np.int64] = np.lexsort((done, keys))
        is_last = np.append(keys[order[1:]] != keys[order[:-1]], True)[: len(order)]
        chosen: NDArray[np.int64] = order[is_last]
        return self[chosen]


def joined(parts: Iterable[Rows]) -> Rows:
    """The rows of several processes, one after another."""
    some = [rows for rows in parts if len(rows)]
    return some[0] if len(some) == 1 else Rows(chain.from_iterable(some))


class Store:
    """The rows of a folder: JSON Lines, one file for each process.

    A line that a killed process left unfinished is ignored, and removed before the next one is written. A finished line
    that is no valid row (:func:`is_valid`) is set aside: it counts as not measured and stays in the file. Each file has
    one writer at a time; a second one is refused.

    Args:
        folder (Path): The folder; it is created if necessary.
        rank (int): The number of this process in its group. Default: 0
        say (callable, optional): Called once for each file with lines that were set aside, with their number.
            Default: None (nothing is said)

    Raises:
        ValueError: On entering, if another process holds this rank's file.

    Examples::

        >>> with tempfile.TemporaryDirectory() as folder, Store(Path(folder)) as store:
        ...     store.append([{"model": "m", "image": "a.png", "method": "x", "metric": "y", "value": 0.1}])
        ...     [row["value"] for row in store.rows()]
        [0.1]
    """

    def __init__(self, folder: Path, rank: int = 0, say: Callable[[str], None] | None = None) -> None:
        self.folder, self._say = folder, say
        self._reported: set[Path] = set()
        self._path = folder / f"rank-{rank}.jsonl"
        self._lock = FileLock(str(folder / f".rank-{rank}.lock"), timeout=0)
        self._file: BinaryIO | None = None

    def __enter__(self) -> Store:
        with contextlib.ExitStack() as undo:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock.acquire()
                undo.callback(self._lock.release)
                self._file = undo.enter_context(self._path.open("ab+"))
            except Timeout as error:
                raise ValueError(
                    f"output: another run is writing to {self.folder.parent}; wait for it or choose another folder"
                ) from error
            except OSError as error:
                raise ValueError(f"output: {self._path} could not be written ({error})") from error
            self._cut_unfinished(self._file)
            undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._file is not None:
                with contextlib.suppress(OSError):  # what could not be written, append has already raised
                    self._file.close()
        finally:
            self._lock.release()

    @staticmethod
    def _cut_unfinished(file: BinaryIO) -> None:
        end = file.seek(0, os.SEEK_END)
        position, block = end, 1 << 16
        while position > 0:
            start = max(0, position - block)
            file.seek(start)
            newline = file.read(position - start).rfind(b"\n")
            if newline >= 0:
                position = start + newline + 1
                break
            position = start
        if position < end:
            file.truncate(position)
            file.seek(0, os.SEEK_END)

    def append(self, rows: Iterable[Row]) -> None:
        """Write rows and wait until they are on disk."""
        assert self._file is not None, "enter the store first"
        self._file.write(b"".join(json.dumps(row, allow_nan=False).encode() + b"\n" for row in rows))
        self._file.flush()
        os.fsync(self._file.fileno())

    def lines(self) -> Iterator[Row]:
        """Read every valid row of all processes, one at a time."""
        for path in sorted(self.folder.glob("rank-*.jsonl")):
            set_aside: list[int] = []
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    row = _parse(line)
                    if row is not None:
                        yield row
                    elif line.endswith(b"\n"):
                        set_aside.append(number)
            if set_aside and path not in self._reported and self._say is not None:
                self._reported.add(path)
                self._say(
                    f"{path}: {len(set_aside)} lines are no valid rows and are set aside, the first is line "
                    f"{set_aside[0]}; what they stood for is measured again"
                )

    def rows(self) -> Rows:
        """For each key the latest row that is done, or the latest row if none is; sorted by the keys."""
        return Rows(self.lines()).latest()


def _parse(line: bytes) -> Row | None:
    if not line.endswith(b"\n"):
        return None
    try:
        try:
            row = orjson.loads(line)
        except ValueError:  # it takes no lone surrogates, which stand for the bytes of a file name that is not UTF-8
            row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if is_valid(row) else None


def is_valid(row: Any) -> bool:
    """Whether an object is a row that this package could have written.

    A row is a dict with a text for each part of its key, and either a finite ``value`` or an ``error``, a text. A curve
    has as many finite scores as shares. All other fields are texts, finite numbers, bools or None.

    Examples::

        >>> row = {"model": "m", "image": "a.png", "method": "x", "metric": "y", "value": 0.1}
        >>> is_valid(row), is_valid({**row, "value": None}), is_valid({**row, "value": None, "error": "out of memory"})
        (True, False, True)
    """
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in _KEY[:4]):
        return False
    if not isinstance(row.get("reference", ""), str):
        return False
    value, error = row.get("value"), row.get("error")
    if not (isinstance(error, str) if value is None else error is None and _is_finite(value)):
        return False
    curve, shares = (row.get(name, []) for name in _CURVE)
    if not all(isinstance(part, list) and all(map(_is_finite, part)) for part in (curve, shares)):
        return False
    others = (part for name, part in row.items() if name not in _CURVE)
    return len(curve) == len(shares) and all(
        part is None or isinstance(part, (str, bool)) or _is_finite(part) for part in others
    )


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that is larger than any float
        return False


#: The end of the names of files that are being written.
_PART = ".captum_fusion.part"


def remove_parts(folder: Path, subfolders: Iterable[str]) -> None:
    """Remove what killed processes have left of files in a folder and its named subfolders. Nobody may be writing."""
    pattern = f".*{_PART}"
    for path in [*folder.glob(pattern), *(path for name in subfolders for path in (folder / name).rglob(pattern))]:
        path.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file completely or not at all, and wait until it is on disk.

    A process that is killed meanwhile leaves a part of it, which :func:`remove_parts` removes.

    Args:
        path (Path): The file; its folder is created if necessary.
        content (bytes): Its content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_PART)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(partial, 0o666 & ~umask)
        os.replace(partial, path)
        with contextlib.suppress(OSError):  # not every system opens or synchronises folders
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        if os.path.exists(partial):
            os.unlink(partial)
