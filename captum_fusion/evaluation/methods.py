"""Methods by their specs: from ``"name:option=value"`` to a function that explains a batch."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from captum.attr import Attribution
from torch import Tensor, nn

from captum_fusion import functional as formulas
from captum_fusion import layers, models
from captum_fusion._arguments import near_misses
from captum_fusion._types import Reshape
from captum_fusion.attr import FusionDetails, LayerFusionCAM, LayerUnionCAM
from captum_fusion.attr.catalog import METHODS
from captum_fusion.attr.fusion import single
from captum_fusion.evaluation.fingerprints import describe, fingerprint_of

#: The stages that a fusion can be cut off after (``fusion-cam:stage=union``), in their order.
STAGES = ("sum", "denoised", "union", "full")

#: The map of a class with a lower probability does not mean anything.
FAINT = 0.01


# --------------------------------------------------------------------------------------------------------------- specs


class MethodSpec(NamedTuple):
    """A method or metric with options, as in ``"name:option=value,option=value"``.

    Attributes:
        name: A name of the catalogue, or ``package.module:object``.
        options: The options; numbers, booleans, None, lists and tuples are parsed, everything else is text.
    """

    name: str
    options: dict[str, Any]


def parse(text: str) -> MethodSpec:
    """Parse ``name`` or ``name:option=value,...``.

    Args:
        text (str): The spec.

    Returns:
        MethodSpec: Name and options.

    Raises:
        ValueError: If an option has no value.

    Examples::

        >>> parse("fusion-cam:theta=20,weighting=raw")
        MethodSpec(name='fusion-cam', options={'theta': 20, 'weighting': 'raw'})
        >>> parse("road:percentiles=[10,50],seed=1").options
        {'percentiles': [10, 50], 'seed': 1}
        >>> parse("captum.attr:Saliency:abs=False")
        MethodSpec(name='captum.attr:Saliency', options={'abs': False})
    """
    name, _, tail = text.rpartition(":")
    if not name or "=" not in tail:
        return MethodSpec(text, {})
    options = {}
    for part in _parts(tail):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not key or not equals or not value:
            raise ValueError(f"{text!r}: {part!r} is not option=value")
        options[key] = _value(value)
    return MethodSpec(name, options)


def _parts(text: str) -> list[str]:
    """Split a text at its commas, except those in brackets."""
    return re.split(r",(?![^(\[{]*[)\]}])", text)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def split(texts: Iterable[str], catalogue: Iterable[str] = ()) -> list[str]:
    """Split a command line's specs, which are separated by spaces or by commas; a comma before ``option=`` stays.

    Args:
        texts (iterable of str): The words of the command line.
        catalogue (iterable of str, optional): The names that ``all`` stands for.
            Default: ()

    Returns:
        list[str]: The specs, each once.

    Examples::

        >>> split(["grad-cam,fusion-cam:theta=5,weighting=raw,score-cam", "rise"])
        ['grad-cam', 'fusion-cam:theta=5,weighting=raw', 'score-cam', 'rise']
        >>> split(["all,mine:function"], ["grad-cam", "rise"])
        ['grad-cam', 'rise', 'mine:function']
    """
    specs: list[str] = []
    for text in texts:
        for i, part in enumerate(piece.strip() for piece in _parts(text)):
            if i and specs and "=" in part and ":" not in part.split("=")[0]:
                specs[-1] += f",{part}"
            elif part:
                specs += catalogue if part == "all" else [part]
    return list(dict.fromkeys(specs))


def unknown(kind: str, name: str, names: Iterable[str]) -> ValueError:
    """The error for a name that a catalogue does not have, with a hint.

    Args:
        kind (str): ``"method"``, ``"metric"`` or ``"preset"``.
        name (str): The wrong name.
        names (iterable of str): The catalogue.
    """
    known = list(names)
    near = near_misses(name, known)
    hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(known)}"
    if kind in ("method", "metric"):
        hint = hint if near else "'captum-fusion methods' lists them"
        hint += " (your own: package.module:function)"
    return ValueError(f"{kind}s: there is no {kind} {name!r}; {hint}")


def refuse_unknown(kind: str, spec: MethodSpec, function: Callable[..., Any]) -> None:
    """Refuse options that a function does not have.

    Raises:
        ValueError: For such an option; the message lists the function's options.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError as error:
        raise ValueError(f"{kind}: {spec.name} must be a Python function: its arguments are not known") from error
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    free = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY or p.default is not p.empty]
    known = [name for name in free if name not in ("target", "additional_forward_args", "example", "explanation_func")]
    for key in spec.options:
        if key not in known:
            raise _no_option(kind, spec.name, key, known)


def _no_option(kind: str, name: str, key: str, known: Sequence[str]) -> ValueError:
    return ValueError(f"{kind}: {name} has no option {key!r}; it has {', '.join(known) or 'none'}")


def import_object(path: str, known: Container[str] = ()) -> Any:
    """Import what ``package.module:object`` names; modules in the current folder are found, too.

    Args:
        path (str): The import path.
        known (container of str): Names of a catalogue, for a hint if one of them has a part without ``=``.

    Returns:
        Any: The object.

    Raises:
        ValueError: If it cannot be imported.

    Examples::

        >>> import_object("captum.attr:Saliency").__name__
        'Saliency'
    """
    if path.partition(":")[0] in known:
        raise ValueError(f"{path}: options are written option=value")
    try:
        return models.import_from_here(path)
    except (Exception, SystemExit) as error:  # a module of the user's may raise anything
        raise ValueError(f"{path} could not be imported ({type(error).__name__}: {error})") from error


# -------------------------------------------------------------------------------------------------------------- methods

#: A function that explains: ``explain(inputs, target) -> (N, C, *spatial)``.
Explain = Callable[..., Tensor]


class ExplainedLayers(NamedTuple):
    """The layers of a network that methods explain.

    Attributes:
        model: The network.
        layers: The layer, or several for methods that fuse layers; other methods explain the last.
        stages: The last layer of every resolution, for ``integrative-cam`` if no layer was named. Default: ()
        reshape: Converts the layers' outputs to ``(N, channels, *spatial)``. Default: None
    """

    model: nn.Module
    layers: Sequence[nn.Module]
    stages: Sequence[nn.Module] = ()
    reshape: Reshape | None = None


def explained_layers(
    model: nn.Module, probe: Tensor, names: Sequence[str] | None, reshape: str | None, wants_stages: bool
) -> tuple[dict[str, Reshape | None], ExplainedLayers]:
    """The named layers, or the default one, with the given reshape, or their own.

    Args:
        model (Module): The network.
        probe (Tensor): An input of it.
        names (sequence of str, optional): Dotted names of layers. Default: None (the default layer)
        reshape (str, optional): As of :func:`captum_fusion.layers.parse_reshape`. Default: None (found by itself)
        wants_stages (bool): Whether a method fuses the stages of a convolutional network if no layer is named.

    Returns:
        tuple: The reshape of each layer by its name, and the layers.

    Raises:
        ValueError: If there is no such layer, or the reshape cannot be parsed.
    """
    given = None if reshape is None else layers.parse_reshape(reshape)
    try:
        if names is not None:
            found = {name: layers.find_layer(model, name) for name in names}
            reshapes: dict[str, Reshape | None] = {
                name: layers.reshape_of(model, layer, probe) if reshape is None else given
                for name, layer in found.items()
            }
            return reshapes, ExplainedLayers(model, list(found.values()), reshape=list(reshapes.values())[-1])
        name, layer, own = layers.default_layer(model, probe)
        own = own if reshape is None else given
        stages = layers.resolution_layers(model, probe) if wants_stages and own is None else []
        return {name: own}, ExplainedLayers(model, [layer], [module for _, module in stages], own)
    except ValueError as error:
        raise ValueError(f"layer: {error}") from error


@dataclass(frozen=True)
class BuiltMethod:
    """A method that is ready to explain.

    Attributes:
        name: The name of its spec or class.
        function: Called with inputs and a target, returns a tensor ``(N, C, *spatial)``.
        attribution: The attribution object; None for a function of the user's.
    """

    name: str
    function: Callable[..., Any]
    attribution: Any = None

    def __call__(self, inputs: Tensor, target: Any = None) -> Tensor:
        """The map, ``(N, C, *spatial)``, without gradients.

        Raises:
            TypeError: If the method returns anything but one tensor.
        """
        result = self.function(inputs.clone(), target)  # a network or function may change its input in place
        if isinstance(result, (tuple, list)) and len(result) == 1:
            result = result[0]
        if not isinstance(result, Tensor):
            raise TypeError(f"{self.name} must give one tensor, not a {type(result).__name__}")
        return result.detach()


def build(
    method: Any, explained: ExplainedLayers, defaults: Mapping[str, Any], per_call: Mapping[str, Any]
) -> BuiltMethod:
    """Build a method of its spec, or of a user's object or function.

    Args:
        method (str, Attribution or callable): A name of the catalogue with options; ``package.module:object`` for an
            attribution class or a function; an attribution object; or a function
            ``explain(model, layer, inputs, target) -> Tensor``.
        explained (ExplainedLayers): The network and its layers.
        defaults (mapping): Constructor options for the classes that have them.
        per_call (mapping): Options of ``attribute``, for the methods that have them.

    Returns:
        BuiltMethod: Called with ``(inputs, target)``, returns a tensor ``(N, C, *spatial)``.

    Raises:
        ValueError: For an unknown name or option, or an option that the method refuses.

    Examples::

        >>> import torch
        >>> from captum_fusion.demo import digits
        >>> model = digits.load_model()
        >>> explain = build("fusion-cam:theta=5", ExplainedLayers(model, [model.stage4]), {}, {})
        >>> explain(torch.zeros(1, 3, 96, 96), 3).shape
        torch.Size([1, 1, 96, 96])
    """
    spec = parse(method) if isinstance(method, str) else MethodSpec(str(method), {})
    if isinstance(method, str):
        if spec.name in METHODS:
            if explained.reshape is not None:
                defaults = {**defaults, "reshape": explained.reshape}
            return _of_attribution(_catalogued(spec, explained, defaults), per_call)
        method = imported(spec)
    if isinstance(method, type) and issubclass(method, Attribution):
        return _of_class(method, spec, explained, per_call)
    if isinstance(method, type) or not callable(getattr(method, "attribute", method)):
        raise ValueError(f"methods: {spec.name!r} must be an attribution or a function(model, layer, inputs, target)")
    if hasattr(method, "attribute"):
        return _of_attribution(method, {**per_call, **spec.options})
    refuse_unknown("methods", spec, method)

    def explain(inputs: Tensor, target: Any) -> Any:
        return method(explained.model, explained.layers[-1], inputs.clone(), target, **spec.options)

    return BuiltMethod(spec.name, explain)


def heat_map(method: BuiltMethod, inputs: Tensor, target: int) -> tuple[Tensor, FusionDetails | None]:
    """A method's map in the input's size, and the details of a fusion.

    Args:
        method (BuiltMethod): The method.
        inputs (Tensor): One input of the network, (1, C, H, W).
        target (int): The class.

    Returns:
        tuple: The map, (1, 1, H, W) in [0, 1], and the details; None for methods that are no fusion.

    Raises:
        ValueError: If the layer has no spatial dimensions.
        TypeError: If the method returns anything but one tensor.
    """
    if isinstance(method.attribution, (LayerFusionCAM, LayerUnionCAM)):
        return single(method.function(inputs, target, return_details=True))
    raw = method(inputs, target)
    if raw.dim() != inputs.dim():
        raise ValueError("the layer must return one tensor (N, channels, height, width)")
    return formulas.normalize(formulas.upsample(raw.sum(1, keepdim=True).relu(), inputs.shape[2:])), None


def check(text: str) -> None:
    """Check that a spec names a method, before a network is loaded for it.

    Raises:
        ValueError: If it does not.
    """
    spec = parse(text)
    if spec.name not in METHODS:
        imported(spec)


def imported(spec: MethodSpec) -> Any:
    """The object of a spec that is not in the catalogue.

    Raises:
        ValueError: If it is no import path, or cannot be imported.
    """
    if ":" not in spec.name:
        raise unknown("method", spec.name, METHODS)
    return import_object(spec.name, METHODS)


def _of_class(cls: Any, spec: MethodSpec, explained: ExplainedLayers, per_call: Mapping[str, Any]) -> BuiltMethod:
    """A method of an attribution class; options are the constructor's or those of ``attribute``."""
    known = inspect.signature(cls).parameters
    arguments = (explained.model, explained.layers[-1]) if "layer" in known else (explained.model,)
    try:
        built = cls(*arguments, **{key: value for key, value in spec.options.items() if key in known})
    except Exception as error:  # a class of the user's may raise anything
        raise ValueError(f"methods: {spec.name} could not be made ({type(error).__name__}: {error})") from error
    rest = {key: value for key, value in spec.options.items() if key not in known}
    accepted = inspect.signature(built.attribute).parameters
    for key in rest:
        if key not in accepted:
            raise ValueError(f"methods: {spec.name} has no option {key!r}")
    return _of_attribution(built, {**per_call, **rest})


def _of_attribution(attribution: Any, per_call: Mapping[str, Any]) -> BuiltMethod:
    accepted = inspect.signature(attribution.attribute).parameters
    options = {key: value for key, value in per_call.items() if key in accepted}

    def explain(inputs: Tensor, target: Any, **more: Any) -> Any:
        return attribution.attribute(inputs, target=target, **options, **more)

    return BuiltMethod(type(attribution).__name__, explain, attribution)


def _catalogued(spec: MethodSpec, explained: ExplainedLayers, defaults: Mapping[str, Any]) -> Any:
    """An attribution object of a method of the catalogue."""
    name, options = spec.name, dict(spec.options)
    stage = options.pop("stage", "full") if name in ("fusion-cam", "union-cam") else "full"
    known = options_of(name)
    for key in options:
        if key not in known:
            raise _no_option("methods", name, key, known)
    if stage not in STAGES:
        raise ValueError(f"methods: {name}: stage must be one of {', '.join(STAGES)}, not {stage!r}")
    if stage == "sum" and name == "union-cam":
        options["theta"] = 0  # its denoising is part of the gradient map
    layers = explained.stages if fuses_stages(name) and explained.stages else explained.layers
    for component in _components_of(name):
        if component in options:
            shared = {**defaults, **{key: options[key] for key in ("score_fn",) if key in options}}
            options[component] = _component(options[component], explained, shared)
    try:
        built = METHODS[name].build(explained.model, layers, **{**defaults, **options})
    except (ValueError, TypeError) as error:
        raise ValueError(f"methods: {name}: {error}") from error
    return built if stage == "full" else Stage(built, stage)


def fuses_layers(method: Any) -> bool:
    """Whether a method of the catalogue makes one map of several layers.

    Examples::

        >>> fuses_layers("layer-cam"), fuses_layers("grad-cam")
        (True, False)
    """
    name = parse(method).name if isinstance(method, str) else ""
    return name in METHODS and METHODS[name].info.fuses_layers


def fuses_stages(method: Any) -> bool:
    """Whether a method fuses the last layers of all resolutions if no layer is named.

    Examples::

        >>> fuses_stages("integrative-cam"), fuses_stages("layer-cam")
        (True, False)
    """
    return isinstance(method, str) and parse(method).name == "integrative-cam"


def options_of(name: str) -> list[str]:
    """The constructor options of a method of the catalogue that can be written in a spec."""
    taken = {"self", "forward_func", "model", "layer", "device_ids", "reshape", "layer_method"}
    options = [option for option in inspect.signature(METHODS[name].cls.__init__).parameters if option not in taken]
    options.sort(key=lambda option: option.endswith("_method"))  # a fusion's components last
    return options + (["preset"] if METHODS[name].info.presets else [])


def _components_of(name: str) -> list[str]:
    """The options of a fusion that take a method."""
    return [option for option in ("gradient_method", "region_method") if option in options_of(name)]


def _component(name: Any, explained: ExplainedLayers, defaults: Mapping[str, Any]) -> Attribution:
    """A fusion's component, by its name in the catalogue."""
    if not isinstance(name, str) or name not in METHODS:
        raise unknown("method", str(name), METHODS)
    built: Attribution = METHODS[name].build(explained.model, explained.layers, **defaults)
    return built


def takes(name: str, option: str) -> bool:
    """Whether a method of the catalogue has a constructor option.

    Examples::

        >>> takes("fusion-cam", "theta"), takes("grad-cam", "theta")
        (True, False)
    """
    return name in METHODS and option in options_of(name)


def fingerprint(method: Any) -> str:
    """What a label stands for: text that changes with it, so that rows of different methods are not mixed.

    For a spec of the catalogue this is the spec; for other specs, objects and functions it ends in a content hash of
    :func:`captum_fusion.evaluation.fingerprints.describe`, which says what is not seen. Metrics are treated alike.

    Args:
        method (str or object): What :func:`build` or :func:`captum_fusion.evaluation.measures.find` takes.

    Returns:
        str: The fingerprint.

    Raises:
        ValueError: If an import path cannot be imported.

    Examples::

        >>> fingerprint("fusion-cam:theta=5")
        'fusion-cam:theta=5'
    """
    if not isinstance(method, str):
        named = method if inspect.isroutine(method) or isinstance(method, type) else type(method)
        return f"{named.__module__}.{named.__qualname__} {fingerprint_of(describe(method))}"
    spec = parse(method)
    if spec.name in METHODS or ":" not in spec.name:
        return method
    return f"{method} {fingerprint_of(describe(import_object(spec.name, METHODS)))}"


class Stage:
    """A fusion that is cut off after a stage, for the papers' ablation studies.

    ``"sum"`` is the sum of both normalised maps without denoising; ``"denoised"`` adds the denoising, ``"union"`` the
    weights of the first stage; ``"full"`` is the whole method.

    Args:
        fusion (LayerFusionCAM or LayerUnionCAM): The method.
        stage (str): One of :data:`STAGES`.

    Examples::

        >>> import torch
        >>> from captum_fusion.demo import digits
        >>> model = digits.load_model()
        >>> Stage(LayerFusionCAM(model, model.stage4), "union").attribute(torch.zeros(1, 3, 96, 96), 3).shape
        torch.Size([1, 1, 96, 96])
    """

    def __init__(self, fusion: LayerFusionCAM | LayerUnionCAM, stage: str) -> None:
        self.fusion, self.stage = fusion, stage

    def attribute(self, inputs: Tensor, target: Any = None, *, perturbations_per_eval: int | None = None) -> Tensor:
        """The map after the stage, ``(N, 1, *input spatial)`` in [0, 1], in the dtype of the input."""
        result, details = single(
            self.fusion.attribute(inputs, target, perturbations_per_eval=perturbations_per_eval, return_details=True)
        )
        if self.stage == "sum":
            return formulas.normalize(details.gradient_map + details.region_map)
        if self.stage == "denoised":
            return formulas.normalize(details.denoised_map + details.region_map)
        return details.union_map if self.stage == "union" else result
