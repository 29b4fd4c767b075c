"""Fusion-CAM and what it stands on, as Captum attributions.

Examples::

    >>> from captum_fusion import LayerFusionCAM, demo
    >>> model, scene = demo.load_model(), demo.load_scenes()[0]
    >>> attribution = LayerFusionCAM(model, model.stage4).attribute(demo.preprocess(scene.image), scene.labels[0])
    >>> attribution.shape
    torch.Size([1, 1, 96, 96])
"""

from captum_fusion._captum import shared_work
from captum_fusion.attr import (
    RISE,
    FusionDetails,
    GuidedFusionCAM,
    IntegrativeDetails,
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
    LayerLinearCAM,
    LayerReciproCAM,
    LayerScoreCAM,
    LayerShapCAM,
    LayerSmoothGradCAMPlusPlus,
    LayerSSCAM,
    LayerUnionCAM,
    LayerXGradCAM,
)

__version__ = "0.1.0.dev0"

__all__ = [
    "RISE",
    "FusionDetails",
    "GuidedFusionCAM",
    "IntegrativeDetails",
    "LayerAblationCAM",
    "LayerAugmentedGradCAM",
    "LayerDecomCAM",
    "LayerEigenCAM",
    "LayerFDCAM",
    "LayerFusionCAM",
    "LayerGradCAMPlusPlus",
    "LayerGroupCAM",
    "LayerHiResCAM",
    "LayerISCAM",
    "LayerIntegratedGradCAM",
    "LayerIntegrativeCAM",
    "LayerLayerCAM",
    "LayerLinearCAM",
    "LayerReciproCAM",
    "LayerSSCAM",
    "LayerScoreCAM",
    "LayerShapCAM",
    "LayerSmoothGradCAMPlusPlus",
    "LayerUnionCAM",
    "LayerXGradCAM",
    "__version__",
    "shared_work",
]
