"""Cascading randomisation: what is randomised, in which order, and what is left alone."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from captum.attr import LayerGradCam, NoiseTunnel, Saliency
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

from captum_fusion import LayerAblationCAM, LayerFusionCAM, LayerLayerCAM, LayerScoreCAM, shared_work
from captum_fusion.metrics import Randomization, cascading_randomization
from captum_fusion.metrics.similarity import pearson, similarity_function, spearman, ssim
from tests.networks import Net, WithBatchNorm, hooks_on, images, make
from tests.test_contract import same


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


class Attention(nn.Module):
    """Tokens of an image through an attention, whose last projection is not called as a module; a shared layer."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.head = nn.Linear(8, 5)
        self.unused = nn.Linear(3, 3)
        self.conv, self.twice = nn.Conv2d(3, 8, 2, stride=2), nn.Conv2d(8, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.conv(x)).relu())
        tokens = x.flatten(2).mT + self.token
        return self.head(self.attention(tokens, tokens, tokens)[0].mean(1))


# --------------------------------------------------------------------------------------------------- the cascade


@pytest.mark.parametrize("kind", [LayerGradCam, LayerFusionCAM])
def test_a_cascade_of_a_small_network(kind: Any) -> None:
    model, x, targets = make(), images(3, 3, 8, 8), [0, 3, 1]
    before, method = weights_of(model), kind(model, model.conv2)
    state = torch.get_rng_state()
    found = cascading_randomization(method, x, targets)
    assert isinstance(found, Randomization)
    assert found.layers == ["head", "conv2", "conv1"]
    assert found.similarities.shape == (4, 3)
    assert found.similarities[0].tolist() == pytest.approx([1, 1, 1])
    assert found.similarities.isfinite().all()
    assert (found.similarities[1:] < 0.999).any(0).all(), "random weights change the map"
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert method.forward_func is model
    assert hooks_on(model) == 0
    same(cascading_randomization(method, x, targets).similarities, found.similarities, 0)
    assert not torch.allclose(cascading_randomization(method, x, targets, seed=1).similarities, found.similarities)
    for i in range(3):
        alone = cascading_randomization(method, x[[i]], targets[i])
        # Of values that are equal up to rounding, either may be the larger one.
        same(alone.similarities[:, 0], found.similarities[:, i], 1e-5 if kind is LayerGradCam else 5e-3)
    with shared_work():
        method.attribute(x, targets)
        same(cascading_randomization(method, x, targets).similarities, found.similarities)
    torch.manual_seed(7)
    same(cascading_randomization(method, x, targets).similarities, found.similarities, 0)


@pytest.mark.parametrize("kind", [LayerScoreCAM, LayerLayerCAM, LayerAblationCAM])
def test_a_cascade_shares_no_work_between_networks(kind: Any) -> None:
    model, x, targets = make(), images(2, 3, 8, 8), [0, 3]
    method = kind(model, model.conv2)
    alone = cascading_randomization(method, x, targets)
    assert (alone.similarities[1:] < 0.999).any(0).all()
    with shared_work() as saved:
        method.attribute(x, targets)
        first = cascading_randomization(method, x, targets)
        assert (saved.forward_samples, saved.backward_samples) == (0, 0), "every step has weights of its own"
        same(first.similarities, alone.similarities)
        same(cascading_randomization(method, x, targets).similarities, alone.similarities)
        method.attribute(x, targets)
        assert saved.forward_samples > 0, "the original network is still known"


def test_noise_tunnels_draw_the_same_noise_for_every_network() -> None:
    model, x = make(), images(2, 3, 8, 8)
    tunnel = NoiseTunnel(LayerGradCam(model, model.conv2))
    options: dict[str, Any] = {"nt_samples": 2, "stdevs": 0.5}
    state = torch.get_rng_state()
    found = cascading_randomization(tunnel, x, 1, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.layers == ["head", "conv2", "conv1"]
    assert found.similarities[0].tolist() == pytest.approx([1, 1])
    same(cascading_randomization(tunnel, x, 1, **options).similarities, found.similarities, 0)
    assert cascading_randomization(NoiseTunnel(LayerFusionCAM(model, model.conv2)), x, 1, **options).layers


class Weights(Saliency):
    """Explains nothing: its map is the network's parameters, so that one sees which of them have changed."""

    def attribute(self, inputs: Tensor, target: Any = None) -> Tensor:
        with torch.no_grad():
            self.forward_func(inputs)
        return torch.cat([p.detach().flatten() for p in self.forward_func.parameters()])[None]


@pytest.mark.parametrize(("kind", "order"), [
    (Net, ["head", "conv2", "conv1"]),
    (WithBatchNorm, ["head", "norm", "conv"]),
    (Attention, ["head", "attention", "twice", "conv", "Attention"]),
])  # fmt: skip
def test_what_is_randomised_when(kind: Any, order: list[str]) -> None:
    model, seen = make(kind), []

    def keep(first: Tensor, second: Tensor) -> Tensor:
        seen.append(second[0])
        return torch.ones(1)

    found = cascading_randomization(Weights(model), images(1, 3, 8, 8), similarity=keep)
    assert found.layers == order
    sizes = [p.numel() for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    done: set[str] = set()
    for layer, before, after in zip(order, seen[:-1], seen[1:], strict=True):
        parts = zip(names, before.split(sizes), after.split(sizes), strict=True)
        changed = {name for name, old, new in parts if not torch.equal(old, new)}
        mine = {n for n in names if n.startswith(layer + ".")} if layer != "Attention" else {"token"}
        if layer == "norm":
            mine = set()  # its fresh weights are those that it had: ones and zeros
        if layer == "attention":
            assert "attention.out_proj.weight" in changed, "a part that is not called as a module"
            mine -= {"attention.in_proj_bias"}  # zeros: of no spread
            changed -= {"attention.out_proj.bias"}
            mine -= {"attention.out_proj.bias"}
        assert changed == mine
        assert not changed & done, "what is random stays as it is"
        done |= changed


class Functional(nn.Module):
    """Uses the weights of its parts without calling them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(192, 192, bias=False), nn.Linear(192, 192, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.first.weight.T @ self.second.weight.T


def test_parts_of_the_only_called_module_are_randomised_with_it() -> None:
    model = make(Functional, seed=5)  # not one of the seeds of the steps
    seen = weights_seen(model, images(1, 3, 8, 8), ["Functional"])
    for before, after in zip(seen[0].chunk(2), seen[1].chunk(2), strict=True):
        assert (before == after).float().mean() < 0.01


def test_layers_of_the_same_shape_get_different_weights() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 192, bias=False), nn.Linear(192, 192, bias=False)).eval()
    first, second = weights_seen(model, images(1, 3, 8, 8), ["2", "1"])[-1].chunk(2)
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.05


def test_the_weights_of_each_step_can_be_drawn_again() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4, bias=False), nn.Linear(4, 5, bias=False)).eval()
    last = weights_seen(model, images(1, 3, 8, 8), ["2", "1"], seed=6)[-1]
    for i, size, drawn in ((1, (4, 5), last[-20:]), (2, (192, 4), last[:-20])):
        with torch.random.fork_rng():
            torch.manual_seed(6 + i)
            assert torch.equal(drawn, nn.Linear(*size, bias=False).weight.detach().flatten())


def weights_seen(model: nn.Module, x: Tensor, order: list[str], seed: int = 0) -> list[Tensor]:
    """The parameters of the network before and after each step."""
    seen: list[Tensor] = []

    def keep(first: Tensor, second: Tensor) -> Tensor:
        seen.append(second[0])
        return torch.ones(1)

    assert cascading_randomization(Weights(model), x, similarity=keep, seed=seed).layers == order
    return seen


def test_the_channels_of_a_map_are_summed() -> None:
    model, x, seen = make(), images(2, 3, 8, 8), list[Tensor]()

    def keep(first: Tensor, second: Tensor) -> Tensor:
        seen.append(first)
        return torch.ones(2)

    method = LayerGradCam(model, model.conv2)
    cascading_randomization(method, x, 1, similarity=keep, attr_dim_summation=False)
    whole = method.attribute(x, 1, attr_dim_summation=False).detach()
    assert whole.shape[1] > 1
    same(seen[0], whole.sum(1, keepdim=True))


def test_fresh_values() -> None:
    """``reset_parameters`` draws from the layer's own distribution; other parameters keep their mean and spread."""
    model, seen = make(Attention), []

    def keep(first: Tensor, second: Tensor) -> Tensor:
        seen.append(second[0])
        return torch.ones(1)

    with torch.no_grad():
        model.attention.in_proj_weight.mul_(7).add_(5)
        model.head.weight.mul_(100)
    cascading_randomization(Weights(model), images(1, 3, 8, 8), similarity=keep)
    last = copy.deepcopy(model)
    nn.utils.vector_to_parameters(seen[-1], last.parameters())
    old, new = model.attention.in_proj_weight, last.attention.in_proj_weight
    assert float(new.detach().mean()) == pytest.approx(float(old.detach().mean()), rel=0.2)
    assert float(new.detach().std()) == pytest.approx(float(old.detach().std()), rel=0.2)
    assert last.head.weight.abs().max() <= 8**-0.5, "a Linear's own initialisation"


def test_running_statistics_are_reset_too() -> None:
    model = make(WithBatchNorm)
    model.norm.running_mean.fill_(3.0)
    kept: list[Any] = []

    class Statistics(Weights):
        def attribute(self, inputs: Tensor, target: Any = None) -> Tensor:
            super().attribute(inputs)
            kept.append(float(self.forward_func.norm.running_mean[0]))
            return torch.rand(1, 5)

    cascading_randomization(Statistics(model), images(1, 3, 8, 8))
    assert kept == [3, 3, 0, 0]
    assert float(model.norm.running_mean[0]) == 3


def test_other_methods_and_arguments() -> None:
    model, x = make(), images(2, 3, 8, 8)
    assert cascading_randomization(Saliency(model), x.clone().requires_grad_(), 1).similarities.shape == (4, 2)
    scale = torch.tensor([[1.0], [2.0]])
    found = cascading_randomization(LayerGradCam(model, model.conv2), x, 1, (scale, 2), attr_dim_summation=False)
    assert found.similarities.shape == (4, 2)
    for name in ("pearson", "ssim", "spearman"):
        assert (
            cascading_randomization(LayerGradCam(model, model.conv2), x, 1, similarity=name)
            .similarities.isfinite()
            .all()
        )
    half = make().double()
    assert cascading_randomization(LayerGradCam(half, half.conv2), x.double(), 1).similarities.shape == (4, 2)


def test_constant_maps_have_similarity_zero() -> None:
    model, x = make(), images(2, 3, 8, 8)
    with torch.no_grad():
        model.head.weight.zero_()  # no gradient: a map of zeros
    found = cascading_randomization(LayerGradCam(model, model.conv2), x, 1)
    assert found.similarities.tolist() == [[0, 0]] * 4
    model = make()
    undefined = cascading_randomization(
        LayerGradCam(model, model.conv2), x, 1, similarity=lambda a, b: a.flatten(1).sum(1) * float("nan")
    )
    assert undefined.similarities.isnan().all(), "what the user's function cannot say is not 0"


def test_errors() -> None:
    model, x = make(), images(2, 3, 8, 8)
    method = LayerGradCam(model, model.conv2)
    for bad in (model, None, method.attribute):
        with pytest.raises(TypeError, match="method must be an attribution"):
            cascading_randomization(bad, x, 1)
    with pytest.raises(TypeError, match=r"method: its forward_func must be a torch\.nn\.Module"):
        cascading_randomization(LayerGradCam(lambda y: model(y), model.conv2), x, 1)
    with pytest.raises(ValueError, match="similarity must be one of"):
        cascading_randomization(method, x, 1, similarity="cosine")
    with pytest.raises(TypeError, match="similarity must be a name or a callable"):
        cascading_randomization(method, x, 1, similarity=3)
    with pytest.raises(ValueError, match="similarity must give a tensor"):
        cascading_randomization(method, x, 1, similarity=lambda a, b: a.mean())
    with pytest.raises(ValueError, match="seed"):
        cascading_randomization(method, x, 1, seed=-1)
    with pytest.raises(TypeError, match="method must return one tensor"):
        cascading_randomization(LayerFusionCAM(model, [model.conv1, model.conv2]), x, 1)
    with pytest.raises(ValueError, match="uses no module with parameters"):
        cascading_randomization(Saliency(nn.Sequential(nn.Flatten()).eval()), x.clone().requires_grad_(), 1)
    line = make(dims=1)
    with pytest.raises(ValueError, match="ssim"):
        cascading_randomization(LayerGradCam(line, line.conv2), images(2, 3, 8), 1, similarity="ssim")
    with pytest.raises(AssertionError):
        cascading_randomization(LayerLayerCAM(model, model.conv2), x)
    assert hooks_on(model) == 0


# -------------------------------------------------------------------------------------------------- similarities


@settings(deadline=None, max_examples=60)
@given(hnp.arrays(np.float32, (2, 9), elements=st.integers(-3, 3).map(float)))
def test_rank_correlation_is_scipys(values: Any) -> None:
    first, second = (torch.from_numpy(row).reshape(1, 1, 3, 3) for row in values)
    defined = all(row.max() > row.min() for row in values)
    expected = scipy.stats.spearmanr(*values).statistic if defined else 0
    assert spearman(first, second).tolist() == pytest.approx([expected], abs=1e-6)
    expected = np.corrcoef(*values)[0, 1] if defined else 0
    assert pearson(first, second).tolist() == pytest.approx([expected], abs=1e-6)


def test_constant_maps_are_not_similar_to_anything_by_a_function_of_your_own() -> None:
    function = similarity_function(lambda first, second: torch.full((len(first),), 0.7))
    ramp, flat = torch.arange(4.0).reshape(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    assert function(ramp, ramp).tolist() == pytest.approx([0.7])
    for first, second in ((ramp, flat), (flat, ramp), (flat, flat)):
        assert function(first, second).tolist() == [0]


def test_maps_that_are_not_finite() -> None:
    good, bad = torch.rand(1, 1, 4, 4), torch.full((1, 1, 4, 4), float("nan"))
    for measure in (spearman, pearson, ssim):
        for first, second in ((good, bad), (bad, good), (bad, bad), (good, good * float("inf"))):
            assert measure(first, second).isnan().all()
        assert measure(good, good * 0).tolist() == [0]


@pytest.mark.parametrize("shape", [(8, 9), (7, 7), (4, 4), (1, 5), (2, 2), (20, 3)])
def test_structural_similarity_by_hand(shape: tuple[int, int]) -> None:
    first, second = (np.random.default_rng(seed).random(shape) for seed in (0, 1))
    side = min(7, *(edge if edge % 2 else edge - 1 for edge in shape))
    scores = []
    maps = [(each - each.min()) / (each.max() - each.min()) for each in (first, second)]
    for i in range(shape[0] - side + 1):
        for j in range(shape[1] - side + 1):
            a, b = (each[i : i + side, j : j + side].ravel() for each in maps)
            (va, ab), (_, vb) = np.cov(a, b) if side > 1 else np.zeros((2, 2))
            top = (2 * a.mean() * b.mean() + 1e-4) * (2 * ab + 9e-4)
            scores.append(top / ((a.mean() ** 2 + b.mean() ** 2 + 1e-4) * (va + vb + 9e-4)))
    x, y = (torch.from_numpy(each)[None, None] for each in (first, second))
    assert ssim(x, y).tolist() == pytest.approx([np.mean(scores)])
    assert ssim(x, x * 3 + 1).tolist() == pytest.approx([1])


def test_structural_similarity_is_scikit_images() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    first, second = (torch.rand(1, 1, 20, 16, generator=torch.Generator().manual_seed(s)).double() for s in (0, 1))
    first, second = ((m - m.min()) / (m.max() - m.min()) for m in (first, second))
    expected = metrics.structural_similarity(first[0, 0].numpy(), second[0, 0].numpy(), data_range=1.0)
    assert ssim(first, second).tolist() == pytest.approx([expected], abs=1e-6)
