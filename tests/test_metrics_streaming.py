"""Means over batches and processes."""

from __future__ import annotations

import importlib
import pickle
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn

from captum_fusion import metrics
from captum_fusion.metrics import adcc, average_drop, complexity, confidences, insertion, overall, pointing_game, road
from tests.networks import images, make


def test_without_torchmetrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.delitem(sys.modules, "captum_fusion.metrics.streaming", raising=False)
    monkeypatch.delattr(metrics, "streaming", raising=False)
    fresh = importlib.reload(metrics)
    assert fresh.road is not None
    with pytest.raises(ImportError, match="pip install torchmetrics"):
        fresh.AttributionMetric  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fresh.nothing  # noqa: B018


def metric_of(*arguments: Any, **options: Any) -> Any:
    pytest.importorskip("torchmetrics")
    return metrics.AttributionMetric(*arguments, **options)


def test_the_mean_over_batches() -> None:
    model, x, targets = make(), images(5, 3, 8, 8), torch.tensor([0, 3, 1, 2, 4])
    maps = x.abs()
    metric = metric_of(average_drop, model)
    metric.update(x[:3], maps[:3], targets[:3])
    metric.update(x[3:], maps[3:], target=targets[3:])
    expected = average_drop(model, x, maps, targets).mean()
    assert metric.compute().dtype is torch.float64
    assert float(metric.compute()) == pytest.approx(float(expected), abs=1e-5), "not the mean of the batches' means"
    metric.reset()
    alone = metric(x[:1], maps[:1], targets[:1])
    assert float(alone) == pytest.approx(float(average_drop(model, x[:1], maps[:1], 0)), abs=1e-5)
    metric(x[1:], maps[1:], targets[1:])
    assert float(metric.compute()) == pytest.approx(float(expected), abs=1e-5)
    metric.reset()
    with pytest.warns(UserWarning, match="compute"), pytest.raises(ValueError, match="has no examples yet"):
        metric.compute()


def test_the_network_stays_out_of_it() -> None:
    model = make()
    metric = metric_of(average_drop, model)
    assert list(metric.parameters()) == []
    assert list(metric.children()) == []
    assert metric.state_dict() == {}
    assert metric.clone()._forward_func.value is model
    pickle.loads(pickle.dumps(metric))
    metric.train()
    assert not model.training


@pytest.mark.parametrize(("function", "part"), [(insertion, "auc"), (road, "combined"), (adcc, "adcc")])
def test_metrics_of_several_parts(function: Any, part: str) -> None:
    model, x = make(), images(3, 3, 8, 8)
    method = LayerGradCam(model, model.conv2)
    maps = method.attribute(x, 1).detach()
    options: dict[str, Any] = {"explanation_func": method.attribute} if function is adcc else {}
    metric = metric_of(function, model, **options)
    metric.update(x, maps, 1)
    whole = function(model, x, maps, 1, **options)
    assert float(metric.compute()) == pytest.approx(float(getattr(whole, part).mean()), abs=1e-5)
    if function is adcc:
        other = metric_of(function, model, part="coherency", **options)
        other.update(x, maps, 1)
        assert float(other.compute()) == pytest.approx(float(whole.coherency.mean()), abs=1e-5)


def test_metrics_without_a_network() -> None:
    maps, masks = torch.rand(4, 1, 6, 6), torch.rand(4, 6, 6) > 0.5
    metric = metric_of(pointing_game, tolerance=0)
    metric.update(maps, masks)
    metric.update(maps[:1], masks[:1], tolerance=15)
    expected = torch.cat([pointing_game(maps, masks, tolerance=0), pointing_game(maps[:1], masks[:1])])
    assert float(metric.compute()) == pytest.approx(float(expected.mean()))
    area = metric_of(complexity)
    area.update(maps)
    assert float(area.compute()) == pytest.approx(float(complexity(maps).mean()))


def test_small_numbers_do_not_drown_in_a_long_sum() -> None:
    metric = metric_of(lambda values: values)
    metric.update(torch.tensor([2.0**25]))
    for _ in range(10):
        metric.update(torch.ones(10))
    assert float(metric.compute()) == (2**25 + 100) / 101


def test_collections_of_metrics() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    model, x = make(), images(3, 3, 8, 8)
    both = torchmetrics.MetricCollection(
        {"drop": metric_of(average_drop, model), "all": metric_of(overall, model, steps=3)}
    )
    both.update(x, x.abs(), 1)
    both.update(x, x.abs(), 2)
    found = both.compute()
    for name, function, options in (("drop", average_drop, {}), ("all", overall, {"steps": 3})):
        values = torch.cat([function(model, x, x.abs(), target, **options) for target in (1, 2)])
        assert float(found[name]) == pytest.approx(float(values.mean()), abs=1e-5)


def test_a_collection_keeps_apart_what_is_equal_at_first() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    both = torchmetrics.MetricCollection({"once": metric_of(lambda x: x), "twice": metric_of(lambda x: 2 * x)})
    both.update(torch.zeros(3))
    both.update(torch.ones(3))
    assert {name: float(value) for name, value in both.compute().items()} == {"once": 0.5, "twice": 1.0}


def test_errors() -> None:
    model, x = make(), images(2, 3, 8, 8)
    with pytest.raises(TypeError, match="metric must be a function"):
        metric_of("average_drop", model)
    with pytest.raises(TypeError, match="forward_func must be callable"):
        metric_of(average_drop, 3)
    with pytest.raises(TypeError, match="one value for each example, not tuple"):
        metric_of(confidences, model).update(x, x, 1)
    with pytest.raises(TypeError, match=r"not shape \(2, 5\)"):
        metric_of(insertion, model, part="scores", steps=4).update(x, x, 1)
    with pytest.raises(TypeError, match=r"one value for each example, not shape \(\)"):
        metric_of(lambda values: values.mean()).update(x)  # the mean of a batch has no number of examples
    with pytest.raises(ValueError, match="part: Curve has no 'area'"):
        metric_of(insertion, model, part="area", steps=4).update(x, x, 1)


# --------------------------------------------------------------------------------------------------- two processes


class Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((1, 2, 3)).reshape(-1, 1)


def shares(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    # Imported while a group exists, it would keep the group's threads past destroy_process_group.
    importlib.import_module("torch.distributed.nn.functional")
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    x = images(5, 1, 4, 4).abs()
    metric = metrics.AttributionMetric(average_drop, Sum().eval(), score_fn="identity")
    for start, stop in ((0, 2), (2, 3)) if rank == 0 else ((3, 5),):
        metric.update(x[start:stop], x[start:stop] ** 2, 0)
    torch.save(metric.compute(), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_mean_of_one(tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    if not torch.distributed.is_available():
        pytest.skip("torch without torch.distributed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(shares, (2, port, str(tmp_path)), nprocs=2)
    x = images(5, 1, 4, 4).abs()
    expected = float(average_drop(Sum().eval(), x, x**2, 0, score_fn="identity").mean())
    for rank in range(2):
        assert float(torch.load(tmp_path / f"{rank}.pt")) == pytest.approx(expected, abs=1e-6)
