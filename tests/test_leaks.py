"""Calls in a loop leave no tensors and no hooks behind.

A few calls with every change, 1000 of every class with ``CAPTUM_FUSION_NIGHTLY=1``.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import resource
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from captum_fusion import shared_work
from tests.classes import CLASSES, EVERY_CLASS, build
from tests.networks import FlatHead, Net, hooks_on, images, make
from tests.nightly import NIGHTLY, amount


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(value), Tensor) for value in gc.get_objects())


def memory() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_calls_leave_nothing_behind(every_cls: Any) -> None:
    model, x = make(), images(2, 3, 6, 6)
    method = build(every_cls, model, model.relu2)

    def calls(number: int) -> None:
        for turn in range(number):
            with shared_work():
                method.attribute(x, [0, 3])
            fresh = build(every_cls, model, model.relu2)
            with contextlib.suppress(IndexError, RuntimeError):
                fresh.attribute(x, [0, 7] if turn % 2 else [0, 3])

    calls(1)
    before = live_tensors()
    calls(amount(2, 10))
    warm = memory()
    calls(amount(0, 490))
    assert live_tensors() == before
    assert hooks_on(model) == 0
    if NIGHTLY and os.environ.get("MALLOC_MMAP_THRESHOLD_"):  # otherwise the allocator keeps what it may need
        assert memory() - warm < 2**23


def test_networks_are_not_kept_alive(every_cls: Any) -> None:
    """Explaining one network after the other keeps none of them."""
    model = make()
    method = build(every_cls, model, model.relu2)
    method.attribute(images(1, 3, 6, 6), 1)
    gone = weakref.ref(model)
    del model, method
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("cls", [cls for cls in EVERY_CLASS if cls not in CLASSES])
def test_objects_are_pickled_after_use(cls: Any) -> None:
    """Of the classes that the contract's tests leave out."""
    model, x = make(FlatHead if cls.__name__ != "LayerLinearCAM" else Net), images(2, 3, 8, 8)
    method = build(cls, model, model.relu2)
    expected = method.attribute(x, [0, 3])
    torch.testing.assert_close(pickle.loads(pickle.dumps(method)).attribute(x, [0, 3]), expected)
