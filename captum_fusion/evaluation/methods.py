"""From the words for a method to something that explains a batch."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import CellType
from typing import Any, NamedTuple

import numpy as np
from captum.attr import Attribution
from torch import Tensor, nn

from captum_fusion import functional as formulas
from captum_fusion.attr import LayerFusionCAM, LayerUnionCAM
from captum_fusion.attr.catalog import METHODS
from captum_fusion.evaluation.fingerprints import fingerprint_of

#: What a fusion can be cut off after (``fusion-cam:stage=union``), from the plainest.
STAGES = ("sum", "denoised", "union", "full")


class Words(NamedTuple):
    """What ``"name:option=value,option=value"`` says.

    Attributes:
        name: The part before the options: a catalogue name, or ``package.module:object``.
        options: The options, with numbers, booleans and None as such.
    """

    name: str
    options: dict[str, Any]


def parse(text: str) -> Words:
    """Read ``name`` or ``name:option=value,...``.

    Args:
        text (str): The words.

    Returns:
        Words: Name and options.

    Raises:
        ValueError: If an option has no value.

    Examples::

        >>> parse("fusion-cam:theta=20,weighting=raw")
        Words(name='fusion-cam', options={'theta': 20, 'weighting': 'raw'})
        >>> parse("road:percentiles=[10,50],seed=1").options
        {'percentiles': [10, 50], 'seed': 1}
        >>> parse("captum.attr:Saliency:abs=False")
        Words(name='captum.attr:Saliency', options={'abs': False})
    """
    name, _, tail = text.rpartition(":")
    if not name or "=" not in tail:
        return Words(text, {})
    options = {}
    for part in _parts(tail):
        key, equals, value = (each.strip() for each in part.partition("="))
        if not key or not equals or not value:
            raise ValueError(f"{text!r}: {part!r} is not option=value")
        options[key] = _value(value)
    return Words(name, options)


def _parts(text: str) -> list[str]:
    """A text divided at its commas, but for those in brackets."""
    return re.split(r",(?![^(\[{]*[)\]}])", text)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def split(texts: Iterable[str]) -> list[str]:
    """Words of a command line, separated by spaces or by commas that are not those between options.

    Examples::

        >>> split(["grad-cam,fusion-cam:theta=5,weighting=raw,score-cam", "rise"])
        ['grad-cam', 'fusion-cam:theta=5,weighting=raw', 'score-cam', 'rise']
    """
    found: list[str] = []
    for text in texts:
        for i, part in enumerate(each.strip() for each in _parts(text)):
            if i and "=" in part and ":" not in part.split("=")[0]:
                found[-1] += f",{part}"
            elif part:
                found.append(part)
    return list(dict.fromkeys(found))


def unknown(kind: str, name: str, names: Iterable[str]) -> ValueError:
    """The error for a name that a catalogue does not have."""
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or list(names)
    return ValueError(
        f"{kind}s: there is no {kind} {name!r}; did you mean {', '.join(near)}? (your own: package.module:function)"
    )


def refuse_unknown(kind: str, words: Words, function: Callable[..., Any]) -> None:
    """Refuse options that a function does not have.

    Raises:
        ValueError: If there is one; the message names it and those that there are.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError as error:
        raise ValueError(f"{kind}: {words.name} must be a Python function: its arguments are not known") from error
    free = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY or each.default is not each.empty]
    known = [name for name in free if name not in ("target", "additional_forward_args", "example", "explanation_func")]
    for key in words.options if not any(each.kind is each.VAR_KEYWORD for each in parameters) else ():
        if key not in known:
            raise ValueError(f"{kind}: {words.name} has no option {key!r}; it has {', '.join(known) or 'none'}")


def import_object(path: str, known: Container[str] = ()) -> Any:
    """What ``package.module:object`` names; modules in the current folder are found, too.

    Raises:
        ValueError: If it cannot be imported, or is one of the ``known`` names with something after it.

    Examples::

        >>> import_object("captum.attr:Saliency").__name__
        'Saliency'
    """
    module, _, name = path.partition(":")
    if module in known:
        raise ValueError(f"{path}: options are written option=value")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # a module of the user's may raise anything
        raise ValueError(f"{path} could not be imported ({type(error).__name__}: {error})") from error


#: What explains: ``explain(inputs, target) -> (N, C, *spatial)``.
Explain = Callable[..., Tensor]


class Place(NamedTuple):
    """Where methods explain.

    Attributes:
        model: The network.
        layers: The layer, or several for methods that fuse layers; other methods take the last.
        stages: The last layer of every resolution, for ``integrative-cam`` where no layer was named.
    """

    model: nn.Module
    layers: Sequence[nn.Module]
    stages: Sequence[nn.Module]


def build(method: Any, place: Place, defaults: Mapping[str, Any], per_call: Mapping[str, Any]) -> Explain:
    """Something that explains inputs, of a method's words or of a user's own method.

    Args:
        method (str, Attribution or callable): A name of the catalogue with options; ``package.module:object`` for an
            attribution class or a function; an attribution object; or a function
            ``explain(model, layer, inputs, target) -> Tensor``.
        place (Place): The network and where to explain it.
        defaults (mapping): Constructor options for the classes that have them.
        per_call (mapping): Options of ``attribute``, for the methods that have them.

    Returns:
        callable: ``explain(inputs, target) -> Tensor`` of shape ``(N, C, *spatial)``.

    Raises:
        ValueError: For a name or an option that there is not, or an option that the method refuses.

    Examples::

        >>> import torch
        >>> from captum_fusion import demo
        >>> model = demo.load_model()
        >>> explain = build("fusion-cam:theta=5", Place(model, [model.stage4], []), {}, {})
        >>> explain(torch.zeros(1, 3, 96, 96), 3).shape
        torch.Size([1, 1, 96, 96])
    """
    options: dict[str, Any] = {}
    name = str(method)
    if isinstance(method, str):
        name, options = parse(method)
        if name in METHODS:
            built = _catalogued(name, options, place, defaults)
            return _calling(built, per_call)
        if ":" not in name:
            raise unknown("method", name, METHODS)
        method = import_object(name, METHODS)
    layer = place.layers[-1]
    if isinstance(method, type) and issubclass(method, Attribution):
        own = inspect.signature(method).parameters
        arguments = (place.model, layer) if "layer" in own else (place.model,)
        try:
            built = method(*arguments, **{key: value for key, value in options.items() if key in own})
        except Exception as error:  # a class of the user's may raise anything
            raise ValueError(f"methods: {name} could not be made ({type(error).__name__}: {error})") from error
        accepted = inspect.signature(built.attribute).parameters
        for key in options:
            if key not in own and key not in accepted:
                raise ValueError(f"methods: {name} has no option {key!r}")
        return _calling(built, {**per_call, **{key: value for key, value in options.items() if key not in own}})
    if isinstance(method, type) or not callable(getattr(method, "attribute", method)):
        raise ValueError(f"methods: {name!r} must be an attribution or a function(model, layer, inputs, target)")
    if hasattr(method, "attribute"):
        return _calling(method, {**per_call, **options})
    refuse_unknown("methods", Words(name, options), method)

    def explain(inputs: Tensor, target: Any = None) -> Tensor:
        return _tensor(method(place.model, layer, inputs.clone(), target, **options), name)

    return explain


def _catalogued(name: str, options: dict[str, Any], place: Place, defaults: Mapping[str, Any]) -> Any:
    options = dict(options)
    stage = options.pop("stage", "full") if name in ("fusion-cam", "union-cam") else "full"
    known = [key for key in inspect.signature(METHODS[name].cls.__init__).parameters if key in _free(name)]
    for key in options:
        if key not in known:
            raise ValueError(f"methods: {name} has no option {key!r}; it has {', '.join(known) or 'none'}")
    if stage not in STAGES:
        raise ValueError(f"methods: {name}: stage must be one of {', '.join(STAGES)}, not {stage!r}")
    if stage == "sum" and name == "union-cam":
        options["theta"] = 0  # its denoising is part of the gradient map
    where = place.stages if name == "integrative-cam" and place.stages else place.layers
    try:
        built = METHODS[name].build(place.model, where, **{**defaults, **options})
    except (ValueError, TypeError) as error:
        raise ValueError(f"methods: {name}: {error}") from error
    return built if stage == "full" else Stage(built, stage)


def _free(name: str) -> list[str]:
    """The options of a method's constructor that are not objects."""
    taken = {"self", "forward_func", "model", "layer", "device_ids", "reshape", "method"}
    names = inspect.signature(METHODS[name].cls.__init__).parameters
    return [each for each in names if each not in taken and not each.endswith("_method")]


def takes(name: str, option: str) -> bool:
    """Whether a method of the catalogue has a constructor option.

    Examples::

        >>> takes("fusion-cam", "theta"), takes("grad-cam", "theta")
        (True, False)
    """
    return name in METHODS and option in _free(name)


def _calling(method: Any, per_call: Mapping[str, Any]) -> Explain:
    accepted = inspect.signature(method.attribute).parameters
    options = {key: value for key, value in per_call.items() if key in accepted}

    def explain(inputs: Tensor, target: Any = None) -> Tensor:
        return _tensor(method.attribute(inputs, target=target, **options), type(method).__name__)

    return explain


def _tensor(result: Any, name: str) -> Tensor:
    if isinstance(result, (tuple, list)) and len(result) == 1:
        result = result[0]
    if not isinstance(result, Tensor):
        raise TypeError(f"{name} must give one tensor, not a {type(result).__name__}")
    return result.detach()


def fingerprint(method: Any) -> str:
    """What a method or metric is, in words that change when it does: for rows that must not be mixed.

    Source, default arguments, what a function encloses, and the attributes of objects, also of the methods that they
    are made of. What a function calls, or reads from global variables, is not seen.

    Examples::

        >>> fingerprint("fusion-cam:theta=5")
        'fusion-cam:theta=5'
    """
    if isinstance(method, str):
        words = parse(method)
        if words.name in METHODS or ":" not in words.name:
            return method
        return f"{method} {fingerprint_of(_described(import_object(words.name, METHODS), {}, ()))}"
    kind = method if inspect.isroutine(method) or isinstance(method, type) else type(method)
    return f"{kind.__module__}.{kind.__qualname__} {fingerprint_of(_described(method, {}, ()))}"


def _described(value: Any, names: Mapping[int, str], within: tuple[int, ...]) -> str:
    """All that can be said of a value; modules by their names in the network that is explained."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, Path)):
        return repr(value)
    if id(value) in within:
        return "itself"
    within = (*within, id(value))

    def inner(some: Iterable[Any]) -> str:
        return "(" + ", ".join(_described(each, names, within) for each in some) + ")"

    if isinstance(value, (Tensor, np.ndarray)):
        return fingerprint_of(value)
    if isinstance(value, nn.Module):
        return f"module {names.get(id(value), _source(type(value)))}"
    if isinstance(value, Mapping):
        return inner(part for key in sorted(value, key=repr) for part in (key, value[key]))
    if isinstance(value, (list, tuple)):
        return inner(value)
    if isinstance(value, (set, frozenset)):
        return inner(sorted(value, key=repr))
    if isinstance(value, partial):
        return inner((value.func, value.args, value.keywords))
    if inspect.ismethod(value):
        return inner((value.__self__, value.__func__))
    if inspect.isfunction(value):
        enclosed = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        return _source(value) + inner((value.__defaults__, value.__kwdefaults__, enclosed))
    if inspect.isroutine(value) or isinstance(value, type):
        return _source(value)
    if isinstance(value, Attribution) and isinstance(value.forward_func, nn.Module):
        names = {id(module): f"{name!r}" for name, module in value.forward_func.named_modules()}
    known = getattr(value, "__dict__", {}) if len(within) == 1 or isinstance(value, Attribution) else {}
    return _source(type(value)) + inner([known])


def _source(value: Any) -> str:
    name = getattr(value, "__qualname__", repr(value))
    try:
        return f"{name} {fingerprint_of(inspect.getsource(value))}"
    except (OSError, TypeError):
        return name


class Stage:
    """A fusion cut off after a stage, for the papers' studies of their components.

    ``"sum"``: the sum of the two maps, both normalised, without denoising; ``"denoised"``: with it; ``"union"``: with
    the weights of the first stage; ``"full"``: the whole method.

    Args:
        fusion (LayerFusionCAM or LayerUnionCAM): The method.
        stage (str): One of :data:`STAGES`.

    Examples::

        >>> import torch
        >>> from captum_fusion import demo
        >>> model = demo.load_model()
        >>> Stage(LayerFusionCAM(model, model.stage4), "union").attribute(torch.zeros(1, 3, 96, 96), 3).shape
        torch.Size([1, 1, 96, 96])
    """

    def __init__(self, fusion: LayerFusionCAM | LayerUnionCAM, stage: str) -> None:
        self.fusion, self.stage = fusion, stage

    def attribute(self, inputs: Tensor, target: Any = None, *, perturbations_per_eval: int | None = None) -> Tensor:
        """The map after the stage, ``(N, 1, *input spatial)`` in [0, 1]."""
        result, details = self.fusion.attribute(
            inputs, target, perturbations_per_eval=perturbations_per_eval, return_details=True
        )
        if self.stage == "sum":
            return formulas.normalize(details.gradient_map + details.region_map)
        if self.stage == "denoised":
            return formulas.normalize(details.denoised_map + details.region_map)
        union: Tensor = details.union_map if self.stage == "union" else result
        return union
