"""Gradient modes, autocast, the train mode of a network, and threads."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import captum
import torch
from torch import nn

from captum_fusion._types import Layer


@contextlib.contextmanager
def grad_mode(enabled: bool) -> Iterator[None]:
    """``set_grad_enabled``, leaving a caller's inference mode, whose tensors autograd cannot use."""
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(enabled))
        yield


#: The caller's autocast, as pairs of a device type and a dtype, while this package computes; else None.
_CALLERS_AUTOCAST: ContextVar[tuple[tuple[str, torch.dtype], ...] | None] = ContextVar("autocast", default=None)


def callers_autocast() -> tuple[tuple[str, torch.dtype], ...]:
    """The autocast in which the network runs: the dtype of each type of device on which it is enabled."""
    state = _CALLERS_AUTOCAST.get()
    if state is not None:
        return state
    available = torch.accelerator.is_available()  # without one, torch 2.6 raises an error when asked which
    accelerator = torch.accelerator.current_accelerator() if available else None
    kinds = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind))


@contextlib.contextmanager
def _autocast(enabled: bool) -> Iterator[None]:
    """The caller's autocast, or none and a note of the caller's."""
    state = callers_autocast()
    token = _CALLERS_AUTOCAST.set(None if enabled else state)
    try:
        with contextlib.ExitStack() as stack:
            for kind, dtype in state:
                stack.enter_context(torch.autocast(kind, dtype, enabled=enabled))
            yield
    finally:
        _CALLERS_AUTOCAST.reset(token)


@contextlib.contextmanager
def own_arithmetic() -> Iterator[None]:
    """Leave the caller's inference mode and autocast. The network itself runs in :func:`as_called`."""
    with grad_mode(torch.is_grad_enabled()), _autocast(enabled=False):
        yield


def as_called() -> contextlib.AbstractContextManager[None]:
    """Within :func:`own_arithmetic`, the caller's autocast, for a call of the network."""
    return _autocast(enabled=True)


_LOCK = threading.RLock()

#: Folders of this package and of captum.
_INSIDE = tuple(str(Path(file).parent) + os.sep for file in (Path(__file__).parent, captum.__file__))


def exclusive() -> contextlib.AbstractContextManager[Any]:
    """One pass at a time: hooks on a network would fire in the passes of other threads."""
    return _LOCK


@contextlib.contextmanager
def hooks_enabled() -> Iterator[None]:
    """One pass at a time, in which hooks run: a model that was compiled before would not see hooks added since."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(exclusive())
        if "torch._dynamo" in sys.modules:  # otherwise nothing has been compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def stack_level() -> int:
    """The ``stacklevel`` of a warning that points at the first code outside this package and captum."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    return level


def warn_if_training(forward_func: Any, layer: Layer) -> bool:
    """Return whether the model is in train mode, and warn if it is."""
    known = forward_func if isinstance(forward_func, nn.Module) else layer
    roots = [known] if isinstance(known, nn.Module) else known
    # Only leaf modules: a DataParallel wrapper of a model in eval mode is itself in train mode.
    training = any(module.training for root in roots for module in root.modules() if not any(module.children()))
    if training:
        warnings.warn(
            "the model is in train mode: further passes update its batch-norm statistics, and dropout makes its scores "
            "random; call model.eval() before attribute()",
            stacklevel=stack_level(),
        )
    return training
