from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from captum_fusion.layers import default_layer, find_layer
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
    found, layer = default_layer(model, torch.rand(1, 3, 224, 224))
    assert found == expected
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


def test_a_network_without_a_convolutional_stage() -> None:
    for model in (nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), torchvision.models.vit_b_32(weights=None).eval()):
        size = 8 if isinstance(model, nn.Sequential) else 224
        with pytest.raises(ValueError, match="no convolutional stage"):
            default_layer(model, torch.rand(1, 3, size, size))


def test_channels_last_maps_are_excluded() -> None:
    swin = torchvision.models.SwinTransformer(
        [4, 4], embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=[4, 4], num_classes=5
    )
    with pytest.raises(ValueError, match="no convolutional stage"):
        default_layer(swin.eval(), torch.rand(1, 3, 64, 64))


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
