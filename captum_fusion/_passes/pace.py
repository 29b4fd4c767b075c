"""How many samples go through the network at once, and in which memory layout."""

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


def now(device: torch.device) -> float:
    """The time in seconds, after everything that was started on the device has finished."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)
    return time.perf_counter()


class FixedPace:
    """At most ``limit`` samples per example in one call of the network, in the input's own layout.

    Nothing is timed, so results repeat to the last digit.

    Args:
        owners (Tensor): int64, (S,): the example that each sample is made from.
        examples (int): The number of examples.
        limit (int): The most samples of an example in one call.
        layout (torch.memory_format): The layout of all samples.
    """

    #: The limit where nothing may be timed and none was given.
    DEFAULT_ON_CPU = 8
    DEFAULT_ELSEWHERE = 64

    def __init__(self, owners: Tensor, examples: int, limit: int, layout: torch.memory_format) -> None:
        self._layout = layout
        rank = torch.zeros_like(owners)
        for example in range(examples):
            mine = owners == example
            rank[mine] = torch.arange(int(mine.sum()), device=owners.device)
        _, counts = torch.unique_consecutive(rank // limit, return_counts=True)
        self._stops = counts.cumsum(0).tolist()

    def next(self, start: int) -> tuple[int, torch.memory_format]:
        return self._stops[bisect.bisect_right(self._stops, start)], self._layout

    def record(self, samples: int, layout: torch.memory_format, seconds: float) -> None:
        pass

    def recover(self, error: RuntimeError, samples: int, layout: torch.memory_format) -> bool:
        return False

    @staticmethod
    def now() -> float:
        return 0.0


class TimedPace:
    """Finds the fastest chunk size and memory layout by timing samples that have to run anyway.

    Sizes double as long as that makes a sample cheaper. Every size is tried twice (once where there are few samples) in
    each layout that is still competitive, and the better time counts. A layout that the model cannot take is dropped.
    Running out of memory halves the size for good.

    Args:
        x (Tensor): A batch of what the samples are made from.
        least (int): The least number of samples that the network takes. Default: 1
        first (int): The size to begin with. Default: 1
        scale (float): The memory for samples, as a multiple of the usual one. Default: 1
        both_layouts (bool): Whether channels_last is tried as well. Default: True
        expected (int, optional): The number of samples in the first run. Default: None (many)
    """

    _ENOUGH = 0.97  # a larger chunk has to make a sample at least this much cheaper
    _HOPELESS = 1.25  # a layout this much slower than the best is not tried at larger sizes
    _FEW = 64  # samples below which a second trial of a size costs more than it tells
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
        sample_bytes = max(1, x[0].numel() * x.element_size())
        if x.device.type == "cpu":
            memory = 16 * 2**20  # bytes of samples: past the cache they only get slower
        else:
            free = torch.cuda.mem_get_info(x.device)[0] if x.device.type == "cuda" else 2**32
            first, memory = max(8, first), free // 64  # a network needs some fifty times its input for activations
        self._limit = max(least, min(int(memory * scale) // sample_bytes, 1024))
        self._size = min(max(first, least), self._limit)
        other = _channels_last(x) if both_layouts and x.shape[1] > 1 else None
        self._layouts = [torch.contiguous_format] + ([other] if other is not None else [])
        self._repeats = 1 if expected is not None and expected < self._FEW else 2
        self._trials = self._layouts * self._repeats
        self._times: dict[torch.memory_format, float] = {}
        self._best = (float("inf"), self._size, self._layouts[0])
        self._misses = 0

    def now(self) -> float:
        return now(self._device)

    def next(self, start: int) -> tuple[int, torch.memory_format]:
        if self._trials:
            return start + self._size, self._trials[0]
        return start + min(self._best[1], self._limit), self._best[2]

    def record(self, samples: int, layout: torch.memory_format, seconds: float) -> None:
        if not self._trials or samples != self._size:
            return
        self._trials.pop(0)
        self._times[layout] = min(self._times.get(layout, float("inf")), seconds / samples)
        if not self._trials:
            self._settle()

    def _settle(self) -> None:
        layout = min(self._times, key=lambda candidate: self._times[candidate])
        fastest = self._times[layout]
        self._misses = 0 if fastest < self._best[0] * self._ENOUGH else self._misses + 1
        self._best = min(self._best, (fastest, self._size, layout), key=lambda trial: trial[0])
        if self._misses < self._PATIENCE and self._size * 2 <= self._limit:
            self._layouts = [other for other in self._layouts if self._times[other] <= self._HOPELESS * fastest]
            self._size *= 2
            self._trials = self._layouts * self._repeats
        self._times = {}

    def recover(self, error: RuntimeError, samples: int, layout: torch.memory_format) -> bool:
        """Whether the same samples can be tried again, fewer at once or in the plain layout."""
        if isinstance(error, torch.OutOfMemoryError):
            if samples == 1:
                return False
            self._limit = self._size = max(1, samples // 2)
            self._best = (float("inf"), self._size, self._layouts[0]) if self._best[1] > self._limit else self._best
            self._trials, self._times = [], {}
            return True
        if layout is not torch.contiguous_format:
            self._layouts = [torch.contiguous_format]
            self._trials = [trial for trial in self._trials if trial is torch.contiguous_format]
            self._times.pop(layout, None)
            if self._best[2] is layout:
                self._best = (float("inf"), self._best[1], torch.contiguous_format)
            if self._times and not self._trials:
                self._settle()
            return True
        return False
