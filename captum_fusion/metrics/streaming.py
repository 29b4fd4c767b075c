"""The mean of a metric over batches and processes, as a metric of torchmetrics."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captum_fusion.metrics.causal import Curve
from captum_fusion.metrics.coherency import ADCC
from captum_fusion.metrics.road import Road

try:
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError("AttributionMetric needs torchmetrics: pip install torchmetrics") from error

#: The part of each result with several parts whose mean is taken.
_PARTS: dict[type, str] = {Curve: "auc", Road: "combined", ADCC: "adcc"}

#: A number for each instance.
_numbers = itertools.count()

#: The options of ``torchmetrics.Metric``.
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
    """The mean of one of this package's metrics over all examples of all batches and processes.

    Args:
        metric (callable): Any function of :mod:`captum_fusion.metrics` that returns a value for each example, or a
            function of your own that does.
        forward_func (callable, optional): The model, for metrics that take it as their first argument. It is not moved,
            saved or copied with the metric.
            Default: None
        part (str, optional): The part to average of a metric that returns several, such as ``"coherency"`` of
            :func:`~captum_fusion.metrics.coherency.adcc`. It must be of shape (N,).
            Default: None (``auc`` of a curve, ``combined`` of ROAD, ``adcc`` of ADCC)
        options (Any): Further keyword arguments for every call of ``metric``, and those of ``torchmetrics.Metric``.

    Raises:
        TypeError: If ``metric`` is not callable, or does not return one value for each example.
        ValueError: If the metric's result has no such ``part``.

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
        # A MetricCollection merges metrics whose states are equal after the first batch, so no two may be.
        self.add_state("identity", torch.tensor(next(_numbers)), dist_reduce_fx="max")

    def update(self, *arguments: Any, **keywords: Any) -> None:
        """Add a batch.

        Args:
            arguments (Any): The arguments of ``metric`` after ``forward_func``: inputs, attributions, target, ... for
                most metrics; attributions, masks, ... for localization metrics.
            keywords (Any): Further keyword arguments for this batch.
        """
        forward_func = self._forward_func.value
        first = () if forward_func is None else (forward_func,)
        values = self._values(self._metric(*first, *arguments, **{**self._options, **keywords}))
        self.total += values.detach().to(self.total).sum()
        self.number += values.numel()

    def _values(self, result: object) -> Tensor:
        part = self._part or _PARTS.get(type(result))
        if part is not None:
            if not hasattr(result, part):
                raise ValueError(f"part: {type(result).__name__} has no {part!r}")
            result = getattr(result, part)
        if not isinstance(result, Tensor) or result.dim() != 1:
            kind = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise TypeError(f"metric must return a tensor with one value for each example, not {kind}; give part=")
        return result

    def compute(self) -> Tensor:
        """The mean over all examples.

        Returns:
            Tensor: A float64 scalar.

        Raises:
            ValueError: If no example has been added.
        """
        if not self.number:
            raise ValueError("AttributionMetric has no examples yet: call update() first")
        return self.total / self.number


class _Held:
    """A value that copies of its owner share, and that torch does not register as a submodule."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, memo: Any) -> _Held:
        return self
