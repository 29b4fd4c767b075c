from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from captum_fusion import LayerAblationCAM, LayerEigenCAM, LayerFusionCAM, LayerHiResCAM, LayerReciproCAM
from captum_fusion.layers import ChannelsLast, TokenGrid, default_layer, find_layer, resolution_layers
from tests.networks import Net, hooks_on, images, make


def test_find_layer() -> None:
    model = torchvision.models.resnet18(weights=None)
    assert find_layer(model, "layer4.1.conv2") is model.layer4[1].conv2


@pytest.mark.parametrize(("wrong", "right"), [("layer5", "layer4"), ("layer4.1.conv3", "layer4.1.conv2"), ("x", "fc")])
def test_errors_list_similar_names(wrong: str, right: str) -> None:
    with pytest.raises(ValueError, match=rf"no layer '{wrong}'; did you mean .*{right}"):
        find_layer(torchvision.models.resnet18(weights=None), wrong)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", "layer4"),
        ("vgg11", "features"),
        ("squeezenet1_1", "features"),
        ("mobilenet_v3_small", "features"),
        ("shufflenet_v2_x0_5", "conv5"),
        ("efficientnet_b0", "features"),
        ("densenet121", "features"),
        ("convnext_tiny", "features"),
        ("regnet_x_400mf", "trunk_output"),
    ],
)
def test_default_layer_of_torchvision_networks(name: str, expected: str) -> None:
    model = torchvision.models.get_model(name, weights=None).eval()
    found, layer, reshape = default_layer(model, torch.rand(1, 3, 224, 224))
    assert found == expected
    assert reshape is None
    assert layer is find_layer(model, expected)
    assert hooks_on(model) == 0


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_default_layer_in_any_number_of_dimensions(dims: int) -> None:
    assert default_layer(make(dims=dims), images(1, 3, *(8,) * dims))[0] == "conv2"


def test_default_layer_of_a_wrapped_network() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = torchvision.models.resnet18(weights=None)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.backbone(x)

    assert default_layer(Wrapped().eval(), torch.rand(1, 3, 64, 64))[0] == "backbone.layer4"


def test_a_network_without_a_layer() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    for find in (default_layer, resolution_layers):
        with pytest.raises(ValueError, match="no convolutional stage"):
            find(model, torch.rand(1, 3, 8, 8))


class Transformer(nn.Module):
    """Patches of 4 x 4 pixels, further tokens before them, and blocks of attention and MLP; reads one token or all."""

    def __init__(
        self, prefix: int, pooled: bool = False, sizes: tuple[int, int] = (32, 32), zero: bool = False
    ) -> None:
        super().__init__()
        self.prefix, self.pooled = prefix, pooled
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.extra = nn.Parameter(torch.randn(1, prefix, 8))
        self.place = nn.Parameter(torch.randn(1, prefix + sizes[0] * sizes[1] // 16, 8))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, 0.0, norm_first=True) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)
        if zero:
            nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.extra.expand(len(x), -1, -1), tokens], 1) + self.place
        for block in self.blocks:
            hidden = block.norm1(tokens)
            hidden = block.self_attn(*[hidden.transpose(0, 1)] * 3, need_weights=False)[0].transpose(0, 1)
            tokens = tokens + hidden
            tokens = tokens + block.linear2(block.linear1(block.norm2(tokens)).relu())
        tokens = self.norm(tokens)
        return self.head(tokens.mean(1) if self.pooled else tokens[:, 0])


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("prefix", [1, 2, 5])
def test_a_transformer_that_reads_its_class_token(prefix: int, zero: bool, frozen: bool) -> None:
    model = Transformer(prefix, zero=zero).eval().requires_grad_(not frozen)
    name, layer, reshape = default_layer(model, torch.rand(1, 3, 32, 32))
    assert name == "blocks.1.norm1"  # everything behind it changes single tokens, of which one is read
    assert layer is model.blocks[1].norm1
    assert isinstance(reshape, TokenGrid)
    assert (reshape.height, reshape.width, reshape.prefix) == (None, None, prefix)
    assert hooks_on(model) == 0


def test_a_transformer_that_reads_all_tokens() -> None:
    model = Transformer(0, pooled=True, sizes=(32, 16)).eval()
    name, _, reshape = default_layer(model, torch.rand(2, 3, 32, 16))
    assert name == "norm"
    assert isinstance(reshape, TokenGrid)
    assert (reshape.height, reshape.width, reshape.prefix) == (8, 4, 0)
    assert reshape(torch.zeros(2, 32, 8)).shape == (2, 8, 8, 4)


def test_hierarchical_transformers() -> None:
    swin = torchvision.models.SwinTransformer(
        [4, 4], embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=[4, 4], num_classes=5
    )
    name, layer, reshape = default_layer(swin.eval(), torch.rand(1, 3, 64, 64))
    assert (name, layer) == ("norm", swin.norm)
    assert isinstance(reshape, ChannelsLast)


@pytest.mark.parametrize("method", [LayerHiResCAM, LayerFusionCAM, LayerAblationCAM, LayerReciproCAM, LayerEigenCAM])
def test_the_default_layer_of_a_transformer_is_explained(method: Any) -> None:
    model, x = Transformer(2).eval(), images(2, 3, 32, 32)
    _, layer, reshape = default_layer(model, x)
    found = method(model, layer, reshape=reshape).attribute(x, [1, 3])
    assert found.shape == (2, 1, *((32, 32) if method is LayerFusionCAM else (8, 8)))
    assert found.abs().amax() > 0
    with pytest.raises(ValueError, match=r"if these are tokens, set reshape, for example to layers.TokenGrid"):
        method(model, layer).attribute(x, [1, 3])


def test_transformers_of_timm() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    expected = {
        "vit_tiny_patch16_224": ("blocks.11.norm1", 1),
        "deit_tiny_distilled_patch16_224": ("blocks.11.norm1", 2),
        "eva02_tiny_patch14_224": ("blocks.11.norm2", 1),
        "mixer_s16_224": ("norm", 0),
    }
    for architecture, (name, prefix) in expected.items():
        found = default_layer(timm.create_model(architecture, num_classes=4).eval(), torch.rand(1, 3, 224, 224))
        assert isinstance(found.reshape, TokenGrid)
        assert (found.name, found.reshape.prefix) == (name, prefix), architecture


def test_a_last_stage_with_as_many_channels_as_classes() -> None:
    assert default_layer(make(outputs=8), images(1, 3, 8, 8))[0] == "conv2"


def test_attention_above_a_convolutional_trunk() -> None:
    class Pooled(Net):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = self.relu2(self.conv2(self.relu1(self.conv1(x)))).flatten(2).transpose(1, 2)
            return self.head(self.attention(tokens, tokens, tokens)[0].mean(1))

    assert default_layer(make(Pooled), images(1, 3, 8, 8))[0] == "conv2"


def test_hooks_are_removed_if_the_network_fails() -> None:
    model = make(Net)
    with pytest.raises(RuntimeError):
        default_layer(model, torch.rand(1, 7, 8, 8))
    assert hooks_on(model) == 0
