"""Comparison with other libraries: torchcam's Score-CAM and captum's Grad-CAM.

torchcam normalises a channel before upsampling, whereas this package, like the paper, normalises after upsampling. The
two are equal for a layer of the input's size and correlate closely for other layers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captum.attr import LayerAttribution, LayerGradCam
from torch import Tensor, nn

from captum_fusion import LayerFusionCAM, LayerScoreCAM, functional
from tests.networks import correlations

TARGETS = [7, 0, 3, 9]


class Pyramid(nn.Module):
    """64 channels of 16 x 16 from images of 64 x 64, with a head that varies over space and realistic logits."""

    def __init__(self, stride: int = 2) -> None:
        super().__init__()
        self.conv1, self.relu1 = nn.Conv2d(3, 24, 5, stride=stride, padding=2), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(24, 64, 3, stride=stride, padding=1), nn.ReLU()
        self.pool, self.head = nn.AdaptiveAvgPool2d(4), nn.Linear(64 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = self.relu2(self.conv2(self.relu1(self.conv1(x))))
        return 60 * self.head(self.pool(features).flatten(1))


def network(stride: int, size: int) -> tuple[Pyramid, Tensor]:
    """The network and four smooth images of very different scale."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Pyramid(stride).eval()
        coarse = torch.randn(len(TARGETS), 3, 6, 6)
    x = nn.functional.interpolate(coarse, (size, size), mode="bilinear", align_corners=False)
    return model, x * torch.tensor([0.5, 1.0, 2.0, 4.0])[:, None, None, None]


def torchcams(model: nn.Module, layer: str, x: Tensor, targets: list[int], **options: Any) -> Tensor:
    """torchcam's normalised maps, (N, 1, h, w)."""
    score_cam = pytest.importorskip("torchcam.methods").ScoreCAM
    with score_cam(model, layer, **options) as extractor, torch.no_grad():
        model(x)
        return extractor(targets)[0][:, None]


def test_score_cam_correlates_with_torchcam() -> None:
    model, x = network(2, 64)
    ours = LayerScoreCAM(model, model.relu2, weighting="softmax").attribute(x, TARGETS)
    theirs = torchcams(model, "relu2", x, TARGETS)
    assert ours.shape == theirs.shape == (4, 1, 16, 16)
    assert min(correlations(ours, theirs)) > 0.999
    # The test is sensitive: it fails for other targets and for another order of the batch.
    assert min(correlations(ours, torchcams(model, "relu2", x, TARGETS[::-1]))) < 0.99
    assert max(correlations(ours, theirs.roll(1, 0))) < 0.99


def test_score_cam_equals_torchcam_where_nothing_is_upsampled() -> None:
    model, x = network(1, 20)
    ours = LayerScoreCAM(model, model.relu2, weighting="softmax").attribute(x, TARGETS)
    theirs = torchcams(model, "relu2", x, TARGETS)
    torch.testing.assert_close(functional.normalize(ours), theirs, rtol=1e-4, atol=1e-5)


def test_region_map_of_the_fusion_is_torchcams() -> None:
    model, x = network(1, 20)
    _, details = LayerFusionCAM(model, model.relu2).attribute(x, TARGETS, return_details=True)
    torch.testing.assert_close(details.region_map, torchcams(model, "relu2", x, TARGETS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", ["relu1", "conv2", "relu2"])
def test_grad_cam_is_captums(layer: str) -> None:
    model, x = network(2, 64)
    seen: list[Tensor] = []
    handle = getattr(model, layer).register_forward_hook(lambda module, args, output: seen.append(output))
    outputs = model(x)
    handle.remove()
    (gradients,) = torch.autograd.grad(outputs[range(4), TARGETS].sum(), seen)
    captums = LayerGradCam(model, getattr(model, layer)).attribute(x, TARGETS)
    scale = float(captums.detach().abs().max())
    torch.testing.assert_close(
        functional.grad_cam(seen[0].detach(), gradients), captums.detach(), rtol=1e-5, atol=1e-6 * scale
    )


def test_gradient_map_of_the_fusion_is_captums_grad_cam() -> None:
    model, x = network(2, 64)
    _, details = LayerFusionCAM(model, model.relu2).attribute(x, TARGETS, return_details=True)
    captums = LayerGradCam(model, model.relu2).attribute(x, TARGETS, relu_attributions=True).detach()
    assert (captums > 0).flatten(1).any(1).all()
    # captum's own upsampling to the input.
    upsampled = LayerAttribution.interpolate(captums, (64, 64), "bilinear")
    for i in range(4):
        low, high = upsampled[i].min(), upsampled[i].max()
        torch.testing.assert_close(
            details.gradient_map[i], (upsampled[i] - low) / (high - low), rtol=1e-5, atol=1e-5, msg=f"example {i}"
        )
