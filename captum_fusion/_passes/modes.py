"""Gradient modes, the train mode of a network, and threads."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import warnings
from collections.abc import Iterator
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


def no_inference_mode() -> contextlib.AbstractContextManager[None]:
    """Leave a caller's inference mode and keep the gradient mode."""
    return grad_mode(torch.is_grad_enabled())


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
