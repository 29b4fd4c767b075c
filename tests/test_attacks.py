"""What broke, or gave wrong numbers in silence, when the package was attacked."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients
from torch import Tensor

from captum_fusion import (
    GuidedFusionCAM,
    LayerAblationCAM,
    LayerFusionCAM,
    LayerHiResCAM,
    LayerReciproCAM,
    LayerScoreCAM,
    LayerUnionCAM,
    layers,
    metrics,
    shared_work,
)
from tests.classes import CLASSES, EVERY_CLASS, build, chunked, options
from tests.networks import FlatHead, Net, Views, hooks_on, images, make


def same(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- shared work


class Scaled(Net):
    """Takes a dict or an array as a further argument."""

    def forward(self, x: Tensor, scale: Any = None) -> Tensor:
        factor = scale["by"] if isinstance(scale, dict) else torch.as_tensor(scale)
        return super().forward(x) * factor.to(x)


@pytest.mark.parametrize("value", [{"by": torch.arange(5.0)}, np.arange(5.0)])
def test_shared_work_sees_changes_of_arguments(value: Any) -> None:
    model, x = make(Scaled), images(2, 3, 8, 8)
    method = LayerScoreCAM(model, model.conv2)
    with shared_work() as saved:
        first = method.attribute(x, 3, additional_forward_args=value)
        method.attribute(x, 3, additional_forward_args=value)
        assert saved.forward_samples > 0, "equal arguments share"
        inside = value["by"] if isinstance(value, dict) else value
        inside[3] = -7.0
        changed = method.attribute(x, 3, additional_forward_args=value)
    same(changed, method.attribute(x, 3, additional_forward_args=value))
    assert (first - changed).abs().max() > 1e-3


def test_shared_work_does_not_share_for_objects_that_it_cannot_compare() -> None:
    class Box:
        by = torch.ones(5)

    class Boxed(Net):
        def forward(self, x: Tensor, box: Any = None) -> Tensor:
            return super().forward(x) * box.by

    model, x, box = make(Boxed), images(2, 3, 8, 8), Box()
    with shared_work() as saved:
        LayerScoreCAM(model, model.conv2).attribute(x, 3, additional_forward_args=(box,))
        LayerScoreCAM(model, model.conv2).attribute(x, 3, additional_forward_args=(box,))
    assert saved.forward_samples == 0


@pytest.mark.parametrize("which", ["input", "weight", "buffer"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_shared_work_sees_changes_through_data(which: str, layout: torch.memory_format) -> None:
    model, x = make().to(memory_format=layout), images(2, 3, 8, 8)
    model.register_buffer("unused", torch.zeros(3))
    tensor = {"input": x, "weight": model.conv1.weight, "buffer": model.unused}[which]
    method = LayerScoreCAM(model, model.conv2)
    with shared_work() as saved:
        method.attribute(x, 1)
        tensor.data.add_(1.0)
        changed = method.attribute(x, 1)
        assert saved.forward_samples == 0
        method.attribute(x.clone(), 1)
        assert saved.forward_samples > 0, "an equal input shares"
    same(changed, method.attribute(x, 1))


# ----------------------------------------------------------------------------------------------------------- threads


def test_two_threads_explain_one_network() -> None:
    """Hooks of one thread must not fire in the passes of another."""
    model, x = make(FlatHead, seed=2), images(4, 3, 8, 8)
    methods: list[Any] = [
        LayerAblationCAM(model, model.relu2),
        LayerReciproCAM(model, model.relu1),
        LayerFusionCAM(model, model.relu2),
        LayerHiResCAM(model, model.conv1),
        GuidedFusionCAM(model, model.relu2),
        LayerFusionCAM(model, model.relu2, gradient_method=IntegratedGradients(model)),
    ]
    expected = [method.attribute(x, [0, 1, 2, 3]) for method in methods]
    problems: list[Any] = []

    def work(start: int) -> None:
        for turn in range(18):
            which = (start + turn) % len(methods)
            try:
                same(methods[which].attribute(x, [0, 1, 2, 3]), expected[which])
            except BaseException as error:
                problems.append((type(methods[which]).__name__, error))

    threads = [threading.Thread(target=work, args=(start,)) for start in (0, 2, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert hooks_on(model) == 0


# ---------------------------------------------------------------------------------------------------------- in place


class ChangesItsInput(FlatHead):
    """Normalises its input in place, as many preprocessing layers do."""

    def forward(self, x: Tensor, scale: Tensor | None = None, power: int = 1) -> Tensor:
        y = super().forward(x.mul_(0.5).add_(0.25))
        return y if scale is None else y * scale.mul_(2.0)


class Untouched(FlatHead):
    def forward(self, x: Tensor, scale: Tensor | None = None, power: int = 1) -> Tensor:
        y = super().forward(x * 0.5 + 0.25)
        return y if scale is None else y * (scale * 2.0)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_network_that_changes_its_input_in_place(cls: Any) -> None:
    changing, usual, x = make(ChangesItsInput), make(Untouched), images(2, 3, 8, 8)
    before, scale = x.clone(), torch.tensor([[1.0] * 5, [2.0] * 5])
    arguments: Any = (x, [1, 2], scale)
    same(cls(changing, changing.relu2).attribute(*arguments), cls(usual, usual.relu2).attribute(*arguments))
    assert torch.equal(x, before)
    assert scale.tolist() == [[1.0] * 5, [2.0] * 5]


def test_a_network_that_changes_its_input_in_place_shows_its_layers() -> None:
    model, x = make(ChangesItsInput), images(1, 3, 8, 8)
    before = x.clone()
    assert layers.default_layer(model, x)[0] == "conv2"
    assert torch.equal(x, before)


def test_metrics_of_a_network_that_changes_its_input_in_place() -> None:
    changing, usual, x = make(ChangesItsInput), make(Untouched), images(2, 3, 8, 8)
    before, maps = x.clone(), torch.rand(2, 1, 8, 8)

    def explain(inputs: Tensor, target: Any = None) -> Tensor:
        return inputs.abs().sum(1, keepdim=True)

    measured: list[Callable[[Any], Tensor]] = [
        lambda model: metrics.average_drop(model, x, maps, 1),
        lambda model: metrics.insertion(model, x, maps, 1, steps=4).scores,
        lambda model: metrics.deletion(model, x, maps, 1, steps=4).scores,
        lambda model: metrics.road(model, x, maps, 1, percentiles=[30], noise=0.0).morf,
        lambda model: metrics.adcc(model, x, maps, 1, explanation_func=explain).adcc,
    ]
    for measure in measured:
        same(measure(changing), measure(usual))
        assert torch.equal(x, before)


@pytest.mark.parametrize("cls", CLASSES)
def test_the_first_layers_input_is_left_without_gradient(cls: Any) -> None:
    model, x = make(FlatHead), images(2, 3, 8, 8)
    cls(model, model.conv1).attribute(x, 1, attribute_to_layer_input=True)
    assert not x.requires_grad
    assert x.grad is None


# --------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    "target", [-1, [np.int64(-1)] * 2, [-1, -1], torch.tensor([-1, -1]), torch.tensor(-1), (-1,), [(-1,), (-1,)]]
)
def test_negative_targets_are_refused_in_every_form(target: Any) -> None:
    model, x = make(), images(2, 3, 8, 8)
    for call in (
        LayerUnionCAM(model, model.conv2).attribute,
        LayerScoreCAM(model, model.conv2).attribute,
        lambda x, target: metrics.average_drop(model, x, torch.rand(2, 1, 8, 8), target),
    ):
        with pytest.raises(AssertionError, match="Target must not be negative"):
            call(x, target)


def test_complexity_refuses_maps_without_a_channel_dimension() -> None:
    with pytest.raises(ValueError, match=r"must be of shape \(N, channels, \*spatial\), not \(2, 8, 9\)"):
        metrics.complexity(torch.rand(2, 8, 9))
    for shape in ((2, 9), (2, 1, 2, 2, 2, 2)):
        with pytest.raises(ValueError, match="must be of shape"):
            metrics.complexity(torch.rand(shape))
    assert metrics.complexity(torch.rand(2, 1, 9)).shape == metrics.complexity(torch.rand(2, 3, 4, 5, 6)).shape == (2,)


class FailsOnce(Views):
    """Raises at one call; its message may speak of the layout."""

    at, calls, message = 5, 0, "the network failed"

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise RuntimeError(self.message)
        return super().forward(x.contiguous())


@pytest.mark.parametrize("at", range(1, 6))
def test_an_error_of_the_network_is_not_retried_in_silence(at: int) -> None:
    model, x = make(FailsOnce), images(1, 3, 8, 8)
    model.at = at
    with pytest.raises(RuntimeError, match="the network failed"):
        LayerScoreCAM(model, model.conv2).attribute(x, 1)
    assert model.calls == at
    assert hooks_on(model) == 0


def test_an_error_about_the_layout_is_retried_in_the_other_layout() -> None:
    model, x = make(Views), images(1, 3, 8, 8)
    assert LayerScoreCAM(model, model.conv2).attribute(x, 1).isfinite().all()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("cls", [LayerScoreCAM, LayerAblationCAM, LayerFusionCAM])
def test_a_model_that_was_compiled_and_run_before(cls: Any, in_place: bool) -> None:
    """Compiled code ignores hooks that are added later; the passes that need hooks run without it."""
    plain, model, x = make(), make(), images(2, 3, 8, 8)
    compiled: Any = model if in_place else torch.compile(model, backend="eager")
    if in_place:
        model.compile(backend="eager")
    with torch.no_grad():
        compiled(x)
    same(cls(compiled, model.conv2).attribute(x, 1), cls(plain, plain.conv2).attribute(x, 1))
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------ default dtype


@pytest.mark.parametrize("cls", [cls for cls in EVERY_CLASS if options(cls, seed=0)])
def test_random_draws_do_not_depend_on_the_default_dtype(cls: Any) -> None:
    model, x = make(FlatHead), images(2, 3, 8, 8)
    method, at_a_time = build(cls, model, model.relu2), chunked(cls, 4)
    expected = method.attribute(x, [1, 2], **at_a_time)
    torch.set_default_dtype(torch.float64)
    try:
        same(build(cls, model, model.relu2).attribute(x, [1, 2], **at_a_time), expected)
    finally:
        torch.set_default_dtype(torch.float32)
