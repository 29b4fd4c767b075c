"""The papers' studies, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from captum_fusion.attr.catalog import METHODS

#: The methods in the tables of Fusion-CAM's paper.
_TABLE = ("grad-cam", "grad-cam++", "xgrad-cam", "score-cam", "group-cam", "union-cam", "fusion-cam")


@dataclass(frozen=True)
class Preset:
    """A study with a name.

    Attributes:
        title: Heading of its page.
        methods: Specs of the methods, in the order of the table.
        metrics: Specs of the metrics.
        reference: The method that paired differences are taken against.
        theta: Values of ``theta`` for the methods that have it, each a method of its own.
        share: Whether methods share the passes that they have in common; not where their time is what is studied.
        published: Figures from papers, by a sentence on their source and on what differs.
    """

    title: str
    methods: tuple[str, ...]
    metrics: tuple[str, ...]
    reference: str
    theta: tuple[float, ...] = ()
    share: bool = True
    published: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)


_FUSION_PAPER = (
    "Fusion-CAM (arXiv:2603.05386), ResNet-50, ILSVRC 2012 validation, by the figures' steps of 0.05 probably 2000 "
    "images; from a third party's copy of the table. Layer, mask and score are not stated there."
)
_UNION_PAPER = (
    "UnionCAM (Front. Neurorobot. 18:1490198), VGG-16, 2000 random ILSVRC 2012 validation images, softmax scores; the "
    "target layer is not stated."
)

#: Every study by its name.
PRESETS: dict[str, Preset] = {
    "fusioncam-table": Preset(
        "Fusion-CAM's table: average drop and increase",
        _TABLE,
        ("average_drop", "average_increase", "complexity"),
        "fusion-cam",
        published={
            _FUSION_PAPER: {
                "grad-cam": {"average_drop": 30.15, "average_increase": 17.05},
                "grad-cam++": {"average_drop": 23.60, "average_increase": 27.25},
                "xgrad-cam": {"average_drop": 22.53, "average_increase": 29.15},
                "score-cam": {"average_drop": 20.13, "average_increase": 32.85},
                "group-cam": {"average_drop": 19.29, "average_increase": 32.25},
                "union-cam": {"average_drop": 16.34, "average_increase": 38.00},
                "fusion-cam": {"average_drop": 13.25, "average_increase": 42.25},
            }
        },
    ),
    "unioncam-table": Preset(
        "UnionCAM's tables: average drop and increase, insertion, deletion and over-all",
        ("grad-cam", "grad-cam++", "xgrad-cam", "score-cam", "group-cam", "union-cam", "union-cam:alpha=count"),
        ("average_drop", "average_increase", "complexity", "insertion", "deletion", "overall"),
        "union-cam",
        published={_UNION_PAPER: {"union-cam": {"average_drop": 43.15, "average_increase": 28.95}}},
    ),
    "ablation": Preset(
        "What the parts of the two fusions add",
        tuple(
            f"{name}:stage={stage}" if stage != "full" else name
            for name in ("union-cam", "fusion-cam")
            for stage in ("sum", "denoised", "union", "full")
        ),
        ("average_drop", "average_increase", "complexity", "overall"),
        "fusion-cam:stage=sum",
    ),
    "theta": Preset(
        "The percentile below which a map is denoised",
        ("union-cam", "fusion-cam"),
        ("average_drop", "average_increase", "complexity"),
        "fusion-cam:theta=10",
        theta=(0, 5, 10, 20, 30, 50, 70, 90),
    ),
    "time": Preset(
        "Samples and seconds of the layer methods",
        tuple(name for name in METHODS if name not in ("cam", "rise", "guided-fusion-cam")),
        ("complexity",),
        "grad-cam",
        share=False,
    ),
}
