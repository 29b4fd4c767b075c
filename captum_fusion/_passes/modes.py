"""Gradient modes, and the training mode of a network."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from captum_fusion._types import Layer


@contextlib.contextmanager
def grad_mode(enabled: bool) -> Iterator[None]:
    """``set_grad_enabled``, also under a caller's inference_mode, whose tensors autograd could never use again."""
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(enabled))
        yield


def no_inference_mode() -> contextlib.AbstractContextManager[None]:
    """Leave a caller's inference_mode, as a context manager. Whether gradients are recorded does not change."""
    return grad_mode(torch.is_grad_enabled())


def warn_if_training(forward_func: Any, layer: Layer) -> bool:
    """Whether the model is in train mode; warns if so."""
    known = forward_func if isinstance(forward_func, nn.Module) else layer
    roots = [known] if isinstance(known, nn.Module) else known
    # Leaves only: a DataParallel around a model in eval mode is itself in train mode.
    training = any(module.training for root in roots for module in root.modules() if not any(module.children()))
    if training:
        warnings.warn(
            "the model is in train mode: masked passes move its batch-norm statistics and dropout makes its scores "
            "random; call model.eval() before attribute()",
            stacklevel=5,
        )
    return training
