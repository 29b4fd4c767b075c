"""What a dataset's labels and regions mean to a network: output indices, and masks in its input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from captum_fusion import models
from captum_fusion.evaluation.data import Class, Example

#: Why localization metrics have no value for an example without regions.
NOT_KNOWN = "the object's location is not known"


@dataclass(frozen=True)
class Classes:
    """The classes of a network and of a dataset.

    Attributes:
        outputs: How many outputs the network has.
        names: Their names, or None where unknown.
        folders: The labels of the dataset that are names, sorted.

    Examples::

        >>> Classes(3, None, ["ant", "bee", "cat"]).indices("bee")
        [1]
        >>> Classes(3, ["cat", "bee", "ant"], ["ant", "bee", "cat"]).indices("Ant")
        [2]
    """

    outputs: int
    names: Sequence[str] | None
    folders: Sequence[str] = ()

    def indices(self, label: Class) -> list[int]:
        """The outputs that a label stands for; none if it is not one of the network's classes.

        A text is the name of a class. If the folders of the dataset are as many as the outputs and none is a class's
        name, they stand for the outputs: by their number if all are numbers, else in their alphabetical order, as
        torchvision's ``ImageFolder`` has it. Otherwise a text may be the number of an output.
        """
        if isinstance(label, int):
            return [label] if 0 <= label < self.outputs else []
        names = [name.casefold() for name in self.names or ()]
        named = [index for index, name in enumerate(names) if name == label.casefold()]
        if named:
            return named
        numbered = [int(label)] if _is_number(label) and int(label) < self.outputs else []
        if (
            len(self.folders) == self.outputs
            and label in self.folders
            and not {folder.casefold() for folder in self.folders} & set(names)
            and not all(map(_is_number, self.folders))
        ):
            return [list(self.folders).index(label)]
        return numbered

    def target(self, example: Example, output: Tensor) -> int:
        """The labelled class of an example; of several the one that the network scores highest.

        Args:
            example (Example): The example.
            output (Tensor): The network's output for it, (classes,).

        Raises:
            ValueError: If it has no label, or none of the network's classes.
        """
        known = [index for label in example.label for index in self.indices(label)]
        if known:
            return max(known, key=lambda index: float(output[index]))
        if not example.label:
            raise ValueError("it has no label")
        raise ValueError(f"its label {' '.join(map(str, example.label))!r} is none of the network's classes")

    def title(self, index: int) -> str:
        """The name of an output, or its index."""
        return str(index) if self.names is None else self.names[index]


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


class ObjectMasks(NamedTuple):
    """Where the objects of a class are in a network's input.

    Attributes:
        masks: Bool (B, H, W); masks of the objects where they are known, otherwise their boxes.
        boxes: Bool (B, H, W); their boxes where they are known, otherwise the masks.
        missing: Why there are none.
    """

    masks: Tensor
    boxes: Tensor
    missing: str = ""


def object_masks(
    example: Example,
    target: int,
    classes: Classes,
    inputs: Tensor,
    size: tuple[int, int] | None,
    loaded: models.LoadedModel,
) -> ObjectMasks:
    """Show the regions of an example to a network's preprocessing, to find the objects in its input.

    Args:
        example (Example): The example.
        target (int): The class whose objects are wanted.
        classes (Classes): What the labels mean.
        inputs (Tensor): The network's input, (1, C, H, W).
        size (tuple[int, int], optional): The picture's width and height; None for a tensor, whose regions are in pixels
            of the input.
        loaded (LoadedModel): The network's preprocessing.

    Returns:
        ObjectMasks: Without masks if the objects are not known.
    """
    none = torch.zeros(0, *inputs.shape[2:], dtype=torch.bool)
    wanted = [r for r in example.regions if any(target in classes.indices(label) for label in r.classes)]
    if not wanted:
        other = "only objects of classes that are not explained are known"
        return ObjectMasks(none, none, other if example.regions else NOT_KNOWN)
    show: Callable[[Any], Tensor] = _white if size is None else lambda canvas: _preprocessed(loaded, canvas)
    width_height = size or (int(inputs.shape[3]), int(inputs.shape[2]))
    try:
        boxes = [show(canvas) for region in wanted for canvas in region.paint_boxes(width_height)]
        masks = [show(mask) for region in wanted if (mask := region.paint_mask(width_height)) is not None]
    except ValueError as error:
        return ObjectMasks(none, none, models.first_line(error))
    visible = [[mask for mask in some if mask.any()] for some in (masks or boxes, boxes or masks)]
    if not visible[0] or not visible[1]:
        return ObjectMasks(none, none, "the object is outside of what the network sees")
    return ObjectMasks(torch.stack(visible[0]), torch.stack(visible[1]))


def _white(canvas: Any) -> Tensor:
    return torch.from_numpy(np.asarray(canvas) > 127)


def _preprocessed(loaded: models.LoadedModel, canvas: Any) -> Tensor:
    """A painted region after the network's preprocessing, as a mask."""
    light = loaded.restore(loaded.preprocess(canvas.convert("RGB")))[0].mean(0).cpu()
    brightest = float(light.max())
    return light > 0.5 * brightest if brightest > 0.02 else torch.zeros_like(light, dtype=torch.bool)
