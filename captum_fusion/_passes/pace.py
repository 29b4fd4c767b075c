"""Chunk size and memory layout of samples in one call of the network."""

from __future__ import annotations

import bisect
import re
import threading
import time
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from captum_fusion._passes.modes import callers_autocast


def _channels_last(x: Tensor) -> torch.memory_format | None:
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())


def layout_of(x: Tensor) -> torch.memory_format:
    """The memory layout of an input."""
    other = _channels_last(x)
    if other is not None and x.is_contiguous(memory_format=other) and not x.is_contiguous():
        return other
    return torch.contiguous_format


def now(device: torch.device) -> float:
    """The time in seconds, after synchronising with the device."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _is_of_layout(error: RuntimeError) -> bool:
    """Whether an error is about the memory layout of a tensor, as that of ``view`` after a convolution."""
    return (
        re.search(r"view size|stride|contiguous|memory.?format|channels.?last", str(error), re.IGNORECASE) is not None
    )


class FixedPace:
    """Chunks of at most ``limit`` samples per example, in the memory layout of the input.

    Nothing is timed, so results repeat to the last bit.

    Args:
        owners (Tensor): Example that each sample comes from, int64, (S,).
        examples (int): Number of examples.
        limit (int): Maximum number of samples per example in one call of the network.
        layout (torch.memory_format): Memory layout of all samples.
        may_halve (bool): Whether running out of memory halves the limit. Default: False
    """

    #: The number of samples of all examples if no limit is given and nothing may be timed.
    DEFAULT_ON_CPU = 8
    DEFAULT_ELSEWHERE = 64

    def __init__(
        self, owners: Tensor, examples: int, limit: int, layout: torch.memory_format, may_halve: bool = False
    ) -> None:
        self._limit, self._layout, self._may_halve = limit, layout, may_halve
        self._rank = torch.zeros_like(owners)
        for example in range(examples):
            owned = owners == example
            self._rank[owned] = torch.arange(int(owned.sum()), device=owners.device)
        self._stops = self._find_stops()

    def _find_stops(self) -> list[int]:
        _, counts = torch.unique_consecutive(self._rank // self._limit, return_counts=True)
        stops: list[int] = counts.cumsum(0).tolist()
        return stops

    def next(self, start: int) -> tuple[int, torch.memory_format]:
        return self._stops[bisect.bisect_right(self._stops, start)], self._layout

    def record(self, samples: int, layout: torch.memory_format, seconds: float) -> None:
        pass

    def recover(self, error: RuntimeError, samples: int, layout: torch.memory_format) -> bool:
        if not self._may_halve or self._limit == 1 or not isinstance(error, torch.OutOfMemoryError):
            return False
        self._limit //= 2
        self._stops = self._find_stops()
        return True

    @staticmethod
    def now() -> float:
        return 0.0


def _start(device: torch.device) -> tuple[int, int]:
    """Samples of the first chunk of a search, and bytes for all samples of a chunk."""
    if device.type == "cpu":
        return 1, 16 * 2**20  # larger chunks exceed the cache and are slower
    # Activations take about fifty times the memory of the input.
    if device.type == "cuda":
        return 64, torch.cuda.mem_get_info(device)[0] // 64  # smaller chunks leave the device idle
    return 8, 2**32 // 64


class TimedPace:
    """Finds the fastest chunk size and memory layout by timing the first chunks. It runs no extra samples.

    The chunk size doubles as long as this reduces the time per sample. Each size is tried twice in each layout that is
    still competitive, and the shorter time is used: the result serves all later calls, so that one disturbed
    measurement must not decide. A run of fewer samples than the chunk size measures nothing. A layout that the model
    rejects is dropped. Running out of memory halves the maximum size permanently. :func:`timed_pace` gives the search
    that earlier calls of the same network have begun.

    Args:
        x (Tensor): Batch that the samples are created from.
        least (int): Minimum number of samples in one call of the network. Default: 1
        first (int): Initial chunk size, on a GPU at least 64 and on other accelerators 8. Default: 1
        scale (float): Factor of the memory available for samples. Default: 1
        both_layouts (bool): Whether channels_last is tried as well. Default: True
    """

    _ENOUGH = 0.97  # a larger chunk must reduce the time per sample to this fraction
    _HOPELESS = 1.25  # a layout slower than the best by this factor is not tried at larger sizes
    _REPEATS = 2  # number of trials of each size and layout
    _PATIENCE = 2  # number of consecutive sizes without improvement that ends the search

    def __init__(
        self,
        x: Tensor,
        least: int = 1,
        *,
        first: int = 1,
        scale: float = 1.0,
        both_layouts: bool = True,
    ) -> None:
        self._device = x.device
        sample_bytes = max(1, x[0].numel() * x.element_size())
        start, memory = _start(x.device)
        self._limit = max(least, min(int(memory * scale) // sample_bytes, 1024))
        self._size = min(max(start, first, least), self._limit)
        other = _channels_last(x) if both_layouts and x.shape[1] > 1 else None
        self._layouts = [torch.contiguous_format] + ([other] if other is not None else [])
        self._trials = self._layouts * self._REPEATS
        self._times: dict[torch.memory_format, float] = {}
        self._best = (float("inf"), self._size, self._layouts[0])
        self._misses = 0
        self.ran_out_of_memory = False
        self._lock = threading.RLock()  # threads that explain one network share its search

    def now(self) -> float:
        return now(self._device)

    def next(self, start: int) -> tuple[int, torch.memory_format]:
        with self._lock:
            if self._trials:
                return start + self._size, self._trials[0]
            return start + min(self._best[1], self._limit), self._best[2]

    def record(self, samples: int, layout: torch.memory_format, seconds: float) -> None:
        with self._lock:
            if not self._trials or samples != self._size or layout is not self._trials[0]:
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
            self._trials = self._layouts * self._REPEATS
        self._times = {}

    def recover(self, error: RuntimeError, samples: int, layout: torch.memory_format) -> bool:
        """Whether to retry the same samples, in smaller chunks or in the contiguous layout."""
        with self._lock:
            return self._recover(error, samples, layout)

    def _recover(self, error: RuntimeError, samples: int, layout: torch.memory_format) -> bool:
        if isinstance(error, torch.OutOfMemoryError):
            self.ran_out_of_memory = True
            if samples == 1:
                return False
            self._limit = self._size = max(1, samples // 2)
            self._best = (float("inf"), self._size, self._layouts[0]) if self._best[1] > self._limit else self._best
            self._trials, self._times = [], {}
            return True
        if layout is not torch.contiguous_format and _is_of_layout(error):
            self._layouts = [torch.contiguous_format]
            self._trials = [trial for trial in self._trials if trial is torch.contiguous_format]
            self._times.pop(layout, None)
            if self._best[2] is layout:
                self._best = (float("inf"), self._best[1], torch.contiguous_format)
            if self._times and not self._trials:
                self._settle()
            return True
        return False


#: Searches of each forward function, by what the samples are like.
_SEARCHES: WeakKeyDictionary[Callable[..., Any], dict[Hashable, TimedPace]] = WeakKeyDictionary()


def timed_pace(forward_func: Callable[..., Any], x: Tensor, least: int, **options: Any) -> TimedPace:
    """The search for a pace of samples like those of ``x``, which continues that of earlier calls.

    One search serves all calls of a network on inputs of one shape, whatever the batch size. A search that ran out of
    memory is not continued, because the memory may be free again.

    Args:
        forward_func (callable): The network; searches are kept as long as it exists.
        x (Tensor): Batch that the samples are created from.
        least (int): Minimum number of samples in one call of the network.
        options (Any): Other arguments of :class:`TimedPace`.

    Returns:
        TimedPace: A new search if there is none to continue, or if ``forward_func`` cannot be referred to weakly.
    """
    surroundings = torch.get_num_threads(), callers_autocast()
    key = (x.device, x.dtype, x.shape[1:], least, surroundings, tuple(sorted(options.items())))
    try:
        searches = _SEARCHES.setdefault(forward_func, {})
    except TypeError:
        return TimedPace(x, least, **options)
    if key not in searches or searches[key].ran_out_of_memory:
        searches[key] = TimedPace(x, least, **options)
    return searches[key]
