from __future__ import annotations

import pytest
import torch
from captum.attr import LayerGradCam
from captum.metrics import sensitivity_max

from captum_fusion.metrics import explanation_func, to_input_shape
from tests.networks import images, make


def test_a_map_takes_the_form_of_the_inputs() -> None:
    maps = torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]])
    shaped = to_input_shape(maps, torch.zeros(1, 3, 4, 4, dtype=torch.float64))
    assert shaped.shape == (1, 3, 4, 4)
    assert shaped.dtype is torch.float64
    assert shaped.is_contiguous()
    assert shaped[0, 0, 0].tolist() == [0.0, 0.25, 0.75, 1.0]
    assert torch.equal(shaped[0, 0], shaped[0, 2])


def test_inputs_of_other_ranks_get_zeros() -> None:
    image, features = to_input_shape(torch.ones(2, 1, 2, 2), (images(2, 3, 4, 4), images(2, 5)))
    assert (image == 1).all()
    assert (features == 0).all()
    assert features.shape == (2, 5)
    with pytest.raises(ValueError, match="attributions of shape"):
        to_input_shape(torch.ones(2, 1, 2, 2), images(2, 5))


def test_the_form_of_the_input_is_mirrored() -> None:
    model = make()
    explain = explanation_func(LayerGradCam(model, model.conv2), target=1)
    x = images(2, 3, 8, 8)
    assert isinstance(explain(x), torch.Tensor)
    assert isinstance(explain((x,)), tuple)
    assert torch.equal(explain((x,))[0], explain(x))
    whole = explanation_func(LayerGradCam(model, model.conv2), input_shape=True, target=1)
    assert whole((x,))[0].shape == x.shape


def test_sensitivity_of_captums_own_layer_method_in_a_batch() -> None:
    model, x = make(), images(3, 3, 8, 8)
    method = LayerGradCam(model, model.conv2)
    with pytest.raises(RuntimeError, match="must match"):
        sensitivity_max(method.attribute, x, target=1, n_perturb_samples=2)
    scores = sensitivity_max(explanation_func(method), x, target=1, n_perturb_samples=2)
    assert scores.shape == (3,)
