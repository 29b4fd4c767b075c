"""Fusion-CAM and related class activation maps, as captum attributions.

Examples::

    >>> from captum_fusion import LayerFusionCAM
    >>> from captum_fusion.demo import digits
    >>> model, scene = digits.load_model(), digits.load_scenes()[0]
    >>> attribution = LayerFusionCAM(model, model.stage4).attribute(digits.preprocess(scene.image), scene.labels[0])
    >>> attribution.shape
    torch.Size([1, 1, 96, 96])
"""

from captum_fusion._passes.sharing import SavedWork as SavedWork
from captum_fusion._passes.sharing import shared_work as shared_work
from captum_fusion.attr.activation import *
from captum_fusion.attr.fusion import *
from captum_fusion.attr.gradient import *
from captum_fusion.attr.guided import *
from captum_fusion.attr.integrative import *
from captum_fusion.attr.region import *
from captum_fusion.attr.replacing import *
from captum_fusion.attr.rise import *
from captum_fusion.attr.sampled import *
from captum_fusion.explore import explore as explore

__version__ = "0.1.0.dev0"
