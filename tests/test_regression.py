"""Cell regression: the linear model against dense formulas, and the method on networks with known weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from captum_fusion import LayerFusionCAM, LayerRegressionCAM, LayerScoreCAM, shared_work
from captum_fusion.functional import antithetic_cells, cell_covariance, cell_regression, grid_means, upsample
from captum_fusion.functional.regression import _RATIOS
from tests.networks import Counter, Net, TupleLayer, images, make

COVARIANCES = {"identity": None, "neighbours": cell_covariance((3, 4))}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------- masks


def test_masks_are_pairs_of_complements_with_half_of_the_cells() -> None:
    masks = antithetic_cells(200, 49, seed=3)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert (masks[0::2] + masks[1::2] == 1).all()
    assert masks.mean() == 0.5
    assert abs(float(masks[0::2].mean()) - 0.5) < 0.03
    assert len(masks.unique(dim=0)) == 200


def test_masks_depend_on_the_seed_only() -> None:
    state = torch.random.get_rng_state()
    masks = antithetic_cells(7, 9, seed=1)
    assert masks.shape == (7, 9)
    assert (masks == antithetic_cells(8, 9, seed=1)[:7]).all()
    assert (masks != antithetic_cells(7, 9, seed=2)).any()
    assert (torch.random.get_rng_state() == state).all()


def test_covariance_of_neighbours() -> None:
    covariance = cell_covariance((2, 3), length=2.0, own=0.1)
    assert covariance[0, 0] == pytest.approx(1.1)
    assert covariance[0, 1] == pytest.approx(math.exp(-1 / 8))  # next in the row
    assert covariance[0, 4] == pytest.approx(math.exp(-2 / 8))  # diagonal neighbour
    assert torch.linalg.eigvalsh(cell_covariance((3, 2, 2))).min() > 0


def test_means_of_cells() -> None:
    means = grid_means(torch.arange(16.0).reshape(1, 1, 4, 4), (2, 2))
    assert means.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert grid_means(torch.ones(2, 1, 4, 4, 4), (2, 2, 2)).shape == (2, 1, 2, 2, 2)


# ----------------------------------------------------------------------------------------------------------- regression


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("prior", ["right", "wrong", "zero"])
def test_linear_scores_give_their_weights_exactly(covariance: str, prior: str) -> None:
    masks, weights = antithetic_cells(64, 12), random(2, 12)
    guess = {"right": weights, "wrong": random(2, 12, seed=9), "zero": torch.zeros(2, 12)}[prior]
    found, errors = cell_regression(masks, 0.3 + weights @ masks.T.double(), guess, COVARIANCES[covariance])
    torch.testing.assert_close(found, weights, rtol=0, atol=1e-6)
    assert errors.max() < 1e-4


def dense_posterior(x: Tensor, y: Tensor, guess: Tensor, covariance: Tensor, ratio: float) -> tuple[Tensor, ...]:
    """Log evidence, mean and deviations for one ratio, with every matrix written out; the intercept by projection."""
    count = len(y)
    basis = torch.linalg.svd(torch.ones(1, count, dtype=torch.double)).Vh[1:]  # contrasts: free of the intercept
    x, y = basis @ x, basis @ y
    total = (x @ covariance).mul(x).sum() / count  # mean prior variance of a sample
    shape = torch.eye(count - 1, dtype=torch.double) + x @ covariance @ x.T * ratio / total
    inverse, along = torch.linalg.inv(shape), x @ guess
    scale = max(0.0, float(along @ inverse @ y / (along @ inverse @ along)))
    residual = y - scale * along
    noise = residual @ inverse @ residual / (count - 1)
    evidence = MultivariateNormal(scale * along, noise * shape).log_prob(y)
    gain = covariance @ x.T * ratio / total
    mean = scale * guess + gain @ inverse @ residual
    deviations = (noise * (covariance * ratio / total - gain @ inverse @ gain.T)).diagonal().sqrt()
    return evidence, mean, deviations


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("noise", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("count", [10, 40])
def test_posterior_is_that_of_dense_formulas(covariance: str, noise: float, count: int) -> None:
    masks, guess = antithetic_cells(count, 12).double(), random(1, 12, seed=1).abs()
    y = masks @ (random(12, seed=2) + 2 * guess[0]) + noise * random(count, seed=3)
    matrix = COVARIANCES[covariance]
    matrix = torch.eye(12, dtype=torch.double) if matrix is None else matrix
    candidates = [dense_posterior(masks, y, guess[0], matrix, ratio) for ratio in _RATIOS]
    _, mean, deviations = max(candidates, key=lambda candidate: float(candidate[0]))
    weights, errors = cell_regression(masks, y[None], guess, COVARIANCES[covariance])
    torch.testing.assert_close(weights[0], mean, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(errors[0], deviations, rtol=1e-6, atol=1e-8)


def test_standard_errors_are_those_of_repeated_experiments() -> None:
    masks, weights = antithetic_cells(128, 12).double(), random(300, 12)
    scores = weights @ masks.T + random(300, 128, seed=1)
    found, errors = cell_regression(masks, scores, torch.zeros(300, 12))
    assert float(((found - weights) / errors).square().mean()) == pytest.approx(1, abs=0.1)


def test_the_first_guess_helps_where_masks_are_few() -> None:
    masks, guess = antithetic_cells(8, 12), random(50, 12).abs()
    scores = 2 * guess @ masks.T.double() + 0.5 * random(50, 8, seed=1)

    def error(prior: Tensor) -> float:
        return float((cell_regression(masks, scores, prior)[0] - 2 * guess).square().mean())

    assert error(guess) < 0.5 * error(torch.zeros(50, 12))


def test_a_first_guess_of_the_wrong_sign_is_not_used() -> None:
    masks, guess = antithetic_cells(16, 12), random(1, 12).abs()
    scores = -(guess @ masks.T.double()) + 0.3 * random(1, 16, seed=1)
    with_guess, without = (cell_regression(masks, scores, prior)[0] for prior in (guess, torch.zeros(1, 12)))
    torch.testing.assert_close(with_guess, without)


def test_results_do_not_depend_on_other_examples_or_on_the_scale() -> None:
    masks, scores, guess = antithetic_cells(20, 12), random(3, 20), random(3, 12, seed=1)
    weights, errors = cell_regression(masks, scores, guess)
    for i in range(3):
        alone = cell_regression(masks, scores[i : i + 1], guess[i : i + 1])
        torch.testing.assert_close(alone, (weights[i : i + 1], errors[i : i + 1]))
    scaled = cell_regression(masks, 1e-6 * scores + 0, 1e3 * guess)
    torch.testing.assert_close(scaled, (1e-6 * weights, 1e-6 * errors), rtol=1e-6, atol=0)


def test_constant_and_non_finite_scores() -> None:
    masks, guess = antithetic_cells(20, 12), random(4, 12).abs()
    scores = torch.stack(
        [torch.full((20,), 0.7), 0.7 + 1e-8 * random(20).float(), random(20).float(), random(20).float()]
    )
    for bad in (math.nan, math.inf, -math.inf):
        scores[2, 3] = bad
        assert all(result[2].isnan().all() for result in cell_regression(masks, scores, guess))
    weights, errors = cell_regression(masks, scores, guess)
    assert (weights[:2] == 0).all()
    assert (errors[:2] == 0).all()
    assert weights[2].isnan().all()
    assert errors[2].isnan().all()
    torch.testing.assert_close(weights[3:], cell_regression(masks, scores[3:], guess[3:])[0])


# ----------------------------------------------------------------------------------------------------------- the method


class Linear(nn.Module):
    """A score that is linear in the input; its layer is the identity."""

    def __init__(self, *size: int) -> None:
        super().__init__()
        self.layer, self.values = nn.Identity(), nn.Parameter(random(1, 2, *size).float(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) * self.values).flatten(1).sum(1)


class Symmetric(Linear):
    """A linear score plus one that is the same for a mask and its complement."""

    def forward(self, x: Tensor) -> Tensor:
        linear = (self.layer(x) * self.values).flatten(1).sum(1)
        return linear + 1000 * (x - 0.5).flatten(1).prod(1)


def test_interactions_of_an_even_number_of_cells_do_not_matter() -> None:
    x = torch.ones(1, 1, 2, 2)
    found = []
    for model in (Linear(2, 2).eval(), Symmetric(2, 2).eval()):
        model.values.data = model.values.data[:, :1]
        method = LayerRegressionCAM(model, model.layer, n_masks=16, score_fn="identity")
        found.append(method.attribute(x, return_details=True)[1])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_masks_without_cells_say_nothing() -> None:
    weights, errors = cell_regression(torch.zeros(4, 3), torch.rand(2, 4), torch.ones(2, 3))
    assert (weights == 0).all()
    assert (errors == 0).all()


def test_one_pair_of_masks() -> None:
    model, x = Linear(2, 2).eval(), images(1, 2, 2, 2)
    _, details = LayerRegressionCAM(model, model.layer, n_masks=2, score_fn="identity").attribute(
        x, return_details=True
    )
    assert details.weights.abs().max() > 0


@pytest.mark.parametrize("size", [(12,), (8, 6), (6, 4, 6)])
def test_weights_of_a_linear_network(size: tuple[int, ...]) -> None:
    """A cell's weight is the score of the input under the cell's upsampled mask alone."""
    model, x = Linear(*size).eval(), images(2, 2, *size)
    grid = tuple(min(3, s) for s in size)
    cells = math.prod(grid)
    each = upsample(torch.eye(cells).reshape(cells, 1, *grid), size)
    expected = torch.stack([model(example * each) for example in x]).reshape(2, 1, *grid).double()
    method = LayerRegressionCAM(model, model.layer, n_masks=4 * cells, grid_size=3, score_fn="identity")
    attribution, details = method.attribute(x, return_details=True)
    torch.testing.assert_close(details.weights, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(attribution, upsample(expected.relu().float(), size), rtol=1e-4, atol=1e-4)
    assert details.standard_errors.max() < 1e-3


def test_the_layer_gives_the_first_guess_and_the_size() -> None:
    model, x = make(), images(2, 3, 8, 8)
    one, two = (LayerRegressionCAM(model, layer, n_masks=6, grid_size=3) for layer in (model.relu1, model.relu2))
    assert one.attribute(x, 1).shape == (2, 1, 8, 8)
    (_, first), (_, second) = (method.attribute(x, 1, return_details=True) for method in (one, two))
    assert (first.weights - second.weights).abs().max() > 1e-4 * first.weights.abs().max()


def test_the_grid_is_no_finer_than_the_layer() -> None:
    model = make()
    _, details = LayerRegressionCAM(model, model.relu2, n_masks=20).attribute(
        images(1, 3, 8, 8), 1, return_details=True
    )
    assert details.weights.shape == (1, 1, 4, 4)


def test_cost() -> None:
    model = make()
    counter, x = Counter(model), images(2, 3, 8, 8)
    LayerRegressionCAM(counter, model.relu2, n_masks=30).attribute(x, 1)
    assert counter.rows == 2 * 31


def wide() -> nn.Module:
    """A network whose layer has 90 live channels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        features = nn.Sequential(nn.Conv2d(3, 90, 3, padding=1), nn.Softplus())
        return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(90, 5)).eval()


def test_cost_of_the_presets() -> None:
    model, x = wide(), images(2, 3, 8, 8)
    for preset, samples in ((LayerFusionCAM.fast, 61), (LayerFusionCAM.best, 517)):
        counter = Counter(model)
        preset(counter, model[0]).attribute(x, 1)
        assert counter.rows == 2 * samples


def test_several_targets_share_the_masked_samples() -> None:
    model, x = make(), images(2, 3, 8, 8)
    counter = Counter(model)
    method = LayerRegressionCAM(counter, model.relu2, n_masks=20)
    results = method.attribute_targets(x, [0, [3, 1]], perturbations_per_eval=5)
    assert counter.rows == 2 * (20 + 2)
    for result, target in zip(results, (0, [3, 1]), strict=True):
        torch.testing.assert_close(result, method.attribute(x, target, perturbations_per_eval=5))


def test_other_seeds_give_other_masks() -> None:
    model, x = make(), images(1, 3, 8, 8)
    maps = [LayerRegressionCAM(model, model.relu2, n_masks=10, seed=seed).attribute(x, 1) for seed in (0, 1)]
    assert (maps[0] != maps[1]).any()
    with shared_work():
        shared = [LayerRegressionCAM(model, model.relu2, n_masks=10, seed=seed).attribute(x, 1) for seed in (0, 1)]
    torch.testing.assert_close(shared, maps)


def test_a_layer_with_several_tensors() -> None:
    model = TupleLayer().eval()
    maps, details = LayerRegressionCAM(model, model.branches, n_masks=10).attribute(
        images(1, 3, 8, 8), 1, return_details=True
    )
    assert [m.shape[1:] for m in maps] == [(1, 8, 8), (1, 3, 3)]
    assert [d.weights.shape[1:] for d in details] == [(1, 7, 7), (1, 3, 3)]


class Saturated(Net):
    """Its first score is the same for every input, and the second is not a number for dark inputs."""

    def forward(self, x: Tensor) -> Tensor:
        scores = super().forward(x)
        dark = x.abs().mean((1, 2, 3)) < 0.3
        return torch.stack([scores[:, 0] * 0 + 1, torch.where(dark, torch.nan, scores[:, 1])], 1)


def test_constant_and_non_finite_networks() -> None:
    model, x = Saturated().eval(), images(1, 3, 8, 8)
    method = LayerRegressionCAM(model, model.relu2, n_masks=20, score_fn="identity")
    assert (method.attribute(x, 0) == 0).all()
    assert method.attribute(0.5 * x, 1).isnan().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_masks": 1}, "n_masks must be an int of at least 2"),
        ({"n_masks": 31}, "n_masks must be even, since masks are pairs of complements, not 31"),
        ({"grid_size": 0}, "grid_size must be an int of at least 1"),
        ({"seed": -1}, "seed must be an int of at least 0"),
        ({"score_fn": "tanh"}, "score_fn"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    model = make()
    with pytest.raises(ValueError, match=message):
        LayerRegressionCAM(model, model.relu2, **options)


# -------------------------------------------------------------------------------------------------------------- presets


def test_fast_is_fusion_cam_with_a_search() -> None:
    model, x = make(), images(2, 3, 8, 8)
    fast = LayerFusionCAM.fast(model, model.relu2, theta=20)
    assert isinstance(fast.region_method, LayerScoreCAM)
    assert (fast.region_method.max_evaluations, fast.theta) == (56, 20)
    torch.testing.assert_close(fast.attribute(x, 1), LayerFusionCAM(model, model.relu2, theta=20).attribute(x, 1))
    model = wide()  # it has more channels than the search evaluates
    fast, full = (method(model, model[0]).attribute(x, 1) for method in (LayerFusionCAM.fast, LayerFusionCAM))
    assert (fast - full).abs().max() > 1e-6
    assert torch.corrcoef(torch.stack([fast.flatten(), full.flatten()]))[0, 1] > 0.99


def test_best_is_fusion_cam_with_cell_regression() -> None:
    model, x = make(), images(2, 3, 8, 8)
    best = LayerFusionCAM.best(model, model.relu2, score_fn="sigmoid")
    assert isinstance(best.region_method, LayerRegressionCAM)
    assert (best.region_method.n_masks, best.region_method.score_fn, best.score_fn) == (512, "sigmoid", "sigmoid")
    region = LayerRegressionCAM(model, model.relu2, score_fn="sigmoid")
    expected = LayerFusionCAM(model, model.relu2, region_method=region, score_fn="sigmoid")
    torch.testing.assert_close(best.attribute(x, 1), expected.attribute(x, 1))


@pytest.mark.parametrize("preset", [LayerFusionCAM.fast, LayerFusionCAM.best])
@pytest.mark.parametrize("option", ["region_method", "max_evaluations"])
def test_presets_refuse_what_they_set(preset: Any, option: str) -> None:
    model = make()
    with pytest.raises(TypeError, match=f"{option} is set by LayerFusionCAM"):
        preset(model, model.relu2, **{option: None})
