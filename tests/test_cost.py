"""What a map costs: rows of the network, and how the chunks that they run in are found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_fusion import (
    LayerAblationCAM,
    LayerFusionCAM,
    LayerScoreCAM,
    LayerSmoothGradCAMPlusPlus,
    LayerUnionCAM,
)
from captum_fusion._passes.pace import TimedPace
from captum_fusion.functional import live_channels
from tests.networks import Counter, Net, images, make
from tests.test_contract import same


class SomeDead(Net):
    """Of eight channels three are dead for every input, and further ones for small inputs."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.conv2.weight[[0, 3, 5]] = 0
            self.conv1.bias.zero_()
            self.conv2.bias.fill_(-0.05)


@pytest.fixture
def model() -> Any:
    return make(SomeDead)


@pytest.fixture
def x() -> Tensor:
    return images(4, 3, 8, 8) * torch.tensor([1.0, 0.1, 1.0, 0.2]).reshape(4, 1, 1, 1)


def live(model: Any, x: Tensor) -> Tensor:
    return live_channels(model.relu2(model.conv2(model.relu1(model.conv1(x)))).detach())


def backward_rows(model: Any) -> list[int]:
    rows: list[int] = []
    model.head.register_full_backward_hook(lambda module, given, found: rows.append(found[0].shape[0]))
    return rows


@pytest.mark.parametrize("chunk", [None, 1, 3, 100])
@pytest.mark.parametrize("cls", [LayerFusionCAM, LayerUnionCAM])
def test_rows_of_a_fusion(model: Any, x: Tensor, cls: Any, chunk: int | None) -> None:
    counted, backward = Counter(model), backward_rows(model)
    cls(counted, model.relu2).attribute(x, [0, 1, 2, 3], perturbations_per_eval=chunk)
    alive = int(live(model, x).sum())
    assert len(set(live(model, x).sum(1).tolist())) > 1, "examples differ in their live channels"
    assert counted.rows == alive + 5 * 4, "clean, baseline, gradient map, region map, union"
    assert backward == [4], "one backward row for each example"


@pytest.mark.parametrize(("weighting", "extra"), [("softmax", 1), ("increase", 2)])
def test_rows_of_score_cam(model: Any, x: Tensor, weighting: str, extra: int) -> None:
    counted, backward = Counter(model), backward_rows(model)
    LayerScoreCAM(counted, model.relu2, weighting=weighting).attribute(x, [0, 1, 2, 3])
    assert counted.rows == int(live(model, x).sum()) + extra * 4
    assert backward == []


def test_components_share_the_pass_and_the_baseline(model: Any, x: Tensor) -> None:
    alive = int(live(model, x).sum())
    counted, backward = Counter(model), backward_rows(model)
    region = LayerScoreCAM(counted, model.relu2, weighting="increase")
    fusion = LayerFusionCAM(counted, model.relu2, region_method=region)
    fusion.attribute(x, 1)
    assert counted.rows == alive + 5 * 4
    counted.rows = 0
    LayerFusionCAM(counted, model.relu2, region_method=region).attribute(
        x, 1, gradient_kwargs={"attr_dim_summation": True}, region_kwargs={"perturbations_per_eval": 3}
    )
    assert counted.rows == alive + 5 * 4
    counted.rows = 0
    nested = LayerFusionCAM(
        counted, model.relu2, None, LayerUnionCAM(counted, model.relu2, region_method=region), region
    )
    nested.attribute(x, 1, region_kwargs={"perturbations_per_eval": 2})
    assert counted.rows == 2 * alive + (5 + 3) * 4, "the union's own three masked rows, no second clean or baseline"
    assert backward == [4, 4, 4]


def test_no_backward_pass_where_no_component_needs_one(model: Any, x: Tensor) -> None:
    backward = backward_rows(model)
    score = LayerScoreCAM(model, model.relu2)
    LayerFusionCAM(model, model.relu2, None, score, score).attribute(x, 1)
    assert backward == []
    own = {"relu_attributions": True, "attr_dim_summation": False}
    LayerFusionCAM(model, model.relu2).attribute(x, 1, gradient_kwargs=own)
    assert backward == [4], "the component's own"


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunks_hold_at_most_that_many_rows_per_example(x: Tensor, chunk: int) -> None:
    model, seen = make(), list[Tensor]()

    def forward(given: Tensor, number: Tensor) -> Tensor:
        seen.append(number)
        return model(given)

    LayerFusionCAM(forward, model.relu2).attribute(x, 1, torch.arange(4), perturbations_per_eval=chunk)
    for numbers in seen[1:]:
        assert numbers.bincount().max() <= chunk
    assert max(len(numbers) for numbers in seen) == 4 * chunk, "and as many, where there are"


def test_a_chunk_given_by_the_user_repeats_to_the_last_digit(model: Any, x: Tensor) -> None:
    fusion = LayerFusionCAM(model, model.relu2)
    first = fusion.attribute(x, [0, 1, 2, 3], perturbations_per_eval=3)
    assert torch.equal(first, fusion.attribute(x, [0, 1, 2, 3], perturbations_per_eval=3))


def test_masked_rows_are_made_a_chunk_at_a_time(model: Any, x: Tensor) -> None:
    counted = Counter(model)
    LayerScoreCAM(counted, model.relu2).attribute(x, 1, perturbations_per_eval=1)
    assert counted.largest == 4


# ---------------------------------------------------------------------------------------------------------------- pace


class OutOfMemory(nn.Module):
    """Cannot take more than three rows at a time."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.refused = inner, 0

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 3:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory (in this test)")
        return self.inner(x)


def test_running_out_of_memory_halves_the_chunk() -> None:
    model, x = make(), images(2, 3, 8, 8)
    small = OutOfMemory(model).eval()
    same(LayerScoreCAM(small, model.conv2).attribute(x, 1), LayerScoreCAM(model, model.conv2).attribute(x, 1))
    assert 1 <= small.refused <= 2, "one size too large is tried, no more"
    with pytest.raises(torch.OutOfMemoryError):
        LayerScoreCAM(small, model.conv2).attribute(x, 1, perturbations_per_eval=8)


def drive(pace: Any, seconds: Any, rows: int = 400) -> list[tuple[int, torch.memory_format]]:
    """Run a pace against a made-up clock: ``seconds(rows, layout)``."""
    start, calls = 0, []
    while start < rows:
        stop, layout = pace.next(start)
        stop = min(stop, rows)
        calls.append((stop - start, layout))
        pace.record(stop - start, layout, seconds(stop - start, layout))
        start = stop
    return calls


LAST, PLAIN = torch.channels_last, torch.contiguous_format


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (lambda rows, layout: rows * (1.0 if layout is LAST else 1.2), (1, LAST)),
        (lambda rows, layout: rows * 0.1 + (1.0 if layout is PLAIN else 2.0), (128, PLAIN)),
        (lambda rows, layout: rows * (1.0 + abs(rows - 8) / 8) * (0.9 if layout is LAST else 1.0), (8, LAST)),
    ],
    ids=["single rows", "large chunks", "eight"],
)
def test_the_fastest_chunk_and_layout_are_found(seconds: Any, expected: tuple[int, Any]) -> None:
    pace = TimedPace(torch.zeros(1, 3, 96, 96))
    calls = drive(pace, seconds)
    assert calls[-2] == expected
    assert sum(rows for rows, _ in calls) == 400, "every row that is timed is one that is needed"


def test_chunks_stay_small_in_memory() -> None:
    pace = TimedPace(torch.zeros(1, 3, 512, 512))
    largest = max(rows for rows, _ in drive(pace, lambda rows, layout: 1.0))
    assert largest * 3 * 512 * 512 * 4 <= 16 * 2**20


def test_a_layout_that_the_model_refuses_is_dropped() -> None:
    pace = TimedPace(torch.zeros(1, 3, 96, 96))
    pace.record(1, pace.next(0)[1], 1.0)
    assert pace.next(1)[1] is LAST
    assert pace.recover(RuntimeError("view size is not compatible"), 1, LAST)
    assert all(layout is PLAIN for _, layout in drive(pace, lambda rows, layout: 1.0))
    assert not pace.recover(RuntimeError("something else"), 1, PLAIN)


@pytest.mark.parametrize("how", ["deterministic", "given"])
@pytest.mark.parametrize("cls", [LayerFusionCAM, LayerAblationCAM, LayerSmoothGradCAMPlusPlus])
def test_nothing_is_timed_where_results_must_repeat(cls: Any, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def clock() -> float:
        raise AssertionError("the clock was read")

    model, x = make(), images(2, 3, 8, 8)
    options = {"perturbations_per_eval": 3} if how == "given" else {}
    expected = cls(model, model.relu2).attribute(x, 1)
    monkeypatch.setattr("time.perf_counter", clock)
    torch.use_deterministic_algorithms(how == "deterministic")
    try:
        first, second = (cls(model, model.relu2).attribute(x, 1, **options) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-5)


def test_the_clock_is_read_where_nothing_asks_for_repetition(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above could otherwise pass without a clock to read."""
    model, x = make(), images(2, 3, 8, 8)

    def clock() -> float:
        raise InterruptedError

    monkeypatch.setattr("time.perf_counter", clock)
    with pytest.raises(InterruptedError):
        LayerFusionCAM(model, model.relu2).attribute(x, 1)
