"""Captum's own metrics on every class, and the protocol of Quantus."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam, LayerGradientXActivation, NoiseTunnel
from captum.metrics import infidelity, sensitivity_max
from torch import Tensor

from captum_fusion import LayerFusionCAM, functional
from captum_fusion.metrics import average_drop, explanation_func, quantus_explain_func, to_input_shape
from tests.networks import FlatHead, TupleLayer, hooks_on, images, make
from tests.test_contract import same

# ------------------------------------------------------------------------------------------------ captum's metrics


def test_infidelity_of_every_class(cls: Any) -> None:
    model, x, targets = make(FlatHead), images(3, 3, 8, 8), torch.tensor([0, 3, 1])
    generator = torch.Generator().manual_seed(0)

    def perturb(inputs: Tensor) -> tuple[Tensor, Tensor]:
        noise = 0.1 * torch.randn(inputs.shape, generator=generator)
        return noise, inputs - noise

    attributions = to_input_shape(cls(model, model.conv2).attribute(x, targets), x)
    found = infidelity(model, perturb, x, attributions, target=targets, n_perturb_samples=3, normalize=True)
    assert found.shape == (3,)
    assert found.isfinite().all()
    assert (found >= 0).all()


def test_sensitivity_of_every_class(cls: Any) -> None:
    model, x, targets = make(FlatHead), images(3, 3, 8, 8), torch.tensor([0, 3, 1])
    for input_shape in (False, True):
        explain = explanation_func(cls(model, model.conv2), input_shape=input_shape)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found = sensitivity_max(explain, x, target=targets, n_perturb_samples=2, perturb_radius=0.1)
        assert found.shape == (3,)
        assert found.isfinite().all()
        assert (found >= 0).all()
    same(sensitivity_max(explain, x, target=targets, n_perturb_samples=1, perturb_radius=0.0), torch.zeros(3))
    assert hooks_on(model) == 0


# --------------------------------------------------------------------------------------------------------- Quantus


def fusion(model: Any) -> LayerFusionCAM:
    return LayerFusionCAM(model, model.conv2)


def test_the_protocol_of_quantus() -> None:
    model, x, y = make(), images(3, 3, 8, 8), np.array([0, 3, 1])
    explain = quantus_explain_func(lambda network: LayerGradCam(network, network.conv2), relu_attributions=True)
    found = explain(model=model, inputs=x.numpy(), targets=y, device="cpu", method="Grad-CAM")
    assert type(found) is np.ndarray
    assert found.shape == (3, 1, 8, 8)
    assert found.dtype == np.float32
    expected = LayerGradCam(model, model.conv2).attribute(x, torch.from_numpy(y), relu_attributions=True)
    same(torch.from_numpy(found), functional.upsample(expected.detach(), (8, 8)))
    for inputs, targets in ((x, torch.from_numpy(y)), (x.double().numpy(), y[:, None]), (x.numpy(), y.astype(float))):
        same(torch.from_numpy(explain(model, inputs, targets)), torch.from_numpy(found))
    overruled = explain(model, x.numpy(), y, relu_attributions=False)
    assert (overruled < 0).any()
    assert not (found < 0).any()
    assert np.isscalar(explain(model, x[:1].numpy(), 2).sum()), "one target"
    double = copy.deepcopy(model).double()
    assert explain(double, x.numpy(), y).dtype == np.float64, "the inputs follow the network"
    other = make(seed=5)
    assert not np.allclose(explain(other, x.numpy(), y), found), (
        "the network that is given is the one that is explained"
    )
    line = make(dims=1)
    assert explain(line, images(2, 3, 8).numpy(), np.array([1, 2])).shape == (2, 1, 8)


def test_quantus_is_given_methods_of_this_package() -> None:
    model, x, y = make(), images(2, 3, 8, 8), np.array([0, 3])
    found = quantus_explain_func(fusion, perturbations_per_eval=3)(model, x.numpy(), y)
    same(torch.from_numpy(found), LayerFusionCAM(model, model.conv2).attribute(x, [0, 3]))
    tunnel = quantus_explain_func(lambda network: NoiseTunnel(fusion(network)), nt_samples=2)
    with torch.random.fork_rng():
        assert tunnel(model, x.numpy(), y).shape == (2, 1, 8, 8)


def test_errors_of_the_quantus_adapter() -> None:
    model, x, y = make(), images(2, 3, 8, 8).numpy(), np.array([0, 3])
    for bad in (fusion(model), None, 3):
        with pytest.raises(TypeError, match="method must be a function that makes an attribution"):
            quantus_explain_func(bad)
    with pytest.raises(TypeError, match="method must return an attribution"):
        quantus_explain_func(lambda network: network)(model, x, y)
    several = make(TupleLayer)
    with pytest.raises(TypeError, match="method must return one tensor"):
        quantus_explain_func(lambda network: LayerFusionCAM(network, network.branches))(several, x, y)
    with pytest.raises(TypeError, match="wrong"):
        quantus_explain_func(fusion)(model, x, y, wrong=1)
    folded = torch.nn.Sequential(torch.nn.Unflatten(1, (3, 8, 8)), model.conv1, torch.nn.Flatten()).eval()
    with pytest.raises(ValueError, match=r"inputs of shape \(2, 192\) do not fit attributions of shape \(2, 1, 8, 8\)"):
        quantus_explain_func(lambda network: LayerGradCam(network, network[1]))(folded, x.reshape(2, -1), y)
    with pytest.raises(ValueError, match=r"inputs of shape \(2, 3, 8, 8\) do not fit attributions of shape \(2, 5\)"):
        quantus_explain_func(lambda network: LayerGradientXActivation(network, network.head))(model, x, y)


def test_quantus_itself() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantus = pytest.importorskip("quantus", exc_type=ImportError)
        model, x, y = make(FlatHead), images(3, 3, 8, 8).numpy(), np.array([0, 3, 1])
        explain = quantus_explain_func(lambda network: LayerGradCam(network, network.conv2))
        sensitivity = quantus.MaxSensitivity(nr_samples=2, disable_warnings=True)
        found = sensitivity(model=model, x_batch=x, y_batch=y, explain_func=explain, device="cpu")
        assert np.shape(found) == (3,)
        assert np.isfinite(found).all()
        flipping = quantus.PixelFlipping(features_in_step=8, disable_warnings=True)
        for batch in (None, explain(model, x, y)):
            curves = flipping(model=model, x_batch=x, y_batch=y, a_batch=batch, explain_func=explain, device="cpu")
            assert np.shape(curves) == (3, 3 * 8 * 8 / 8)
        cascade = quantus.MPRT(disable_warnings=True)
        scores = cascade(model=model, x_batch=x, y_batch=y, explain_func=explain, device="cpu")
        assert len(scores) >= 3, "randomised copies of the network are explained"
        both = quantus.evaluate(
            metrics={"sensitivity": sensitivity},
            xai_methods={"grad": explain, "fusion": quantus_explain_func(fusion)},
            model=model,
            x_batch=x,
            y_batch=y,
            explain_func_kwargs={},
            call_kwargs={"call": {"device": "cpu"}},
        )
        assert set(both) == {"grad", "fusion"}


def test_half_precision_maps_are_summed_in_single() -> None:
    maps = torch.full((1, 64, 2, 2), 2000.0, dtype=torch.float16)
    assert torch.equal(to_input_shape(maps, torch.zeros(1, 3, 4, 4)), torch.full((1, 3, 4, 4), 128000.0))
    x, fine = torch.rand(1, 3, 4, 4), torch.linspace(0, 1, 64 * 16).reshape(1, 64, 4, 4)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5)).eval()
    half = fine.half() * 100
    assert torch.equal(average_drop(model, x, half, 1), average_drop(model, x, half.float(), 1))


def test_errors_of_captums_adapters() -> None:
    model, x = make(), images(2, 3, 8, 8)
    with pytest.raises(TypeError, match=r"method must be an attribution such as LayerFusionCAM.*, not method"):
        explanation_func(LayerFusionCAM(model, model.conv2).attribute)
    of_layers = explanation_func(LayerFusionCAM(model, [model.conv1, model.conv2]))
    with pytest.raises(TypeError, match=r"method must return a tensor or a tuple .* \(of one layer\), not list"):
        of_layers(x, target=1)
    with pytest.raises(TypeError, match="not Tensor, FusionDetails"):
        explanation_func(LayerFusionCAM(model, model.conv2), return_details=True)(x, target=1)
    with pytest.raises(TypeError, match="attributions must be a tensor, not ndarray"):
        to_input_shape(x.numpy(), x)
    with pytest.raises(TypeError, match=r"inputs must be a tensor or a tuple of tensors .*, not list"):
        to_input_shape(x, [x])
