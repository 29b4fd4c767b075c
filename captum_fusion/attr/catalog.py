"""Every method by the name that the command line and the evaluation know it by."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from captum.attr import Attribution, LayerGradCam
from torch import nn

from captum_fusion.attr import activation, fusion, gradient, integrative, region, replacing, rise, sampled
from captum_fusion.attr._info import FAMILIES, MethodInfo


@dataclass(frozen=True)
class Method:
    """A method and its class. Facts about the method are read from the class (``info``).

    Attributes:
        cls: The class.
        info: Its name, family, cost, citation and paper.
    """

    cls: type[Attribution]
    info: MethodInfo

    @property
    def name(self) -> str:
        """The name on the command line."""
        return self.info.name

    def build(self, model: Any, layers: Sequence[nn.Module], **options: Any) -> Any:
        """An object of the class.

        Args:
            model (callable): The network.
            layers (sequence of Module): Where to explain. Methods that fuse layers take all of them, others the last.
            options: Constructor options. Those that the class does not have are left out.

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
        several = self.info.fuses_layers and len(layers) > 1
        return self.cls(model, list(layers) if several else layers[-1], **kept)


#: Every method by its name.
METHODS: dict[str, Method] = {}


def register(cls: type[Attribution], info: MethodInfo | None = None) -> type[Attribution]:
    """Add a method of your own to the catalogue, so that the command line and the evaluation know its name.

    Args:
        cls (type): An attribution class, with a class attribute ``info`` unless ``info`` is given. Usable as a
            decorator.
        info (MethodInfo, optional): The facts about the method. Default: None (``cls.info``)

    Returns:
        type: The class itself.

    Raises:
        ValueError: If the family is not known, or the name belongs to another class.
    """
    facts: MethodInfo = cls.info if info is None else info
    if facts.family not in FAMILIES:
        raise ValueError(f"info: family must be one of {', '.join(FAMILIES)}, not {facts.family!r}")
    if facts.name in METHODS and METHODS[facts.name].cls is not cls:
        raise ValueError(f"info: the name {facts.name!r} belongs to {METHODS[facts.name].cls.__name__}")
    METHODS[facts.name] = Method(cls, facts)
    return cls


def _register_all() -> None:
    """The package's own methods, fusions first, and captum's Grad-CAM."""
    grad_cam = MethodInfo(
        "grad-cam", "gradient", "1, 1 b", "Selvaraju et al., ICCV 2017", "https://arxiv.org/abs/1610.02391", signed=True
    )
    found: list[tuple[Any, MethodInfo]] = [(LayerGradCam, grad_cam)]
    for module in (fusion, integrative, gradient, sampled, region, replacing, rise, activation):
        public = [value for name, value in vars(module).items() if name in module.__all__]
        found += [(cls, cls.info) for cls in public if hasattr(cls, "info")]
    for cls, info in sorted(found, key=lambda pair: FAMILIES.index(pair[1].family)):
        register(cls, info)


_register_all()
