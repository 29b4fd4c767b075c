"""The formulas of ``captum_fusion.functional``: hand-computed numbers, and properties that hold for any map."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

from captum_fusion import functional as F
from captum_fusion.metrics import insertion

robust = settings(deadline=None, derandomize=True, max_examples=100)

moderate = st.floats(-1e3, 1e3, allow_nan=False, width=64)
unit = st.floats(0, 1, allow_nan=False, width=64)
shapes = hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=6)


def arrays(elements: st.SearchStrategy[float] = moderate, shape: object = shapes) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float64, shape, elements=elements)


def batch(*maps: np.ndarray | Tensor) -> Tensor:
    return torch.stack([torch.as_tensor(m) for m in maps])[:, None]


def close(actual: Tensor, expected: object, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(
        actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=tolerance, atol=tolerance, check_device=False
    )


# ----------------------------------------------------------------------------------------------------------- normalize


def test_normalize_by_hand() -> None:
    maps = torch.tensor([[[2.0, 4.0], [3.0, 6.0]], [[-1.0, -1.0], [-1.0, 1.0]]])
    close(F.normalize(maps), [[[0.0, 0.5], [0.25, 1.0]], [[0.0, 0.0], [0.0, 1.0]]])


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1.0, 1e20])
def test_normalize_has_no_additive_epsilon(scale: float) -> None:
    close(F.normalize(scale * torch.tensor([[[1.0, 2.0, 5.0]]])), [[[0.0, 0.25, 1.0]]], 1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 0.1, 1e-20, 1e20])
def test_normalize_of_a_constant_is_zero(value: float) -> None:
    maps = torch.full((2, 1, 3, 3), value)
    assert (F.normalize(maps) == 0).all()
    assert (F.normalize(torch.cat([maps, torch.rand(1, 1, 3, 3)]))[:2] == 0).all()


@robust
@given(arrays())
def test_normalize_reaches_0_and_1_or_is_zero(values: np.ndarray) -> None:
    result = F.normalize(batch(values))
    assert result.isfinite().all()
    assert result.min() >= 0
    assert result.max() <= 1
    span, top = np.ptp(values), np.abs(values).max()
    assume(not 0.9e-6 * top <= span <= 1.1e-6 * top)
    if span > 1e-6 * top:
        assert (result.min(), result.max()) == (0, 1)
        close(result[0, 0], (values - values.min()) / span)
    else:
        assert (result == 0).all()


@robust
@given(arrays(unit), st.floats(1e-3, 1e3), st.floats(-1.0, 1.0))
def test_normalize_ignores_a_positive_affine_rescale(values: np.ndarray, scale: float, offset: float) -> None:
    assume(np.ptp(values) > 1e-2)
    close(F.normalize(batch(scale * (values + offset))), F.normalize(batch(values)), 1e-9)


@robust
@given(st.lists(arrays(shape=(3, 4)), min_size=2, max_size=4))
def test_normalize_treats_examples_one_by_one(maps: list[np.ndarray]) -> None:
    assert torch.equal(F.normalize(batch(*maps)), torch.cat([F.normalize(batch(m)) for m in maps]))


def test_half_types_are_reduced_in_float32() -> None:
    maps = torch.tensor([[[1.0, 2.0, 3.0]]])
    for dtype in (torch.float16, torch.bfloat16):
        assert F.normalize(maps.to(dtype)).dtype == torch.float32
    assert F.normalize(maps.double()).dtype == torch.float64


# ------------------------------------------------------------------------------------------------------------ upsample


def test_upsample_has_half_pixel_centres() -> None:
    close(F.upsample(torch.tensor([[[0.0, 4.0]]]), (4,)), [[[0.0, 1.0, 3.0, 4.0]]])
    # With aligned corners this would be 0, 2, 4, 6 in each row.
    expected = [[0.0, 1.5, 4.5, 6.0], [1.5, 3.0, 6.0, 7.5], [4.5, 6.0, 9.0, 10.5], [6.0, 7.5, 10.5, 12.0]]
    close(F.upsample(torch.tensor([[[[0.0, 6.0], [6.0, 12.0]]]]), (4, 4)), [[expected]])
    cube = torch.arange(2.0).reshape(1, 1, 2, 1, 1).expand(1, 1, 2, 2, 2)
    close(F.upsample(cube, (4, 2, 3))[0, 0, :, 0, 0], [0.0, 0.25, 0.75, 1.0])


# ---------------------------------------------------------------------------------------------------------- percentile


@robust
@given(arrays(shape=hnp.array_shapes(min_dims=1, max_dims=2, min_side=1, max_side=30)), st.floats(0, 100))
def test_percentile_is_numpys(values: np.ndarray, theta: float) -> None:
    expected = np.percentile(values, theta, axis=-1, keepdims=True)
    close(F.percentile(torch.from_numpy(values), theta), expected, 1e-9)


@pytest.mark.parametrize("theta", [0, 10, 25, 50, 75, 99.9, 100])
def test_percentile_with_ties_and_exact_positions(theta: float) -> None:
    values = torch.tensor([[3.0, 1.0, 1.0, 2.0, 3.0], [5.0, 4.0, 3.0, 2.0, 1.0]], dtype=torch.float64)
    close(F.percentile(values, theta), np.percentile(values.numpy(), theta, axis=1, keepdims=True))


# ------------------------------------------------------------------------------------------------------------- denoise


def test_denoise_by_hand() -> None:
    maps = torch.tensor([[[0.0, 0.2, 0.4, 0.6, 0.8]], [[0.8, 0.8, 0.8, 0.8, 0.1]]])
    close(F.denoise(maps, 50), [[[0.0, 0.0, 0.4, 0.6, 0.8]], [[0.8, 0.8, 0.8, 0.8, 0.0]]])


def test_denoise_at_100_keeps_the_maximum() -> None:
    close(F.denoise(torch.tensor([[[0.1, 0.9, 0.3, 0.9]]]), 100), [[[0.0, 0.9, 0.0, 0.9]]])


@robust
@given(arrays(unit), st.floats(0, 100))
def test_denoise_keeps_what_reaches_the_percentile(values: np.ndarray, theta: float) -> None:
    result = F.denoise(batch(values), theta)[0, 0].numpy()
    assert ((result == 0) | (result == values)).all()
    threshold, slack = np.percentile(values, theta), 1e-6 * values.max()
    assert (result[values >= threshold] == values[values >= threshold]).all()
    assert (result[values < threshold - 1.1 * slack] == 0).all()


@robust
@given(arrays(unit))
def test_denoise_at_0_changes_nothing(values: np.ndarray) -> None:
    close(F.denoise(batch(values), 0), batch(values), 0)


@robust
@given(st.lists(arrays(shape=(3, 4)), min_size=2, max_size=4), st.floats(0, 100))
def test_denoise_treats_examples_one_by_one(maps: list[np.ndarray], theta: float) -> None:
    together = F.denoise(batch(*maps), theta)
    assert torch.equal(together, torch.cat([F.denoise(batch(m), theta) for m in maps]))


def test_denoise_keeps_ties_up_to_float_noise() -> None:
    nearly = torch.tensor([[[0.5, 0.5 - 2**-24, 0.5 + 2**-24, 1.0, 0.499]]])
    close(F.denoise(nearly, 50), [[[0.5, 0.5 - 2**-24, 0.5 + 2**-24, 1.0, 0.0]]], 0)


def test_denoise_gradients_by_channel() -> None:
    gradients = torch.tensor([[[1.0, 2.0, 3.0], [-3.0, -2.0, -1.0], [7.0, 7.0, 7.0]]])
    close(F.denoise_gradients(gradients, 50), [[[0.0, 2.0, 3.0], [0.0, -2.0, -1.0], [7.0, 7.0, 7.0]]])


# ------------------------------------------------------------------------------------------------------ channel weights


def test_live_channels() -> None:
    activations = torch.tensor([[[0.0, 0.0], [5.0, 5.0], [0.0, 1e-12], [-1.0, 1.0], [1.0, 1.0 + 2**-23]]])
    assert F.live_channels(activations).tolist() == [[False, False, True, True, False]]


def test_softmax_weights_by_hand() -> None:
    scores = torch.tensor([[math.log(1.0), math.log(3.0), 50.0]])
    close(F.softmax_weights(scores, torch.tensor([[True, True, False]])), [[0.25, 0.75, 0.0]], 1e-6)
    assert (F.softmax_weights(scores, torch.zeros(1, 3, dtype=torch.bool)) == 0).all()


@robust
@given(arrays(shape=(3, 6)), hnp.arrays(np.bool_, (3, 6)), arrays(shape=(3, 6)), moderate)
def test_softmax_weights_ignore_dead_channels(
    scores: np.ndarray, live: np.ndarray, other: np.ndarray, baseline: float
) -> None:
    weights = F.softmax_weights(torch.from_numpy(scores), torch.from_numpy(live))
    assert weights.isfinite().all()
    assert (weights[~torch.from_numpy(live)] == 0).all()
    close(weights.sum(1), live.any(1).astype(float), 1e-9)
    for i in range(3):
        if live[i].any():
            e = np.exp(scores[i][live[i]] - scores[i][live[i]].max())
            close(weights[i][torch.from_numpy(live[i])], e / e.sum(), 1e-9)
    dead_changed = torch.from_numpy(np.where(live, scores, other))
    assert torch.equal(F.softmax_weights(dead_changed, torch.from_numpy(live)), weights)
    close(F.softmax_weights(torch.from_numpy(scores - baseline), torch.from_numpy(live)), weights, 1e-9)


def test_increase_weights_by_hand() -> None:
    scores, live = torch.tensor([[0.9, 0.1, 0.5], [0.9, 0.1, 0.5]]), torch.tensor([[True, True, False]] * 2)
    close(F.increase_weights(scores, torch.tensor([0.4, 0.0]), live), [[0.5, 0.0, 0.0], [0.9, 0.1, 0.0]], 1e-6)


def test_weighted_activations_by_hand() -> None:
    activations = torch.tensor([[[1.0, -2.0], [3.0, 1.0]], [[1.0, 1.0], [1.0, 2.0]]])
    weights = torch.tensor([[2.0, 1.0], [1.0, -1.0]])
    close(F.weighted_activations(activations, weights), [[[5.0, 0.0]], [[0.0, 0.0]]])


def test_there_can_be_as_many_clusters_as_channels() -> None:
    """The maps of three channels with two positions, normalised: (0, 1), (1, 0) and (0, 0)."""
    few = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]])
    for groups in (3, 5):
        assert sorted(F.cluster_channels(few, groups)[0].tolist()) == [0, 1, 2]


def test_a_function_that_does_not_depend_on_the_score_has_no_derivatives() -> None:
    constant, gradients = torch.ones((), requires_grad=True), torch.tensor([[[2.0, -1.0]]])
    first, _, _ = F.smooth_derivatives(lambda score: constant.expand_as(score), torch.tensor([1.0]), gradients)
    assert (first == 0).all()


def test_weights_of_layers_without_gradients_and_activations_are_equal() -> None:
    nothing = torch.zeros(1, 4)
    for weighting in ("mean", "product", "uniform"):
        close(F.layer_weights(nothing, nothing, weighting), [[0.25] * 4])
    close(F.layer_weights(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), "product"), [[0.5, 0.5]])


# ------------------------------------------------------------------------------------------------------- contributions


def test_contribution_by_hand() -> None:
    score, baseline = torch.tensor([0.8, 0.1, 0.5, 1.0, 2e-9]), torch.tensor([0.2, 0.4, 0.5, 1.0 - 2.5e-5, 1e-9])
    close(F.contribution(score, baseline), [0.6, -0.3, 0.0, 0.0, 1e-9], 1e-6)
    assert F.contribution(torch.tensor(1.0), torch.tensor(1.0 - 1e-4)) > 0


def test_the_floor_of_a_contribution_is_relative_to_the_larger_score() -> None:
    score, baseline = torch.tensor([1000.0, 0.001, -1000.0, 1000.0]), torch.tensor([999.98, 0.00099, -999.98, 999.9])
    close(F.contribution(score, baseline), [0.0, 1e-5, 0.0, 0.1], 1e-4)


def test_gain_has_no_room_above_1() -> None:
    """Scores above 1 are no probabilities, and what is missing to 1 is then nothing."""
    close(F.gain(torch.tensor([0.5, 1.0, 1.25]), torch.tensor([0.625, 1.5, 1.5])), [25.0, 0.0, 0.0])


def test_contribution_weights_by_hand() -> None:
    pairs = torch.tensor([[0.3, 0.1], [-0.2, 0.4], [0.4, -0.2], [-0.2, -0.1], [0.0, 0.0], [1e-30, 3e-30]])
    expected = [[0.75, 0.25], [0.0, 1.0], [1.0, 0.0], [0.5, 0.5], [0.5, 0.5], [0.25, 0.75]]
    close(F.contribution_weights(*pairs.T), expected, 1e-6)


@robust
@given(arrays(shape=(4, 2)))
def test_contribution_weights_sum_to_1(pairs: np.ndarray) -> None:
    weights = F.contribution_weights(*torch.from_numpy(pairs).T).numpy()
    assert ((weights >= 0) & (weights <= 1)).all()
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-12)
    for (first, second), (w, v) in zip(pairs, weights, strict=True):
        assert (w - v) * (max(first, 0) - max(second, 0)) >= 0, "the larger contribution has the larger weight"
        if first <= 0 < second:
            assert (w, v) == (0, 1)


# ---------------------------------------------------------------------------------------------------------- similarity


def test_product_and_mean_of_the_maps_of_several_layers() -> None:
    """RefineCAM's product, as by the authors' code: upsample, normalise, multiply and normalise."""
    generator = torch.Generator().manual_seed(0)
    late, early = (torch.rand(2, 1, size, size, generator=generator) for size in (3, 8))
    late[1] = 1.0
    raised = torch.nn.functional.interpolate(late, (8, 8), mode="bilinear", align_corners=False)
    for example in range(2):
        a, b = (m[example] - m[example].min() for m in (raised, early))
        a, b = (m / m.max() if m.max() > 0 else m for m in (a, b))
        for formula, expected in (F.product_map, a * b), (F.mean_map, (a + b) / 2):
            expected = expected - expected.min()
            if expected.max() > 0:
                expected = expected / expected.max()
            torch.testing.assert_close(formula([late, early], (8, 8))[example], expected)
            torch.testing.assert_close(formula([early, late], (8, 8))[example], expected)
    for formula in (F.product_map, F.mean_map):
        with pytest.raises(ValueError, match="maps must have at least one map"):
            formula([], (8, 8))


def test_product_is_torchcams_refine_cam() -> None:
    methods = pytest.importorskip("torchcam.methods")
    if not hasattr(methods, "RefineCAM"):
        pytest.skip("this torchcam has no RefineCAM")
    maps = list(torch.rand(3, 2, 1, 6, 6, generator=torch.Generator().manual_seed(0)))
    theirs = methods.RefineCAM.fuse_cams([single[:, 0].clone() for single in maps])
    torch.testing.assert_close(F.product_map(maps, (6, 6))[:, 0], theirs, rtol=1e-5, atol=1e-6)


def test_similarity_fusion_by_hand() -> None:
    fused, similarity = F.similarity_fusion(torch.tensor([0.5, 1.0, 0.75, 3.0]), torch.tensor([0.5, 0.0, 0.25, 0.0]))
    close(similarity, [1.0, 0.0, 0.5, 0.0])
    close(fused, [0.5, 0.5, 0.625, 1.5])


@robust
@given(arrays(unit, (8,)), arrays(unit, (8,)))
def test_similarity_fusion_is_max_minus_half_the_squared_difference(first: np.ndarray, second: np.ndarray) -> None:
    fused, similarity = F.similarity_fusion(torch.from_numpy(first), torch.from_numpy(second))
    close(fused, np.maximum(first, second) - (first - second) ** 2 / 2, 1e-14)
    close(similarity, 1 - np.abs(first - second), 1e-14)


@robust
@given(arrays(unit, (8,)), arrays(unit, (8,)), arrays(unit, (8,)))
def test_similarity_fusion_properties(first: np.ndarray, second: np.ndarray, more: np.ndarray) -> None:
    def fuse(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return F.similarity_fusion(torch.from_numpy(a), torch.from_numpy(b))[0].numpy()

    fused = fuse(first, second)
    assert (fused >= (first + second) / 2 - 1e-14).all()
    assert (fused <= np.maximum(first, second) + 1e-14).all()
    np.testing.assert_allclose(fuse(second, first), fused, atol=1e-14)
    assert (fuse(np.maximum(first, more), second) >= fused - 1e-14).all(), "monotone in each argument"


# ------------------------------------------------------------------------------------------- gradient maps, GAP heads


def test_grad_cam_by_hand() -> None:
    activations = torch.tensor([[[1.0, 2.0], [0.0, 4.0]]])
    gradients = torch.tensor([[[1.0, 3.0], [-2.0, 0.0]]])
    close(F.grad_cam(activations, gradients), [[[2.0, 0.0]]])


def test_union_gradient_map_by_hand() -> None:
    activations = torch.tensor([[[1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 2.0, 2.0], [9.0, 9.0, 9.0, 9.0]]])
    gradients = torch.tensor([[[1.0, 2.0, 3.0, 5.0], [-1.0, -1.0, 4.0, -1.0], [-1.0, -2.0, -3.0, 0.0]]])
    # The median of channel 0 is 2.5: 3 and 5 are kept, with sum 8. Channel 1 keeps 4; channel 2 has no positive value.
    close(F.union_gradient_map(activations, gradients, 50.0, "sum"), [[[0.0, 0.0, 9 / 8 + 2.0, 20 / 8]]])
    close(F.union_gradient_map(activations, gradients, 50.0, "count"), [[[0.0, 0.0, 9 / 2 + 8.0, 20 / 2]]])
    close(F.union_gradient_map(activations, gradients, 0.0, "sum"), [[[1 / 11, 4 / 11, 9 / 11 + 2.0, 20 / 11]]], 1e-6)


@robust
@given(arrays(shape=(2, 3, 4)), st.floats(0, 100))
def test_alpha_sum_gives_every_channel_with_a_positive_gradient_the_same_weight(g: np.ndarray, theta: float) -> None:
    gradients = torch.from_numpy(np.where(np.abs(g) < 1, 0, g))
    total = F.union_gradient_map(torch.ones_like(gradients), gradients, theta, "sum").sum((1, 2))
    close(total, (gradients > 0).any(2).sum(1), 1e-9)


class GapHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.head = nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.conv(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def gap() -> tuple[Tensor, list[Tensor], Tensor]:
    """Activations, gradients for each class, and the head's weights of a network that ends in global pooling."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model, x = GapHead().double().eval(), torch.randn(4, 3, 11, 9, dtype=torch.float64)
    activations = model.relu(model.conv(x))
    outputs = model.head(activations.mean((2, 3)))
    gradients = [torch.autograd.grad(outputs[:, c].sum(), activations, retain_graph=True)[0] for c in range(6)]
    return activations.detach(), gradients, model.head.weight.detach()


@pytest.mark.parametrize("theta", [0.0, 10.0, 50.0, 100.0])
def test_gap_head_denoising_changes_nothing(gap: tuple[Tensor, list[Tensor], Tensor], theta: float) -> None:
    _, gradients, weight = gap
    for c, gradient in enumerate(gradients):
        assert torch.equal(F.denoise_gradients(gradient, theta), gradient)
        close(gradient[0, :, 0, 0] * gradient[0, 0].numel(), weight[c])
        # Rounding noise within a channel must have no effect either.
        noise = torch.rand(gradient.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(c))
        noisy = gradient * (1 + 1e-8 * noise)
        assert torch.equal(F.denoise_gradients(noisy, theta), noisy)


def test_gap_head_alpha_sum_depends_on_the_class_only_through_signs(gap: tuple[Tensor, list[Tensor], Tensor]) -> None:
    activations, gradients, weight = gap
    for c, gradient in enumerate(gradients):
        expected = activations[:, weight[c] > 0].sum(1, keepdim=True) / activations[0, 0].numel()
        close(F.union_gradient_map(activations, gradient, 10.0, "sum"), expected)
        rescaled = gradient * torch.linspace(0.1, 10, gradient.shape[1], dtype=gradient.dtype)[:, None, None]
        close(F.union_gradient_map(activations, rescaled, 10.0, "sum"), expected)


def test_gap_head_alpha_count_is_positive_grad_cam(gap: tuple[Tensor, list[Tensor], Tensor]) -> None:
    activations, gradients, weight = gap
    maps = []
    for c, gradient in enumerate(gradients):
        result = F.union_gradient_map(activations, gradient, 10.0, "count")
        positive = (weight[c].relu()[:, None, None] * activations).sum(1, keepdim=True)
        close(F.normalize(result), F.normalize(positive))
        close(result, F.grad_cam(activations, gradient.relu()) / activations[0, 0].numel())
        maps.append(F.normalize(result))
    assert min((maps[i] - maps[j]).abs().max() for i in range(6) for j in range(i)) > 0.05, "class-specific"


# -------------------------------------------------------------------------------------------------------------- scores


def test_score_functions() -> None:
    output = torch.tensor([[0.0, math.log(3.0)]])
    close(F.score_function("softmax")(output), [[0.25, 0.75]], 1e-6)
    close(F.score_function("sigmoid")(output), [[0.5, 0.75]], 1e-6)
    assert torch.equal(F.score_function("identity")(output), output.double())
    close(F.score_function(torch.exp)(output), [[1.0, 3.0]], 1e-6)
    for name in ("softmax", "sigmoid", "identity"):
        assert torch.equal(F.score_function(name)(output[0]), output[0]), "(N,) is the score itself"


def test_softmax_is_over_dimension_1() -> None:
    output = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    close(F.score_function("softmax")(output).sum(1), torch.ones(2, 4), 1e-6)


def test_score_function_errors() -> None:
    with pytest.raises(ValueError, match="score_fn"):
        F.score_function("softmax")(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="score_fn"):
        F.score_function("logits")
    with pytest.raises(TypeError, match="score_fn"):
        F.score_function(None)


# ---------------------------------------------------------------------------------------------------- super-resolution


def test_rotations_are_rigid_and_shifts_are_fractions_of_the_picture() -> None:
    """A pixel at p from the centre samples the picture at R p + shift, in pixels of a picture that is not square."""
    (height, width), angles = (3, 5), np.array([0.3, -1.2])
    shifts = np.array([[0.1, 0.25], [-0.2, 0.0]])
    grids = F.affine_grids(torch.from_numpy(angles), torch.from_numpy(shifts), (height, width))
    assert grids.shape == (2, 3, 5, 2)
    y, x = np.meshgrid(np.arange(3) - 1.0, np.arange(5) - 2.0, indexing="ij")
    for grid, angle, (right, down) in zip(grids, angles, shifts, strict=True):
        across = np.cos(angle) * x - np.sin(angle) * y + right * width
        along = np.sin(angle) * x + np.cos(angle) * y + down * height
        close(grid, np.stack([2 * across / width, 2 * along / height], -1))


@pytest.mark.parametrize("cells", [(2, 3), (3, 2), (6, 9), (1, 1)])
def test_coarsening_is_bilinear_sampling_and_the_mean_of_each_cell(cells: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    angles = torch.rand(4, generator=generator, dtype=torch.float64)
    shifts = torch.rand(4, 2, generator=generator, dtype=torch.float64) - 0.5
    fine = torch.rand(1, 1, 6, 9, generator=generator, dtype=torch.float64)
    grids = F.affine_grids(angles, shifts, (6, 9))
    moved = nn.functional.grid_sample(fine.expand(4, -1, -1, -1), grids, align_corners=False)  # 0 outside
    y, x = (np.arange(pixels) * n // pixels for pixels, n in zip((6, 9), cells, strict=True))
    means = [[moved[:, 0, y == i][:, :, x == j].mean((1, 2)) for j in range(cells[1])] for i in range(cells[0])]
    found = F.coarsening(grids, cells) @ fine.flatten()
    close(found.reshape(4, *cells), torch.stack([torch.stack(row, -1) for row in means], 1))


def super_resolution_loss(fine: Tensor, maps: Tensor, grids: Tensor, tv_weight: float, energy_weight: float) -> Tensor:
    """The documented objective for one example: a map (1, height, width) for coarse ones (L, h, w), NaN left out."""
    moved = nn.functional.grid_sample(fine.expand(len(maps), 1, -1, -1), grids, align_corners=False)
    errors = nn.functional.adaptive_avg_pool2d(moved, maps.shape[1:])[:, 0] - maps
    variation = sum((fine.diff(dim=dim).square() + 0.003**2).sqrt().sum() for dim in (1, 2))
    return errors[maps.isfinite()].square().sum() + tv_weight * variation + energy_weight * fine.square().sum()


@pytest.mark.parametrize(("tv_weight", "energy_weight"), [(0.0, 0.0), (0.02, 0.05), (0.3, 0.0), (0.0, 1.0)])
def test_super_resolution_takes_adams_steps_on_its_objective(tv_weight: float, energy_weight: float) -> None:
    """The same steps with gradients from autograd, for each example alone."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(2, 3, 2, 3, generator=generator, dtype=torch.float64)
    maps[1, 2] = torch.nan  # not defined: left out, of this example alone
    shifts = 0.2 * torch.rand(3, 2, generator=generator, dtype=torch.float64)
    grids = F.affine_grids(torch.tensor([0.0, 0.4, -0.3], dtype=torch.float64), shifts, (4, 6))
    found = F.super_resolve(maps, grids, tv_weight, energy_weight, iterations=30, rate=0.01)
    assert found.dtype is torch.float64
    assert not found.is_inference(), "usable where gradients are computed"
    for example, result in zip(maps, found, strict=True):
        fine = torch.zeros(1, 4, 6, dtype=torch.float64, requires_grad=True)
        adam = torch.optim.Adam([fine], lr=0.01)
        for _ in range(30):
            adam.zero_grad()
            super_resolution_loss(fine, example, grids, tv_weight, energy_weight).backward()
            adam.step()
        close(result, fine, 1e-9)


def test_the_first_step_of_super_resolution_has_the_length_of_the_rate() -> None:
    """Adam's first step is its rate in each coordinate, whatever the gradient."""
    maps, grids = torch.tensor([[[[2.0, -3.0]]]]), F.affine_grids(torch.zeros(1), torch.zeros(1, 2), (1, 2))
    close(F.super_resolve(maps, grids, 0.0, 0.0, iterations=1), [[[[1e-3, -1e-3]]]], 1e-8)
    close(F.super_resolve(maps, grids, 0.0, 0.0, iterations=1, rate=0.5), [[[[0.5, -0.5]]]], 1e-6)


# --------------------------------------------------------------------------------------------------------------- blurs


def test_rise_blur_is_that_of_rises_code() -> None:
    """The kernel: scipy's Gaussian filter of an impulse in a window of 11 pixels; a convolution padded with zeros."""
    impulse = np.zeros((11, 11))
    impulse[5, 5] = 1
    kernel = scipy.ndimage.gaussian_filter(impulse, 5)
    assert kernel.max() / kernel.min() == pytest.approx(1.14, abs=0.01), "not a truncated Gaussian, which has 2.72"
    for shape in ((1, 3, 20, 31), (2, 1, 4, 7)):
        x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        expected = np.stack([[scipy.ndimage.convolve(c, kernel, mode="constant") for c in each] for each in x.numpy()])
        np.testing.assert_allclose(F.rise_blur(x).numpy(), expected, atol=1e-12)
    line, box = torch.randn(1, 2, 9), torch.randn(1, 1, 5, 6, 7)
    assert (F.rise_blur(line).shape, F.rise_blur(box).shape) == (line.shape, box.shape)
    assert F.rise_blur(line.bfloat16()).dtype == torch.float32


def test_insertion_as_rise_starts_at_rises_blur() -> None:
    x, maps = torch.rand(2, 3, 16, 16), torch.rand(2, 1, 16, 16)

    def darkness(inputs: torch.Tensor) -> torch.Tensor:
        return -(inputs - 0.5).square().mean((1, 2, 3))

    scores = insertion(darkness, x, maps, preset="rise").scores
    close(scores[:, 0].float(), darkness(F.rise_blur(x)), 1e-6)
    own = insertion(darkness, x, maps, preset="rise", baselines=F.gaussian_blur(x, 11, 5.0)).scores
    assert (scores[:, 0] - own[:, 0]).abs().min() > 1e-4
