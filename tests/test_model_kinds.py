"""Networks of other kinds: reparametrized, with adapters, quantized in part, and in other dimensions.

Every result is compared with that of a plain network that computes the same function.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from captum_fusion import LayerAugmentedGradCAM, metrics
from tests.classes import CLASSES, options, takes
from tests.networks import FlatHead, Net, hooks_on, images, make
from tests.test_contract import same

#: Options that reduce the number of samples.
FEW = {"seed": 0, "n_masks": 64, "n_samples": 3, "n_steps": 2}


@pytest.fixture
def x() -> Tensor:
    return images(2, 3, 8, 8)


def explain(cls: Any, model: nn.Module, x: Tensor, **arguments: Any) -> Tensor:
    layer = model.get_submodule("relu2")
    return cls(model, layer, **options(cls, **FEW)).attribute(x, [1, 3], **arguments)


@pytest.mark.parametrize("cls", CLASSES)
def test_reparametrized_layers(cls: Any, x: Tensor) -> None:
    model = make(FlatHead)
    parametrizations.weight_norm(model.conv1)
    parametrizations.spectral_norm(model.conv2)
    parametrizations.orthogonal(model.head)
    model.eval()
    found = explain(cls, model, x)
    assert all(parametrize.is_parametrized(module) for module in (model.conv1, model.conv2, model.head))
    assert hooks_on(model) == 0
    assert all(parameter.grad is None for parameter in model.parameters())
    for module in (model.conv1, model.conv2, model.head):
        parametrize.remove_parametrizations(module, "weight")
    same(found, explain(cls, model, x))


class Adapter(nn.Module):
    """A frozen linear layer and a low-rank update of it (LoRA)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(images(2, base.in_features, seed=3) / 8)
        self.up = nn.Parameter(images(base.out_features, 2, seed=4) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("cls", CLASSES)
def test_adapters_equal_merged_weights(cls: Any, x: Tensor) -> None:
    adapted, merged = make(FlatHead), make(FlatHead)
    adapted.head = Adapter(adapted.head).eval()
    with torch.no_grad():
        merged.head.weight += adapted.head.up @ adapted.head.down
    same(explain(cls, adapted, x), explain(cls, merged, x))
    assert [parameter.requires_grad for parameter in adapted.head.parameters()] == [True, True, False, False]


class Quantized(nn.Module):
    """A linear layer with weights in int8, computed without autograd."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("bias", linear.bias.detach())
        self.scale = float(scale)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_quantized_head(cls: Any, x: Tensor) -> None:
    """Methods without gradients explain it; the others say why they cannot."""
    quantized, plain = make(FlatHead), make(FlatHead)
    quantized.head = Quantized(quantized.head).eval()
    with torch.no_grad():
        plain.head.weight.copy_(quantized.head.weight * quantized.head.scale)
    if cls(plain, plain.relu2).uses_gradients or takes(cls, "grad_kwargs"):
        with pytest.raises(ValueError, match="layer: no gradient of the target's output reaches it"):
            explain(cls, quantized, x)
        assert hooks_on(quantized) == 0
    else:
        same(explain(cls, quantized, x), explain(cls, plain, x))


# ---------------------------------------------------------------------------------------------------------- dimensions


class Flat(Net):
    """The network in one more dimension, in which its kernels have the size 1."""

    def __init__(self, plain: Net, dims: int) -> None:
        super().__init__(dims=dims)
        for mine, theirs in ((self.conv1, plain.conv1), (self.conv2, plain.conv2)):
            mine.weight = nn.Parameter(theirs.weight.detach().unsqueeze(-1))
            mine.bias = theirs.bias
            mine.kernel_size = (*theirs.kernel_size, 1)
            mine.stride, mine.padding = (*theirs.stride, 1), (*theirs.padding, 0)
        self.head = plain.head


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls is not LayerAugmentedGradCAM])
def test_maps_do_not_depend_on_a_dimension_of_size_one(cls: Any, dims: int) -> None:
    """A network of 1 (2) dimensions gives the maps of the same network in 2 (3) with a dimension of size 1."""
    plain = make(dims=dims)
    flat = Flat(plain, dims + 1).eval()
    x = images(2, 3, *[8] * dims)
    same(flat(x.unsqueeze(-1)), plain(x))
    same(explain(cls, flat, x.unsqueeze(-1)).squeeze(-1), explain(cls, plain, x))


def measured() -> Iterator[Any]:
    for name in ("average_drop", "average_increase", "average_gain", "confidences", "insertion", "deletion", "overall"):
        yield getattr(metrics, name)


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("metric", list(measured()))
def test_metrics_do_not_depend_on_a_dimension_of_size_one(metric: Any, dims: int) -> None:
    plain = make(dims=dims)
    flat = Flat(plain, dims + 1).eval()
    x = images(2, 3, *[8] * dims)
    attributions = images(2, 1, *[8] * dims, seed=1).abs()
    accepted = inspect.signature(metric).parameters
    extra = {"score_fn": "identity"} if "score_fn" in accepted else {}
    expected = metric(plain, x, attributions, [1, 3], **extra)
    found = metric(flat, x.unsqueeze(-1), attributions.unsqueeze(-1), [1, 3], **extra)
    for one, other in zip(found, expected, strict=True):
        same(one, other)
