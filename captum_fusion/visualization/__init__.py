"""Figures of attributions, on matplotlib and ``captum.attr.visualization``. They use no pyplot and open no window.

Functions that draw one panel take a figure with axes and return them; functions that draw several panels take a figure
or subfigure and return it. :func:`overlay` returns an array of pixels in the picture's own resolution.

The default colour map is perceptually uniform and legible for colour-blind readers. It is brightest where a map is
highest, so it keeps its meaning in greyscale. Any name of a matplotlib colour map is accepted, ``"jet"`` included.
Signed maps are drawn in a diverging colour map that is centred on 0.
"""

from __future__ import annotations

from captum_fusion.visualization.colours import CMAP, DIVERGING_CMAP, shared_scale
from captum_fusion.visualization.fusion import visualize_fusion
from captum_fusion.visualization.maps import visualize_comparison, visualize_grid, visualize_map
from captum_fusion.visualization.pictures import MODES, overlay, to_picture
from captum_fusion.visualization.signals import visualize_signal
from captum_fusion.visualization.volumes import visualize_volume

__all__ = [
    "CMAP",
    "DIVERGING_CMAP",
    "MODES",
    "overlay",
    "shared_scale",
    "to_picture",
    "visualize_comparison",
    "visualize_fusion",
    "visualize_grid",
    "visualize_map",
    "visualize_signal",
    "visualize_volume",
]
