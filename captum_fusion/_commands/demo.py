"""``captum-fusion demo``: a bundled photograph, explained once for each of two classes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_fusion import LayerFusionCAM, LayerScoreCAM, functional
from captum_fusion._commands.common import CommandError, add_output, check_folder, scores, write_figure

if TYPE_CHECKING:
    from captum_fusion.demo.photographs import Photograph

#: Pixels in the figure for each pixel of the network's input.
_SCALE = 2

_COLUMNS = ("gradient map", "region map", "union", "fusion")


def add(commands: Any) -> None:
    """Add the command to the parser's commands."""
    parser = commands.add_parser(
        "demo",
        help="explain a bundled photograph of two objects, offline, in seconds",
        description="Explain a bundled photograph to the bundled network, a SqueezeNet 1.1 trained on ImageNet, once "
        "for each of two classes. Needs no network connection. Writes captum_fusion_demo.png.",
    )
    parser.add_argument("--photograph", metavar="NAME", help="a bundled photograph of two objects (default: two_dogs)")
    add_output(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Explain the photograph, print what the maps show, and write the figure."""
    from captum_fusion.demo import photographs
    from captum_fusion.visualization import visualize_grid

    pairs = {found.name: found for found in photographs.load_photographs() if len(found.labels) == 2}
    name = options.photograph or next(iter(pairs))
    if name not in pairs:
        raise CommandError(f"there is no photograph {name!r} of two objects; there are {', '.join(pairs)}")
    check_folder(options.output)
    photograph, model = pairs[name], photographs.load_model()
    names = [photographs.CLASSES[label] for label in photograph.labels]
    inputs = photographs.preprocess(photograph.image)
    region = LayerScoreCAM(model, model.features, max_evaluations=56)  # nearly the full map, at a fraction of its cost
    fusion = LayerFusionCAM(model, model.features, region_method=region)
    explained: Any = fusion.attribute_targets(inputs, targets=list(photograph.labels), return_details=True)
    print(f"{name}: {names[0]} and {names[1]}. Photograph: {photograph.author}, {photograph.licence}.")
    picture, masks = _seen(photograph)
    rows: list[tuple[Tensor, list[tuple[Tensor | None, str]]]] = []
    for i, (label, (heat, details)) in enumerate(zip(photograph.labels, explained, strict=True)):
        maps = torch.cat([details.denoised_map, details.region_map, details.union_map, heat])
        whole, *alone = scores(model, torch.cat([inputs, inputs * maps]), [label] * 5)
        print(f"  {names[i]}: probability {whole:.2f}; {alone[-1]:.2f} with only the highlighted part shown.")
        print(f"    {_where(heat, masks, names, i)}")
        panels: list[tuple[Tensor | None, str]] = [(None, f"{names[i]}\np = {whole:.2f}")]
        for column, one, score in zip(_COLUMNS, maps, alone, strict=True):
            panels.append((one, f"{column}\nalone: p = {score:.2f}"))
        rows.append((picture, panels))
    path = options.output / "captum_fusion_demo.png"
    write_figure(path, visualize_grid(rows))
    print(f"wrote {path}")
    print("Next, a picture of your own: captum-fusion explain PICTURE.jpg")


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
    parts = [f"{shares[i]:.0%} on the {names[i]} ({areas[i]:.0%} of the picture)" for i in (own, 1 - own)]
    return f"The map: {parts[0]}, {parts[1]}."
