"""A small network that classifies handwritten digits, and scenes with exact masks of their digits.

The scenes are 96 x 96 images with zero, one or two handwritten digits among distractors. The masks of the digits are
exact, so the share of an explanation on the right object can be measured.

The digits are real: the test set of "Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak (UCI
Machine Learning Repository, https://doi.org/10.24432/C50P49, licensed under CC BY 4.0), as carried by
``sklearn.datasets.load_digits``. They were enlarged, recoloured and pasted into scenes. The bundled scenes are licensed
under CC BY 4.0 as well. Everything else in them is drawn by :mod:`captum_fusion.demo.digits.drawing`. A pixel belongs
to a digit if the digit's ink covers more than 0.3 of it.

The network was trained by ``python -m captum_fusion.demo.digits.train`` from scratch, with the first 1397 of the 1797
digits. The target of training is a distribution over the visible digits: 1 for a single digit, 1/2 for each of two, and
uniform if there is none. Some training scenes are partly faded to the mean colour or to a blurred copy, as in
explanation methods; digits hidden in this way are not visible. The other 400 digits are for testing. The bundled scenes
show some of them. They are the first of seeded streams of test scenes whose digits the network recognises, without
repeating a digit among the scenes of a kind (:func:`captum_fusion.demo.digits.train.bundle`).

Example::

    >>> scene = load_scenes()[0]
    >>> probabilities = load_model()(preprocess(scene.image)).softmax(dim=1)
    >>> set(probabilities[0].topk(2).indices.tolist()) == set(scene.labels)
    True
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from captum_fusion.demo.digits.model import DigitSceneNet

__all__ = [
    "CLASSES",
    "MEAN",
    "STD",
    "DigitSceneNet",
    "Scene",
    "load_model",
    "load_scenes",
    "preprocess",
    "scene_path",
]

CLASSES: tuple[str, ...] = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
"""Names of the ten classes."""

MEAN = (0.49, 0.50, 0.49)
"""Mean of the red, green and blue channels of the training scenes, in [0, 1]."""

STD = (0.29, 0.29, 0.29)
"""Standard deviation of these channels."""

WEIGHTS = Path(__file__).with_name("digit_scenes.safetensors")
"""Path of the weights that :func:`load_model` loads."""

SCENES = Path(__file__).with_name("scenes")
"""Folder of the scenes that :func:`load_scenes` loads."""


class Scene(NamedTuple):
    """An image and the masks of its digits.

    Attributes:
        name: name for :func:`scene_path`.
        image: float32 (3, 96, 96) in [0, 1].
        labels: class index of each digit, all different.
        masks: mask of each digit, bool (len(labels), 96, 96).
    """

    name: str
    image: Tensor
    labels: tuple[int, ...]
    masks: Tensor


def load_model() -> DigitSceneNet:
    """Load the trained network.

    Returns:
        The network on the CPU, in evaluation mode.

    Example::

        >>> load_model().training
        False
    """
    model = DigitSceneNet()
    model.load_state_dict(safetensors.torch.load_file(WEIGHTS))
    return model.eval()


def load_scenes() -> list[Scene]:
    """Load the bundled test scenes: first those with two digits, then those with one, then one without digits.

    Returns:
        The scenes, on the CPU.

    Example::

        >>> [len(scene.labels) for scene in load_scenes()]
        [2, 2, 2, 2, 2, 1, 1, 0]
    """
    scenes = []
    for entry in json.loads((SCENES / "scenes.json").read_text(encoding="utf-8")):
        name, labels = entry["name"], tuple(entry["labels"])
        masks = torch.zeros(len(labels), 96, 96, dtype=torch.bool)
        for mask, label in zip(masks, labels, strict=True):
            mask.copy_(_read(SCENES / f"{name}_mask_{label}.png"))
        scenes.append(Scene(name, _read(scene_path(name)).permute(2, 0, 1) / 255, labels, masks))
    return scenes


def scene_path(name: str) -> Path:
    """Return the path of a bundled scene's image file.

    Args:
        name: the scene's name.

    Returns:
        The path of a PNG file.

    Raises:
        ValueError: if there is no scene of that name.

    Example::

        >>> scene_path(load_scenes()[0].name).suffix
        '.png'
    """
    path = SCENES / f"{name}.png"
    if not path.is_file():
        raise ValueError(f"name must be one of {[scene.name for scene in load_scenes()]}, not {name!r}")
    return path


def preprocess(images: Tensor) -> Tensor:
    """Prepare images for the network.

    Args:
        images: float (N, 3, H, W) or (3, H, W) in [0, 1].

    Returns:
        float (N, 3, 96, 96), resized if necessary and normalised with :data:`MEAN` and :data:`STD`.

    Example::

        >>> preprocess(torch.rand(3, 200, 100)).shape
        torch.Size([1, 3, 96, 96])
    """
    if images.dim() == 3:
        images = images.unsqueeze(0)
    if images.shape[-2:] != (96, 96):
        images = F.interpolate(images, size=(96, 96), mode="bilinear", antialias=True)
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


def _read(path: Path) -> Tensor:
    """Read an image: uint8 (H, W, 3), or bool (H, W) if it has one bit per pixel."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image))
