"""The methods, as ``captum.attr.LayerAttribution`` subclasses."""

from captum_fusion.attr.fusion import FusionDetails, LayerFusionCAM, LayerUnionCAM
from captum_fusion.attr.region import LayerScoreCAM

__all__ = ["FusionDetails", "LayerFusionCAM", "LayerScoreCAM", "LayerUnionCAM"]
