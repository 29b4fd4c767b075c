"""Rows on disk: one line of JSON for each finished cell of a table."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

Row = dict[str, Any]
Key = tuple[str, str, str, str, str]


def key_of(row: Row) -> Key:
    """The key of a row: model, image, method and metric, and the reference of a metric that has one."""
    return row["model"], row["image"], row["method"], row["metric"], row.get("reference", "")


def is_done(row: Row) -> bool:
    """Whether a row is final: it has a value, or a reason why there is none. Failures are tried again."""
    return "error" not in row or bool(row.get("final"))


def latest(rows: Iterable[Row]) -> Iterator[Row]:
    """For each key the latest row that is done, or the latest row if none is."""
    kept: dict[Key, Row] = {}
    for row in rows:
        key = key_of(row)
        if is_done(row) or key not in kept or not is_done(kept[key]):
            kept[key] = row
    yield from kept.values()


class Store:
    """The rows of a folder: JSON Lines, one file for each process.

    A line that a killed process left unfinished is ignored, and removed before the next one is written. Each file has
    one writer at a time; a second one is refused.

    Args:
        folder (Path): The folder; it is created if necessary.
        rank (int): The number of this process in its group. Default: 0

    Raises:
        ValueError: On entering, if another process holds this rank's file.

    Examples::

        >>> with tempfile.TemporaryDirectory() as folder, Store(Path(folder)) as store:
        ...     store.append([{"model": "m", "image": "a.png", "method": "x", "metric": "y", "value": 0.1}])
        ...     [row["value"] for row in store.rows()]
        [0.1]
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = folder
        self._path = folder / f"rank-{rank}.jsonl"
        self._lock = FileLock(str(folder / f".rank-{rank}.lock"), timeout=0)
        self._file: BinaryIO | None = None

    def __enter__(self) -> Store:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            self._file = self._path.open("ab+")
        except Timeout as error:
            raise ValueError(
                f"output: another run is writing to {self.folder.parent}; wait for it or choose another folder"
            ) from error
        except OSError as error:
            raise ValueError(f"output: {self._path} could not be written ({error})") from error
        self._cut_unfinished(self._file)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
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
        """Read every finished line of all processes, one at a time."""
        for path in sorted(self.folder.glob("rank-*.jsonl")):
            with path.open("rb") as file:
                yield from (row for line in file if (row := _parse(line)) is not None)

    def rows(self) -> Iterator[Row]:
        """For each key the latest row that is done, or the latest row if none is."""
        yield from latest(self.lines())


def _parse(line: bytes) -> Row | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row: Row = json.loads(line)
        key_of(row)
    except (ValueError, KeyError, TypeError):
        return None
    return row


def write_whole(path: Path, content: bytes) -> None:
    """Write a file completely or not at all.

    Args:
        path (Path): The file; its folder is created if necessary.
        content (bytes): Its content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(partial, 0o666 & ~umask)
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.unlink(partial)
