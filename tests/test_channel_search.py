"""Active Score-CAM: the map of all channels' scores from some of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from captum_fusion import LayerFusionCAM, LayerISCAM, LayerScoreCAM, LayerSSCAM, LayerUnionCAM, shared_work
from captum_fusion.attr._bases import LayerTensor
from captum_fusion.functional import ChannelSearch
from captum_fusion.functional.channel_search import FEWEST, _Posterior
from tests.networks import Counter, images
from tests.test_contract import same


class ManyChannels(nn.Module):
    """A convolutional network with 48 channels, some of them dead."""

    def __init__(self, channels: int = 48) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, padding=1)
        self.relu = nn.ReLU()
        self.head = nn.Linear(channels, 5)
        with torch.no_grad():
            self.conv.bias[::7] = -100.0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.relu(self.conv(x)).mean((2, 3))))


def network(channels: int = 48) -> ManyChannels:
    torch.manual_seed(3)
    return ManyChannels(channels).eval()


def live_counts(model: ManyChannels, x: Tensor) -> list[int]:
    maps = model.relu(model.conv(x)).detach().flatten(2)
    return (maps.amax(2) > maps.amin(2)).sum(1).tolist()


def correlation(first: Tensor, second: Tensor) -> float:
    return float(np.corrcoef(first.double().flatten(), second.double().flatten())[0, 1])


def run(search: ChannelSearch, scores: Tensor) -> Tensor:
    while channels := search.ask():
        search.tell(channels, scores[channels])
    return search.scores()


def problem(channels: int = 40, size: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Activations, gradients, and the masks of the channels."""
    generator = torch.Generator().manual_seed(seed)
    activations = torch.rand(channels, size, size, generator=generator).double()
    gradients = torch.randn(channels, size, size, generator=generator).double()
    flat = activations.flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    return activations, gradients, (flat - low) / (high - low)


# ---- the mathematics


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), size=st.integers(2, 4), weighting=st.sampled_from(["softmax", "probability"]))
def test_scores_that_are_linear_in_the_mask_are_recovered(seed: int, size: int, weighting: str) -> None:
    activations, gradients, masks = problem(60, size, seed)
    weights = torch.randn(size * size, generator=torch.Generator().manual_seed(seed)).double()
    scores = masks @ weights + 0.7
    search = ChannelSearch(activations, gradients, 40, weighting=weighting)
    torch.testing.assert_close(run(search, scores), scores, rtol=1e-5, atol=1e-5)
    assert search.evaluations == 40
    assert search.expected_error < 1e-6


def test_masks_are_compared_where_the_first_order_map_is_large() -> None:
    """d_ij = |sqrt(r) (X_i - X_j)| over its root mean square, r = 1/2 + |h| / (2 mean |h|), h = sum_k g^k A^k."""
    activations, gradients, masks = problem(30, 2)
    distances = search_of(activations, gradients)
    first_order = (activations * gradients).sum(0).flatten().abs()
    relevance = 0.5 + 0.5 * first_order / first_order.mean()
    expected = torch.cdist(masks * relevance.sqrt(), masks * relevance.sqrt())
    pairs = ~torch.eye(30, dtype=torch.bool)
    torch.testing.assert_close(distances[pairs], (expected / expected[pairs].square().mean().sqrt())[pairs])
    flat = search_of(activations, torch.zeros_like(gradients))
    expected = torch.cdist(masks, masks)
    torch.testing.assert_close(flat[pairs], (expected / expected[pairs].square().mean().sqrt())[pairs])


def search_of(activations: Tensor, gradients: Tensor) -> Tensor:
    """The distances of all masks."""
    everything = torch.arange(len(activations))
    return ChannelSearch(activations, gradients, 12)._distances(everything, everything)


@pytest.mark.parametrize("length", [0.5, 4.0, math.inf])
def test_prior_covariance_by_the_formula(length: float) -> None:
    """Matern 5/2 (or 2 <X_i, X_j>) + 10 + z z^T + a nugget, z the standardised first-order scores."""
    activations, gradients, masks = problem(12, 2)
    search, everything = ChannelSearch(activations, gradients, 8), torch.arange(12)
    distances = search_of(activations, gradients)
    found = search._covariance(distances, length, everything, everything)
    guess = (masks @ (activations * gradients).sum(0).flatten().relu()).numpy()
    guess = (guess - guess.mean()) / guess.std()
    if length < math.inf:
        scaled = math.sqrt(5) * distances.numpy() / length
        kernel = (1 + scaled + scaled**2 / 3) * np.exp(-scaled)
    else:  # the inner products of masks around their mean, from the distances
        centring = np.eye(12) - 1 / 12
        kernel = -centring @ distances.square().numpy() @ centring
    expected = kernel + 10 + np.outer(guess, guess)
    apart = ~np.eye(12, dtype=bool)
    np.testing.assert_allclose(found.numpy()[apart], expected[apart], rtol=1e-9)
    assert (found.diagonal().numpy() > expected.diagonal()).all(), "the nugget"
    np.testing.assert_allclose(found.diagonal(), expected.diagonal(), rtol=1e-3)
    torch.testing.assert_close(search._prior_variance(length), found.diagonal(), rtol=1e-9, atol=0)


def test_two_sevenths_of_the_budget_come_first_and_the_rest_in_equal_rounds() -> None:
    activations, gradients, masks = problem(100, 2)
    for budget, rounds, sizes in ((70, 6, [20, 9, 9, 8, 8, 8, 8]), (28, 5, [8, 4, 4, 4, 4, 4]), (10, 6, [8, 1, 1])):
        search, found = ChannelSearch(activations, gradients, budget, rounds=rounds), []
        while channels := search.ask():
            search.tell(channels, masks[channels, 0])
            found.append(len(channels))
        assert found == sizes


def test_posterior_against_dense_algebra() -> None:
    """Mean and variance of the unmeasured channels by inverting the whole covariance."""
    activations, gradients, masks = problem(30, 3)
    scores = (masks.square().sum(1) + masks[:, 0]).sin()
    search = ChannelSearch(activations, gradients, 12, rounds=1)
    run(search, scores)
    posterior = search._posterior
    assert posterior is not None
    everything = torch.arange(30)
    known = search._chosen
    prior = search._covariance(
        search._distances(everything, everything), posterior.length, everything, everything
    ).numpy()
    inverse = np.linalg.inv(prior[np.ix_(known, known)])
    values = scores[known].numpy()
    cross = prior[:, known]
    mean = values.mean() + cross @ inverse @ (values - values.mean())
    scale = (values - values.mean()) @ inverse @ (values - values.mean()) / (len(known) - 1)
    variance = scale * (np.diag(prior) - np.einsum("ij,jk,ik->i", cross, inverse, cross))
    others = np.setdiff1d(np.arange(30), known)
    np.testing.assert_allclose(posterior.mean[others], mean[others], rtol=1e-8)
    np.testing.assert_allclose(posterior.variance[others], variance[others], rtol=1e-6, atol=1e-12)
    assert posterior.scale == pytest.approx(scale)


@pytest.mark.parametrize("weighting", ["softmax", "probability", "increase"])
def test_expected_error_against_samples_of_the_posterior(weighting: str) -> None:
    """The mean of 1 - correlation over maps drawn from the posterior, for a posterior that is narrow."""
    activations, gradients, masks = problem(40, 3, seed=1)
    scores = 0.3 * masks.square().sum(1) + 2
    search = ChannelSearch(activations, gradients, 30, weighting=weighting, baseline=1.2)
    run(search, scores)
    posterior = search._posterior
    assert posterior is not None
    everything = torch.arange(40)
    prior = search._covariance(search._distances(everything, everything), posterior.length, everything, everything)
    covariance = posterior.scale * (prior - posterior.half @ posterior.half.T)
    covariance[search._chosen], covariance[:, search._chosen] = 0, 0
    values, vectors = torch.linalg.eigh(covariance)
    draws = torch.randn(4000, 40, generator=torch.Generator().manual_seed(0)).double()
    drawn = posterior.mean + draws @ (vectors * values.clamp_min(0).sqrt()).T
    weigh: dict[str, Any] = {
        "softmax": lambda values: values.softmax(-1),
        "probability": lambda values: values,
        "increase": lambda values: (values - 1.2).relu(),
    }
    weights, centre = weigh[weighting](drawn), weigh[weighting](posterior.mean)
    maps, reference = weights @ activations.flatten(1), centre @ activations.flatten(1)
    errors = [1 - correlation(m, reference) for m in maps]
    assert search.expected_error == pytest.approx(float(np.mean(errors)), rel=0.15)


@pytest.mark.parametrize("weighting", ["softmax", "probability"])
def test_the_next_channels_lower_the_expected_error_most(weighting: str) -> None:
    """One after the other, with the whole covariance updated after each: S -= S_k S_k^T / S_kk."""
    activations, gradients, masks = problem(40, 3, seed=2)
    search = ChannelSearch(activations, gradients, 30, weighting=weighting, rounds=2)
    first = search.ask()
    search.tell(first, (masks.square().sum(1) + masks[:, 0]).sin()[first])
    posterior, everything = search._posterior, torch.arange(40)
    assert posterior is not None
    moves = search._moves(*search._weights(posterior))
    prior = search._covariance(search._distances(everything, everything), posterior.length, everything, everything)
    covariance, expected = posterior.scale * (prior - posterior.half @ posterior.half.T), list[int]()
    error = (moves.T @ covariance @ moves).trace()
    for _ in range(11):
        gains = (moves.T @ covariance).square().sum(0) / covariance.diagonal()
        gains[[*first, *expected]] = -1
        best = int(gains.argmax())
        expected.append(best)
        covariance = covariance - torch.outer(covariance[best], covariance[best]) / covariance[best, best]
        left = (moves.T @ covariance @ moves).trace()
        assert float(error - left) == pytest.approx(float(gains[best])), "what the channel is worth"
        error = left
    assert search.ask() == expected


def test_expected_error_of_many_channels() -> None:
    """trace(J^T S J) / 2 for the 256 channels with the largest own errors, and the own errors of the others."""
    activations, gradients, masks = problem(300, 2)
    search = ChannelSearch(activations, gradients, 20)
    run(search, masks.square().sum(1).sin())
    posterior, everything = search._posterior, torch.arange(300)
    assert posterior is not None
    moves = search._moves(*search._weights(posterior))
    prior = search._covariance(search._distances(everything, everything), posterior.length, everything, everything)
    covariance = posterior.scale * (prior - posterior.half @ posterior.half.T)
    errors = moves.square().sum(1) * covariance.diagonal()
    order = errors.argsort(descending=True)
    kept, left = order[:256], order[256:]
    expected = (moves[kept].T @ covariance[kept][:, kept] @ moves[kept]).trace() + errors[left].sum()
    assert errors[left].sum() > 1e-6 * expected
    assert search.expected_error == pytest.approx(float(expected) / 2, rel=1e-7)


def test_tolerance_ends_the_search() -> None:
    activations, gradients, masks = problem(100, 3)
    scores = masks @ torch.arange(9.0).double() / 9
    easy = ChannelSearch(activations, gradients, 100, tolerance=0.01)
    run(easy, scores)
    assert FEWEST <= easy.evaluations < 60
    noise = ChannelSearch(activations, gradients, 100, weighting="probability", tolerance=1e-9)
    run(noise, torch.rand(100, generator=torch.Generator().manual_seed(0)).double())
    assert noise.evaluations == 100
    assert noise.expected_error == 0


@pytest.mark.parametrize("budget", [1, 5, 40, 41, 1000])
def test_budgets(budget: int) -> None:
    activations, gradients, masks = problem(40, 3)
    scores = masks.square().sum(1)
    search = ChannelSearch(activations, gradients, budget)
    found = run(search, scores)
    assert search.evaluations == min(budget, 40)
    assert found.isfinite().all()
    if budget >= 40:
        assert torch.equal(found, scores)
        assert search.expected_error == 0


@pytest.mark.parametrize("weighting", ["softmax", "probability", "increase"])
def test_scores_without_information(weighting: str) -> None:
    activations, gradients, _ = problem(40, 3)
    for value in (0.0, 0.25, 1.0):
        scores = torch.full((40,), value, dtype=torch.double)
        search = ChannelSearch(activations, gradients, 20, weighting=weighting, is_probability=weighting != "softmax")
        torch.testing.assert_close(run(search, scores), scores, atol=1e-5, rtol=1e-5)
    same_masks = activations[:1].expand(40, 3, 3)
    search = ChannelSearch(same_masks, gradients, 20, weighting=weighting)
    assert run(search, torch.linspace(0, 1, 40).double()).isfinite().all()
    flat = ChannelSearch(activations, torch.zeros_like(gradients), 20, weighting=weighting)
    assert run(flat, torch.linspace(0, 1, 40).double()).isfinite().all()


def test_scores_that_are_not_finite() -> None:
    activations, gradients, masks = problem(40, 3)
    scores = masks.sum(1)
    scores[::5] = torch.nan
    search = ChannelSearch(activations, gradients, 20)
    found = run(search, scores)
    measured = torch.zeros(40, dtype=torch.bool)
    measured[search._chosen] = True
    assert torch.equal(found.isnan(), measured & scores.isnan()), "a measured NaN stays, and spoils no other score"
    nothing = ChannelSearch(activations, gradients, 20)
    assert run(nothing, torch.full((40,), torch.nan, dtype=torch.double)).isnan().all()
    assert not ChannelSearch(activations[:0], gradients[:0], 20).ask()


def test_one_measurement_says_nothing_of_the_error() -> None:
    activations, gradients, masks = problem(10, 3)
    search = ChannelSearch(activations, gradients, 1)
    run(search, masks.sum(1))
    assert search.expected_error == float("inf")
    two = ChannelSearch(activations, gradients, 2)
    run(two, masks.sum(1))
    assert two.evaluations == 2
    assert 0 < two.expected_error < math.inf


@pytest.mark.parametrize("variance", [1e-3, 0.5, 2.0, 19.5])
def test_the_slope_of_softmax_weights_is_that_of_a_log_normal_variable(variance: float) -> None:
    """Root mean square slope: the standard deviation of exp(score) over that of the score."""
    activations, gradients, _ = problem(10, 2)
    mean, spread = torch.zeros(10).double(), torch.full((10,), variance).double()
    posterior = _Posterior(mean, spread, mean[:, None], 1.0, 1.0)
    weights, slopes = ChannelSearch(activations, gradients, 5)._weights(posterior)
    exponential = scipy.stats.lognorm(s=math.sqrt(variance))
    expected = exponential.std() / exponential.mean() / math.sqrt(variance)
    np.testing.assert_allclose(slopes / weights, expected, rtol=1e-6)


def test_one_channel() -> None:
    activations, gradients, _ = problem(1, 3)
    search = ChannelSearch(activations, gradients, 56)
    assert run(search, torch.tensor([3.0]).double()).tolist() == [3.0]


def test_a_batch_larger_than_the_usual_number_of_candidates() -> None:
    """Two sevenths of the budget, the first batch, are more than 256 channels."""
    activations, gradients, masks = problem(1000, 2)
    search = ChannelSearch(activations, gradients, 950)
    run(search, masks[:, 0])
    assert search.evaluations == 950


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradients_that_are_not_finite_count_as_0(value: float) -> None:
    activations, gradients, masks = problem(40, 3)
    broken, zero = gradients.clone(), gradients.clone()
    broken[3], zero[3] = value, 0.0
    scores = masks.square().sum(1)
    assert torch.equal(
        run(ChannelSearch(activations, broken, 20), scores), run(ChannelSearch(activations, zero, 20), scores)
    )


# ---- the methods

METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "softmax": (LayerScoreCAM, {}),
    "probability": (LayerScoreCAM, {"weighting": "probability"}),
    "increase": (LayerScoreCAM, {"weighting": "increase"}),
    "sigmoid": (LayerScoreCAM, {"weighting": "probability", "score_fn": "sigmoid"}),
    "identity": (LayerScoreCAM, {"weighting": "probability", "score_fn": "identity"}),
    "ss-cam": (LayerSSCAM, {"n_samples": 2, "stdevs": 0.1}),
    "is-cam": (LayerISCAM, {"n_steps": 2}),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_budget_for_all_channels_gives_the_published_map(name: str) -> None:
    cls, options = METHODS[name]
    model, x = network(), images(3, 3, 8, 8)
    full = cls(model, model.relu, **options).attribute(x, [0, 3, 1], perturbations_per_eval=4)
    found, details = cls(model, model.relu, max_evaluations=48, **options).attribute(
        x, [0, 3, 1], perturbations_per_eval=4, return_details=True
    )
    assert torch.equal(found, full)
    assert details.evaluations.tolist() == live_counts(model, x)
    assert details.expected_error.tolist() == [0, 0, 0]


@pytest.mark.parametrize("score_fn", ["softmax", "sigmoid", "identity"])
def test_the_search_of_a_method_is_that_of_its_live_channels(score_fn: Any) -> None:
    """Score-CAM by hand: the masked scores that the search asks for, and the weights that it gives."""
    model, x = network(), images(1, 3, 8, 8)
    found = LayerScoreCAM(model, model.relu, weighting="probability", score_fn=score_fn, max_evaluations=14)
    activations = model.relu(model.conv(x)).detach().requires_grad_()
    model.head(torch.tanh(activations.mean((2, 3))))[0, 1].backward()
    maps, gradients = activations.detach()[0], activations.grad[0]
    live = maps.amax((1, 2)) > maps.amin((1, 2))
    maps, gradients = maps[live], gradients[live]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    masked = model(x * ((maps - low) / (high - low))[:, None]).detach().double()
    scores = {"softmax": masked.softmax(1), "sigmoid": masked.sigmoid(), "identity": masked}[score_fn][:, 1]
    is_probability = score_fn != "identity"
    search = ChannelSearch(maps, gradients, 14, weighting="probability", is_probability=is_probability)
    weights = run(search, scores)
    expected = (weights[:, None, None] * maps).sum(0).relu()
    same(found.attribute(x, 1)[0, 0], expected.float())


class Fragile(ManyChannels):
    """Has no score for dark pictures, or a score of 0."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).masked_fill((x[:, 0, 4, 4] < 0)[:, None], self.value)


def test_a_copy_without_a_score_counts_as_0() -> None:
    x, maps = images(2, 3, 8, 8), []
    x[:, 0, 4, 4] = 0.5
    for value in (math.nan, math.inf, 0.0):
        torch.manual_seed(3)
        model = Fragile(value).eval()
        method = LayerSSCAM(model, model.relu, n_samples=12, stdevs=0.3, score_fn=torch.abs)
        maps.append(method.attribute(x, 1))
    assert maps[2].flatten(1).any(1).all()
    same(maps[0], maps[2])
    same(maps[1], maps[2])


@pytest.mark.parametrize("name", METHODS)
def test_few_evaluations_give_nearly_the_same_map(name: str) -> None:
    cls, options = METHODS[name]
    model, x = network(), images(3, 3, 8, 8)
    targets = model(x).argmax(1).tolist()
    full = cls(model, model.relu, **options).attribute(x, targets)
    found, details = cls(model, model.relu, max_evaluations=20, **options).attribute(x, targets, return_details=True)
    assert details.evaluations.tolist() == [20, 20, 20]
    assert (details.expected_error > 0).all()
    assert full.flatten(1).any(1).all(), "an all-zero map tests nothing"
    for i in range(3):
        assert correlation(found[i], full[i]) > 0.98, (name, i)


def test_an_example_does_not_depend_on_its_batch() -> None:
    model, x = network(), images(3, 3, 8, 8)
    for options in ({"max_evaluations": 14}, {"tolerance": 0.001}):
        method = LayerScoreCAM(model, model.relu, **options)
        together = method.attribute(x, [0, 3, 1])
        for i, target in enumerate([0, 3, 1]):
            same(method.attribute(x[i : i + 1], target), together[i : i + 1])


def test_cost() -> None:
    model, x = network(), images(3, 3, 8, 8)
    counted = Counter(model)
    LayerScoreCAM(counted, model.relu, max_evaluations=15).attribute(x, 1, perturbations_per_eval=100)
    assert counted.rows == 3 * (1 + 15)
    assert counted.calls == 1 + 7, "one call of the network in each round, for all examples"
    counted = Counter(model)
    fusion = LayerFusionCAM(counted, model.relu, max_evaluations=15)
    fusion.attribute(x, 1)
    assert counted.rows == 3 * (15 + 5)


def test_fusions_take_the_search_through_their_region_component() -> None:
    model, x = network(), images(2, 3, 8, 8)
    for cls in (LayerFusionCAM, LayerUnionCAM):
        region = LayerScoreCAM(model, model.relu, max_evaluations=15)
        same(
            cls(model, model.relu, max_evaluations=15).attribute(x, 1),
            cls(model, model.relu, region_method=region).attribute(x, 1),
        )
        with pytest.raises(ValueError, match="max_evaluations is an option of the default region_method"):
            cls(model, model.relu, region_method=region, max_evaluations=3)


def test_searches_are_not_shared() -> None:
    model, x = network(), images(2, 3, 8, 8)
    method = LayerScoreCAM(model, model.relu, max_evaluations=12)
    alone = [method.attribute(x, target) for target in (0, 1)]
    with shared_work():
        LayerScoreCAM(model, model.relu).attribute(x, 0)
        together = [method.attribute(x, target) for target in (0, 1)]
    for first, second in zip(alone, together, strict=True):
        same(first, second)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("options", [{"max_evaluations": 12}, {"tolerance": 0.01}])
def test_no_tensor_is_created_on_the_default_device(name: str, options: dict[str, Any]) -> None:
    cls, others = METHODS[name]
    model, x = network(), images(2, 3, 8, 8)
    method = cls(model, model.relu, **others, **options)
    expected, details = method.attribute(x, [0, 3], perturbations_per_eval=4, return_details=True)
    with torch.device("meta"):
        found, same_details = method.attribute(x, [0, 3], perturbations_per_eval=4, return_details=True)
    same(found, expected)
    assert torch.equal(same_details.evaluations, details.evaluations)


class HalvedScoreCAM(LayerScoreCAM):
    """Score-CAM with half of the values, to test that ``_map`` can be overridden."""

    def _map(self, tensor: LayerTensor) -> Tensor:
        return super()._map(tensor) / 2


def test_a_subclass_can_override_map() -> None:
    model, x = network(), images(2, 3, 8, 8)
    full = LayerScoreCAM(model, model.relu).attribute(x, 1)
    same(HalvedScoreCAM(model, model.relu).attribute(x, 1), full / 2)


def test_dead_layers_and_tuples_of_layers() -> None:
    model, x = network(), images(2, 3, 8, 8)
    with torch.no_grad():
        model.conv.bias.fill_(-100.0)
    found, details = LayerScoreCAM(model, model.relu, max_evaluations=5).attribute(x, 1, return_details=True)
    assert (found == 0).all()
    assert details.evaluations.tolist() == [0, 0]
    maps = LayerScoreCAM(model, [model.conv, model.relu], max_evaluations=5).attribute(x, 1, return_details=True)
    assert [m.shape for m, _ in maps] == [(2, 1, 8, 8), (2, 1, 8, 8)]


@pytest.mark.parametrize(
    ("name", "value"), [("max_evaluations", 0), ("max_evaluations", 1.5), ("tolerance", 0), ("tolerance", 2)]
)
def test_wrong_options(name: str, value: Any) -> None:
    model = network()
    for cls in (LayerScoreCAM, LayerSSCAM, LayerISCAM):
        with pytest.raises(ValueError, match=name):
            cls(model, model.relu, **{name: value})
