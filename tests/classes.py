"""The public layer methods, and what the common tests need to know of each."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from captum.attr import LayerAttribution, LayerGradCam

from captum_fusion import LayerDecomCAM, LayerFusionCAM, LayerLinearCAM, LayerUnionCAM
from captum_fusion.attr._bases import BackgroundCAM
from captum_fusion.attr.catalog import METHODS


class SoftmaxDecomCAM(LayerDecomCAM):
    """Weighted by probabilities, because a small network's raw scores are negative and count as 0."""

    @functools.wraps(LayerDecomCAM.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"score_fn": "softmax", **kwargs})


FUSIONS = [LayerFusionCAM, LayerUnionCAM]

#: The catalogue's layer methods. LayerLinearCAM refuses the networks of the common tests (see test_linear_cam), and
#: DecomCAM's raw scores are negative on them.
CLASSES: list[Any] = [
    SoftmaxDecomCAM if method.cls is LayerDecomCAM else method.cls
    for method in METHODS.values()
    if issubclass(method.cls, LayerAttribution) and method.cls not in (LayerGradCam, LayerLinearCAM)
]

#: Their maps are in the input's space, in [0, 1].
INPUT_SPACE = [cls for cls in CLASSES if cls.info.space == "input"]
#: Their maps have both signs.
SIGNED = [cls for cls in CLASSES if cls.info.signed]
#: The map is the same for every target.
CLASS_AGNOSTIC = [cls for cls in CLASSES if not cls.needs_target]
#: A list of layers gives one map.
FUSE_LAYERS = [cls for cls in CLASSES if cls.info.fuses_layers]
#: They hide the input behind a blur unless told otherwise.
BLUR = [cls for cls in CLASSES if issubclass(cls, BackgroundCAM)]


def takes(cls: Any, name: str) -> bool:
    """Whether ``attribute`` has an argument of that name."""
    return name in inspect.signature(cls.attribute).parameters


def masks_input(cls: Any) -> bool:
    """Whether ``baselines`` are those of the input."""
    return "baselines" in cls.call_options


def options(cls: Any, **wanted: Any) -> dict[str, Any]:
    """Those of some constructor options that the class has."""
    return {key: value for key, value in wanted.items() if key in inspect.signature(cls.__init__).parameters}


def with_baselines(cls: Any) -> dict[str, Any]:
    """Constructor options with which ``baselines`` count."""
    return {"background": "baseline"} if cls in BLUR else {}
