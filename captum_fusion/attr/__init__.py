"""The methods, as ``captum.attr.LayerAttribution`` subclasses."""

from captum_fusion.attr.activation import LayerDecomCAM, LayerEigenCAM, LayerLinearCAM
from captum_fusion.attr.fusion import FusionDetails, GuidedFusionCAM, LayerFusionCAM, LayerUnionCAM
from captum_fusion.attr.gradient import (
    LayerAugmentedGradCAM,
    LayerGradCAMPlusPlus,
    LayerHiResCAM,
    LayerIntegratedGradCAM,
    LayerLayerCAM,
    LayerSmoothGradCAMPlusPlus,
    LayerXGradCAM,
)
from captum_fusion.attr.integrative import IntegrativeDetails, LayerIntegrativeCAM
from captum_fusion.attr.region import (
    RISE,
    LayerAblationCAM,
    LayerFDCAM,
    LayerGroupCAM,
    LayerISCAM,
    LayerReciproCAM,
    LayerScoreCAM,
    LayerShapCAM,
    LayerSSCAM,
)

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
]
