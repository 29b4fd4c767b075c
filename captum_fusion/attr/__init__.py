"""The methods, as ``captum.attr.LayerAttribution`` subclasses.

This package re-exports the names in ``__all__`` of each family's module. It has no ``__all__`` of its own, because type
checkers only read literal ones.
"""

from captum_fusion.attr.activation import *
from captum_fusion.attr.fusion import *
from captum_fusion.attr.gradient import *
from captum_fusion.attr.guided import *
from captum_fusion.attr.integrative import *
from captum_fusion.attr.region import *
from captum_fusion.attr.regression import *
from captum_fusion.attr.replacing import *
from captum_fusion.attr.rise import *
from captum_fusion.attr.sampled import *
