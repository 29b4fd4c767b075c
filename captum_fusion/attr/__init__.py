"""The methods, as ``captum.attr.LayerAttribution`` subclasses.

Each family's module lists its public names in ``__all__``, and they are found here. This package has no ``__all__`` of
its own, because type checkers only read literal ones.
"""

from captum_fusion.attr.activation import *
from captum_fusion.attr.fusion import *
from captum_fusion.attr.gradient import *
from captum_fusion.attr.integrative import *
from captum_fusion.attr.region import *
from captum_fusion.attr.replacing import *
from captum_fusion.attr.rise import *
from captum_fusion.attr.sampled import *
