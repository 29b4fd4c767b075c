"""On a GPU, every class and metric gives what it gives on the CPU. ``tests/benchmarks/gpu.sh`` runs these tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_fusion import LayerFusionCAM, LayerScoreCAM, functional
from captum_fusion.__main__ import main
from captum_fusion.evaluation import evaluate
from captum_fusion.metrics import adcc, average_drop, average_increase, deletion, insertion, road
from tests.classes import build, chunked
from tests.networks import correlations, images, make

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = torch.device("cuda")
TARGETS = [0, 1, 2]


@pytest.fixture
def x() -> Tensor:
    return images(3, 3, 8, 8)


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions without TF32, which is on by default and rounds to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def same(a: Tensor, b: Tensor) -> None:
    """Equal up to rounding, which the iterations of a super-resolution amplify."""
    torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-3, atol=1e-4)


def test_the_map_of_the_cpu(every_cls: Any, x: Tensor) -> None:
    model, gpu = make(), make().to(DEVICE)
    expected = build(every_cls, model, model.relu2).attribute(x, TARGETS)
    before = torch.cuda.get_rng_state(DEVICE)
    found = build(every_cls, gpu, gpu.relu2).attribute(x.to(DEVICE), TARGETS)
    assert found.is_cuda
    assert found.dtype == expected.dtype
    same(found, expected)
    assert torch.equal(torch.cuda.get_rng_state(DEVICE), before)


def test_data_parallel(every_cls: Any, x: Tensor) -> None:
    gpu = make().to(DEVICE)
    expected = build(every_cls, gpu, gpu.relu2).attribute(x.to(DEVICE), TARGETS)
    same(build(every_cls, nn.DataParallel(gpu), gpu.relu2).attribute(x.to(DEVICE), TARGETS), expected)


def test_channels_last(every_cls: Any, x: Tensor) -> None:
    gpu = make().to(DEVICE)
    expected = build(every_cls, gpu, gpu.relu2).attribute(x.to(DEVICE), TARGETS)
    gpu = gpu.to(memory_format=torch.channels_last)
    found = build(every_cls, gpu, gpu.relu2).attribute(x.to(DEVICE, memory_format=torch.channels_last), TARGETS)
    same(found, expected)


@pytest.mark.parametrize(("dtype", "least"), [(torch.float16, 0.98), (torch.bfloat16, 0.8)], ids=str)
def test_autocast(every_cls: Any, x: Tensor, dtype: torch.dtype, least: float) -> None:
    """The maps of a small network with random weights are nearly flat, so 8 bits show a part of them only."""
    gpu = make().to(DEVICE)
    expected = build(every_cls, gpu, gpu.relu2).attribute(x.to(DEVICE), TARGETS)
    with torch.autocast(DEVICE.type, dtype):
        found = build(every_cls, gpu, gpu.relu2).attribute(x.to(DEVICE), TARGETS)
    assert found.isfinite().all()
    varied = expected.double().flatten(1).std(1) > 0
    assert torch.equal(found.double().flatten(1).std(1) > 0, varied)
    assert min(correlations(found[varied], expected[varied]), default=1.0) > least


def test_a_chunk_size_changes_nothing(every_cls: Any, x: Tensor) -> None:
    gpu, limit = make().to(DEVICE), chunked(every_cls, 3)
    if not limit:
        pytest.skip("runs no samples in chunks")
    expected = build(every_cls, gpu, gpu.relu2).attribute(x.to(DEVICE), TARGETS)
    same(build(every_cls, gpu, gpu.relu2).attribute(x.to(DEVICE), TARGETS, **limit), expected)


@pytest.mark.parametrize("preset", [LayerFusionCAM.fast, LayerFusionCAM.best])
def test_presets(preset: Any, x: Tensor) -> None:
    model, gpu = make(), make().to(DEVICE)
    expected = preset(model, model.relu2).attribute(x, TARGETS)
    same(preset(gpu, gpu.relu2).attribute(x.to(DEVICE), TARGETS), expected)


@pytest.mark.parametrize("metric", [average_drop, average_increase, insertion, deletion, road])
def test_metrics(metric: Callable[..., Any], x: Tensor) -> None:
    model, gpu = make(), make().to(DEVICE)
    maps = functional.normalize(images(3, 1, 8, 8, seed=3))
    expected = metric(model, x, maps, TARGETS)
    found = metric(gpu, x.to(DEVICE), maps.to(DEVICE), TARGETS)
    parts = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    for a, b in parts:
        same(a, b)


def test_adcc(x: Tensor) -> None:
    model, gpu = make(), make().to(DEVICE)
    maps = functional.normalize(images(3, 1, 8, 8, seed=3))
    expected = adcc(model, x, maps, TARGETS, explanation_func=LayerScoreCAM(model, model.relu2).attribute)
    explain = LayerScoreCAM(gpu, gpu.relu2).attribute
    for a, b in zip(adcc(gpu, x.to(DEVICE), maps.to(DEVICE), TARGETS, explanation_func=explain), expected, strict=True):
        same(a, b)


def test_evaluation(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"methods": ["fusion-cam", "grad-cam"], "metrics": ["insertion", "average_drop"]}
    tables = []
    for device in ("cpu", str(DEVICE)):
        found = evaluate(
            "digits", "digits", output=tmp_path / device, limit=3, show_progress=False, device=device, **settings
        )
        rows = [row for row in found.rows if row["metric"] in settings["metrics"]]
        tables.append({(row["image"], row["method"], row["metric"]): row["value"] for row in rows})
    assert tables[1] == pytest.approx(tables[0], rel=1e-3, abs=1e-3)


def test_command_line(tmp_path: Path) -> None:
    arguments = ["evaluate", "digits", "--model", "digits", "--methods", "grad-cam", "--metrics", "complexity"]
    main([*arguments, "--limit", "1", "--device", str(DEVICE), "--output", str(tmp_path / "table")])
    assert (tmp_path / "table" / "run.json").is_file()


class Wide(nn.Module):
    """Takes 64 times the memory of its input, so that chunks must be small on a card with little free memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.wide, self.head = nn.Conv2d(3, 64, 3, 4, 1), nn.Conv2d(3, 192, 3, 1, 1), nn.Linear(256, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.conv(x).relu().mean((2, 3)), self.wide(x).relu().mean((2, 3))], 1))


def test_running_out_of_memory() -> None:
    model = make(Wide).to(DEVICE)
    x = images(1, 3, 256, 256).to(DEVICE)
    method = LayerScoreCAM(model, model.conv)
    expected = method.attribute(x, 1, perturbations_per_eval=1)
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info(DEVICE)[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated(DEVICE) + 600 * 2**20) / total)
    try:
        found = method.attribute(x, 1, perturbations_per_eval=None)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    same(found, expected)
