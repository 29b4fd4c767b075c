"""The network that is explored, and the pictures to choose from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from captum_fusion import models
from captum_fusion.explore.session import Source


def of_name(
    name: str, weights: str | None = None, classes: str | None = None, whole_image: bool = False
) -> tuple[models.LoadedModel, Source]:
    """A network by name, as :func:`captum_fusion.models.load_model` loads it.

    What it says of its source names files without their folders.

    Raises:
        ValueError: For a name, file or weights that do not fit.

    Examples::

        >>> of_name("digits")[1].lines[-1]
        "loaded = load_model('digits')"
    """
    loaded = models.load_model(name, weights, classes, whole_image)
    given = {"weights": weights, "classes": classes, "whole_image": whole_image or None}
    facts = {key: _without_folder(value) for key, value in given.items() if value is not None}
    arguments = ", ".join([repr(name), *(f"{key}={value!r}" for key, value in facts.items())])
    files = [facts[key] for key, value in given.items() if facts.get(key) != value and value is not None]
    note = [f"# Put your {' and '.join(map(str, files))} into this folder."] if files else []
    lines = ("from captum_fusion.models import load_model", "", *note, f"loaded = load_model({arguments})")
    return loaded, Source(lines, {"loaded_from": name, **facts})


def _without_folder(value: Any) -> Any:
    """A file's name: the path says who the user is, and means nothing elsewhere."""
    return Path(value).name if isinstance(value, str) and Path(value).is_file() else value


def of_module(
    model: nn.Module, preprocess: Callable[[Image.Image], Tensor] | None = None
) -> tuple[models.LoadedModel, Source]:
    """A network of the user's.

    Args:
        model (Module): The network.
        preprocess (callable, optional): From an RGB picture to its input, (1, 3, H, W) or (3, H, W).
            Default: None (224 x 224 pixels, ImageNet's normalisation)
    """
    name = type(model).__name__
    loaded = models.from_module(name, model)
    lines = [
        "import torch",
        "from captum_fusion.models import from_module",
        "",
        f"model: torch.nn.Module = ...  # the {name} that was given to captum_fusion.explore",
        f"loaded = from_module({name!r}, model)",
    ]
    if preprocess is not None:
        loaded = loaded._replace(preprocess=_batched(preprocess))
        lines += ["loaded = loaded._replace(preprocess=...)  # the function that was given to captum_fusion.explore"]
    return loaded, Source(tuple(lines), {"loaded_from": "a module"})


def _batched(preprocess: Callable[[Image.Image], Tensor]) -> Callable[[Image.Image], Tensor]:
    def batched(image: Image.Image) -> Tensor:
        inputs = preprocess(image)
        if not isinstance(inputs, Tensor):
            raise TypeError(f"preprocess must return a tensor, not {type(inputs).__name__}")
        return inputs[None] if inputs.dim() == 3 else inputs

    return batched


@dataclasses.dataclass(frozen=True)
class Example:
    """A picture to choose.

    Attributes:
        path: Its file.
        credit: Who made it, and under which licence. Default: ``""``
    """

    path: Path
    credit: str = ""


def examples(images: Iterable[str | Path], name: str) -> list[Example]:
    """The pictures to choose from: the given ones, or those that are bundled for a network.

    Args:
        images (iterable of str or Path): Picture files.
        name (str): The network's name.

    Raises:
        ValueError: If a file does not exist.
    """
    given = [Example(Path(image)) for image in images]
    for one in given:
        if not one.path.is_file():
            raise ValueError(f"there is no file {one.path}")
    return given or bundled(name)


def bundled(name: str) -> list[Example]:
    """The pictures that are bundled for a network: photographs, or digit scenes for the network of digits."""
    from captum_fusion.demo import digits, photographs

    if name == models.DIGITS:
        return [Example(digits.scene_path(scene.name)) for scene in digits.load_scenes()]
    return [
        Example(photographs.photograph_path(photograph.name), f"{photograph.author}, {photograph.licence}")
        for photograph in photographs.load_photographs()
    ]


def with_classes(loaded: models.LoadedModel, classes: Sequence[str] | None) -> models.LoadedModel:
    """The network with other class names, if there are any."""
    return loaded if classes is None else loaded._replace(class_names=list(classes))


def moved(loaded: models.LoadedModel, device: str) -> models.LoadedModel:
    """The network on a device.

    Raises:
        ValueError: If there is no such device.
    """
    try:
        loaded.model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {device} is not available here ({models.first_line(error)})") from error
    return loaded


def of_any(model: Any, weights: str | None, preprocess: Callable[[Image.Image], Tensor] | None) -> Any:
    """What :func:`captum_fusion.explore.explore` is given, loaded, and where it is from.

    Raises:
        ValueError: For arguments that do not go together, or a name that does not fit.
    """
    if model is None or isinstance(model, str):
        if preprocess is not None:
            raise ValueError("preprocess belongs to a module; a model of a name has its own")
        return of_name(model or models.BUNDLED, weights)
    if weights is not None:
        raise ValueError("weights belong to a model of a name; this one is loaded already")
    if isinstance(model, models.LoadedModel):
        lines = (f"loaded = ...  # the LoadedModel {model.name!r} that was given to captum_fusion.explore",)
        loaded = model if preprocess is None else model._replace(preprocess=_batched(preprocess))
        return loaded, Source(lines, {"loaded_from": "a LoadedModel"})
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, a LoadedModel or a name, not {type(model).__name__}")
    return of_module(model, preprocess)
