"""Sharing of passes between calls of ``attribute``."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import types
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from captum_fusion._passes.pace import now

Result = TypeVar("Result")


@dataclass
class SavedWork:
    """Work saved by sharing within :func:`shared_work`.

    Attributes:
        forward_samples: Number of forward samples saved.
        backward_samples: Number of backward samples saved.
        seconds: Time that these samples took in the call that ran them.
    """

    forward_samples: int = 0
    backward_samples: int = 0
    seconds: float = 0.0


class WorkCache:
    """Results shared by the calls within one :func:`shared_work` block."""

    #: Maximum number of elements of the outputs that are kept (128 MiB in float32).
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
        """Return the result cached under ``key``, or compute and cache it.

        Args:
            key (Hashable): Everything that the result depends on, see :meth:`key`.
            compute (callable): Function without arguments that computes the result.
            device (torch.device): Device of the computation, synchronised for timing.
            samples (int): Number of forward samples of ``compute``.
            backward (bool): Whether ``compute`` takes the same number of backward samples. Default: False
            without_backward (Hashable): Second key, for callers that need the result without its backward samples.
                Default: None
        """
        if key in self._results:
            known: Result
            known, cost = self._results[key]
            self.saved.forward_samples += cost.forward_samples
            self.saved.backward_samples += cost.backward_samples
            self.saved.seconds += cost.seconds
            return known
        start = now(device)
        result = compute()
        seconds = now(device) - start
        self._results[key] = result, SavedWork(samples, samples if backward else 0, seconds)
        if without_backward is not None:
            self._results.setdefault(without_backward, (result, SavedWork(samples, 0, seconds)))
        return result

    def key(self, value: Any) -> Hashable:
        """Convert a value to a part of a key: data (see :func:`is_data`) by content, other objects by identity.

        Objects are kept alive, so that their identities remain unique.
        """
        if value is None or isinstance(value, (*_PLAIN, type)):
            return value
        if isinstance(value, (tuple, list)):
            return tuple(self.key(item) for item in value)
        if isinstance(value, dict):
            return "dict", tuple((self.key(name), self.key(item)) for name, item in value.items())
        if isinstance(value, np.ndarray) and is_data(value):
            return "array", value.shape, str(value.dtype), _digest(value.tobytes())
        if isinstance(value, Tensor) and is_data(value):
            content = _digest(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            return "tensor", tuple(value.shape), value.dtype, value.device, value.requires_grad, content
        self._alive[id(value)] = value
        return id(value)

    def key_of_weights(self, weights: list[Tensor]) -> Hashable:
        """The key of a network's parameters and buffers: their identities, versions and samples of their values."""
        self._alive.update((id(tensor), tensor) for tensor in weights)
        parts: dict[torch.device, list[Tensor]] = {}
        for tensor in weights:
            # In the order of memory, so that a dense tensor of any layout is not copied.
            strides = tensor.stride()
            flat = (
                tensor.detach().permute(sorted(range(tensor.dim()), key=strides.__getitem__, reverse=True)).reshape(-1)
            )
            step = max(1, flat.numel() // _SAMPLED)
            parts.setdefault(tensor.device, []).append(flat[::step].contiguous().view(torch.uint8))
        values = b"".join(torch.cat(of_device).cpu().numpy().tobytes() for of_device in parts.values())
        return tuple((id(tensor), tensor._version, tensor.data_ptr()) for tensor in weights), _digest(values)


#: Values that are compared by their value.
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)

#: At least so many values of each parameter are compared, to detect changes through ``tensor.data``.
_SAMPLED = 1024


def is_data(value: Any) -> bool:
    """Whether a value consists of numbers, texts, arrays and tensors only, so that it can be compared by content."""
    if isinstance(value, (tuple, list)):
        return all(map(is_data, value))
    if isinstance(value, dict):
        return all(is_data(name) and is_data(item) for name, item in value.items())
    if isinstance(value, np.ndarray):
        return not value.dtype.hasobject
    if isinstance(value, Tensor):
        return value.layout == torch.strided and not value.is_meta and not value.is_quantized
    return value is None or isinstance(value, _PLAIN)


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


_CACHE: ContextVar[WorkCache | None] = ContextVar("captum_fusion_shared_work", default=None)


def current_cache() -> WorkCache | None:
    """The cache of the current :func:`shared_work` block, if any."""
    return _CACHE.get()


@contextlib.contextmanager
def shared_work() -> Iterator[SavedWork]:
    """Let calls of ``attribute`` on the same inputs share their passes through the network.

    Within the block, layer passes, baseline samples, and the masked samples of Score-CAM, SS-CAM and IS-CAM run once.
    The masks of these methods do not depend on the target, so their samples are shared between targets, and between the
    methods on their own and inside fusions. Passes are shared between calls with the same network and equal inputs,
    arguments and baselines; of weights a change of any tensor is detected (through ``tensor.data``: of most of its
    values). Do not change anything else within the block: new hooks, other attributes of a module, and other values of
    variables that ``forward_func`` uses are not detected. Nothing is shared for networks in train mode, if no module
    that ``forward_func`` calls is found, or if the arguments are other objects than numbers, texts, arrays, tensors and
    containers of these.
    The outputs of masked samples are kept until the end of the block, up to 128 MiB per method.

    Yields:
        SavedWork: The work saved by sharing.

    Examples::

        >>> from captum_fusion import LayerFusionCAM, LayerScoreCAM, shared_work
        >>> from captum_fusion.demo import digits
        >>> model, scene = digits.load_model(), digits.load_scenes()[0]
        >>> image = digits.preprocess(scene.image)
        >>> with shared_work() as saved:
        ...     fused = LayerFusionCAM(model, model.stage4).attribute(image, scene.labels[0])
        ...     other = LayerFusionCAM(model, model.stage4).attribute(image, scene.labels[1])
        ...     region = LayerScoreCAM(model, model.stage4).attribute(image, scene.labels[0])  # takes no new samples
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
    """Parameters and buffers of the modules that a function calls; None if they are unknown, or not comparable yet."""
    modules = list(dict.fromkeys(_modules_of(forward_func, set())))
    if not modules:
        return None
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    comparable = all(not is_lazy(tensor) and not tensor.is_inference() and is_data(tensor) for tensor in tensors)
    return tensors if comparable else None


def _modules_of(value: Any, seen: set[int]) -> Iterator[nn.Module]:
    """The modules that a callable is, is bound to or refers to, directly or through functions and containers."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        yield value
        return
    nested = (nn.Module, functools.partial, types.MethodType, types.FunctionType, list, tuple, dict)
    for part in _parts_of(value):
        if isinstance(part, nested):
            yield from _modules_of(part, seen)
        else:  # of other objects, such as a trainer, only the modules that are their attributes
            yield from (held for held in getattr(part, "__dict__", {}).values() if isinstance(held, nn.Module))


def _parts_of(value: Any) -> Iterable[Any]:
    """The objects that a callable or a container holds."""
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.MethodType):
        return [value.__self__, *getattr(value.__self__, "__dict__", {}).values()]
    if isinstance(value, types.FunctionType):
        try:
            names = inspect.getclosurevars(value)
        except ValueError:  # an enclosed variable has no value
            return []
        return [*names.nonlocals.values(), *names.globals.values()]
    if isinstance(value, (list, tuple)):
        return value
    return list((value if isinstance(value, dict) else getattr(value, "__dict__", {})).values())
