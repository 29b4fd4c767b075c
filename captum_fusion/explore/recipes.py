"""How a map is made: a method of the catalogue with its options and components, as an object and as Python lines."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import captum.attr
from captum.attr import Attribution
from torch import nn

import captum_fusion
from captum_fusion import layers
from captum_fusion.attr.catalog import METHODS
from captum_fusion.evaluation import methods

#: The most methods side by side.
PANELS = 4

#: The method of the first screen, which is quick.
FIRST = "fusion-cam:preset=fast"

#: The methods that are offered before the catalogue's.
PRESETS = (FIRST, "fusion-cam:preset=best")

#: The methods whose components can be exchanged, with the names of the components.
COMPONENTS = {"fusion-cam": ("gradient", "region"), "union-cam": ("region",)}


class Recipe(NamedTuple):
    """A method with its options, and the components of a fusion.

    Attributes:
        method: A spec of a method of the catalogue, such as ``"fusion-cam:theta=5"``.
        gradient: The spec of the gradient component of a fusion. Default: None (the method's own)
        region: The spec of the region component. Default: None (the method's own)
    """

    method: str
    gradient: str | None = None
    region: str | None = None

    @property
    def label(self) -> str:
        """A short title."""
        parts = [part for part in self._components().values() if part is not None]
        return self.method + (f" ({' + '.join(parts)})" if parts else "")

    def _components(self) -> dict[str, str | None]:
        """The given components, as far as the method takes them."""
        names = COMPONENTS.get(methods.parse(self.method).name, ())
        return {name: getattr(self, name) for name in names}

    @property
    def spec(self) -> str:
        """The method and its components as one spec."""
        spec = methods.parse(self.method)
        parts = {f"{name}_method": part for name, part in self._components().items() if part is not None}
        options = {**spec.options, **parts}
        if "region_method" in options and "preset" in options:
            options = {**METHODS[spec.name].preset_options(options.pop("preset")), **options}
        return spec.name + (":" if options else "") + ",".join(f"{key}={value}" for key, value in options.items())

    def construction(self, layer: Sequence[str], options: Mapping[str, Any]) -> Construction:
        """The call that makes the attribution object.

        Args:
            layer (sequence of str): Dotted names of the layers; methods that do not fuse layers explain the last.
            options (mapping): Constructor options for the classes that have them.

        Raises:
            ValueError: For an unknown method or option.
        """
        made = _construction(methods.parse(self.spec), layer, options)
        parts = {
            key: _construction(methods.parse(made.options.pop(key)), layer, options)
            for key in ("gradient_method", "region_method")
            if made.options.get(key) is not None
        }
        if "region_method" in parts:
            limit = made.options.pop("max_evaluations", None)
            if limit is not None and methods.takes(parts["region_method"].name, "max_evaluations"):
                parts["region_method"].options.setdefault("max_evaluations", limit)
        return made._replace(options={**parts, **made.options})


class Construction(NamedTuple):
    """A call of a method's constructor.

    Attributes:
        name: The name of the method in the catalogue.
        layers: Dotted names of its layers; None if the method explains none.
        options: The options of the constructor; a component is a construction.
    """

    name: str
    layers: tuple[str, ...] | None
    options: dict[str, Any]

    def build(self, model: nn.Module, network: nn.Module) -> Any:
        """Make the attribution object.

        Args:
            model (Module): The network that the layers are found in.
            network (Module): The network that is explained: the same, or one that contains it.

        Raises:
            ValueError: For an option that the method refuses.
        """
        options = {
            key: value.build(model, network) if isinstance(value, Construction) else value
            for key, value in self.options.items()
        }
        found = [layers.find_layer(model, name) for name in self.layers or ()]
        try:
            return METHODS[self.name].build(network, found, **options)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.name}: {error}") from error

    def code(self) -> str:
        """The call as Python, with ``network`` and ``layer`` (``layers`` for several) for its first two arguments."""
        arguments = ["network"]
        if self.layers is not None:
            arguments.append("layers" if len(self.layers) > 1 else "layer")
        for key, value in self.options.items():
            if key == "preset":
                continue
            arguments.append(f"{key}={value.code() if isinstance(value, Construction) else repr(value)}")
        preset = self.options.get("preset")
        return f"{self.cls.__name__}{f'.{preset}' if preset else ''}({', '.join(arguments)})"

    @property
    def cls(self) -> type[Attribution]:
        """The class."""
        return METHODS[self.name].class_for(self.options)

    def imports(self) -> dict[str, set[str]]:
        """The classes that :meth:`code` names, for each package."""
        name, package = self.cls.__name__, self.cls.__module__
        public = (module for module in (captum_fusion, captum.attr) if hasattr(module, name))
        found = {next((module.__name__ for module in public), package): {name}}
        if "reshape" in self.options:
            found["captum_fusion.layers"] = {type(self.options["reshape"]).__name__}
        for value in self.options.values():
            if isinstance(value, Construction):
                for key, names in value.imports().items():
                    found.setdefault(key, set()).update(names)
        return found


def _construction(spec: methods.MethodSpec, layer: Sequence[str], options: Mapping[str, Any]) -> Construction:
    if spec.name not in METHODS:
        raise methods.unknown("method", spec.name, METHODS)
    for key in spec.options:
        if not methods.takes(spec.name, key):
            raise ValueError(f"{spec.name} has no option {key!r}")
    METHODS[spec.name].preset_options(spec.options.get("preset"))
    known = inspect.signature(METHODS[spec.name].class_for(options).__init__).parameters
    kept = {key: value for key, value in options.items() if key in known}
    names = None
    if "layer" in known:
        names = tuple(layer) if METHODS[spec.name].info.fuses_layers else tuple(layer[-1:])
    return Construction(spec.name, names, {**kept, **spec.options})


def checked(specs: Sequence[str]) -> Sequence[str]:
    """The specs, if each names a method of the catalogue with options that it has.

    Raises:
        ValueError: If one does not.

    Examples::

        >>> checked(["grad-cam", "fusion-cam:theta=5"])
        ['grad-cam', 'fusion-cam:theta=5']
    """
    for spec in specs:
        Recipe(spec).construction((), {})
    return specs
