"""SqueezeNet 1.1, trained on ImageNet, and photographs of its classes.

The network is torchvision's ``squeezenet1_1`` with DeepScale's SqueezeNet v1.1 weights (BSD licence), stored in half
precision. Preprocessing and class names are torchvision's.

Each photograph comes with its author, licence and source, and with the classes that it shows. Object masks were drawn
by hand, as polygons. ``NOTICE`` beside this file has the licences in full.

Example::

    >>> photograph = load_photographs()[0]
    >>> logits = load_model()(preprocess(photograph.image))
    >>> int(logits.argmax()) in photograph.labels
    True
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.models import SqueezeNet, SqueezeNet1_1_Weights, squeezenet1_1

__all__ = ["CLASSES", "Photograph", "load_model", "load_photographs", "photograph_path", "preprocess"]

_WEIGHTS = SqueezeNet1_1_Weights.IMAGENET1K_V1  # torchvision's preprocessing and class names, not its parameters

_FOLDER = Path(__file__).parent

CLASSES: tuple[str, ...] = tuple(_WEIGHTS.meta["categories"])
"""Names of ImageNet's 1000 classes."""


class Photograph(NamedTuple):
    """A photograph, or a mosaic of two, and what it shows.

    Attributes:
        name: name for :func:`photograph_path`.
        image: RGB picture.
        labels: class index of each object, all different.
        masks: mask of each object, bool (len(labels), height, width) at the picture's resolution, drawn by hand. None
            if nobody drew them.
        author: who took the picture.
        licence: its licence.
        source: where it comes from, and what was changed.
    """

    name: str
    image: Image.Image
    labels: tuple[int, ...]
    masks: Tensor | None
    author: str
    licence: str
    source: str


def load_model() -> SqueezeNet:
    """Load the trained network.

    Returns:
        torchvision's SqueezeNet 1.1 in float32 on the CPU, in evaluation mode.

    Example::

        >>> load_model()(torch.zeros(1, 3, 224, 224)).shape
        torch.Size([1, 1000])
    """
    state = safetensors.torch.load_file(_FOLDER / "squeezenet1_1.safetensors")
    model = squeezenet1_1(weights=None)
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model.eval()


def load_photographs() -> list[Photograph]:
    """Load the bundled photographs.

    Returns:
        The photographs, first those that show objects of two classes.

    Example::

        >>> photograph = load_photographs()[0]
        >>> [CLASSES[label] for label in photograph.labels]
        ['golden retriever', 'redbone']
    """
    photographs = []
    for facts in json.loads((_FOLDER / "photographs.json").read_text(encoding="utf-8")):
        with Image.open(photograph_path(facts["name"])) as file:
            image = file.convert("RGB")
        labels = tuple(CLASSES.index(name) for name in facts["classes"])
        masks = [_mask(image.size, polygons) for polygons in facts.get("polygons_drawn_by_hand", [])]
        photographs.append(
            Photograph(
                facts["name"], image, labels, torch.stack(masks) if masks else None,
                facts["author"], facts["licence"], facts["source"],
            )
        )  # fmt: skip
    return photographs


def photograph_path(name: str) -> Path:
    """Return the path of a bundled photograph's file.

    Args:
        name: the photograph's name.

    Returns:
        The path of a JPEG file.

    Raises:
        ValueError: if there is no photograph of that name.

    Example::

        >>> photograph_path("cat").suffix
        '.jpg'
    """
    path = _FOLDER / "pictures" / f"{name}.jpg"
    if not path.is_file():
        names = sorted(file.stem for file in path.parent.glob("*.jpg"))
        raise ValueError(f"name must be one of {names}, not {name!r}")
    return path


def preprocess(image: Image.Image) -> Tensor:
    """Prepare a picture for the network, as torchvision does.

    The shorter side becomes 256 pixels, and the central 224 x 224 pixels are kept and normalised.

    Args:
        image: RGB picture of any size.

    Returns:
        float32 (1, 3, 224, 224).

    Example::

        >>> preprocess(Image.new("RGB", (300, 200))).shape
        torch.Size([1, 3, 224, 224])
    """
    prepared: Tensor = _WEIGHTS.transforms()(image)
    return prepared.unsqueeze(0)


def _mask(size: tuple[int, int], polygons: list[list[list[float]]]) -> Tensor:
    """The pixels within any of the polygons, bool (height, width)."""
    image = Image.new("1", size)
    for polygon in polygons:
        ImageDraw.Draw(image).polygon([(x, y) for x, y in polygon], fill=1)
    return torch.from_numpy(np.array(image))
