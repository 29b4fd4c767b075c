"""Sharing between targets and methods: lower cost, and the same maps."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_fusion import (
    RISE,
    GuidedFusionCAM,
    LayerFusionCAM,
    LayerISCAM,
    LayerScoreCAM,
    LayerSSCAM,
    LayerUnionCAM,
    shared_work,
)
from captum_fusion import functional as formulas
from captum_fusion._passes.sharing import WorkCache
from captum_fusion.attr._bases import LayerTensor
from tests.classes import CLASSES
from tests.networks import Counter, TupleLayer, WithBatchNorm, images, make
from tests.test_contract import same


@pytest.fixture
def x() -> Tensor:
    return images(3, 3, 8, 8)


TARGETS: list[Any] = [1, [0, 3, 2], torch.tensor([4, 4, 1])]


def test_several_targets_equal_separate_calls(cls: Any, x: Tensor) -> None:
    model = make()
    method = cls(model, model.conv2)
    found = method.attribute_targets(x, targets=TARGETS)
    assert len(found) == len(TARGETS)
    for result, target in zip(found, TARGETS, strict=True):
        same(result, method.attribute(x, target))
    for wrong in (3, None, torch.tensor([1, 2])):
        with pytest.raises(TypeError, match="targets must be a list"):
            method.attribute_targets(x, targets=wrong)


@pytest.mark.parametrize("weighting", ["softmax", "increase"])
def test_masked_samples_of_score_cam_run_once(x: Tensor, weighting: str) -> None:
    counted = Counter(model := make())
    method = LayerScoreCAM(counted, model.conv2, weighting=weighting)
    method.attribute_targets(x, targets=TARGETS)
    assert counted.rows == 3 * (1 + 8 + (weighting == "increase")), "clean, eight channels, baseline: once"
    counted.rows = 0
    method.attribute(x, 1)
    method.attribute(x, 1)
    assert counted.rows == 2 * 3 * (1 + 8 + (weighting == "increase")), "nothing is cached between calls"


@pytest.mark.parametrize("cls", [LayerFusionCAM, LayerUnionCAM])
def test_a_fusion_runs_the_masked_samples_of_its_region_map_once(x: Tensor, cls: Any) -> None:
    counted = Counter(model := make())
    cls(counted, model.conv2).attribute_targets(x, targets=TARGETS, perturbations_per_eval=3)
    assert counted.rows == 3 * (8 + 1 + 3 * (1 + 3)), "channels and baseline once; a pass and three maps per target"


@pytest.mark.parametrize("cls", [LayerSSCAM, LayerISCAM])
def test_other_masks_that_do_not_depend_on_the_target(x: Tensor, cls: Any) -> None:
    counted = Counter(model := make())
    method = cls(counted, model.conv2)
    method.attribute_targets(x, targets=TARGETS)
    assert counted.rows == 3 * (1 + 8 * method.copies)
    counted.rows = 0
    with shared_work():
        first = LayerSSCAM(counted, model.conv2, n_samples=2).attribute(x, 1)
        other = LayerSSCAM(counted, model.conv2, n_samples=2, seed=1).attribute(x, 1)
    assert counted.rows == 3 * (1 + 2 * 8 * 2), "another seed has other masks"
    assert not torch.allclose(first, other, atol=1e-6)


def test_methods_share_passes_and_masked_samples(x: Tensor) -> None:
    model = make()
    alone = [cls(model, model.conv2).attribute(x, [0, 3, 1]) for cls in CLASSES]
    counted = Counter(model)
    with shared_work():
        together = [cls(counted, model.conv2).attribute(x, [0, 3, 1]) for cls in CLASSES]
        before = counted.rows
        LayerFusionCAM(counted, model.conv2).attribute(x, [0, 3, 1])
        assert counted.rows == before + 3 * 3, "only the samples masked by its three maps"
    same(together, alone)


def test_components_on_other_layers_and_guided_fusions_share_as_well(x: Tensor) -> None:
    counted = Counter(model := make())
    elsewhere = LayerScoreCAM(counted, model.conv1)
    with shared_work():
        elsewhere.attribute(x, 1)
        before = counted.rows
        LayerFusionCAM(counted, model.conv2, region_method=elsewhere).attribute(x, 1)
        assert counted.rows == before + 3 * (1 + 1 + 3), "a pass at the fusion's layer, the baseline, three maps"
    seen: list[int] = []
    model.head.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    with shared_work():
        LayerFusionCAM(model, model.conv2).attribute(x, 1)
        before = sum(seen)
        GuidedFusionCAM(model, model.conv2).attribute(x, 1)
    assert sum(seen) == before + 3 * (3 + 1), "three maps, and guided backpropagation"


def test_different_calls_share_nothing(x: Tensor) -> None:
    model, other = make(), make(seed=2)
    score = LayerScoreCAM(model, model.conv2, weighting="increase")
    scale = torch.full((3, 1), 2.0)
    variants: list[tuple[Any, Tensor, dict[str, Any]]] = [
        (score, x, {}),
        (score, x, {"baselines": 0.5}),
        (score, x, {"baselines": torch.full((1, 3, 1, 1), 0.25)}),
        (score, x, {"additional_forward_args": scale}),
        (score, x + 1, {}),
        (score, x[:2], {}),
        (LayerScoreCAM(model, model.conv1, weighting="increase"), x, {}),
        (score, x, {"attribute_to_layer_input": True}),
        (LayerScoreCAM(other, other.conv2, weighting="increase"), x, {}),
        (LayerScoreCAM(model, [model.conv1, model.relu2]), x, {}),
    ]
    alone = [method.attribute(given, 1, **kwargs) for method, given, kwargs in variants]
    with shared_work():
        together = [method.attribute(given, 1, **kwargs) for method, given, kwargs in variants]
    same(together, alone)


def test_in_place_changes_of_tensors_are_detected(x: Tensor) -> None:
    model, given, target = make(), x.clone(), torch.tensor([0, 1, 2])
    method = LayerFusionCAM(model, model.conv2)
    with shared_work():
        method.attribute(given, target)
        given += 1
        target += 1
        result = method.attribute(given, target)
    same(result, method.attribute(x + 1, [1, 2, 3]))


def test_wrong_targets_and_failing_networks(x: Tensor) -> None:
    model = make()
    method = LayerScoreCAM(model, model.conv2)
    with shared_work():
        method.attribute(x, 1)
        for wrong in (None, [0, 1], "cat"):
            with pytest.raises(AssertionError):
                method.attribute(x, wrong)
        with pytest.raises(IndexError, match="out of bounds"):
            method.attribute(x, 9)
    failing = Counter(model, fail_at=3)
    with pytest.raises(RuntimeError, match="the network failed"), shared_work():
        LayerScoreCAM(failing, model.conv2).attribute(x, 1)
    counted = Counter(model)
    LayerScoreCAM(counted, model.conv2).attribute(x, 1)
    assert counted.rows == 3 * 9, "nothing is shared after the block"


def test_blocks_within_blocks_and_tuple_layers(x: Tensor) -> None:
    model = make(TupleLayer)
    method = LayerScoreCAM(model, model.branches)
    with shared_work():
        first = method.attribute_targets(x, targets=[1, 2])
        counted_before = first[0]
    same(counted_before, method.attribute(x, 1))
    same(first[1], method.attribute(x, 2))


@pytest.mark.filterwarnings("ignore:the model is in train mode")
def test_networks_in_train_mode_share_nothing(x: Tensor) -> None:
    model = make(WithBatchNorm)
    model.drop.train()
    seen: list[int] = []
    model.conv.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    with shared_work():
        LayerScoreCAM(model, model.norm).attribute(x, 1)
        once = sum(seen)
        LayerScoreCAM(model, model.norm).attribute(x, 1)
    assert sum(seen) == 2 * once


def test_large_outputs_are_not_kept() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x).relu()).repeat(1, 1, 500, 500)

    model, x = make(Dense), images(1, 3, 8, 8)
    seen: list[int] = []
    model.head.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    method = LayerScoreCAM(model, model.conv)
    found = method.attribute_targets(x, targets=[(0, 4, 4), (1, 4, 4)])
    assert sum(seen) == 1 + 2 * 4, "twelve million numbers per sample are not kept, so the samples run again"
    same(found[1], method.attribute(x, (1, 4, 4)))


def test_samples_run_and_saved_add_up_to_the_cost_of_separate_calls(x: Tensor) -> None:
    counted = Counter(model := make())
    methods = [
        LayerScoreCAM(counted, model.conv2),
        LayerFusionCAM(counted, model.conv2),
        LayerUnionCAM(counted, model.conv2),
        LayerScoreCAM(counted, model.conv2, weighting="increase"),
    ]
    alone = []
    for method in methods:
        counted.rows = 0
        method.attribute(x, 1, perturbations_per_eval=2)
        alone.append(counted.rows)
    with shared_work() as saved:
        for method, expected in zip(methods, alone, strict=True):
            counted.rows = saved.forward_samples = 0
            method.attribute(x, 1, perturbations_per_eval=2)
            assert counted.rows + saved.forward_samples == expected, type(method).__name__
            if method is not methods[0]:
                assert counted.rows < expected / 2
        assert saved.seconds > 0
        before = saved.backward_samples
        methods[1].attribute(x, 1, perturbations_per_eval=2)
        assert saved.backward_samples == before + 3, "the backward samples of the shared pass are counted"
    assert alone == [3 * (1 + 8), 3 * (8 + 5), 3 * (8 + 5), 3 * (1 + 8 + 1)]


def test_the_seconds_saved_are_those_that_the_first_run_took(x: Tensor) -> None:
    model = make()
    method = LayerScoreCAM(model, model.conv2)
    with shared_work() as saved:
        start = time.perf_counter()
        method.attribute(x, 1)
        first = time.perf_counter() - start
        assert saved.seconds == 0
        method.attribute(x, 1)
        assert 0 < saved.seconds <= first


@pytest.mark.parametrize(("values", "changed"), [(1024, 1), (4096, 4), (10_000, 9)])
def test_a_run_of_changed_weights_is_noticed(values: int, changed: int) -> None:
    """At least 1024 values of a parameter are compared, evenly spread, even if a change leaves no other trace."""
    weights = [torch.zeros(values)]
    cache = WorkCache()
    before = cache.key_of_weights(weights)
    assert cache.key_of_weights(weights) == before
    for start in (0, values // 3, values // 2 + 1, values - changed - values % changed):
        weights[0].data[start : start + changed] = 1.0
        assert cache.key_of_weights(weights) != before
        weights[0].data.zero_()


class InvertedScoreCAM(LayerScoreCAM):
    """A subclass with its own masks that does not declare what they depend on."""

    power = 1.0

    def _map(self, tensor: LayerTensor) -> Tensor:
        live = formulas.live_channels(tensor.activations)
        examples, channels = formulas.channel_pairs(live)

        def masks(chunk: slice, size: Sequence[int]) -> Tensor:
            maps = tensor.activations[examples[chunk], channels[chunk]].unsqueeze(1)
            return (1 - formulas.normalize(formulas.upsample(maps, size))) ** self.power

        scores = tensor.masked_scores(masks, examples, formulas.score_function("softmax"))
        weights = formulas.channel_table(live, examples, channels, scores)
        return formulas.weighted_activations(tensor.activations, weights)


class PoweredScoreCAM(InvertedScoreCAM):
    """A subclass whose instances share masked samples if their ``power`` is equal."""

    masks_depend_on = ("power",)

    def __init__(self, *args: Any, power: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.power = power


def test_subclasses_with_other_masks_get_their_own_maps(x: Tensor) -> None:
    model = make()
    methods = [
        LayerScoreCAM(model, model.conv2),
        InvertedScoreCAM(model, model.conv2),
        PoweredScoreCAM(model, model.conv2, power=2.0),
        PoweredScoreCAM(model, model.conv2, power=3.0),
    ]
    alone = [method.attribute(x, 1) for method in methods]
    with shared_work() as saved:
        together = [method.attribute(x, 1) for method in methods]
        before = saved.forward_samples
        again = methods[3].attribute(x, 1)
        assert saved.forward_samples - before >= 3 * 8, "equal instances share their samples"
    for first, second in zip(alone, together, strict=True):
        same(first, second)
    same(again, alone[3])
    for first, second in itertools.combinations(alone, 2):
        assert not torch.allclose(first, second)


@pytest.mark.parametrize("change", ["step", "buffer", "state dict"])
def test_weights_that_change_within_the_block(x: Tensor, change: str) -> None:
    model, other = make(WithBatchNorm), make(WithBatchNorm)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    method = LayerFusionCAM(model, model.norm)
    with shared_work():
        first = method.attribute(x, 1)
        if change == "step":
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
            model(x)[:, 1].sum().backward()
            optimizer.step()
        elif change == "buffer":
            model.norm.running_mean.add_(0.5)
        else:
            model.load_state_dict(other.state_dict())
        second = method.attribute(x, 1)
    same(second, method.attribute(x, 1))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("kind", ["lambda", "partial", "method", "global"])
def test_weights_of_a_network_inside_a_function(x: Tensor, kind: str) -> None:
    model = make()
    functions: dict[str, Any] = {
        "lambda": lambda given: model(given),
        "partial": functools.partial(model.__call__),
        "method": model.forward,
        "global": eval("lambda given: network(given)", {"network": model}),
    }
    method = LayerScoreCAM(functions[kind], model.conv2)
    with shared_work() as saved:
        method.attribute(x, 1)
        method.attribute(x, 2)
        assert saved.forward_samples >= 3 * 8, "the network inside the function was found"
        with torch.no_grad():
            model.head.weight.mul_(-1)
        changed = method.attribute(x, 1)
    same(changed, method.attribute(x, 1))


class Extractor:
    """An object that holds a network."""

    def __init__(self, body: Any) -> None:
        self.body = body


@pytest.mark.parametrize("kind", ["function", "list", "dict", "object", "partial"])
def test_weights_of_a_network_in_several_parts(x: Tensor, kind: str) -> None:
    """One part is found at once; changes of the other one, which is not in the closure itself, must be seen as well."""
    model = make()
    body, head = nn.Sequential(model.conv1, model.conv2), nn.Sequential(model.pool, nn.Flatten(), model.head)
    bodies, named, extractor = [body], {"body": body}, Extractor(body)

    def extract(given: Tensor) -> Tensor:
        return body(given)

    functions: dict[str, Any] = {
        "function": lambda given: head(extract(given)),
        "list": lambda given: head(bodies[0](given)),
        "dict": lambda given: head(named["body"](given)),
        "object": lambda given: head(extractor.body(given)),
        "partial": functools.partial(lambda last, given: last(extract(given)), head),
    }
    method = LayerScoreCAM(functions[kind], model.conv2)
    with shared_work() as saved:
        first = method.attribute(x, 1)
        method.attribute(x, 2)
        assert saved.forward_samples >= 3 * 8
        with torch.no_grad():
            model.conv2.weight.mul_(-1)
        changed = method.attribute(x, 1)
    same(changed, method.attribute(x, 1))
    assert not torch.allclose(changed, first)


def test_a_function_whose_network_is_unknown_shares_nothing(x: Tensor) -> None:
    model = make()
    nested = Extractor(Extractor(model))
    method = LayerScoreCAM(lambda given: nested.body.body(given), model.conv2)
    with shared_work() as saved:
        first = method.attribute(x, 1)
        with torch.no_grad():
            model.head.weight.mul_(-1)
        assert not torch.allclose(method.attribute(x, 1), first)
    assert saved.forward_samples == 0


def test_a_function_with_an_enclosed_variable_without_a_value(x: Tensor) -> None:
    model = make()

    def forward(given: Tensor) -> Tensor:
        return model(given) if len(given) else later

    results = LayerScoreCAM(forward, model.conv2).attribute_targets(x, [1, 2])
    later = x
    for result, target in zip(results, [1, 2], strict=True):
        same(result, LayerScoreCAM(model, model.conv2).attribute(x, target))


def test_rise_and_guided_fusion_explain_several_targets(x: Tensor) -> None:
    model = make()
    for method in (RISE(model, n_masks=8), GuidedFusionCAM(model, model.relu2)):
        found = method.attribute_targets(x, targets=[1, 2])
        for result, target in zip(found, (1, 2), strict=True):
            same(result, method.attribute(x, target))


def test_passes_of_another_precision_are_not_shared() -> None:
    model, x = make(), images(2, 3, 8, 8)
    method = LayerScoreCAM(model, model.relu2)
    expected = method.attribute(x, 1)
    with shared_work():
        with torch.autocast("cpu", torch.bfloat16):
            method.attribute(x, 1)
        found = method.attribute(x, 1)
    assert found.dtype is expected.dtype
    same(found, expected)


def test_a_network_whose_lazy_parameters_have_no_shape_yet() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)).eval()
    method, x = LayerScoreCAM(model, model[1]), images(2, 3, 8, 8)
    with shared_work() as saved:
        first = method.attribute(x, 1)
        assert saved.forward_samples == 0
        same(method.attribute(x, 1), first)
        same(method.attribute(x, 1), first)
    assert saved.forward_samples > 0, "once the parameters are known, calls share their passes"
