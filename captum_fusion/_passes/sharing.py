"""Work that several calls of ``attribute`` share."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from captum_fusion._passes.pace import now

Result = TypeVar("Result")


@dataclass
class SavedWork:
    """Work saved by sharing, counted within :func:`shared_work`.

    Attributes:
        forward_samples: Samples that did not have to go through the network forward.
        backward_samples: Samples that did not have to go through it backward.
        seconds: The time that these samples took in the call that ran them.
    """

    forward_samples: int = 0
    backward_samples: int = 0
    seconds: float = 0.0


class WorkCache:
    """The results that calls within one :func:`shared_work` block share, by what they depend on."""

    #: The largest outputs of masked samples that are kept, in numbers (128 MiB in float32).
    LARGEST_OUTPUT = 2**25

    def __init__(self) -> None:
        self.saved = SavedWork()
        self._results: dict[Hashable, tuple[Any, SavedWork]] = {}
        self._alive: dict[int, Any] = {}

    def remember(
        self,
        key: Hashable,
        compute: Callable[[], Result],
        device: torch.device,
        samples: int,
        *,
        backward: bool = False,
        without_backward: Hashable = None,
    ) -> Result:
        """The result that is known under ``key``, or that of ``compute``, which is then known.

        Args:
            key (Hashable): Everything that the result depends on, made by :meth:`key`.
            compute (callable): Called without arguments where the result is not known.
            device (torch.device): Where it is computed; timings wait for it.
            samples (int): How many forward samples ``compute`` takes.
            backward (bool): Whether it takes as many backward samples. Default: False
            without_backward (Hashable): A second key, under which the result stands in for one that takes no backward
                samples. Default: None
        """
        if key in self._results:
            result, cost = self._results[key]
            self.saved.forward_samples += cost.forward_samples
            self.saved.backward_samples += cost.backward_samples
            self.saved.seconds += cost.seconds
            return result  # type: ignore[no-any-return]
        start = now(device)
        result = compute()
        seconds = now(device) - start
        self._results[key] = result, SavedWork(samples, samples if backward else 0, seconds)
        if without_backward is not None:
            self._results.setdefault(without_backward, (result, SavedWork(samples, 0, seconds)))
        return result

    def key(self, value: Any) -> Hashable:
        """A value as part of a key: numbers and strings by their value, anything else by identity.

        A tensor counts as another one after a change in place. Objects are kept alive, so that none takes the identity
        of another.
        """
        if value is None or isinstance(value, (bool, int, float, str, bytes, type)):
            return value
        if isinstance(value, (tuple, list)):
            return tuple(self.key(item) for item in value)
        self._alive[id(value)] = value
        return id(value), value._version if isinstance(value, Tensor) and not value.is_inference() else 0


_CACHE: ContextVar[WorkCache | None] = ContextVar("captum_fusion_shared_work", default=None)


def current_cache() -> WorkCache | None:
    """The cache of the :func:`shared_work` block that this code runs in, if any."""
    return _CACHE.get()


@contextlib.contextmanager
def shared_work() -> Iterator[SavedWork]:
    """Let calls of ``attribute`` on the same inputs share their passes through the network.

    Within the block, layer passes, baseline samples, and the masked samples of Score-CAM, SS-CAM and IS-CAM (whose
    masks do not depend on the target) run once, for any target, on their own and inside fusions. Calls are on the same
    inputs if they are given the very same objects: network, inputs, arguments, baselines. Tensors that change in place
    are noticed, weights included. Nothing is shared for networks in train mode, or for a ``forward_func`` that is
    neither a module nor a function in which the modules that it calls can be found. The outputs of masked samples are
    kept until the end of the block, up to 128 MiB for each method.

    Yields:
        SavedWork: Counts the work saved by sharing.

    Examples::

        >>> from captum_fusion import LayerFusionCAM, LayerScoreCAM, demo, shared_work
        >>> model, scene = demo.load_model(), demo.load_scenes()[0]
        >>> image = demo.preprocess(scene.image)
        >>> with shared_work() as saved:
        ...     fused = LayerFusionCAM(model, model.stage4).attribute(image, scene.labels[0])
        ...     other = LayerFusionCAM(model, model.stage4).attribute(image, scene.labels[1])
        ...     region = LayerScoreCAM(model, model.stage4).attribute(image, scene.labels[0])  # no more masked samples
    """
    cache = _CACHE.get()
    if cache is not None:
        yield cache.saved
        return
    cache = WorkCache()
    token = _CACHE.set(cache)
    try:
        yield cache.saved
    finally:
        _CACHE.reset(token)


def weights_of(forward_func: Callable[..., Any]) -> list[Tensor] | None:
    """Parameters and buffers of the modules that a function calls; None where the modules are not known."""
    modules = list(_modules_of(forward_func))
    if not modules:
        return None
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return None if any(tensor.is_inference() for tensor in tensors) else tensors


def _modules_of(value: Any) -> Iterable[nn.Module]:
    """The modules that a callable is, is bound to, or refers to."""
    if isinstance(value, nn.Module):
        return [value]
    if isinstance(value, functools.partial):
        parts = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, types.MethodType):
        parts = [value.__self__, *vars(value.__self__).values()] if hasattr(value.__self__, "__dict__") else []
    elif isinstance(value, types.FunctionType):
        names = inspect.getclosurevars(value)
        parts = [*names.nonlocals.values(), *names.globals.values()]
    else:
        parts = list(getattr(value, "__dict__", {}).values())
    nested = (functools.partial, types.MethodType)
    found = [module for part in parts if isinstance(part, (nn.Module, *nested)) for module in _modules_of(part)]
    return dict.fromkeys(found)
