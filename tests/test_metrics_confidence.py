"""Win rate, coherency, ADCC and over-all, against values computed by hand and against independent loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from captum_fusion import LayerFusionCAM, LayerScoreCAM, functional, metrics, shared_work
from captum_fusion.metrics import (
    ADCC,
    adcc,
    average_drop,
    coherency,
    confidences,
    deletion,
    explanation_func,
    insertion,
    overall,
    win_rate,
)
from captum_fusion.metrics.similarity import correlation
from tests.networks import Counter, TwoInputs, hooks_on, images, make
from tests.test_contract import same


class Mean(nn.Module):
    """The mean of the pixels and 1 minus it: probabilities of two classes."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        share = x.mean((1, 2, 3))
        share = share if scale is None else share * scale
        return torch.stack([share, 1 - share], 1)


RAW: dict[str, Any] = {"score_fn": "identity"}


def row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(1, 1, 1, -1)


# ------------------------------------------------------------------------------------------------------- win rate


def test_win_rate_by_hand() -> None:
    model, x = Mean().eval(), torch.full((1, 1, 1, 4), 0.8)
    much, little = row(1, 1, 1, 0), row(1, 0, 0, 0)
    assert win_rate(model, x, much, 0, other_attributions=little, **RAW).tolist() == [100]
    assert win_rate(model, x, little, 0, other_attributions=much, **RAW).tolist() == [0]
    assert win_rate(model, x, much, 0, other_attributions=much * 7, **RAW).tolist() == [0], "a tie is no win"
    assert win_rate(model, x, much, 1, other_attributions=little, **RAW).tolist() == [0], "neither drops"
    shifted = win_rate(model, x, little, 0, other_attributions=much, baselines=2.0, **RAW)
    assert shifted.tolist() == [0], "a bright baseline: nothing drops"
    assert win_rate(model, x, little, 1, other_attributions=much, baselines=2.0, **RAW).tolist() == [0]
    assert win_rate(model, x, much, 1, other_attributions=little, baselines=2.0, **RAW).tolist() == [100]


def test_win_rate_is_what_average_drop_says() -> None:
    model, x, targets = make(), images(5, 3, 8, 8), [0, 3, 1, 2, 4]
    own = LayerScoreCAM(model, model.conv2).attribute(x, targets)
    other = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    counter = Counter(model)
    found = win_rate(counter, x, own, targets, other_attributions=other, perturbations_per_eval=1)
    assert counter.rows == 15, "each example once as it is and once under either map"
    drops = [average_drop(model, x, maps, targets) for maps in (own, other)]
    assert found.tolist() == (100.0 * (drops[0] < drops[1])).tolist()
    assert 0 < found.mean() < 100
    alone = [win_rate(model, x[[i]], own[[i]], targets[i], other_attributions=other[[i]]) for i in range(5)]
    same(found, torch.cat(alone))


def test_errors_of_the_win_rate() -> None:
    model, x = make(), images(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"other_attributions must be of shape \(2, channels"):
        win_rate(model, x, x, 1, other_attributions=x[:1])
    with pytest.raises(TypeError, match="other_attributions"):
        win_rate(model, x, x, 1)


# ------------------------------------------------------------------------------------------------------ coherency


class Explainer:
    """Gives fixed maps, and remembers how it was called."""

    def __init__(self, maps: Any) -> None:
        self.maps, self.calls = maps, []

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        self.calls.append((inputs, kwargs))
        return self.maps


def test_coherency_by_hand() -> None:
    x = torch.full((1, 1, 1, 4), 3.0)
    maps = row(0, 1, 2, 4)
    for again, r in (
        (row(0, 1, 2, 4) * 1e-9 + 0, 1.0),
        (row(4, 3, 2, 0) * 5, np.corrcoef([0, 1, 2, 4], [4, 3, 2, 0])[0, 1]),
        (row(0, 1, 1, 0), np.corrcoef([0, 1, 2, 4], [0, 1, 1, 0])[0, 1]),
        (row(-7, 1, -2, 3), np.corrcoef([0, 1, 2, 4], [0, 1, 0, 3])[0, 1]),
        (row(5, 5, 5, 5), -1.0),
        (row(0, 0, 0, 0), -1.0),
        (row(-1, -2, -3, -4), -1.0),
        (row(0, 1, float("nan"), 2), float("nan")),
        (row(0, 1, float("inf"), 2), float("nan")),
    ):
        explain = Explainer(again)
        assert coherency(x, maps, 1, explanation_func=explain).tolist() == pytest.approx(
            [(1 + r) / 2], abs=1e-6, nan_ok=True
        )
        ((masked, kwargs),) = explain.calls
        assert masked.flatten().tolist() == [0, 0.75, 1.5, 3]
        assert kwargs == {"target": 1}
    assert coherency(x, row(2, 2, 2, 2), explanation_func=Explainer(maps)).tolist() == [0], "a constant map"
    assert coherency(x, row(0, float("nan"), 1, 2), explanation_func=Explainer(maps)).isnan().all()
    explain = Explainer(row(-1, 1, 2, 4))
    raw = coherency(x, row(0, 0.5, 1, 0), normalize=False, baselines=1.0, explanation_func=explain)
    assert raw.tolist() == pytest.approx([(1 + np.corrcoef([0, 0.5, 1, 0], [-1, 1, 2, 4])[0, 1]) / 2])
    assert explain.calls[0][0].flatten().tolist() == [1, 2, 3, 1]


def test_coherency_calls_the_method_as_captum_would() -> None:
    x, maps = images(2, 3, 4, 4), torch.rand(2, 1, 4, 4)
    explain = Explainer((maps,))
    scale = torch.tensor([1.0, 2.0])
    same(
        coherency((x,), maps, [1, 0], (scale,), explanation_kwargs={"n": 3}, explanation_func=explain),
        torch.ones(2, dtype=torch.float64),
    )
    ((given_inputs, kwargs),) = explain.calls
    assert isinstance(given_inputs, tuple)
    assert kwargs == {"target": [1, 0], "additional_forward_args": (scale,), "n": 3}
    smaller = Explainer(torch.rand(2, 3, 2, 2))
    assert coherency(x, maps, explanation_func=smaller).shape == (2,), "of another size, with channels"


def test_coherency_records_no_graph() -> None:
    x, maps = images(2, 3, 4, 4).requires_grad_(), torch.rand(2, 1, 4, 4)
    explain, baselines = Explainer(maps), torch.zeros(1, 3, 4, 4).requires_grad_()
    assert not coherency(x, maps, 1, explanation_func=explain, baselines=baselines).requires_grad
    ((masked, _),) = explain.calls
    assert not masked.requires_grad


def test_coherency_of_several_inputs() -> None:
    x = (images(2, 3, 8, 8), images(2, 3, 12, 12), images(2, 5))
    explain = Explainer(torch.rand(2, 1, 4, 4))
    maps = torch.rand(2, 1, 4, 4)
    coherency(x, maps, 1, explanation_func=explain)
    first, second, third = explain.calls[0][0]
    mask = functional.normalize(functional.upsample(maps, (8, 8)))
    same(first, x[0] * mask)
    same(second, x[1] * functional.upsample(mask, (12, 12)))
    same(third, x[2])
    coherency(x, maps, 1, mask_inputs=[1], explanation_func=explain)
    same(explain.calls[1][0][0], x[0])


def test_coherency_runs_nothing_but_the_method() -> None:
    model, x, targets = make(), images(3, 3, 8, 8), [0, 3, 1]
    method = LayerGradCam(model, model.conv2)
    maps = method.attribute(x, targets).detach()
    passes = []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    explain = explanation_func(method)
    with shared_work():
        found = coherency(x, maps, targets, explanation_func=explain)
    handle.remove()
    assert len(passes) == 1
    alone = [coherency(x[[i]], maps[[i]], targets[i], explanation_func=explain) for i in range(3)]
    same(found, torch.cat(alone))
    expected = []
    for i in range(3):
        mask = functional.normalize(functional.upsample(maps[[i]], (8, 8)).relu())
        again = method.attribute(x[[i]] * mask, targets[i]).detach()
        pair = [mask.numpy().ravel(), functional.upsample(again, (8, 8)).relu().numpy().ravel()]
        expected.append((1 + np.corrcoef(*pair)[0, 1]) / 2 if all(each.std() > 0 for each in pair) else 0)
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    with torch.inference_mode():
        assert (
            coherency(x.clone(), maps, targets, explanation_func=LayerFusionCAM(model, model.conv2).attribute)
            .isfinite()
            .all()
        )
    assert hooks_on(model) == 0


def test_errors_of_coherency() -> None:
    x, maps = images(2, 3, 4, 4), torch.rand(2, 1, 4, 4)
    with pytest.raises(TypeError, match="explanation_func must be a callable"):
        coherency(x, maps, explanation_func=None)
    for wrong in (None, (maps, maps), [maps]):
        with pytest.raises(TypeError, match="explanation_func must return one tensor"):
            coherency(x, maps, explanation_func=Explainer(wrong))
    with pytest.raises(ValueError, match="the map of explanation_func must be of shape"):
        coherency(x, maps, explanation_func=Explainer(maps[:1]))
    with pytest.raises(ValueError, match="attributions must be in"):
        coherency(x, maps + 1, normalize=False, explanation_func=Explainer(maps))
    with pytest.raises(ValueError, match="inputs: there is nothing to mask"):
        coherency(torch.rand(2, 5), maps, explanation_func=Explainer(maps))


maps_of_six = st.lists(st.floats(-1e6, 1e6, width=32), min_size=6, max_size=6)


@settings(deadline=None, max_examples=60)
@given(maps_of_six, maps_of_six, st.floats(0.1, 10))
def test_properties_of_coherency(first: list[float], second: list[float], factor: float) -> None:
    x, maps, again = torch.ones(1, 1, 1, 6), row(*first), row(*second)
    found = float(coherency(x, maps, explanation_func=Explainer(again)))
    assert 0 <= found <= 1
    assert float(coherency(x, maps, explanation_func=Explainer(maps))) in (0.0, pytest.approx(1.0))
    assert float(coherency(x, again, explanation_func=Explainer(maps))) == pytest.approx(found, abs=1e-5), "symmetric"
    assert float(coherency(x, maps, explanation_func=Explainer(again * factor))) == pytest.approx(found, abs=1e-3), (
        "scale"
    )


def test_correlation_is_numpys() -> None:
    first, second = images(4, 50), images(4, 50, seed=1) + 1000
    found, defined = correlation(first, second)
    assert defined.all()
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(first.numpy(), second.double().numpy(), strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert correlation(first, torch.full((4, 50), 3.0))[0].tolist() == [0] * 4


# ----------------------------------------------------------------------------------------------------------- ADCC


def test_adcc_by_hand() -> None:
    model, x = Mean().eval(), torch.full((1, 1, 1, 4), 0.8)
    maps = row(1, 0.5, 0, 0)
    found = adcc(model, x, maps, 0, explanation_func=Explainer(row(3, 1, 0, 0)), **RAW)
    assert isinstance(found, ADCC)
    coherent = (1 + np.corrcoef([1, 0.5, 0, 0], [3, 1, 0, 0])[0, 1]) / 2
    assert found.coherency.tolist() == pytest.approx([coherent])
    assert found.complexity.tolist() == pytest.approx([1.5 / 4])
    assert found.average_drop.tolist() == pytest.approx([1 - 1.5 / 4])
    assert found.adcc.tolist() == pytest.approx([3 / (1 / coherent + 1 / (1 - 1.5 / 4) + 1 / (1.5 / 4))])


def test_a_term_of_zero_makes_adcc_zero() -> None:
    model, x = Mean().eval(), torch.full((1, 1, 1, 4), 0.8)
    ones, maps = torch.ones(1, 1, 1, 4), row(1, 0.5, 0, 0)
    everything = adcc(model, x, ones, 0, explanation_func=Explainer(maps), normalize=False, **RAW)
    assert [float(each) for each in everything] == [0, 0, 1, 0], "a map that highlights everything"
    unlike = adcc(model, x, maps, 0, explanation_func=Explainer(ones), **RAW)
    assert (float(unlike.adcc), float(unlike.coherency)) == (0, 0)
    nothing = adcc(model, x, maps * 0, 0, explanation_func=Explainer(maps), **RAW)
    assert [float(each) for each in nothing] == [0, 0, 0, 1]
    negative = adcc(model, x, maps, 0, explanation_func=Explainer(maps), score_fn=lambda out: out - 0.7)
    assert float(negative.average_drop) == 1, "a drop of more than the score counts as all of it"
    assert float(negative.adcc) == 0


def test_adcc_in_batches() -> None:
    model, x, targets = make(), images(3, 3, 8, 8), [0, 3, 1]
    method = LayerFusionCAM(model, model.conv2)
    maps = method.attribute(x, targets)
    found = adcc(model, x, maps, targets, explanation_func=method.attribute)
    for i in range(3):
        alone = adcc(model, x[[i]], maps[[i]], targets[i], explanation_func=method.attribute, perturbations_per_eval=1)
        for whole, part in zip(found, alone, strict=True):
            same(whole[[i]], part)
    same(found.coherency, coherency(x, maps, targets, explanation_func=method.attribute))
    same(100 * found.average_drop, average_drop(model, x, maps, targets))
    whole, part = confidences(model, x, maps, targets)
    by_hand = []
    for coherent, area, y, o in zip(found.coherency, found.complexity, whole, part, strict=True):
        terms = [coherent, 1 - area, 1 - max(0, y - o) / y]
        by_hand.append(0 if min(terms) <= 0 else 3 / sum(1 / term for term in terms))
    assert found.adcc.tolist() == pytest.approx([float(each) for each in by_hand], abs=1e-4)
    scale = torch.tensor([[1.0], [20.0], [30.0]])
    scaled = adcc(model, x, maps, targets, (scale,), explanation_func=method.attribute)
    same(100 * scaled.average_drop, average_drop(model, x, maps, targets, (scale,)))
    assert not torch.allclose(scaled.adcc, found.adcc)


# ------------------------------------------------------------------------------------------------------- over-all


def test_overall_is_insertion_minus_deletion() -> None:
    model, x, targets = make(), images(3, 3, 8, 8), [0, 3, 1]
    maps = x.abs()
    for options in ({}, {"preset": "rise", "steps": 5}, {"perturbations_per_eval": 2, "score_fn": "identity"}):
        gone, come = (metric(model, x, maps, targets, **options).auc for metric in (deletion, insertion))
        same(overall(model, x, maps, targets, **options), come - gone)
    gone = deletion(model, x, maps, targets, baselines=0.5).auc
    come = insertion(model, x, maps, targets, baselines=-0.5).auc
    same(overall(model, x, maps, targets, insertion_baselines=-0.5, deletion_baselines=0.5), come - gone)
    counter = Counter(model)
    overall(counter, x, maps, targets, steps=4)
    assert counter.rows == 3 * (1 + 2 * (3 + 1)), "the unchanged inputs once"


def test_overall_by_hand() -> None:
    x = row(1, 2, 3, 4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 1, bias=False)).eval()
    nn.init.ones_(model[1].weight)
    best = overall(model, x, x, 0, steps=4, insertion_baselines=0, score_fn="identity")
    assert best.tolist() == [((4 + 7 + 9 + 5) - (5 + 6 + 3 + 1)) / 4]
    worst = overall(model, x, -x, 0, steps=4, insertion_baselines=0, score_fn="identity")
    same(best, -worst)


def test_errors_of_overall() -> None:
    model, x = make(), images(2, 3, 8, 8)
    with pytest.raises(ValueError, match="insertion_baselines must be"):
        overall(model, x, x, 1, insertion_baselines="grey")
    with pytest.raises(ValueError, match="steps"):
        overall(model, x, x, 1, steps=0)
    with pytest.raises(AssertionError):
        overall(model, x, x)


def test_two_inputs_and_overall() -> None:
    x = (images(2, 3, 8, 8), images(2, 3, 12, 12), images(2, 5))
    assert overall(make(TwoInputs), x, torch.rand(2, 1, 4, 4), 1, steps=3).shape == (2,)


def test_a_pixel_of_an_input_of_another_size_is_removed_with_most_of_its_area() -> None:
    """The map is 4 x 4; of the input of 2 x 2 a pixel stands for four of its pixels, of 8 x 8 a quarter of one."""
    maps = torch.full((1, 1, 4, 4), 1.0)
    maps[..., :2, :2] = 2.0  # removed in the first of four steps
    sizes = [(4, 4), (2, 2), (8, 8)]
    for i, size in enumerate(sizes):
        x = (torch.ones(1, 1, 4, 4), *(torch.ones(1, 1, *s) for s in sizes))

        def left(*inputs: Tensor, which: int = i + 1) -> Tensor:
            return inputs[which].mean((1, 2, 3))

        assert deletion(left, x, maps, steps=4).scores[0, :2].tolist() == [1.0, 0.75], size


# ---------------------------------------------------------------------------------------------------------- equal area


def test_masks_with_an_area() -> None:
    masks = (
        torch.rand(3, 1, 20, 20, generator=torch.Generator().manual_seed(0))
        ** torch.tensor([0.2, 1, 5])[:, None, None, None]
    )
    for area in (0.1, 0.25, 0.6):
        fitted = functional.with_area(masks, area)
        torch.testing.assert_close(fitted.flatten(1).mean(1), torch.full((3,), area), atol=1e-5, rtol=0)
        assert (fitted.flatten(1).argsort(1) == masks.flatten(1).argsort(1)).all(), "a power keeps the order"
    fitted = functional.with_area(masks, 0.25)
    torch.testing.assert_close(functional.with_area(masks**3, 0.25), fitted, atol=1e-4, rtol=0)


def test_masks_that_cannot_have_the_area() -> None:
    masks = torch.tensor([[0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0]])
    assert (functional.with_area(masks, 0.5) == masks).all()
    assert (functional.with_area(torch.zeros(1, 4), 0.5) == 0).all()


def test_confidences_at_an_area() -> None:
    """The brightness of a constant picture is the mask's area."""
    brightness, image = lambda x: x.mean((1, 2, 3)), torch.ones(2, 1, 4, 4)
    maps = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    _, part = confidences(brightness, image, maps, area=0.3)
    torch.testing.assert_close(part, torch.full((2,), 0.3, dtype=part.dtype), atol=1e-5, rtol=0)
    expected_values = {average_drop: 70.0, metrics.average_increase: 0.0, metrics.average_gain: 0.0}
    for metric, expected in expected_values.items():
        values = metric(brightness, image, maps, area=0.3)
        torch.testing.assert_close(values, torch.full((2,), expected, dtype=values.dtype), atol=1e-3, rtol=0)


@pytest.mark.parametrize("area", [0, 1, -0.1, 2, "0.5", math.nan])
def test_bad_areas(area: Any) -> None:
    with pytest.raises(ValueError, match="area must be a number"):
        confidences(lambda x: x.mean((1, 2, 3)), torch.ones(1, 1, 4, 4), torch.rand(1, 1, 4, 4), area=area)


def test_an_explanation_runs_in_the_callers_autocast() -> None:
    seen = []

    def explain(x: Tensor, target: Any = None, **_: Any) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return x.mean(1, keepdim=True)

    x = images(2, 3, 8, 8)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            coherency(x, x.mean(1, keepdim=True), 1, explanation_func=explain)
    assert seen == [False, True]
