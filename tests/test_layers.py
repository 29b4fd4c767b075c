from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from captum_fusion import LayerAblationCAM, LayerEigenCAM, LayerFusionCAM, LayerHiResCAM, LayerReciproCAM
from captum_fusion.__main__ import main
from captum_fusion.demo import photographs
from captum_fusion.layers import (
    ChannelsLast,
    TokenGrid,
    default_layer,
    find_layer,
    parse_reshape,
    reshape_of,
    resolution_layers,
)
from captum_fusion.targets import Output
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


def test_a_convolution_to_class_scores_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match="no convolutional stage"):
        default_layer(model, torch.rand(1, 3, 8, 8))


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


class Hybrid(nn.Module):
    """Two convolutions, then a transformer on their grid."""

    def __init__(self, patches: nn.Module | None = None) -> None:
        super().__init__()
        trunk = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, 4, padding=1))
        self.trunk = trunk if patches is None else patches
        self.transformer = Transformer(1, sizes=(16, 16))
        self.transformer.patches = nn.Identity()

    def forward(self, x: Tensor) -> Any:
        return self.transformer(self.trunk(x))


def test_tokens_behind_convolutions_are_preferred() -> None:
    model, x = Hybrid().eval(), torch.rand(1, 3, 32, 32)
    name, layer, reshape = default_layer(model, x)
    assert name == "transformer.blocks.1.norm1"
    assert reshape == TokenGrid(prefix=1) == reshape_of(model, layer, x)
    assert [name for name, _ in resolution_layers(model, x)] == ["trunk.0", "trunk"]


def test_the_only_output_may_be_an_object() -> None:
    class Wrapped(Hybrid):
        def forward(self, x: Tensor) -> Any:
            return {"logits": super().forward(x)}

    model, x = Wrapped().eval(), torch.rand(1, 3, 32, 32)
    assert default_layer(model, x).name == "transformer.blocks.1.norm1"
    assert default_layer(Output(model, "logits"), x).name == "model.transformer.blocks.1.norm1"


def test_convolutions_within_attention_are_no_stages() -> None:
    class Attention(nn.Module):
        """Heads of attention, (N, heads, tokens, channels), with a convolution over their grid."""

        def __init__(self) -> None:
            super().__init__()
            self.place = self.Place()
            self.norm = nn.LayerNorm(8)

        class Place(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(8, 8, 3, padding=1)

            def forward(self, heads: Tensor) -> Tensor:
                n, h, t, c = heads.shape
                maps = heads.permute(0, 1, 3, 2).reshape(n, h * c, 4, 4)
                return heads + self.conv(maps).reshape(n, h, c, t).transpose(2, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            heads = self.norm(tokens).unflatten(2, (2, 4)).transpose(1, 2)
            return tokens + self.place(heads).transpose(1, 2).flatten(2)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.attention, self.head = nn.Conv2d(3, 8, 4, stride=4), Attention(), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(self.patches(x).flatten(2).transpose(1, 2)).mean(1))

    model, x = Net().eval(), torch.rand(1, 3, 16, 16)
    assert default_layer(model, x)[::2] == ("attention.norm", TokenGrid(prefix=0))


def test_a_stage_that_returns_its_channels_last() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.LayerNorm(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x).movedim(1, -1)).relu()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.stage, self.head = nn.Conv2d(3, 3, 3), Last(), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.stage(self.stem(x)).mean((1, 2)))

    model, x = Net().eval(), torch.rand(1, 3, 10, 10)
    assert default_layer(model, x)[::2] == ("stage", ChannelsLast())
    assert resolution_layers(model, x)[-1][0] == "stage.conv", "a fusion of layers has one reshape for all"


def test_a_norm_over_the_first_dimension() -> None:
    class Norm2d(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.movedim(1, -1)).movedim(-1, 1)

    class Neck(Transformer):
        """The neck of Segment Anything: the tokens become a map again."""

        def __init__(self) -> None:
            super().__init__(0, sizes=(48, 48))
            self.neck = Norm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.patches(x).flatten(2).transpose(1, 2)
            tokens = self.norm(tokens + self.place)
            return self.head(self.neck(tokens.transpose(1, 2).unflatten(2, (12, 12))).relu().mean((2, 3)))

    model, x = Neck().eval(), torch.rand(1, 3, 48, 48)
    assert default_layer(model, x)[::2] == ("neck", None)


@pytest.mark.parametrize(("other", "grid"), [([nn.Conv2d(3, 1, 16, 16)], "2 x 2"), ([], "no grid")])
def test_tokens_without_a_grid(other: list[nn.Module], grid: str) -> None:
    class Patches(nn.Module):
        """Patches by a linear layer: nothing says that these are 8 x 8."""

        def __init__(self) -> None:
            super().__init__()
            self.other, self.linear = nn.Sequential(*other), nn.Linear(48, 8)

        def forward(self, x: Tensor) -> Tensor:
            self.other(x)
            return self.linear(nn.functional.unfold(x, 4, stride=4).transpose(1, 2)).transpose(1, 2)

    model = Hybrid(Patches()).eval()
    model.transformer.place = nn.Parameter(torch.randn(1, 65, 8))
    with pytest.raises(ValueError, match=f"65 tokens of transformer.norm .convolutions return {grid}.*reshape"):
        default_layer(model, torch.rand(1, 3, 32, 32))


def test_layers_whose_tokens_are_no_grid() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.norm, self.head = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            windows = self.patches(x).unfold(2, 4, 4).unfold(3, 4, 4).flatten(4).flatten(2, 3).permute(0, 2, 3, 1)
            return self.head(self.norm(windows).mean((1, 2)))

    class Hiera(Transformer):
        """Tokens in the order of mask units until the last stage."""

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.blocks[0].norm1(self.patches(x).flatten(2).transpose(1, 2))
            return self.head(self.norm(tokens.unflatten(1, (16, 4)).mean(2)).mean(1))

    x = torch.rand(1, 3, 32, 32)
    windows, hiera = Windows().eval(), Hiera(0).eval()
    with pytest.raises(ValueError, match=r"output of norm, of shape \(1, 4, 16, 8\), is no grid of the network"):
        reshape_of(windows, windows.norm, x)
    with pytest.raises(ValueError, match=r"blocks.0.norm1, .* has tokens in the order of Hiera's mask units"):
        reshape_of(hiera, hiera.blocks[0].norm1, x)
    assert default_layer(hiera, x)[::2] == ("norm", TokenGrid(prefix=0))
    hiera.head = nn.Linear(8, 2)  # fewer classes than tokens
    assert reshape_of(hiera, hiera.norm, x) == TokenGrid(prefix=0)


def test_written_reshapes() -> None:
    assert parse_reshape("14x14") == TokenGrid(14, 14, 0)
    assert parse_reshape("8x24+2") == TokenGrid(8, 24, 2)
    assert parse_reshape("channels-last") == ChannelsLast()
    assert parse_reshape("none") is None
    for wrong in ("14", "14x", "0x14", "14x14+", "14x14+-1", "14 x 14", "channels_last", ""):
        with pytest.raises(ValueError, match=r"^reshape: .* is not HEIGHTxWIDTH"):
            parse_reshape(wrong)


def transformer() -> nn.Module:
    """A ViT as users of the command line have it: 224 x 224, here with large patches."""
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(224, 56, 2, 2, 16, 32, num_classes=4)
    nn.init.normal_(model.heads.head.weight)
    return model


def test_explain_a_transformer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = str(photographs.photograph_path(photographs.load_photographs()[0].name))
    common = ["explain", picture, "--model", "tests.test_layers:transformer", "--output", str(tmp_path), "--save-map"]
    assert main([*common, "--method", "recipro-cam", "integrative-cam"]) == 0
    assert "layer: encoder.layers.encoder_layer_1.ln_1" in capsys.readouterr().out
    found = {file.name: np.load(file) for file in tmp_path.glob("*.npy")}
    layers = ["--layers", "encoder.layers.encoder_layer_1.ln_1"]
    assert main([*common, "--method", "recipro-cam", *layers, "--reshape", "4x4+1"]) == 0
    again = np.load(next(file for file in tmp_path.glob("*.npy") if file.name not in found))
    assert np.array_equal(again, next(value for name, value in found.items() if "recipro" in name))
    for wrong, message in {
        "4x4": r"\(1, 17, 16\) is not 0 tokens and a grid of 4 x 4",
        "four": "reshape: 'four' is not HEIGHTxWIDTH",
    }.items():
        capsys.readouterr()
        assert main([*common, "--method", "grad-cam", *layers, "--reshape", wrong]) == 2
        assert re.search(message, capsys.readouterr().err)
    names = ",".join(f"encoder.layers.encoder_layer_{i}.ln_1" for i in (0, 1))
    assert main([*common, "--method", "layer-cam", "grad-cam", "--layers", names, "--reshape", "4x4+1"]) == 0


@pytest.mark.parametrize("name", ["vit_b_32", "swin_t"])
def test_explain_transformers_of_torchvision(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "weights.pt"
    with torch.device("meta"):
        shapes = torchvision.models.get_model(name, weights=None, num_classes=3).state_dict()
    whole = {key: value for key, value in shapes.items() if not value.is_floating_point()}
    state = {key: 0.02 * torch.randn(value.shape) for key, value in shapes.items() if key not in whole}
    buffers = torchvision.models.get_model(name, weights=None, num_classes=3).state_dict() if whole else {}
    torch.save({**state, **{key: buffers[key] for key in whole}}, weights)
    picture = str(photographs.photograph_path(photographs.load_photographs()[0].name))
    arguments = ["--model", name, "--weights", str(weights), "--method", "grad-cam", "--output", str(tmp_path)]
    assert main(["explain", picture, *arguments]) == 0
    assert (
        "layer: " + {"vit_b_32": "encoder.layers.encoder_layer_11.ln_1", "swin_t": "norm"}[name]
        in capsys.readouterr().out
    )


def test_evaluate_a_transformer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pictures" / "cat"
    folder.mkdir(parents=True)
    Image.new("RGB", (32, 24), (200, 90, 30)).save(folder / "cat.png")
    common = ["evaluate", str(folder.parent), "--model", "tests.test_layers:transformer", "--metrics", "complexity"]
    common += ["--methods", "grad-cam", "integrative-cam", "--device", "cpu", "--pictures", "0"]
    assert main([*common, "--output", str(tmp_path / "found")]) == 0
    layer = ["--layers", "encoder.layers.encoder_layer_1.ln_1"]
    assert main([*common, *layer, "--reshape", "4x4+1", "--output", str(tmp_path / "given")]) == 0
    settings = [
        json.loads((tmp_path / name / "run.json").read_text())["model transformer"] for name in ("found", "given")
    ]
    assert [one["reshape"] for one in settings] == [repr(TokenGrid(prefix=1)), repr(TokenGrid(4, 4, 1))]
    capsys.readouterr()
    for wrong, message in {
        ("4x4+1", "4x4"): "reshape: there are 2 for 1 models",
        ("x",): "reshape: 'x' is not",
    }.items():
        assert main([*common, "--reshape", *wrong, "--output", str(tmp_path / "wrong")]) == 2
        assert message in capsys.readouterr().err


def test_transformers_of_timm() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    expected = {
        "vit_tiny_patch16_224": ("blocks.11.norm1", 1),
        "deit_tiny_distilled_patch16_224": ("blocks.11.norm1", 2),
        "eva02_tiny_patch14_224": ("blocks.11.norm2", 1),
        "mixer_s16_224": ("norm", 0),
        "vit_tiny_r_s16_p8_224": ("blocks.11.norm1", 1),
        "pit_ti_distilled_224": ("transformers.2.blocks.3.norm1", 2),
        "coat_tiny": ("parallel_blocks.5.norm14", 1),
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


def test_a_norm_of_features_makes_no_transformer() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 2)
    )
    assert default_layer(net.eval(), torch.rand(1, 3, 8, 8)).name == "0"


def test_a_norm_of_one_position_is_no_map() -> None:
    net = nn.Sequential(
        nn.LayerNorm([3, 4, 4]), nn.AvgPool2d(4), nn.LayerNorm([3, 1, 1]), nn.Flatten(), nn.Linear(3, 2)
    )
    assert default_layer(net.eval(), torch.rand(1, 3, 4, 4)).name == "0"


def test_tokens_with_other_rows_than_the_batch_are_left_out() -> None:
    class Mirrored(nn.Module):
        """A second norm normalises the tokens of every picture and of its mirror image."""

        def __init__(self) -> None:
            super().__init__()
            self.patches, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 5)
            self.norm, self.both = nn.LayerNorm(8), nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.norm(self.patches(x).flatten(2).transpose(1, 2))
            first, second = self.both(torch.cat([tokens, tokens.flip(1)])).mean(1).chunk(2)
            return self.head(first + second)

    assert default_layer(Mirrored().eval(), torch.rand(2, 3, 8, 8)).name == "norm"
