"""``captum-fusion demo``: a bundled photograph, explained once for each of two classes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_fusion import LayerFusionCAM, functional
from captum_fusion._commands.common import CommandError, add_output, check_folder, scores, write_figure
from captum_fusion.attr.fusion import single

if TYPE_CHECKING:
    from captum_fusion.demo.photographs import Photograph

#: Pixels in the figure for each pixel of the network's input.
_SCALE = 2


def add(commands: Any) -> None:
    """Add the command to the parser's commands."""
    parser = commands.add_parser(
        "demo",
        help="explain a bundled photograph of two objects, offline, in seconds",
        description="Explain a bundled photograph to the bundled network, a SqueezeNet 1.1 trained on ImageNet, once "
        "for each of two classes. Needs no network connection. Writes captum_fusion_demo.png.",
    )
    parser.add_argument(
        "--photograph", metavar="NAME", help="a bundled photograph of two objects (default: cat_and_coffee)"
    )
    add_output(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Explain the photograph, print what the maps show, and write the figure."""
    from captum_fusion.demo import photographs
    from captum_fusion.visualization import visualize_fusion

    pairs = {found.name: found for found in photographs.load_photographs() if len(found.labels) == 2}
    name = options.photograph or next(iter(pairs))
    if name not in pairs:
        raise CommandError(f"there is no photograph {name!r} of two objects; there are {', '.join(pairs)}")
    check_folder(options.output)
    photograph, model = pairs[name], photographs.load_model()
    target = list(photograph.labels)
    names = [photographs.CLASSES[label] for label in target]
    inputs = photographs.preprocess(photograph.image).repeat(2, 1, 1, 1)
    fusion = LayerFusionCAM.fast(model, model.features)
    maps, details = single(fusion.attribute(inputs, target, return_details=True))
    alone = scores(model, inputs * maps, target)
    picture, masks = _seen(photograph)
    print(f"{name}: {names[0]} and {names[1]} ({photograph.author}, {photograph.licence})")
    for i, label in enumerate(names):
        print(f"  {label}: probability {details.score[i]:.2f}; with only the highlighted part shown, {alone[i]:.2f}.")
        print(f"    {_where(maps[i : i + 1], masks, names, i)}")
    titles = [f"{label}: p = {score:.2f}" for label, score in zip(names, details.score.tolist(), strict=True)]
    path = options.output / "captum_fusion_demo.png"
    write_figure(path, visualize_fusion(picture.expand(2, -1, -1, -1), maps, details, titles=titles))
    print(f"wrote {path}")
    print("Next, a picture of your own: captum-fusion explain PICTURE.jpg")
    print("Other classes, methods and layers, in the browser: captum-fusion explore --open")


def _seen(photograph: Photograph) -> tuple[Tensor, Tensor]:
    """The part of the picture that the network sees, (3, H, W) in [0, 1], and the masks of its objects."""
    from torchvision.models import SqueezeNet1_1_Weights
    from torchvision.transforms import functional as transforms

    usual = SqueezeNet1_1_Weights.IMAGENET1K_V1.transforms()
    assert photograph.masks is not None
    both = torch.cat([transforms.to_tensor(photograph.image), photograph.masks.float()])
    resized = transforms.resize(both, [_SCALE * size for size in usual.resize_size])
    seen = transforms.center_crop(resized, [_SCALE * size for size in usual.crop_size])
    return seen[:3], seen[3:] > 0.5


def _where(heat: Tensor, masks: Tensor, names: list[str], own: int) -> str:
    """Which share of the map falls on its own object and on the other one, and how large they are."""
    spread = functional.upsample(heat, masks.shape[1:])[0]
    shares, areas = (spread * masks).sum((1, 2)) / spread.sum(), masks.float().mean((1, 2))
    other = 1 - own
    return (
        f"{shares[own]:.0%} of the map is on the {names[own]}, which fills {areas[own]:.0%} of the picture; "
        f"{shares[other]:.0%} is on the {names[other]}, which fills {areas[other]:.0%}."
    )
