"""The mean of a metric over a stream of batches and over processes, as a metric of torchmetrics."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captum_fusion.metrics.causal import Curve
from captum_fusion.metrics.confidence import ADCC
from captum_fusion.metrics.road import Road

try:
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError("AttributionMetric needs torchmetrics: pip install torchmetrics") from error

#: What counts of the metrics that return more than a tensor.
_PARTS: dict[type, str] = {Curve: "auc", Road: "combined", ADCC: "adcc"}

#: Numbers of the metrics that are made.
_numbers = itertools.count()

#: Options that are those of ``torchmetrics.Metric``.
_OF_TORCHMETRICS = (
    "compute_on_cpu",
    "compute_with_cache",
    "dist_sync_fn",
    "dist_sync_on_step",
    "distributed_available_fn",
    "process_group",
    "sync_on_compute",
)


class AttributionMetric(Metric):
    """The mean of one of this package's metrics over all examples that it is shown, in all processes.

    Args:
        metric (callable): Any function of :mod:`captum_fusion.metrics` that gives a value for each example, or one of
            the user's with such a signature.
        forward_func (callable, optional): The model, for the metrics that take one as their first argument. The metric
            does not own it: it is neither moved, nor saved, nor copied with it.
            Default: None
        part (str, optional): Which part counts of a metric that returns several: ``"coherency"`` of
            :func:`~captum_fusion.metrics.confidence.adcc`, say. The parts must be of shape (N,).
            Default: None (``auc`` of a curve, ``combined`` of ROAD, ``adcc`` of ADCC)
        options (Any): Further keyword arguments of every call of ``metric``, and those of ``torchmetrics.Metric``.

    Raises:
        TypeError: If ``metric`` is not callable, or returns anything but one value for each example.

    Examples::

        >>> from captum_fusion.metrics import average_drop, pointing_game
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(10)).eval()
        >>> drop = AttributionMetric(average_drop, net, score_fn="softmax")
        >>> for _ in range(3):
        ...     drop.update(torch.rand(2, 3, 8, 8), torch.rand(2, 1, 4, 4), target=[3, 7])
        >>> drop.compute().shape
        torch.Size([])
        >>> hits = AttributionMetric(pointing_game, tolerance=0)
        >>> hits.update(torch.tensor([[[[0.0, 1.0]]]]), torch.tensor([[[False, True]]]))
        >>> hits.compute()
        tensor(1., dtype=torch.float64)
    """

    is_differentiable = False
    full_state_update = False
    total: Tensor
    number: Tensor
    identity: Tensor

    def __init__(
        self,
        metric: Callable[..., Any],
        forward_func: Callable[..., Any] | None = None,
        *,
        part: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**{key: options.pop(key) for key in _OF_TORCHMETRICS if key in options})
        if not callable(metric):
            raise TypeError(f"metric must be a function of captum_fusion.metrics, not {type(metric).__name__}")
        if forward_func is not None and not callable(forward_func):
            raise TypeError(f"forward_func must be callable, not {type(forward_func).__name__}")
        self._metric, self._part, self._options = metric, part, options
        self._forward_func = _Held(forward_func)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("number", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        # A MetricCollection takes metrics whose states are equal after the first batch for one and the same.
        self.add_state("identity", torch.tensor(next(_numbers)), dist_reduce_fx="max")

    def update(self, *arguments: Any, **keywords: Any) -> None:
        """Take a batch.

        Args:
            arguments (Any): What ``metric`` takes after ``forward_func``: inputs, attributions, target, ... (for the
                metrics of localization, which take none: attributions, masks, ...).
            keywords (Any): Further arguments for this batch.
        """
        forward_func = self._forward_func.value
        first = () if forward_func is None else (forward_func,)
        values = self._values(self._metric(*first, *arguments, **{**self._options, **keywords}))
        self.total += values.detach().to(self.total).sum()
        self.number += values.numel()

    def _values(self, found: Any) -> Tensor:
        part = self._part or _PARTS.get(type(found))
        if part is not None:
            if not hasattr(found, part):
                raise ValueError(f"part: {type(found).__name__} has no {part!r}")
            found = getattr(found, part)
        if not isinstance(found, Tensor) or found.dim() != 1:
            kind = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise TypeError(f"metric must give a tensor with one value for each example, not {kind}; name its part")
        return found

    def compute(self) -> Tensor:
        """The mean over all examples.

        Returns:
            Tensor: A float64 scalar.

        Raises:
            ValueError: If there has been no example.
        """
        if not self.number:
            raise ValueError("AttributionMetric has not been given any example: call update() first")
        return self.total / self.number


class _Held:
    """A value that its holder's copies share, and that is not one of its modules."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, memo: Any) -> _Held:
        return self
