"""The public layer methods, and what the common tests need to know of each."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from captum_fusion import (
    LayerAblationCAM,
    LayerAugmentedGradCAM,
    LayerDecomCAM,
    LayerEigenCAM,
    LayerFDCAM,
    LayerFusionCAM,
    LayerGradCAMPlusPlus,
    LayerGroupCAM,
    LayerHiResCAM,
    LayerIntegratedGradCAM,
    LayerIntegrativeCAM,
    LayerISCAM,
    LayerLayerCAM,
    LayerReciproCAM,
    LayerScoreCAM,
    LayerShapCAM,
    LayerSmoothGradCAMPlusPlus,
    LayerSSCAM,
    LayerUnionCAM,
    LayerXGradCAM,
)


class SoftmaxDecomCAM(LayerDecomCAM):
    """Weighted by probabilities, because a small network's raw scores are negative and count as 0."""

    @functools.wraps(LayerDecomCAM.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"score_fn": "softmax", **kwargs})


FUSIONS = [LayerFusionCAM, LayerUnionCAM]

#: Every method with a layer but LayerLinearCAM, which refuses the networks of the common tests (see test_linear_cam).
CLASSES = [
    *FUSIONS,
    LayerIntegrativeCAM,
    LayerHiResCAM,
    LayerGradCAMPlusPlus,
    LayerXGradCAM,
    LayerLayerCAM,
    LayerSmoothGradCAMPlusPlus,
    LayerIntegratedGradCAM,
    LayerAugmentedGradCAM,
    LayerScoreCAM,
    LayerSSCAM,
    LayerISCAM,
    LayerGroupCAM,
    SoftmaxDecomCAM,
    LayerAblationCAM,
    LayerReciproCAM,
    LayerFDCAM,
    LayerShapCAM,
    LayerEigenCAM,
]

#: Their maps are in the input's space, in [0, 1].
INPUT_SPACE = [*FUSIONS, LayerIntegrativeCAM, LayerAugmentedGradCAM]
#: Their maps have both signs.
SIGNED = [LayerShapCAM, LayerEigenCAM]
#: The map is the same for every target.
CLASS_AGNOSTIC = [LayerEigenCAM]
#: A list of layers gives one map.
FUSE_LAYERS = [LayerIntegrativeCAM, LayerLayerCAM]
#: They hide the input behind a blur unless told otherwise.
BLUR = [LayerGroupCAM, SoftmaxDecomCAM]


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
