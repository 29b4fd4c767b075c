"""The public layer methods, with the properties that the common tests need."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from captum.attr import LayerAttribution, LayerGradCam

from captum_fusion import (
    RISE,
    GuidedFusionCAM,
    LayerDecomCAM,
    LayerFusionCAM,
    LayerLinearCAM,
    LayerRegressionCAM,
    LayerUnionCAM,
)
from captum_fusion.attr._bases import BackgroundCAM
from captum_fusion.attr.catalog import METHODS


class SoftmaxDecomCAM(LayerDecomCAM):
    """DecomCAM with probabilities as scores. The raw scores of a small network are negative and would be set to 0."""

    @functools.wraps(LayerDecomCAM.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"score_fn": "softmax", **kwargs})


FUSIONS = [LayerFusionCAM, LayerUnionCAM]

#: The layer methods of the catalogue. LayerLinearCAM rejects the networks of the common tests (see test_linear_cam),
#: and DecomCAM's raw scores are negative on them.
CLASSES: list[Any] = [
    SoftmaxDecomCAM if method.cls is LayerDecomCAM else method.cls
    for method in METHODS.values()
    if issubclass(method.cls, LayerAttribution) and method.cls not in (LayerGradCam, LayerLinearCAM)
]

#: Every public attribution class.
EVERY_CLASS: list[Any] = [*CLASSES, LayerLinearCAM, GuidedFusionCAM, RISE]

#: Methods whose maps are in the input's space, in [0, 1].
INPUT_SPACE = [cls for cls in CLASSES if cls.info.space == "input"]
#: Methods whose maps have both signs.
SIGNED = [cls for cls in CLASSES if cls.info.signed]
#: Methods whose map is the same for every target.
CLASS_AGNOSTIC = [cls for cls in CLASSES if not cls.needs_target]
#: Methods that fuse a list of layers into one map.
FUSE_LAYERS = [cls for cls in CLASSES if cls.info.fuses_layers]
#: Methods whose background is a blurred input by default.
BLUR = [cls for cls in CLASSES if issubclass(cls, BackgroundCAM)]


def takes(cls: Any, name: str) -> bool:
    """Whether ``attribute`` has an argument of that name."""
    return name in inspect.signature(cls.attribute).parameters


def chunked(cls: Any, limit: int | None) -> dict[str, Any]:
    """The argument of ``attribute`` that limits the chunks, for a class that has one."""
    limits = {"perturbations_per_eval": limit}
    return {"layer_kwargs": limits} if cls is GuidedFusionCAM else limits if takes(cls, *limits) else {}


def masks_input(cls: Any) -> bool:
    """Whether ``baselines`` replace values of the input."""
    return "baselines" in cls.call_options


def options(cls: Any, **wanted: Any) -> dict[str, Any]:
    """The given constructor options that the class has."""
    return {key: value for key, value in wanted.items() if key in inspect.signature(cls.__init__).parameters}


def with_baselines(cls: Any) -> dict[str, Any]:
    """Constructor options with which ``baselines`` are used."""
    return {"background": "baseline"} if cls in BLUR else {}


#: Numbers of masks that are enough for the common tests.
_MASKS = {RISE: {"n_masks": 8, "grid_size": 3}, LayerRegressionCAM: {"n_masks": 32}}


def few(cls: Any) -> dict[str, Any]:
    """Constructor options for few samples."""
    return {**options(cls, n_samples=3, n_steps=2, n_iterations=3), **_MASKS.get(cls, {})}


def build(cls: Any, model: Any, layer: Any, **options: Any) -> Any:
    """An instance of any class, with few samples; the layer is left out for a class that has none."""
    return cls(model, *([] if cls is RISE else [layer]), **few(cls), **options)
