"""How many rows go through the network at once, and in which memory layout."""

from __future__ import annotations

import bisect
import time

import torch
from torch import Tensor


def _channels_last(x: Tensor) -> torch.memory_format | None:
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())


def layout_of(x: Tensor) -> torch.memory_format:
    """The memory layout that the user gave the input."""
    other = _channels_last(x)
    if other is not None and x.is_contiguous(memory_format=other) and not x.is_contiguous():
        return other
    return torch.contiguous_format


class FixedPace:
    """At most ``limit`` rows per example in one call of the network, in the input's own layout.

    Nothing is timed, so that results repeat to the last digit.
    """

    def __init__(self, rows: Tensor, examples: int, limit: int, layout: torch.memory_format) -> None:
        self._layout = layout
        rank = torch.zeros_like(rows)
        for example in range(examples):
            mine = rows == example
            rank[mine] = torch.arange(int(mine.sum()), device=rows.device)
        _, counts = torch.unique_consecutive(rank // limit, return_counts=True)
        self._stops = counts.cumsum(0).tolist()

    def next(self, start: int) -> tuple[int, torch.memory_format]:
        return self._stops[bisect.bisect_right(self._stops, start)], self._layout

    def record(self, rows: int, layout: torch.memory_format, seconds: float) -> None:
        pass

    def recover(self, error: RuntimeError, rows: int, layout: torch.memory_format) -> bool:
        return False

    @staticmethod
    def now() -> float:
        return 0.0


class TimedPace:
    """Finds rows per call and memory layout by timing the rows that have to be run anyway.

    Sizes double as long as that makes a row cheaper; every size is tried twice (once where there are few rows) in each
    layout that is still in the running, and the better time counts. A layout that the model cannot take is dropped, and
    running out of memory halves the size for good.

    Args:
        x (Tensor): A batch of what the rows are made of.
        least (int): The least number of rows that the network takes. Default: 1
        first (int): The size to begin with. Default: 1
        scale (float): Of the usual memory for rows, how much may be used. Default: 1
        both_layouts (bool): Whether channels_last is tried, too. Default: True
        expected (int, optional): How many rows there will be first. Default: many
    """

    _ENOUGH = 0.97  # a larger chunk has to make a row at least this much cheaper
    _HOPELESS = 1.25  # a layout this much slower than the best is not tried at larger sizes
    _FEW = 64  # rows below which a second trial of a size costs more than it tells
    _PATIENCE = 2  # sizes in a row without a gain before the search ends

    def __init__(
        self,
        x: Tensor,
        least: int = 1,
        *,
        first: int = 1,
        scale: float = 1.0,
        both_layouts: bool = True,
        expected: int | None = None,
    ) -> None:
        self._device = x.device
        row_bytes = max(1, x[0].numel() * x.element_size())
        if x.device.type == "cpu":
            memory = 16 * 2**20  # bytes of rows: past the cache they only get slower
        else:
            free = torch.cuda.mem_get_info(x.device)[0] if x.device.type == "cuda" else 2**32
            first, memory = max(8, first), free // 64  # a network needs some fifty times its input for activations
        self._limit = max(least, min(int(memory * scale) // row_bytes, 1024))
        self._size = min(max(first, least), self._limit)
        other = _channels_last(x) if both_layouts and x.shape[1] > 1 else None
        self._layouts = [torch.contiguous_format] + ([other] if other is not None else [])
        self._repeats = 1 if expected is not None and expected < self._FEW else 2
        self._trials = self._layouts * self._repeats
        self._times: dict[torch.memory_format, float] = {}
        self._best = (float("inf"), self._size, self._layouts[0])
        self._misses = 0

    def now(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()

    def next(self, start: int) -> tuple[int, torch.memory_format]:
        if self._trials:
            return start + self._size, self._trials[0]
        return start + min(self._best[1], self._limit), self._best[2]

    def record(self, rows: int, layout: torch.memory_format, seconds: float) -> None:
        if not self._trials or rows != self._size:
            return
        self._trials.pop(0)
        self._times[layout] = min(self._times.get(layout, float("inf")), seconds / rows)
        if not self._trials:
            self._settle()

    def _settle(self) -> None:
        layout = min(self._times, key=lambda each: self._times[each])
        fastest = self._times[layout]
        self._misses = 0 if fastest < self._best[0] * self._ENOUGH else self._misses + 1
        self._best = min(self._best, (fastest, self._size, layout), key=lambda each: each[0])
        if self._misses < self._PATIENCE and self._size * 2 <= self._limit:
            self._layouts = [each for each in self._layouts if self._times[each] <= self._HOPELESS * fastest]
            self._size *= 2
            self._trials = self._layouts * self._repeats
        self._times = {}

    def recover(self, error: RuntimeError, rows: int, layout: torch.memory_format) -> bool:
        """Whether the same rows can be tried again, smaller or in the plain layout."""
        if isinstance(error, torch.OutOfMemoryError):
            if rows == 1:
                return False
            self._limit = self._size = max(1, rows // 2)
            self._best = (float("inf"), self._size, self._layouts[0]) if self._best[1] > self._limit else self._best
            self._trials, self._times = [], {}
            return True
        if layout is not torch.contiguous_format:
            self._layouts = [torch.contiguous_format]
            self._trials = [each for each in self._trials if each is torch.contiguous_format]
            self._times.pop(layout, None)
            if self._best[2] is layout:
                self._best = (float("inf"), self._best[1], torch.contiguous_format)
            if self._times and not self._trials:
                self._settle()
            return True
        return False
