"""``captum-fusion demo``: both digits of a bundled scene, explained."""

from __future__ import annotations

import argparse
from typing import Any

from captum_fusion import LayerFusionCAM, demo
from captum_fusion._commands.common import CommandError, add_output, check_folder, scores, write_figure
from captum_fusion.attr.fusion import single


def add(commands: Any) -> None:
    """Add the command to the parser's commands."""
    parser = commands.add_parser(
        "demo",
        help="explain both digits of a bundled scene, offline, in seconds",
        description="Explain a bundled picture with two digits to the bundled network, once for each of the two "
        "classes. Needs no network connection. Writes captum_fusion_demo.png.",
    )
    parser.add_argument("--scene", metavar="NAME", help="a bundled scene (default: the first with two digits)")
    add_output(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Explain the scene, print what the maps show, and write the figure."""
    from captum_fusion.visualization import visualize_fusion

    scenes = {scene.name: scene for scene in demo.load_scenes() if len(scene.labels) == 2}
    name = options.scene or next(iter(scenes))
    if name not in scenes:
        raise CommandError(f"there is no scene {name!r} with two digits; there are {', '.join(scenes)}")
    scene, model = scenes[name], demo.load_model()
    check_folder(options.output)
    inputs = demo.preprocess(scene.image).repeat(len(scene.labels), 1, 1, 1)
    target = list(scene.labels)
    maps, details = single(LayerFusionCAM(model, model.stage4).attribute(inputs, target, return_details=True))
    kept = scores(model, inputs * maps, target)
    print(f"{scene.name}: {' and '.join(demo.CLASSES[label] for label in scene.labels)}")
    for i, label in enumerate(scene.labels):
        inside = [float((maps[i, 0] * mask).sum() / maps[i].sum()) for mask in scene.masks]
        print(
            f"  {demo.CLASSES[label]:<6} probability {details.score[i]:.2f}, with only the highlighted part shown "
            f"{kept[i]:.2f}; {inside[i]:.0%} of the map falls on this digit, {inside[1 - i]:.0%} on the other"
        )
    titles = [f"{demo.CLASSES[label]}: p = {details.score[i]:.2f}" for i, label in enumerate(scene.labels)]
    figure = visualize_fusion(scene.image.expand(2, -1, -1, -1), maps, details, titles=titles)
    path = options.output / "captum_fusion_demo.png"
    write_figure(path, figure)
    print(f"wrote {path}")
