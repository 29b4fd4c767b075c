"""ROAD against a dense solution of its linear system, and against values computed by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

from captum_fusion import LayerScoreCAM
from captum_fusion.metrics import Road, road
from captum_fusion.metrics.road import impute
from tests.networks import Counter, TwoInputs, hooks_on, images, make
from tests.test_contract import same


def dense(image: Any, known: Any) -> Any:
    """Each missing pixel is the weighted mean of its neighbours: all pixels as unknowns of one dense system."""
    height, width = known.shape
    system, right = np.eye(height * width), image.reshape(len(image), -1).T.copy()
    for i, j in zip(*np.nonzero(~known), strict=True):
        pixel = i * width + j
        right[pixel] = 0
        neighbours = {
            (i + a) * width + j + b: 1 / 6 if a == 0 or b == 0 else 1 / 12
            for a in (-1, 0, 1)
            for b in (-1, 0, 1)
            if (a or b) and 0 <= i + a < height and 0 <= j + b < width
        }
        for other, weight in neighbours.items():
            system[pixel, other] = -weight / sum(neighbours.values())
    return np.linalg.solve(system, right).T.reshape(image.shape)


@settings(deadline=None, max_examples=60)
@given(hnp.arrays(np.bool_, (6, 6)).filter(np.any), st.integers(0, 1000))
def test_imputation_is_the_dense_solution(known: Any, seed: int) -> None:
    image = images(3, 6, 6, seed=seed)
    found = impute(image[None], torch.from_numpy(known)[None], noise=0.0)[0]
    assert found.numpy() == pytest.approx(dense(image.double().numpy(), known), abs=1e-5)
    assert torch.equal(found[:, torch.from_numpy(known)], image[:, torch.from_numpy(known)])
    for channel, filled in zip(image[:, known], found, strict=True):
        assert channel.min() - 1e-5 <= filled.min(), "a mean of neighbours leaves their range nowhere"
        assert filled.max() <= channel.max() + 1e-5


def test_imputation_by_hand() -> None:
    x = torch.tensor([[[[1.0, 9.0, 4.0], [9.0, 9.0, 9.0]]]])
    known = torch.tensor([[[True, False, True], [True, True, True]]])
    centre = (1 / 6 * (1 + 4 + 9) + 1 / 12 * (9 + 9)) / (3 / 6 + 2 / 12)
    assert impute(x, known, noise=0.0)[0, 0, 0].tolist() == pytest.approx([1, centre, 4])
    assert torch.equal(impute(x, torch.ones_like(known)), x), "nothing to impute"
    colours = images(1, 3, 4, 5)
    gone = impute(colours, torch.zeros(1, 4, 5, dtype=torch.bool), noise=0.0)
    same(gone, colours.mean((2, 3), keepdim=True).expand_as(gone))
    assert impute(colours.half(), torch.rand(1, 4, 5) > 0.5).dtype is torch.float16


def test_noise() -> None:
    x = images(1, 3, 40, 40).expand(3, -1, -1, -1)
    known = torch.zeros(3, 40, 40, dtype=torch.bool)
    known[:, :20] = True
    known[2] = False
    plain, noisy = impute(x, known, noise=0.0), impute(x, known, noise=0.1)
    extra = noisy - plain
    assert (extra[:2, :, :20] == 0).all(), "on imputed pixels only"
    same(extra[0], extra[1])
    same(extra[0, :, 20:], extra[2, :, 20:])
    assert float(extra[2].std()) == pytest.approx(0.1, rel=0.05)
    assert float(extra[2].mean()) == pytest.approx(0, abs=0.01)
    assert not torch.equal(impute(x, known, noise=0.1, seed=1), noisy)
    state = torch.get_rng_state()
    assert torch.equal(impute(x, known, noise=0.1), noisy)
    assert torch.equal(torch.get_rng_state(), state)


class Left(nn.Module):
    """The mean of the left half, and of the right half."""

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return torch.stack([x[..., :half].mean((1, 2, 3)), x[..., half:].mean((1, 2, 3))], 1)


def test_road_by_hand() -> None:
    image = torch.tensor([[[[4.0, 4.0, 0.0, 0.0]] * 3]])
    options: dict[str, Any] = {"noise": 0.0, "score_fn": "identity"}
    found = road(Left().eval(), image, image, 0, percentiles=[0, 50, 100], **options)
    assert isinstance(found, Road)
    assert found.percentiles.tolist() == [0, 50, 100]
    same(found.morf, torch.tensor([[4.0, 0.0, 2.0]]).double())
    same(found.lerf, torch.tensor([[4.0, 4.0, 2.0]]).double())
    same(found.combined, torch.tensor([4 / 2 / 3]).double())
    other = road(Left().eval(), image, image, 1, percentiles=[50], **options)
    assert other.combined.tolist() == pytest.approx([2]), "either half becomes what the other is"
    wrong = road(Left().eval(), image, -image, 0, percentiles=[50], **options)
    assert wrong.combined.tolist() == pytest.approx([-2])
    constant = road(make(), images(2, 3, 8, 8), torch.ones(2, 1, 8, 8), 1)
    assert constant.percentiles.tolist() == [10, 20, 30, 40, 50, 60, 70, 80, 90]
    assert constant.combined.tolist() == pytest.approx([0, 0], abs=1e-7)


def test_road_is_a_loop_over_imputed_images() -> None:
    model, x, targets = make(), images(3, 3, 8, 8), [0, 3, 1]
    maps = LayerScoreCAM(model, model.conv2).attribute(x, targets)
    counter = Counter(model)
    found = road(counter, x, maps, targets, percentiles=(10, 50, 98), seed=3)
    assert counter.rows == 3 * (1 + 2 * 3)
    up = nn.functional.interpolate(maps, (8, 8), mode="bilinear")
    for i, target in enumerate(targets):
        flat = up[i].flatten().numpy()
        for column, gone in enumerate((6, 32, 63)):
            for scores, order in (
                (found.morf, np.argsort(-flat, kind="stable")),
                (found.lerf, np.argsort(flat, kind="stable")),
            ):
                known = torch.ones(64, dtype=torch.bool)
                known[torch.from_numpy(order[:gone])] = False
                with torch.no_grad():
                    row = model(impute(x[[i]], known.reshape(1, 8, 8), seed=3)).softmax(1)[0, target]
                assert float(scores[i, column]) == pytest.approx(float(row), abs=1e-5)
    same(found.combined, ((found.lerf - found.morf) / 2).mean(1))


def test_batches_and_chunks() -> None:
    model, x, targets = make(), images(3, 3, 8, 8), [0, 3, 1]
    maps = x.abs()
    found = road(model, x, maps, targets)
    for i in range(3):
        for whole, part in zip(found[:3], road(model, x[[i]], maps[[i]], targets[i])[:3], strict=True):
            same(whole[[i]], part)
    for chunk in (1, 2, 1000):
        same(road(model, x, maps, torch.tensor(targets), perturbations_per_eval=chunk).combined, found.combined)
    assert found.morf.shape == (3, 9)
    assert not torch.allclose(road(model, x, maps, targets, noise=1.0).morf, found.morf)
    assert hooks_on(model) == 0
    with torch.inference_mode():
        same(road(model, x.clone(), maps, targets).combined.clone(), found.combined)


def test_several_inputs() -> None:
    model, x = make(TwoInputs), (images(2, 3, 8, 8), images(2, 3, 12, 12), images(2, 5))
    maps = torch.rand(2, 1, 4, 4)
    both, one = road(model, x, maps, 1), road(model, x, maps, 1, mask_inputs=[0])
    assert both.combined.shape == (2,)
    assert not torch.allclose(both.combined, one.combined)


def test_other_scores() -> None:
    model, x = make(), images(2, 3, 8, 8)
    raw = road(model, x, x, 1, score_fn="identity", percentiles=[0])
    with torch.no_grad():
        same(raw.morf[:, 0].float(), model(x)[:, 1])


def test_errors_of_road() -> None:
    model, x = make(), images(2, 3, 8, 8)
    for name, bad in (
        ("percentiles", ()),
        ("percentiles", 50),
        ("percentiles", (10, 101)),
        ("percentiles", (-1,)),
        ("percentiles", ("10",)),
        ("percentiles", "10"),
        ("percentiles", (float("nan"),)),
        ("noise", -1),
        ("noise", None),
        ("seed", -1),
        ("seed", 0.5),
        ("score_fn", "logit"),
        ("perturbations_per_eval", 0),
    ):
        with pytest.raises(ValueError, match=name):
            road(model, x, x, 1, **{name: bad})
    with pytest.raises(ValueError, match="attributions must be of shape"):
        road(model, x, x[:1], 1)
    with pytest.raises(AssertionError):
        road(model, x, x)
    for dims in (1, 3):
        line = images(2, 3, *[6] * dims)
        with pytest.raises(ValueError, match="inputs: road needs two spatial dimensions"):
            road(make(dims=dims), line, line, 1)
