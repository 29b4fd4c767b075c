"""Every method by the name that the command line and the evaluation know it by."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from captum.attr import LayerGradCam
from torch import nn

from captum_fusion.attr.activation import LayerDecomCAM, LayerEigenCAM, LayerLinearCAM
from captum_fusion.attr.fusion import GuidedFusionCAM, LayerFusionCAM, LayerUnionCAM
from captum_fusion.attr.gradient import (
    LayerAugmentedGradCAM,
    LayerGradCAMPlusPlus,
    LayerHiResCAM,
    LayerIntegratedGradCAM,
    LayerLayerCAM,
    LayerSmoothGradCAMPlusPlus,
    LayerXGradCAM,
)
from captum_fusion.attr.integrative import LayerIntegrativeCAM
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

#: Methods that make one map of several layers.
_FUSE_LAYERS = (LayerIntegrativeCAM, LayerLayerCAM)


@dataclass(frozen=True)
class Method:
    """A method, and what a table of methods says of it.

    Attributes:
        name: What the command line calls it.
        cls: Its class.
        family: ``"fusion"``, ``"gradient"``, ``"region"`` or ``"activation"``.
        rows: Rows of the network for each example, with K live channels and Z positions of the layer; ``(layer)`` are
            those that begin at the layer, ``b`` counts backward rows.
        citation: First author, where and when.
        url: The paper.
    """

    name: str
    cls: Any
    family: str
    rows: str
    citation: str
    url: str

    def build(self, model: Any, layers: Sequence[nn.Module], **options: Any) -> Any:
        """An object of the class.

        Args:
            model (callable): The network.
            layers (sequence of Module): Where to explain. Methods that fuse layers take all of them, others the last.
            options: Constructor options, of which those that the class does not have are left out.

        Returns:
            Attribution: Ready for ``attribute(inputs, target)``.

        Examples::

            >>> from captum_fusion import demo
            >>> model = demo.load_model()
            >>> METHODS["score-cam"].build(model, [model.stage4], weighting="increase", theta=5).weighting
            'increase'
        """
        known = inspect.signature(self.cls.__init__).parameters
        kept = {key: value for key, value in options.items() if key in known}
        if "layer" not in known:
            return self.cls(model, **kept)
        return self.cls(model, list(layers) if self.fuses_layers and len(layers) > 1 else layers[-1], **kept)

    @property
    def fuses_layers(self) -> bool:
        """Whether it makes one map of several layers."""
        return issubclass(self.cls, _FUSE_LAYERS)


_ALL = (
    Method(
        "fusion-cam",
        LayerFusionCAM,
        "fusion",
        "K + 5, 1 b",
        "Dekdegue et al., 2026",
        "https://arxiv.org/abs/2603.05386",
    ),
    Method(
        "union-cam",
        LayerUnionCAM,
        "fusion",
        "K + 5, 1 b",
        "Hu et al., Front. Neurorobot. 2024",
        "https://doi.org/10.3389/fnbot.2024.1490198",
    ),
    Method(
        "integrative-cam",
        LayerIntegrativeCAM,
        "fusion",
        "1, 1 b",
        "Singh et al., 2024",
        "https://arxiv.org/abs/2412.01354",
    ),
    Method(
        "guided-fusion-cam",
        GuidedFusionCAM,
        "fusion",
        "K + 6, 2 b",
        "after Selvaraju et al., ICCV 2017",
        "https://arxiv.org/abs/1610.02391",
    ),
    Method(
        "grad-cam",
        LayerGradCam,
        "gradient",
        "1, 1 b",
        "Selvaraju et al., ICCV 2017",
        "https://arxiv.org/abs/1610.02391",
    ),
    Method(
        "hires-cam", LayerHiResCAM, "gradient", "1, 1 b", "Draelos and Carin, 2020", "https://arxiv.org/abs/2011.08891"
    ),
    Method(
        "grad-cam++",
        LayerGradCAMPlusPlus,
        "gradient",
        "1, 1 b",
        "Chattopadhay et al., WACV 2018",
        "https://arxiv.org/abs/1710.11063",
    ),
    Method(
        "xgrad-cam", LayerXGradCAM, "gradient", "1, 1 b", "Fu et al., BMVC 2020", "https://arxiv.org/abs/2008.02312"
    ),
    Method(
        "layer-cam",
        LayerLayerCAM,
        "gradient",
        "1, 1 b",
        "Jiang et al., IEEE TIP 2021",
        "https://doi.org/10.1109/TIP.2021.3089943",
    ),
    Method(
        "smooth-grad-cam++",
        LayerSmoothGradCAMPlusPlus,
        "gradient",
        "5, 4 b",
        "Omeiza et al., 2019",
        "https://arxiv.org/abs/1908.01224",
    ),
    Method(
        "integrated-grad-cam",
        LayerIntegratedGradCAM,
        "gradient",
        "52, 50 b",
        "Sattarzadeh et al., ICASSP 2021",
        "https://arxiv.org/abs/2102.07805",
    ),
    Method(
        "augmented-grad-cam",
        LayerAugmentedGradCAM,
        "gradient",
        "101, 100 b",
        "Morbidelli et al., ICASSP 2020",
        "https://doi.org/10.1109/ICASSP40776.2020.9054416",
    ),
    Method(
        "score-cam", LayerScoreCAM, "region", "K + 1", "Wang et al., CVPR-W 2020", "https://arxiv.org/abs/1910.01279"
    ),
    Method("ss-cam", LayerSSCAM, "region", "35 K + 1", "Wang et al., 2020", "https://arxiv.org/abs/2006.14255"),
    Method("is-cam", LayerISCAM, "region", "10 K + 1", "Naidu et al., 2020", "https://arxiv.org/abs/2010.03023"),
    Method("group-cam", LayerGroupCAM, "region", "34, 1 b", "Zhang et al., 2021", "https://arxiv.org/abs/2103.13859"),
    Method(
        "ablation-cam",
        LayerAblationCAM,
        "region",
        "1, K (layer)",
        "Desai and Ramaswamy, WACV 2020",
        "https://doi.org/10.1109/WACV45572.2020.9093360",
    ),
    Method(
        "recipro-cam",
        LayerReciproCAM,
        "region",
        "1, Z (layer)",
        "Byun and Lee, CVPR-W 2024",
        "https://arxiv.org/abs/2209.14074",
    ),
    Method(
        "fd-cam",
        LayerFDCAM,
        "region",
        "1, 1 b, 2 K + 1 (layer)",
        "Li et al., ICPR 2022",
        "https://arxiv.org/abs/2206.08792",
    ),
    Method(
        "shap-cam",
        LayerShapCAM,
        "region",
        "1, 25 (Z - 1) + 1 (layer)",
        "Zheng et al., ECCV 2022",
        "https://arxiv.org/abs/2208.03608",
    ),
    Method("rise", RISE, "region", "4001", "Petsiuk et al., BMVC 2018", "https://arxiv.org/abs/1806.07421"),
    Method("cam", LayerLinearCAM, "activation", "1", "Zhou et al., CVPR 2016", "https://arxiv.org/abs/1512.04150"),
    Method(
        "eigen-cam",
        LayerEigenCAM,
        "activation",
        "1",
        "Muhammad and Yeasin, IJCNN 2020",
        "https://arxiv.org/abs/2008.00299",
    ),
    Method(
        "decom-cam", LayerDecomCAM, "activation", "11, 1 b", "Yang et al., 2024", "https://arxiv.org/abs/2405.18882"
    ),
)

#: Every method by its name.
METHODS: dict[str, Method] = {method.name: method for method in _ALL}
