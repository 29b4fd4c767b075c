"""The catalogue of methods: names on the command line and in the evaluation, and the classes they stand for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from captum.attr import Attribution, LayerGradCam
from torch import nn

from captum_fusion.attr import (
    activation,
    fusion,
    gradient,
    guided,
    integrative,
    region,
    regression,
    replacing,
    rise,
    sampled,
)
from captum_fusion.attr._info import FAMILIES, MethodInfo


@dataclass(frozen=True)
class Method:
    """An entry of the catalogue.

    Attributes:
        cls: The class.
        info: Name, family, cost, citation and link to the paper.
    """

    cls: type[Attribution]
    info: MethodInfo

    @property
    def name(self) -> str:
        """The name on the command line."""
        return self.info.name

    def preset_options(self, preset: Any) -> Mapping[str, Any]:
        """The options that a preset sets; none without a preset.

        Raises:
            ValueError: If the method has no such preset.
        """
        if preset is None:
            return {}
        if preset not in list(self.info.presets):
            raise ValueError(f"preset must be one of {', '.join(self.info.presets) or 'none'}, not {preset!r}")
        return self.info.presets[preset]

    def class_for(self, options: Mapping[str, Any]) -> type[Attribution]:
        """The class to build with options: captum's Grad-CAM has no ``reshape``."""
        reshaped = self.cls is LayerGradCam and options.get("reshape") is not None
        return gradient.ReshapedGradCAM if reshaped else self.cls

    def build(self, model: Any, layers: Sequence[nn.Module], preset: str | None = None, **options: Any) -> Any:
        """Create an instance of the class.

        Args:
            model (callable): The network.
            layers (sequence of Module): Layers to explain. Methods that fuse layers use all of them, others the last.
            preset (str, optional): One of ``info.presets``. Default: None (the constructor)
            options: Constructor options. Options that the class does not have are ignored.

        Raises:
            ValueError: If the method has no such preset, or an option has an invalid value.

        Returns:
            Attribution: The method, ready for ``attribute(inputs, target)``.

        Examples::

            >>> from captum_fusion.demo import digits
            >>> model = digits.load_model()
            >>> METHODS["score-cam"].build(model, [model.stage4], weighting="increase", theta=5).weighting
            'increase'
        """
        self.preset_options(preset)
        cls = self.class_for(options)
        known = inspect.signature(cls.__init__).parameters
        kept = {key: value for key, value in options.items() if key in known}
        if "layer" not in known:
            return cls(model, **kept)
        several = self.info.fuses_layers and len(layers) > 1
        make = cls if preset is None else getattr(cls, preset)
        return make(model, list(layers) if several else layers[-1], **kept)


#: All methods, by name.
METHODS: dict[str, Method] = {}


def register(cls: type[Attribution], info: MethodInfo | None = None) -> type[Attribution]:
    """Add a method to the catalogue, so that the command line and the evaluation accept its name.

    Can be used as a class decorator.

    Args:
        cls (type): Attribution class, with a class attribute ``info`` unless ``info`` is given.
        info (MethodInfo, optional): Metadata of the method. Default: None (``cls.info``)

    Returns:
        type: The class itself.

    Raises:
        ValueError: If the family is unknown, or the name belongs to another class.
    """
    metadata: MethodInfo = cls.info if info is None else info
    if metadata.family not in FAMILIES:
        raise ValueError(f"info: family must be one of {', '.join(FAMILIES)}, not {metadata.family!r}")
    if metadata.name in METHODS and METHODS[metadata.name].cls is not cls:
        raise ValueError(f"info: the name {metadata.name!r} belongs to {METHODS[metadata.name].cls.__name__}")
    METHODS[metadata.name] = Method(cls, metadata)
    return cls


def _register_all() -> None:
    """Register the package's methods, fusions first, and captum's Grad-CAM."""
    grad_cam = MethodInfo(
        "grad-cam", "gradient", "1, 1 b", "Selvaraju et al., ICCV 2017", "https://arxiv.org/abs/1610.02391", signed=True
    )
    entries: list[tuple[Any, MethodInfo]] = [(LayerGradCam, grad_cam)]
    for module in (fusion, integrative, guided, gradient, sampled, region, regression, replacing, rise, activation):
        public = [value for name, value in vars(module).items() if name in module.__all__]
        entries += [(cls, cls.info) for cls in public if hasattr(cls, "info")]
    for cls, info in sorted(entries, key=lambda entry: FAMILIES.index(entry[1].family)):
        register(cls, info)


_register_all()
