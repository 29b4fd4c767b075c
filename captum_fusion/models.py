"""Loading networks by name, with their weights, preprocessing and class names."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pickle
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from captum_fusion._arguments import near_misses
from captum_fusion.demo import digits

#: The name of the bundled SqueezeNet 1.1.
BUNDLED = "bundled"

#: The name of the bundled network for digit scenes.
DIGITS = "digits"


class LoadedModel(NamedTuple):
    """A network with its preprocessing and class names.

    Attributes:
        name: Its name in messages and tables.
        model: The network, in eval mode.
        preprocess: From an RGB picture to the network's input, (1, 3, H, W).
        restore: From such an input back to a picture, (1, 3, H, W) in [0, 1].
        class_names: Names of the outputs, or None if unknown.
    """

    name: str
    model: nn.Module
    preprocess: Callable[[Image.Image], Tensor]
    restore: Callable[[Tensor], Tensor]
    class_names: Sequence[str] | None


def load_model(
    name: str, weights: str | None = None, classes: str | None = None, whole_image: bool = False
) -> LoadedModel:
    """Build a network and load its weights, without ever unpickling code.

    Args:
        name (str): ``"bundled"`` (:mod:`captum_fusion.demo.photographs`), ``"digits"``
            (:mod:`captum_fusion.demo.digits`), the name of a torchvision classification model, or
            ``"package.module:function"`` for a function without arguments that returns a ``torch.nn.Module``; modules
            in the current folder are found, too. Such a network gets 224 x 224 RGB pictures with ImageNet's
            normalisation; a network that needs anything else must convert them itself.
        weights (str, optional): For torchvision models the name of published weights (``"DEFAULT"``,
            ``"IMAGENET1K_V1"``; downloaded by torchvision); for every model a state dict in a ``.safetensors`` or
            PyTorch file.
            Default: None (published DEFAULT weights for a torchvision name, the function's own otherwise)
        classes (str, optional): A file with the class names, a JSON list or one a line.
            Default: None
        whole_image (bool, optional): Squeeze the whole picture into the input; the published preprocessing resizes it
            and crops its centre.
            Default: False

    Returns:
        LoadedModel: In eval mode, on the CPU.

    Raises:
        ValueError: For a name, file or weights that do not fit; the message says which and why.

    Examples::

        >>> load_model("digits").class_names[3]
        'three'
    """
    file = Path(weights) if weights and (Path(weights).suffix or Path(weights).exists()) else None
    state = None if file is None or name in (BUNDLED, DIGITS) else _read_state(file)
    if name in (BUNDLED, DIGITS):
        if weights is not None:
            raise ValueError(f"the model {name} has its own weights; leave weights out")
        loaded = _bundled(whole_image) if name == BUNDLED else _digits()
    elif ":" in name:
        if weights is not None and file is None:
            raise ValueError(f"weights of {name} must be a .safetensors or .pt file, not {weights!r}")
        loaded = _from_function(name, whole_image)
    else:
        loaded = _from_torchvision(name, None if file else weights or "DEFAULT", state, whole_image)
    if state is not None:
        _load_state(loaded.model, state, weights, name)
    if classes is not None:
        loaded = loaded._replace(class_names=_read_classes(Path(classes)))
    loaded.model.eval()
    return loaded


def from_module(name: str, model: nn.Module, whole_image: bool = False) -> LoadedModel:
    """Give a network of your own the usual preprocessing: 224 x 224 RGB pictures with ImageNet's normalisation.

    Args:
        name (str): Its name in messages and tables.
        model (Module): The network; its mode and device are left as they are.
        whole_image (bool, optional): Squeeze the whole picture into the input instead of cropping its centre.
            Default: False

    Returns:
        LoadedModel: Without class names.

    Examples::

        >>> from_module("mine", nn.Identity()).preprocess(Image.new("RGB", (300, 200))).shape
        torch.Size([1, 3, 224, 224])
    """
    from torchvision.models import ResNet18_Weights

    usual = ResNet18_Weights.IMAGENET1K_V1.transforms()
    return LoadedModel(name, model, *_with_transforms(usual, whole_image), None)


def output_of(name: str, model: nn.Module, inputs: Tensor) -> Tensor:
    """Run a classifier and check its output.

    Args:
        name (str): The model's name in the error message.
        model (Module): The network.
        inputs (Tensor): Its input.

    Returns:
        Tensor: Of shape (N, classes), without gradients.

    Raises:
        ValueError: If the model does not take the input, or returns anything else.

    Examples::

        >>> output_of("flat", nn.Flatten(), torch.zeros(1, 3, 2, 2)).shape
        torch.Size([1, 12])
    """
    try:
        with torch.no_grad():
            output = model(inputs)
    except Exception as error:  # a network of the user's may raise anything
        raise ValueError(
            f"model: {name} does not take an input of shape {tuple(inputs.shape)} ({first_line(error)})"
        ) from error
    if not isinstance(output, Tensor) or output.dim() != 2:
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"model: {name} must return a tensor of shape (N, classes), not {found}")
    return output


def class_names_of(loaded: LoadedModel, outputs: int) -> list[str] | None:
    """The names of a network's outputs: its own, or ImageNet's for 1000 outputs without names.

    Args:
        loaded (LoadedModel): The network.
        outputs (int): How many outputs it has.

    Returns:
        list[str] or None: None where the names are not known.

    Raises:
        ValueError: If the number of names is not the number of outputs.

    Examples::

        >>> class_names_of(load_model("digits"), 10)[3]
        'three'
    """
    names = imagenet_classes() if loaded.class_names is None and outputs == 1000 else loaded.class_names
    if names is not None and len(names) != outputs:
        raise ValueError(f"classes: there are {len(names)} names for {outputs} outputs")
    return None if names is None else list(names)


def imagenet_classes() -> list[str]:
    """The 1000 ImageNet class names in torchvision's order."""
    from torchvision.models import ResNet18_Weights

    return list(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


# ---------------------------------------------------------------------------------------------------------- pictures


def _restorer(mean: Sequence[float], std: Sequence[float]) -> Callable[[Tensor], Tensor]:
    def restore(inputs: Tensor) -> Tensor:
        shift, scale = (inputs.new_tensor(values).reshape(1, -1, 1, 1) for values in (mean, std))
        return (inputs * scale + shift).clamp(0, 1)

    return restore


def _with_transforms(
    transforms: Any, whole_image: bool
) -> tuple[Callable[[Image.Image], Tensor], Callable[[Tensor], Tensor]]:
    if whole_image:
        transforms.resize_size = transforms.crop_size * 2  # [side, side] is resized to without keeping the aspect

    def preprocess(image: Image.Image) -> Tensor:
        prepared: Tensor = transforms(image)
        return prepared.unsqueeze(0)

    return preprocess, _restorer(transforms.mean, transforms.std)


# ----------------------------------------------------------------------------------------------------------- sources


def _bundled(whole_image: bool) -> LoadedModel:
    from torchvision.models import SqueezeNet1_1_Weights

    from captum_fusion.demo import photographs

    transforms = SqueezeNet1_1_Weights.IMAGENET1K_V1.transforms()
    return LoadedModel(
        BUNDLED, photographs.load_model(), *_with_transforms(transforms, whole_image), photographs.CLASSES
    )


def _digits() -> LoadedModel:
    from torchvision.transforms.functional import to_tensor

    def preprocess(image: Image.Image) -> Tensor:
        return digits.preprocess(to_tensor(image))

    return LoadedModel(DIGITS, digits.load_model(), preprocess, _restorer(digits.MEAN, digits.STD), digits.CLASSES)


def _from_torchvision(
    name: str, weights: str | None, state: dict[str, Tensor] | None, whole_image: bool
) -> LoadedModel:
    from torchvision import models

    if name not in models.list_models(module=models):
        near = near_misses(name, models.list_models(module=models)) or ["resnet50", "mobilenet_v3_large", "vgg16"]
        raise ValueError(
            f"there is no model {name!r}: give {BUNDLED!r}, {DIGITS!r}, package.module:function, or a torchvision "
            f"classification model such as {', '.join(near)}"
        )
    published = models.get_model_weights(name)
    described = published.DEFAULT
    chosen = None
    if weights is not None:
        if weights not in published.__members__:
            raise ValueError(
                f"weights: {name} has {', '.join(published.__members__)}; {weights!r} is neither of them nor a file"
            )
        chosen = described = published[weights]
    options = {} if state is None else _options_for(state, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some builders announce a change of their initialisation
            model = models.get_model(name, weights=chosen, **options)
    except OSError as error:
        raise ValueError(f"weights: those of {name} could not be downloaded ({error})") from error
    names = list(described.meta["categories"])
    if options.get("num_classes", len(names)) != len(names):
        names = []
    return LoadedModel(name, model, *_with_transforms(described.transforms(), whole_image), names or None)


def _from_function(name: str, whole_image: bool) -> LoadedModel:
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"model: {name} could not be imported ({error})") from error
    if isinstance(function, nn.Module):
        raise ValueError(f"model: {name} is a module; give a function without arguments that returns it")
    if not callable(function):
        raise ValueError(f"model: {name} is not callable")
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError) as error:
        raise ValueError(f"model: {name} must be callable without arguments ({error})") from error
    model = function()
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: {name}() must return a torch.nn.Module, not {type(model).__name__}")
    return from_module(name, model, whole_image)


# ------------------------------------------------------------------------------------------------------------- files


def _read_state(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ValueError(f"weights: there is no file {file}")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"weights: {file} holds more than tensors and would execute code when loaded; save model.state_dict()"
        ) from error
    except Exception as error:  # each format has exceptions of its own for a broken file, with no common base
        raise ValueError(f"weights: {file} could not be read ({first_line(error)})") from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise ValueError(f"weights: {file} is not a state dict of tensors")
    return dict(state)


def _without_wrapper(state: dict[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """Remove the ``module.`` that DataParallel puts before every key, unless the model's keys have it, too."""
    wrapped = all(key.startswith("module.") for key in state) and not any(key.startswith("module.") for key in keys)
    return {key.removeprefix("module."): value for key, value in state.items()} if wrapped else state


def _load_state(model: nn.Module, state: dict[str, Tensor], file: str | None, name: str) -> None:
    ours = model.state_dict()
    state = _without_wrapper(state, ours)
    missing = [key for key in ours if key not in state and not key.endswith("num_batches_tracked")]
    extra = [key for key in state if key not in ours]
    wrong = [key for key in ours if key in state and ours[key].shape != state[key].shape]
    if missing or extra or wrong:
        parts = []
        for what, keys in (("missing", missing), ("not in the model", extra), ("of another shape", wrong)):
            if keys:
                parts.append(f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})")
        raise ValueError(f"weights: {file} does not fit {name}: {'; '.join(parts)}")
    model.load_state_dict(state, strict=False)


def _options_for(state: dict[str, Tensor], name: str) -> dict[str, Any]:
    """The options of torchvision's builder that make the model fit the weights."""
    from torchvision import models

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        biases = [key for key, value in models.get_model(name, weights=None).named_parameters() if value.dim() == 1]
    state = _without_wrapper(state, biases)
    options: dict[str, Any] = {}
    if biases and biases[-1] in state:  # its length is the number of classes
        options["num_classes"] = state[biases[-1]].shape[0]
    if name in ("googlenet", "inception_v3"):
        # The published weights of these two were trained with another preprocessing, which the model undoes if it is
        # told to. torchvision does that for weights that it downloads, but not for the same weights in a file.
        options |= {"transform_input": True, "aux_logits": any("aux" in key.lower() for key in state)}
        options["init_weights"] = False
    return options


def _read_classes(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
        names = json.loads(text) if file.suffix == ".json" else text.rstrip().splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"classes: {file} could not be read ({first_line(error)})") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"classes: {file} must hold a list of names")
    return names


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or the name of its class if it has no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
