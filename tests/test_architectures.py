"""Six networks of the table in docs/architectures.md, and that its checks find what they are for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from captum_fusion.layers import ChannelsLast, DefaultLayer, TokenGrid, default_layer
from tests.benchmarks.architectures import PAGE, Network, all_networks, is_centred, main, picture, problem, report, run
from tests.networks import make

NETWORKS = {f"{network.family}: {network.name}": network for network in all_networks()}


@pytest.mark.parametrize(
    ("name", "reshape", "shared"),
    [
        ("torchvision, classification: squeezenet1_1", "", True),
        ("torchvision, classification: shufflenet_v2_x0_5", "", True),
        ("torchvision, classification: vit_b_32", "TokenGrid(prefix=1)", True),
        ("torchvision, classification: swin_t", "ChannelsLast()", True),
        ("torchvision, segmentation: lraspp_mobilenet_v3_large", "", True),
        ("torchvision, detection: ssdlite320_mobilenet_v3_large", "", False),
    ],
)
def test_six_networks(name: str, reshape: str, shared: bool) -> None:
    row = run(NETWORKS[name])
    assert row["error"] == ""
    assert (row["reshape"], row["prefix"]) == (reshape, shared)


@pytest.mark.parametrize("name", [key for key in NETWORKS if key.startswith("transformers: ")])
def test_networks_of_transformers(name: str) -> None:
    assert run(NETWORKS[name])["error"] == ""


def vit() -> nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(48, 8, 2, 2, 16, 32, num_classes=4).eval()
    nn.init.normal_(model.heads.head.weight)
    return model


def test_grids_in_another_order_are_found() -> None:
    class Transposed(TokenGrid):
        def __call__(self, tokens: Tensor) -> Tensor:
            return super().__call__(tokens).transpose(2, 3)

    class Shifted(TokenGrid):
        def __call__(self, tokens: Tensor) -> Tensor:
            return super().__call__(tokens.roll(1, 1))

    model, inputs = vit(), picture(48)
    found = default_layer(model, inputs)
    assert is_centred(model, found, inputs, ())
    for wrong in (Transposed(), Shifted(), TokenGrid(4, 9)):
        assert not is_centred(model, found._replace(reshape=wrong), inputs, ())


def test_maps_of_less_than_nine_cells_say_nothing() -> None:
    model = make()
    assert is_centred(model, DefaultLayer("conv2", model.conv2), picture(4), ())


def test_wrong_maps_are_found() -> None:
    good = torch.arange(4.0).reshape(1, 1, 2, 2)
    assert problem(good, (2, 2)) is None
    assert problem(good, (4, 1)) == "shape (1, 1, 2, 2)"
    assert problem(good / 0, (2, 2)) == "not finite"
    assert problem(good * 0 + 1, (2, 2)) == "constant"


def test_errors_are_rows() -> None:
    row = run(Network("flat", "mine", lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 4)), 16))
    assert row["error"].startswith("ValueError: no convolutional stage")
    assert "0 of 1 work" in report([row])
    row = run(Network("last", "mine", lambda: ChannelsLastNet(), 16))
    assert row["reshape"] == repr(ChannelsLast())
    assert row["error"] == ""
    assert "| last | 16 | `stage` | 8 x 8 | `ChannelsLast()` | yes | |" in report([row])


class ChannelsLastNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stage, self.norm, self.head = nn.Conv2d(3, 4, 1), Strided(), nn.LayerNorm(6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stage(self.stem(x)).mean((1, 2))).relu())


class Strided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 6, 3, 2, padding=1), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).movedim(1, -1)) * 2


def test_the_page_has_every_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    for network in NETWORKS.values():
        assert f"| {network.name} | {network.size} |" in page, network.name
    main(["--only", "none of them", "--output", str(tmp_path / "rows.json")])
    assert "Versions: torch" in capsys.readouterr().out
