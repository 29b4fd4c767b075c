"""Confidence and causal metrics, against curves computed by hand and torchcam's."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from captum_fusion import LayerScoreCAM
from captum_fusion.metrics import (
    average_drop,
    average_gain,
    average_increase,
    complexity,
    confidences,
    deletion,
    insertion,
)
from captum_fusion.metrics.causal import PRESETS
from tests.networks import Counter, TwoInputs, hooks_on, images, make
from tests.test_contract import same

METRICS = [average_drop, average_increase, average_gain]
CURVES = [insertion, deletion]


class Sum(nn.Module):
    """Two scores: the sum of the pixels, and twice that; no softmax."""

    def forward(self, x: Tensor) -> Tensor:
        total = x.sum((1, 2, 3))
        return torch.stack([total, 2 * total], 1)


PIXELS = torch.tensor([[1.0, 5.0, 2.0], [4.0, 3.0, 6.0]]).reshape(1, 1, 2, 3)
ORDER = torch.tensor([[0.1, 0.5, 0.2], [0.4, 0.5, 0.9]]).reshape(1, 1, 2, 3)  # 6, then 5 before 3, 4, 2, 1


def test_curves_of_a_sum_by_hand() -> None:
    model, raw = Sum().eval(), {"score_fn": "identity"}
    gone = deletion(model, PIXELS, ORDER, 0, steps=6, **raw)
    assert gone.scores.tolist() == [[21, 15, 10, 7, 3, 1, 0]]
    assert gone.shares.tolist() == pytest.approx([i / 6 for i in range(7)])
    assert float(gone.auc) == pytest.approx((21 / 2 + 15 + 10 + 7 + 3 + 1) / 6)
    come = insertion(model, PIXELS, ORDER, 1, steps=6, baselines=0, **raw)
    assert come.scores.tolist() == [[0, 12, 22, 28, 36, 40, 42]]
    partial = deletion(model, PIXELS, ORDER, 0, steps=4, **raw)  # steps of two pixels: three of them
    assert partial.scores.tolist() == [[21, 10, 3, 0]]
    last = deletion(model, PIXELS[..., :1, :].repeat(1, 1, 1, 1), ORDER[..., :1, :], 0, steps=2, **raw)
    assert last.scores.tolist() == [[8, 1, 0]]
    assert last.shares.tolist() == pytest.approx([0, 2 / 3, 1])
    assert float(last.auc) == pytest.approx((8 + 1) / 2 * 2 / 3 + 1 / 2 * 1 / 3), "the last step is narrower"
    shifted = deletion(model, PIXELS, ORDER, 0, steps=6, baselines=torch.full((1, 1, 2, 3), 10.0), **raw)
    assert shifted.scores.tolist() == [[21, 25, 30, 37, 43, 51, 60]]


def test_insertion_begins_at_the_blurred_input() -> None:
    model, x = make(), images(2, 3, 8, 8)
    blurred = insertion(model, x, x.abs(), [1, 3], preset="rise", steps=4)
    impulse = np.zeros((11, 11))
    impulse[5, 5] = 1
    kernel = torch.from_numpy(gaussian_filter(impulse, 5)).float().expand(3, 1, 11, 11)
    with torch.no_grad():
        start = model(nn.functional.conv2d(x, kernel, padding=5, groups=3)).softmax(1)[[0, 1], [1, 3]]
        end = model(x).softmax(1)[[0, 1], [1, 3]]
    same(blurred.scores[:, 0].float(), start)
    same(blurred.scores[:, -1].float(), end)
    gone = deletion(model, x, x.abs(), [1, 3], steps=4)
    same(gone.scores[:, 0].float(), end)


def test_steps_of_the_papers() -> None:
    x, maps = torch.ones(1, 1, 224, 224), torch.rand(1, 1, 7, 7, generator=torch.Generator().manual_seed(0))
    model = Sum().eval()
    for preset, (steps, pixels) in {"rise": (224, 224), "groupcam": (28, 1792), "groupcam_head": (112, 448)}.items():
        counted = Counter(model)
        curve = deletion(counted, x, maps, 0, preset=preset, score_fn="identity")
        assert PRESETS[preset].steps == steps
        assert curve.scores.shape == (1, steps + 1)
        same(curve.scores[0, 1] - curve.scores[0, 0], torch.tensor(-float(pixels), dtype=torch.float64))
        assert counted.rows == steps + 1, "both ends are one row each"


@pytest.mark.parametrize("metric", [*METRICS, *CURVES])
def test_batches_chunks_and_targets(metric: Any) -> None:
    model, x, targets = make(), images(3, 3, 8, 8), [0, 3, 1]
    maps = LayerScoreCAM(model, model.conv2).attribute(x, targets)
    found = metric(model, x, maps, targets)
    alone = [metric(model, x[[i]], maps[[i]], targets[i]) for i in range(3)]
    parts = (lambda value: (value.auc, value.scores)) if metric in CURVES else (lambda value: (value,))
    for whole, single in zip(parts(found), zip(*map(parts, alone), strict=True), strict=True):
        same(whole, torch.cat(single))
        assert whole.shape[0] == 3
    for chunk in (1, 2, 1000):
        same(parts(metric(model, x, maps, torch.tensor(targets), perturbations_per_eval=chunk))[0], parts(found)[0])
    same(parts(metric(model, x, maps.repeat(1, 2, 1, 1) / 2, targets))[0], parts(found)[0])
    others = metric(model, x, maps, [1, 0, 2])
    assert not torch.allclose(parts(others)[-1], parts(found)[-1]) or metric is average_increase


def test_confidence_by_hand() -> None:
    class Probability(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            share = x.mean((1, 2, 3))
            return torch.stack([share, 1 - share], 1)

    model, x = Probability().eval(), torch.full((2, 1, 2, 2), 0.8)
    maps = torch.tensor([[[[2.0, 0.0], [0.0, 0.0]]], [[[1.0, 1.0], [-3.0, 1.0]]]])
    whole, part = confidences(model, x, maps, 0, score_fn="identity")
    same(whole, torch.tensor([0.8, 0.8], dtype=torch.float64))
    same(part, torch.tensor([0.2, 0.6], dtype=torch.float64))
    same(average_drop(model, x, maps, 0, score_fn="identity"), torch.tensor([75.0, 25.0], dtype=torch.float64))
    same(average_drop(model, x, maps, 1, score_fn="identity"), torch.zeros(2, dtype=torch.float64))
    same(average_increase(model, x, maps, [0, 1], score_fn="identity"), torch.tensor([0.0, 100.0]).double())
    same(average_gain(model, x, maps, [0, 1], score_fn="identity"), torch.tensor([0.0, 25.0]).double())
    same(complexity(maps), torch.tensor([0.25, 0.75]))
    same(confidences(model, x, maps, 0, score_fn="identity", baselines=0.4)[1], torch.tensor([0.5, 0.7]).double())


def test_a_map_of_ones_fools_average_drop() -> None:
    model, x = make(), images(4, 3, 8, 8)
    ones = torch.ones(4, 1, 8, 8)
    assert (average_drop(model, x, ones, 1, normalize=False) == 0).all()
    assert (average_increase(model, x, ones, 1, normalize=False) == 0).all(), "not by rounding errors"
    assert (complexity(ones, normalize=False) == 1).all()


def test_torchcams_metric() -> None:
    metrics = pytest.importorskip("torchcam.metrics")
    methods = pytest.importorskip("torchcam.methods")
    model, x = make(), images(6, 3, 8, 8)
    with methods.LayerCAM(model, "conv2") as extractor:
        metric = metrics.ClassificationMetric(extractor, lambda logits: logits.softmax(-1))
        metric.update(x)
        summary = metric.summary()
        target = model(x).argmax(1).tolist()
        cams = extractor(target, model(x))[0]
    maps = nn.functional.interpolate(cams[:, None], (8, 8), mode="bilinear")
    own = (
        average_drop(model, x, maps, target, normalize=False),
        average_increase(model, x, maps, target, normalize=False),
    )
    assert summary["avg_drop"] == pytest.approx(float(own[0].mean()) / 100, abs=1e-5)
    assert summary["conf_increase"] == pytest.approx(float(own[1].mean()) / 100, abs=1e-5)


def test_several_inputs() -> None:
    model, x = make(TwoInputs), (images(2, 3, 8, 8), images(2, 3, 12, 12), images(2, 5))
    maps = torch.rand(2, 1, 4, 4)
    assert deletion(model, x, maps, 1, steps=5).scores.shape == (2, 6)
    only = average_drop(model, x, maps, 1, mask_inputs=[0])
    assert not torch.allclose(only, average_drop(model, x, maps, 1))
    with pytest.raises(
        ValueError, match=r"mask_inputs must be indices of floating point inputs of rank 4, not \[0, 2\]"
    ):
        average_drop(model, x, maps, 1, mask_inputs=[0, 2])


@pytest.mark.parametrize("metric", [*METRICS, *CURVES])
def test_errors_of_metrics(metric: Any) -> None:
    model, x = make(), images(2, 3, 8, 8)
    assert list(inspect.signature(metric).parameters)[:5] == [
        "forward_func",
        "inputs",
        "attributions",
        "target",
        "additional_forward_args",
    ]
    for wrong in (torch.rand(3, 1, 8, 8), torch.rand(2, 8, 8), None):
        with pytest.raises(ValueError, match=r"attributions must be of shape \(2, channels, 2 spatial"):
            metric(model, x, wrong, 1)
    for target in (None, [0], "cat"):
        with pytest.raises(AssertionError):
            metric(model, x, torch.rand(2, 1, 8, 8), target)
    with pytest.raises(ValueError, match="score_fn"):
        metric(model, x, torch.rand(2, 1, 8, 8), 1, score_fn="logit")
    with pytest.raises(ValueError, match="perturbations_per_eval"):
        metric(model, x, torch.rand(2, 1, 8, 8), 1, perturbations_per_eval=0)
    if metric in CURVES:
        for name, value in {"preset": "none", "steps": 0}.items():
            with pytest.raises(ValueError, match=name):
                metric(model, x, torch.rand(2, 1, 8, 8), 1, **{name: value})
    else:
        with pytest.raises(ValueError, match="attributions must be in"):
            metric(model, x, torch.rand(2, 1, 8, 8) - 2, 1, normalize=False)
    assert hooks_on(model) == 0
    with pytest.raises(ValueError, match="baselines"):
        insertion(model, x, torch.rand(2, 1, 8, 8), 1, baselines="grey")
