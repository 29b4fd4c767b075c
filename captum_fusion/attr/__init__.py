"""The methods, as ``captum.attr.LayerAttribution`` subclasses."""

from captum_fusion.attr.activation import LayerDecomCAM, LayerEigenCAM, LayerLinearCAM
from captum_fusion.attr.fusion import FusionDetails, LayerFusionCAM, LayerUnionCAM
from captum_fusion.attr.gradient import (
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
    LayerGroupCAM,
    LayerISCAM,
    LayerReciproCAM,
    LayerScoreCAM,
    LayerShapCAM,
)

__all__ = [
    "RISE",
    "FusionDetails",
    "IntegrativeDetails",
    "LayerAblationCAM",
    "LayerDecomCAM",
    "LayerEigenCAM",
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
    "LayerScoreCAM",
    "LayerShapCAM",
    "LayerSmoothGradCAMPlusPlus",
    "LayerUnionCAM",
    "LayerXGradCAM",
]
