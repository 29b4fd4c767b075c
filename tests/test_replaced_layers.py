"""Methods that replace a layer's activations. The network below the layer runs once per chunk, for many networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captum.attr import LayerFeatureAblation
from torch import Tensor, nn

from captum_fusion import LayerAblationCAM, LayerFDCAM, LayerGradCAMPlusPlus, LayerReciproCAM, LayerShapCAM
from captum_fusion.layers import ChannelsLast, TokenGrid
from tests.networks import Net, hooks_on, images, make
from tests.test_contract import one_by_one, same

REPLACED = [LayerAblationCAM, LayerReciproCAM, LayerFDCAM, LayerShapCAM]


class Residual(Net):
    """A layer inside a residual block: the skip connection has the batch size of the input."""

    def __init__(self, join: str = "add") -> None:
        super().__init__()
        self.join, self.inner = join, nn.Conv2d(6, 6, 3, padding=1)
        if join == "cat":
            self.conv2 = nn.Conv2d(12, 8, 3, padding=1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.conv1(x))
        inner = self.inner(x)
        x = torch.cat([x, inner], 1) if self.join == "cat" else x + inner
        return self.head(self.pool(self.relu2(self.conv2(x))).flatten(1))


class ReshapesByBatchSize(Net):
    """Reshapes by the batch size of its input."""

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        x = self.relu2(self.conv2(self.relu1(self.conv1(x))))
        return self.head(x.reshape(batch, -1, 8, 16).mean((1, 3)))


class Twice(nn.Module):
    """Calls one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.conv(self.stem(x)).relu()).relu().mean((2, 3)))


class SharedReLU(nn.Module):
    """Calls one ReLU for 3 and for 4 channels, or twice for 4 channels with a connection around the second call."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.skip, self.head = skip, nn.Linear(4, 5)
        self.relu = self.last = nn.ReLU()
        self.first, self.second = nn.Conv2d(3, 4 if skip else 3, 1), nn.Conv2d(4 if skip else 3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        early = self.relu(self.first(x))
        late = self.last(self.second(early))
        return self.head((late + early if self.skip else late).mean((2, 3)))


def samples_through(module: nn.Module) -> list[int]:
    seen: list[int] = []
    module.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[0]))
    return seen


def channel_ablation(model: Any, layer: nn.Module, x: Tensor, target: int, channels: int) -> Tensor:
    """Captum's drop in score for each channel, (N, K)."""
    mask = torch.arange(channels).reshape(1, -1, 1, 1)
    found = [
        LayerFeatureAblation(model, layer).attribute(x[[i]], target=target, layer_mask=mask) for i in range(len(x))
    ]
    return torch.cat(found)[:, :, 0, 0]


@pytest.mark.parametrize("kind", [Net, Residual, lambda: Residual("cat"), ReshapesByBatchSize, Twice])
def test_ablation_cam_is_captums_layer_feature_ablation(kind: Any) -> None:
    model, x = make(kind), images(3, 3, 8, 8)
    layer = getattr(model, "inner", None) or getattr(model, "conv2", None) or model.conv
    activations: list[Tensor] = []
    layer.register_forward_hook(lambda module, inputs, output: activations.append(output.detach()))
    model(x)
    kept = activations[-1]  # the last call of a layer that is called twice
    drops = channel_ablation(model, layer, x, 1, kept.shape[1])
    expected = (drops[..., None, None] * kept).sum(1, keepdim=True).relu()
    assert expected.amax() > 0
    for chunk in (None, 1, 3, 1000):
        same(LayerAblationCAM(model, layer).attribute(x, 1, perturbations_per_eval=chunk), expected, tolerance=1e-6)


@pytest.mark.parametrize("cls", REPLACED)
@pytest.mark.parametrize("skip", [False, True])
def test_of_a_layer_that_is_called_twice_only_the_last_call_is_replaced(cls: Any, skip: bool) -> None:
    model, x = make(SharedReLU, skip=skip), images(2, 3, 8, 8)
    once = make(SharedReLU, skip=skip)
    once.last = nn.ReLU().eval()
    same(cls(model, model.relu).attribute(x, [0, 3]), cls(once, once.last).attribute(x, [0, 3]))
    assert hooks_on(model) == 0


@pytest.mark.parametrize("cls", REPLACED)
@pytest.mark.parametrize("kind", [Net, Residual, lambda: Residual("cat"), ReshapesByBatchSize])
def test_batches_of_networks_of_all_kinds(cls: Any, kind: Any) -> None:
    model, x, targets = make(kind), images(3, 3, 8, 8), [0, 3, 1]
    method = cls(model, getattr(model, "inner", model.conv2))
    same(method.attribute(x, targets), one_by_one(method, x, targets))
    assert hooks_on(model) == 0


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
def test_samples_below_the_layer(chunk: int) -> None:
    model, x = make(), images(2, 3, 8, 8)
    below, above = samples_through(model.conv1), samples_through(model.head)
    LayerAblationCAM(model, model.conv2).attribute(x, 1, perturbations_per_eval=chunk)
    chunks = -(-8 // chunk)  # eight channels
    assert sum(below) == 2 + 2 * chunks, "one sample per chunk of an example"
    assert sum(above) == 2 + 2 * 8
    assert max(above) == max(2, min(chunk, 8))


def test_samples_above_the_layer() -> None:
    model, x = make(), images(2, 3, 8, 8)
    for cls, samples in ((LayerReciproCAM, 16), (LayerFDCAM, 2 * 8), (LayerShapCAM, 25 * 15 + 1)):
        above = samples_through(model.head)
        cls(model, model.conv2).attribute(x, 1)
        assert sum(above) == 2 + 2 * samples, cls


def test_channels_equal_to_the_baseline_take_no_sample() -> None:
    model, x = make(), images(2, 3, 8, 8)
    with torch.no_grad():
        model.conv2.weight[:3] = 0
        model.conv2.bias[:3] = torch.tensor([0.0, -1.0, 2.0])
    above = samples_through(model.head)
    LayerAblationCAM(model, model.relu2).attribute(x, 1)
    assert sum(above) == 2 + 2 * 6, "the channel that is 2 everywhere is removed; the two that are 0 are skipped"


def test_a_network_with_a_fixed_batch_size_gets_repeated_inputs() -> None:
    model, x = make(ReshapesByBatchSize), images(2, 3, 8, 8)
    below = samples_through(model.conv1)
    LayerAblationCAM(model, model.conv2).attribute(x, 1, perturbations_per_eval=4)
    assert below == [2, 1, 4, 4, 4, 4], "one attempt, then every sample from the input on"


def test_chunks_contain_one_example() -> None:
    """With as many samples as examples, a skip connection would pair samples with wrong examples without an error."""
    model, x = make(Residual), images(4, 3, 8, 8)
    method = LayerAblationCAM(model, model.inner, groups=4, grouping="chunks")
    same(method.attribute(x, 1, perturbations_per_eval=4), one_by_one(method, x, [1] * 4))


def test_groups_of_channels() -> None:
    model, x = make(), images(2, 3, 8, 8)
    mask = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2]).reshape(1, -1, 1, 1)
    drops = torch.cat(
        [LayerFeatureAblation(model, model.relu2).attribute(x[[i]], target=2, layer_mask=mask) for i in range(2)]
    )
    activations = model.relu2(model.conv2(model.relu1(model.conv1(x)))).detach()
    expected = (drops[:, :, :1, :1] * activations).sum(1, keepdim=True).relu()
    above = samples_through(model.head)
    grouped = LayerAblationCAM(model, model.relu2, groups=3, grouping="chunks").attribute(x, 2)
    assert sum(above) == 2 + 2 * 3
    same(grouped, expected, tolerance=1e-6)
    clusters = LayerAblationCAM(model, model.relu2, groups=8).attribute(x, 2)
    same(clusters, LayerAblationCAM(model, model.relu2).attribute(x, 2), tolerance=1e-6)


# --------------------------------------------------------------------------------------------------------------- tokens


class Transformer(nn.Module):
    """Patches, a class token and two attention blocks. Inputs of 16 x 16 give a grid of 4 x 4."""

    def __init__(self, height: int = 4, width: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(12, 3, 24, batch_first=True) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1)
        tokens = self.norm(self.blocks[0](tokens))
        return self.head(self.blocks[1](tokens)[:, 0])


def test_vit_recipro_cam_keeps_the_class_token() -> None:
    model, x = make(Transformer), images(2, 3, 16, 16)
    method = LayerReciproCAM(model, model.norm, gaussian=True, score_fn="identity", reshape=TokenGrid())
    result = method.attribute(x, [1, 3])
    assert result.shape == (2, 1, 4, 4)
    kernel = torch.tensor([1.0, 2.0, 1.0])
    kernel = kernel[:, None] * kernel / 16
    with torch.no_grad():
        tokens = torch.cat([model.token.expand(2, -1, -1), model.patches(x).flatten(2).transpose(1, 2)], 1)
        tokens = model.norm(model.blocks[0](tokens))
        for n, target in enumerate((1, 3)):
            for i in range(4):
                for j in range(4):
                    kept = torch.zeros(6, 6)
                    kept[i : i + 3, j : j + 3] = kernel
                    sample = tokens[n].clone()
                    sample[1:] *= kept[1:5, 1:5].reshape(16, 1)
                    score = model.head(model.blocks[1](sample[None])[:, 0])[0, target]
                    torch.testing.assert_close(result[n, 0, i, j], score)


@pytest.mark.parametrize("cls", [*REPLACED, LayerGradCAMPlusPlus])
def test_token_layers(cls: Any) -> None:
    model, x, targets = make(Transformer), images(3, 3, 16, 8), [0, 3, 1]
    method = cls(model, model.norm, reshape=TokenGrid(height=4))
    result = method.attribute(x, targets)
    assert result.shape == (3, 1, 4, 2)
    same(result, one_by_one(method, x, targets))
    assert result.abs().amax() > 0


def test_token_grids() -> None:
    tokens = torch.arange(2 * 7 * 3.0).reshape(2, 7, 3)
    maps = TokenGrid(2, 3)(tokens)
    assert maps.shape == (2, 3, 2, 3)
    assert torch.equal(maps[1, 2].flatten(), tokens[1, 1:, 2])
    whole = TokenGrid(width=3).inverse(maps * 0 - 1, tokens)
    assert torch.equal(whole[:, 0], tokens[:, 0])
    assert (whole[:, 1:] == -1).all()
    assert torch.equal(TokenGrid(2, 3).inverse(maps, tokens), tokens)
    for grid in (TokenGrid(), TokenGrid(4), TokenGrid(2, 4), TokenGrid(2, 3, prefix=0), TokenGrid(prefix=7)):
        with pytest.raises(ValueError, match=r"reshape: .*\(2, 7, 3\) is not"):
            grid(tokens)
    last = torch.arange(24.0).reshape(1, 2, 4, 3)
    assert torch.equal(ChannelsLast()(last)[0, 2], last[0, :, :, 2])
    assert torch.equal(ChannelsLast().inverse(ChannelsLast()(last), last), last)


def test_a_reshape_without_an_inverse() -> None:
    model, x = make(Transformer), images(1, 3, 16, 16)
    grid = TokenGrid()
    assert LayerGradCAMPlusPlus(model, model.norm, reshape=lambda t: grid(t)).attribute(x, 1).shape == (1, 1, 4, 4)
    with pytest.raises(ValueError, match=r"reshape must have a method inverse"):
        LayerReciproCAM(model, model.norm, reshape=lambda t: grid(t)).attribute(x, 1)
    assert hooks_on(model) == 0
