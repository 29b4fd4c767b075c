"""The cost of a map in forward and backward samples, and the choice of chunk sizes."""

from __future__ import annotations

import gc
import itertools
import random
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
from captum_fusion._passes.call import Call
from captum_fusion._passes.pace import FixedPace, TimedPace, _start, timed_pace
from captum_fusion.functional import live_channels
from tests.networks import Counter, Net, images, make
from tests.test_contract import same


class SomeDead(Net):
    """Three of eight channels are dead for every input, and more for small inputs."""

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


def backward_samples(model: Any) -> list[int]:
    samples: list[int] = []
    model.head.register_full_backward_hook(lambda module, inputs, outputs: samples.append(outputs[0].shape[0]))
    return samples


@pytest.mark.parametrize("chunk", [None, 1, 3, 100])
@pytest.mark.parametrize("cls", [LayerFusionCAM, LayerUnionCAM])
def test_forward_samples_of_a_fusion(model: Any, x: Tensor, cls: Any, chunk: int | None) -> None:
    counted, backward = Counter(model), backward_samples(model)
    cls(counted, model.relu2).attribute(x, [0, 1, 2, 3], perturbations_per_eval=chunk)
    alive = int(live(model, x).sum())
    assert len(set(live(model, x).sum(1).tolist())) > 1, "examples differ in their live channels"
    assert counted.rows == alive + 5 * 4, "clean, baseline, gradient map, region map, union"
    assert backward == [4], "one backward sample per example"


@pytest.mark.parametrize(("weighting", "extra"), [("softmax", 1), ("increase", 2)])
def test_forward_samples_of_score_cam(model: Any, x: Tensor, weighting: str, extra: int) -> None:
    counted, backward = Counter(model), backward_samples(model)
    LayerScoreCAM(counted, model.relu2, weighting=weighting).attribute(x, [0, 1, 2, 3])
    assert counted.rows == int(live(model, x).sum()) + extra * 4
    assert backward == []


def test_components_share_the_pass_and_the_baseline(model: Any, x: Tensor) -> None:
    alive = int(live(model, x).sum())
    counted, backward = Counter(model), backward_samples(model)
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
    fusion.attribute(x, 1, gradient_kwargs={"relu_attributions": True})
    assert counted.rows == alive + 5 * 4, "the map is rectified anyway"
    counted.rows = 0
    nested = LayerFusionCAM(
        counted, model.relu2, None, LayerUnionCAM(counted, model.relu2, region_method=region), region
    )
    nested.attribute(x, 1, region_kwargs={"perturbations_per_eval": 2})
    assert counted.rows == 2 * alive + (5 + 3) * 4, "the union itself adds three masked samples"
    assert backward == [4, 4, 4, 4]


def test_no_backward_pass_if_no_component_needs_one(model: Any, x: Tensor) -> None:
    backward = backward_samples(model)
    score = LayerScoreCAM(model, model.relu2)
    LayerFusionCAM(model, model.relu2, None, score, score).attribute(x, 1)
    assert backward == []
    own = {"relu_attributions": True, "attr_dim_summation": False}
    LayerFusionCAM(model, model.relu2).attribute(x, 1, gradient_kwargs=own)
    assert backward == [4], "the backward pass of the component itself"


def test_the_time_of_a_chunk_is_noted_with_its_number_of_samples(x: Tensor) -> None:
    model, noted, clock = make(), list[tuple[int, float]](), itertools.count(100.0, 5.0)

    class Pace(FixedPace):
        def now(self) -> float:
            return next(clock)

        def record(self, samples: int, layout: torch.memory_format, seconds: float) -> None:
            noted.append((samples, seconds))

    owners = torch.arange(4).repeat(3)
    call = Call.checked(model, x, 1)
    pace = Pace(owners, 4, 1, torch.contiguous_format)
    chunks = [len(chunk) for chunk in call.in_chunks(owners, pace, lambda chunk, owners, layout: owners)]
    assert sum(chunks) == 12
    assert len(chunks) > 1
    assert noted == [(size, 5.0) for size in chunks]


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunks_hold_at_most_that_many_samples_per_example(x: Tensor, chunk: int) -> None:
    model, seen = make(), list[Tensor]()

    def forward(given: Tensor, number: Tensor) -> Tensor:
        seen.append(number)
        return model(given)

    LayerFusionCAM(forward, model.relu2).attribute(x, 1, torch.arange(4), perturbations_per_eval=chunk)
    for numbers in seen[1:]:
        assert numbers.bincount().max() <= chunk
    assert max(len(numbers) for numbers in seen) == 4 * chunk, "the limit is reached"


def test_a_chunk_given_by_the_user_repeats_to_the_last_bit(model: Any, x: Tensor) -> None:
    fusion = LayerFusionCAM(model, model.relu2)
    first = fusion.attribute(x, [0, 1, 2, 3], perturbations_per_eval=3)
    assert torch.equal(first, fusion.attribute(x, [0, 1, 2, 3], perturbations_per_eval=3))


def test_masked_samples_are_created_chunk_by_chunk(model: Any, x: Tensor) -> None:
    counted = Counter(model)
    LayerScoreCAM(counted, model.relu2).attribute(x, 1, perturbations_per_eval=1)
    assert counted.largest == 4


# ----------------------------------------------------------------------------------------------------------------- pace


class OutOfMemory(nn.Module):
    """Runs out of memory for more than three samples at a time."""

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
    assert 1 <= small.refused <= 2, "only one size that is too large is tried"
    with pytest.raises(torch.OutOfMemoryError):
        LayerScoreCAM(small, model.conv2).attribute(x, 1, perturbations_per_eval=8)


def drive(pace: Any, seconds: Any, total: int = 400) -> list[tuple[int, torch.memory_format]]:
    """Run a pace against a simulated clock: ``seconds(samples, layout)``."""
    start, calls = 0, []
    while start < total:
        stop, layout = pace.next(start)
        stop = min(stop, total)
        calls.append((stop - start, layout))
        pace.record(stop - start, layout, seconds(stop - start, layout))
        start = stop
    return calls


LAST, PLAIN = torch.channels_last, torch.contiguous_format


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (lambda samples, layout: samples * (1.0 if layout is LAST else 1.2), (1, LAST)),
        (lambda samples, layout: samples * 0.1 + (1.0 if layout is PLAIN else 2.0), (128, PLAIN)),
        (lambda samples, layout: samples * (1.0 + abs(samples - 8) / 8) * (0.9 if layout is LAST else 1.0), (8, LAST)),
    ],
    ids=["single samples", "large chunks", "eight"],
)
def test_the_fastest_chunk_and_layout_are_found(seconds: Any, expected: tuple[int, Any]) -> None:
    pace = TimedPace(torch.zeros(1, 3, 96, 96))
    calls = drive(pace, seconds)
    assert calls[-2] == expected
    assert sum(samples for samples, _ in calls) == 400, "no extra samples are run for timing"


def test_the_search_starts_larger_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**34, 2**36))
    assert _start(torch.device("cuda")) == (64, 2**28)
    assert TimedPace(torch.zeros(1, 3, 8, 8, device="meta")).next(0) == (8, PLAIN)
    assert TimedPace(torch.zeros(1, 3, 4096, 4096, device="meta")).next(0) == (1, PLAIN), "too large for more"
    assert TimedPace(torch.zeros(1, 3, 8, 8)).next(0) == (1, PLAIN)


def test_chunks_stay_small_in_memory() -> None:
    pace = TimedPace(torch.zeros(1, 3, 512, 512))
    largest = max(samples for samples, _ in drive(pace, lambda samples, layout: 1.0))
    assert largest * 3 * 512 * 512 * 4 <= 16 * 2**20


def test_one_disturbed_measurement_does_not_decide() -> None:
    pace, disturbed = TimedPace(torch.zeros(1, 3, 96, 96)), iter([False, True])
    calls = drive(
        pace, lambda n, layout: n * (1.0 if layout is LAST else 1.5) * (3.0 if next(disturbed, False) else 1.0)
    )
    assert calls[-2][1] is LAST


def test_a_layout_that_the_model_refuses_is_dropped() -> None:
    pace = TimedPace(torch.zeros(1, 3, 96, 96))
    pace.record(1, pace.next(0)[1], 1.0)
    assert pace.next(1)[1] is LAST
    assert pace.recover(RuntimeError("view size is not compatible"), 1, LAST)
    assert all(layout is PLAIN for _, layout in drive(pace, lambda samples, layout: 1.0))
    assert not pace.recover(RuntimeError("something else"), 1, PLAIN)


def test_calls_of_one_network_share_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))  # every chunk takes as long, so large ones win
    counted, x = Counter(make()), images(1, 3, 8, 8)
    method = LayerScoreCAM(counted, counted.model.conv2)
    calls = []
    for _ in range(3):
        counted.calls = 0
        method.attribute(x, 1)
        calls.append(counted.calls)
    assert calls[2] <= calls[1] < calls[0]


def test_a_search_belongs_to_a_network_and_a_kind_of_sample() -> None:
    model, x = make(), torch.zeros(1, 3, 8, 8)
    pace = timed_pace(model, x, 1)
    assert timed_pace(model, x.expand(4, -1, -1, -1), 1) is pace, "the batch size is not part of it"
    with torch.autocast("cpu", torch.bfloat16):
        assert timed_pace(model, x, 1) is not pace
    for other in (x.double(), torch.zeros(1, 3, 9, 9)):
        assert timed_pace(model, other, 1) is not pace
    assert timed_pace(model, x, 2) is not pace
    assert timed_pace(model, x, 1, both_layouts=False) is not pace
    assert timed_pace(make(), x, 1) is not pace
    unhashable: Any = type("Unhashable", (), {"__hash__": None})()
    assert timed_pace(unhashable, x, 1) is not timed_pace(unhashable, x, 1)
    assert timed_pace(model, x, 1) is pace
    pace.recover(torch.OutOfMemoryError(), 8, torch.contiguous_format)
    assert timed_pace(model, x, 1) is not pace, "the memory may be free again"
    gone = weakref.ref(timed_pace(model, x, 1))
    del model, pace
    gc.collect()
    assert gone() is None


def test_threads_may_share_a_search() -> None:
    pace = TimedPace(torch.zeros(1, 3, 8, 8))

    def search() -> None:
        for _ in range(300):
            start, layout = pace.next(0)
            pace.record(start, layout, random.random())
            pace._trials = pace._trials or pace._layouts * 2  # it never ends

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            for found in [pool.submit(search) for _ in range(4)]:
                found.result()
    finally:
        sys.setswitchinterval(interval)


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


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("cls", [LayerScoreCAM, LayerAblationCAM, LayerSmoothGradCAMPlusPlus])
def test_chunks_of_large_batches_stay_small_where_nothing_is_timed(cls: Any) -> None:
    counted = Counter(model := make())
    cls(counted, model.conv2).attribute(images(6, 3, 8, 8), 1)
    assert counted.largest <= 8, "the limit is for all examples together"


@pytest.mark.usefixtures("deterministic")
def test_running_out_of_memory_halves_a_chunk_that_is_not_timed() -> None:
    model, x = make(), images(2, 3, 8, 8)
    small = OutOfMemory(model).eval()
    same(LayerScoreCAM(small, model.conv2).attribute(x, 1), LayerScoreCAM(model, model.conv2).attribute(x, 1))
    assert small.refused >= 1


def test_the_clock_is_read_where_nothing_asks_for_repetition(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above could otherwise pass without a clock to read."""
    model, x = make(), images(2, 3, 8, 8)

    def clock() -> float:
        raise InterruptedError

    monkeypatch.setattr("time.perf_counter", clock)
    with pytest.raises(InterruptedError):
        LayerFusionCAM(model, model.relu2).attribute(x, 1)
