from __future__ import annotations

import inspect
import typing
from typing import Any

import pytest
import torch
from captum.attr import IntegratedGradients, LayerGradCam
from captum.metrics import sensitivity_max

from captum_fusion import metrics
from captum_fusion.metrics import explanation_func, to_input_shape
from tests.networks import TupleLayer, images, make


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


def test_no_map_of_a_layer_with_several_tensors_is_lost() -> None:
    model, x = make(TupleLayer), images(2, 3, 8, 8)
    method = LayerGradCam(model, model.branches)
    found = explanation_func(method, target=1)(x)
    for ours, theirs in zip(found, method.attribute(x, 1), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_sensitivity_of_captums_own_layer_method_in_a_batch() -> None:
    model, x = make(), images(3, 3, 8, 8)
    method = LayerGradCam(model, model.conv2)
    with pytest.raises(RuntimeError, match="must match"):
        sensitivity_max(method.attribute, x, target=1, n_perturb_samples=2)
    scores = sensitivity_max(explanation_func(method), x, target=1, n_perturb_samples=2)
    assert scores.shape == (3,)


def test_input_attributions_that_mirror_the_inputs_form() -> None:
    model, x = make(), images(2, 3, 8, 8)
    explain = explanation_func(IntegratedGradients(model), input_shape=True, target=1, n_steps=2)
    (mirrored,) = explain((x,))
    assert mirrored.shape == x.shape
    assert torch.equal(mirrored, explain(x))


FUNCTIONS = [name for name in metrics.__all__ if inspect.isfunction(getattr(metrics, name))]
WITHOUT_INPUTS = {"boxes_to_masks", "complexity", "energy_pointing_game", "localization_iou", "pointing_game"}
WITHOUT_INPUTS |= {"segmentation_iou"}
ADAPTERS = {"cascading_randomization", "explanation_func", "quantus_explain_func", "to_input_shape"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures(name: str) -> None:
    function = getattr(metrics, name)
    assert typing.get_type_hints(function)["return"] is not Any
    parameters = inspect.signature(function).parameters.values()
    assert "{" not in function.__doc__.split("Examples::")[0], "a shared paragraph that is not filled in"
    if name in WITHOUT_INPUTS | ADAPTERS:
        return
    assert {p.kind for p in parameters} == {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    expected = ["forward_func", "inputs", "attributions", "target", "additional_forward_args"]
    assert positional == (expected[1:] if name == "coherency" else expected)
