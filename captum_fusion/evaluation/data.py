"""Examples and datasets: pictures, their labels, and where the objects are."""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch import Tensor

from captum_fusion.evaluation.fingerprints import fingerprint_of

#: A class, by its index or its name.
Class = int | str
#: Left, top, right and bottom edge, in pixels of the picture.
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Region:
    """Where the objects of a class are in a picture.

    Attributes:
        classes: The class that it belongs to, or several that mean the same.
        boxes: Boxes in pixels of the upright picture.
        mask: The objects' pixels: a bool array, or a picture of the same size (or its path) whose pixels above 127
            belong to the objects.
        index: The value that stands for the class in a mask of several classes. Default: None
    """

    classes: tuple[Class, ...]
    boxes: tuple[Box, ...] = ()
    mask: Any = None
    index: int | None = None

    def paint_boxes(self, size: tuple[int, int]) -> list[Image.Image]:
        """Paint each box white on black.

        Args:
            size (tuple[int, int]): Width and height in pixels.

        Returns:
            list[Image]: One for each box; boxes without area are left out.

        Raises:
            ValueError: If a corner of a box is not finite.
        """
        painted = []
        for box in self.boxes:
            if not all(map(math.isfinite, box)):
                raise ValueError(f"box {box} is not finite")
            left, top, right, bottom = (round(edge) for edge in box)
            if right > left and bottom > top:
                canvas = Image.new("L", size)
                ImageDraw.Draw(canvas).rectangle((left, top, right - 1, bottom - 1), fill=255)
                painted.append(canvas)
        return painted

    def paint_mask(self, size: tuple[int, int]) -> Image.Image | None:
        """Paint the mask white on black.

        Args:
            size (tuple[int, int]): Width and height in pixels.

        Returns:
            Image or None: None if there is no mask.

        Raises:
            ValueError: If the mask cannot be read or has another size.
        """
        if self.mask is None:
            return None
        pixels = self._mask_pixels()
        inside = pixels == self.index if self.index is not None else pixels if pixels.dtype == bool else pixels > 127
        if inside.shape != size[::-1]:
            raise ValueError(f"mask of shape {inside.shape} does not fit a picture of {size[1]} x {size[0]} pixels")
        return Image.fromarray(inside.astype(np.uint8) * 255)

    def _mask_pixels(self) -> np.ndarray[Any, Any]:
        if not isinstance(self.mask, (str, Path)):
            return np.asarray(self.mask)
        try:
            with Image.open(self.mask) as opened:
                return np.asarray(opened if self.index is not None else opened.convert("L"))
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(f"mask {self.mask} could not be read ({error})") from error


@dataclass(frozen=True)
class Example:
    """A picture to explain.

    Attributes:
        name: Its name in the results, unique within a dataset.
        image: A file, a PIL picture, or a tensor (C, H, W) that is ready for the network; boxes and masks are then in
            pixels of the tensor.
        label: The correct classes: one, several (the one that the network scores highest is explained), or none where
            it is unknown.
        regions: Where the objects are.
    """

    name: str
    image: Any
    label: tuple[Class, ...] = ()
    regions: tuple[Region, ...] = ()

    def fingerprint(self, with_label: bool) -> str:
        """A content hash of the picture, and of its label if that decides what is explained."""
        return fingerprint_of(_content(self.image), repr(self.label) if with_label else "")

    def fingerprint_of_regions(self) -> str:
        """A content hash of the regions."""
        return fingerprint_of(
            *(f"{region.classes} {region.boxes} {region.index} {_content(region.mask)}" for region in self.regions)
        )


def _content(image: Any) -> str:
    """A content hash of a picture; of a file its size and its last 4096 bytes, so that large datasets start fast."""
    if image is None:
        return ""
    if not isinstance(image, (str, Path)):
        return fingerprint_of(image if isinstance(image, Tensor) else np.asarray(image))
    try:
        with Path(image).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 4096))
            return fingerprint_of(str(size), file.read())
    except (OSError, ValueError):
        return "missing"


def as_example(item: Any, index: int) -> Example:
    """Make an :class:`Example` of an item of a user's dataset.

    Args:
        item (Example, tuple, dict, Image or Tensor): An example; a picture or tensor, alone or with its label; or a
            dict of an example's fields.
        index (int): Its position in the dataset, which is its name unless the item has one.

    Returns:
        Example: With ``label`` and ``regions`` as tuples.

    Raises:
        TypeError: For any other item, and for a label that is neither an index nor a name (a one-hot vector, say).

    Examples::

        >>> import torch
        >>> as_example((torch.zeros(3, 8, 8), 4), 17).name
        '17'
        >>> as_example((torch.zeros(3, 8, 8), 4), 17).label
        (4,)
    """
    if isinstance(item, Example):
        return replace(item, label=_classes(item.label), regions=tuple(item.regions))
    if isinstance(item, dict):
        item = {"name": str(index), **item}
        label = item.get("label", ())
        return Example(**{**item, "label": _classes(label), "regions": tuple(item.get("regions", ()))})
    image, label = item if isinstance(item, (tuple, list)) and len(item) == 2 else (item, ())
    if not isinstance(image, (str, Path, Image.Image, Tensor)):
        raise TypeError(
            f"dataset: item {index} must be an Example, a picture, a tensor or a pair with its label, not "
            f"{type(item).__name__}"
        )
    return Example(str(index), image, _classes(label))


def _classes(label: Any) -> tuple[Class, ...]:
    if isinstance(label, Tensor):
        label = label.item() if label.numel() == 1 else label
    labels = () if label is None else tuple(label) if isinstance(label, (tuple, list)) else (label,)
    for value in labels:
        if isinstance(value, bool) or not isinstance(value, (str, Integral)):
            raise TypeError(f"label must be a class's index or name, or several of these, not {label!r:.80}")
    if len(set(labels)) < len(labels):  # a one-hot list, say
        raise TypeError(f"label must not name a class twice, as {label!r:.80} does")
    return tuple(value if isinstance(value, str) else int(value) for value in labels)


def load_image(image: Any) -> Image.Image | Tensor:
    """Load the upright RGB picture of an example; a tensor is returned as it is.

    Args:
        image (str, Path, Image or Tensor): As in :class:`Example`.

    Returns:
        Image or Tensor: 8-bit RGB, rotated as its EXIF tag says; 16-bit pictures are scaled, not clipped.

    Raises:
        ValueError: If the file does not exist, is not a picture, or could not be read; the message names it.

    Examples::

        >>> from captum_fusion.demo import digits
        >>> load_image(digits.scene_path("four_and_six")).size
        (96, 96)
    """
    if isinstance(image, Tensor):
        return image
    if isinstance(image, Image.Image):
        return _upright(image, "the picture")
    try:
        with Image.open(image) as opened:
            return _upright(opened, str(image))
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {image}") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{image} is not an image") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises, besides ValueError
        raise ValueError(f"{image} could not be read as an image ({error})") from error


def _upright(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise ValueError(f"{name} holds floating point numbers; save it as an 8 or 16 bit picture")
    if image.mode.startswith("I"):  # Pillow would clip values of more than 8 bits
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"{name} holds more than 16 bits a pixel; save it as an 8 or 16 bit picture")
        image = Image.fromarray((pixels / 257).round().astype(np.uint8))
    upright: Image.Image = ImageOps.exif_transpose(image).convert("RGB")
    return upright


# ----------------------------------------------------------------------------------------------------------- datasets


class Items(Protocol):
    """What a dataset is made from: anything with a length whose items :func:`as_example` takes."""

    def __len__(self) -> int:
        """The number of items."""

    def __getitem__(self, index: int, /) -> Any:
        """An item."""


class Identity(NamedTuple):
    """Content hashes of an example, which rows are compared by; empty where they are not known.

    Attributes:
        picture: Of the picture, and of its label where labels are explained.
        regions: Of its regions.
    """

    picture: str = ""
    regions: str = ""


class Dataset:
    """A dataset whose items are opened one at a time, when they are needed.

    Nothing is known about an item without opening it, so examples are named by their position. Subclasses override what
    they know in advance.

    Args:
        items (Items): The items.
        source (str, optional): Where they are from, as results record it.
            Default: None (the name of the items' class)

    Examples::

        >>> import torch
        >>> dataset = Dataset(torch.utils.data.TensorDataset(torch.zeros(5, 3, 8, 8), torch.arange(5)))
        >>> dataset.source, dataset[3].label, dataset.first(2).names()
        ('TensorDataset', (3,), ['0', '1'])
    """

    def __init__(self, items: Items, source: str | None = None) -> None:
        self.items = items
        self.source = type(items).__name__ if source is None else source
        self._length: int | None = None

    def __len__(self) -> int:
        return len(self.items) if self._length is None else self._length

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]
        return as_example(self.items[index], index)

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def first(self, number: int | None) -> Dataset:
        """The first examples, or all of them for None. The names of the classes stay those of the whole dataset."""
        if number is None:
            return self
        shorter = copy.copy(self)
        shorter._length = min(number, len(self))
        return shorter

    def without(self, folders: Iterable[Path]) -> Dataset:
        """The dataset without the files in some folders, as far as the files are known."""
        return self

    def names(self) -> list[str]:
        """The names of the examples."""
        return [str(index) for index in range(len(self))]

    def class_names(self) -> list[str]:
        """The labels that are names, sorted: for a folder of folders, the folders' names."""
        return []

    def identities(self, with_label: bool) -> dict[str, Identity]:
        """Content hashes of the examples, by name.

        Args:
            with_label (bool): Whether the label counts, since it decides which class is explained.
        """
        return {}

    def shared_pictures(self) -> dict[str, str]:
        """For each example the name of the first one with the same picture."""
        return {}


class ListDataset(Dataset):
    """A dataset in memory, whose pictures can be compared with those of an earlier run.

    Args:
        items (sequence): What :func:`as_example` takes.
        source (str, optional): Where they are from.
            Default: None (the name of the items' class)
    """

    def identities(self, with_label: bool) -> dict[str, Identity]:
        """Content hashes of the examples, by name."""
        identities = {}
        for index, name in enumerate(self.names()):
            with contextlib.suppress(TypeError):  # not an example; reported when its turn comes
                example = self[index]
                identities[name] = Identity(example.fingerprint(with_label), example.fingerprint_of_regions())
        return identities


class ExampleDataset(ListDataset):
    """A list of :class:`Example`: names, classes and pictures are known without opening a file.

    Args:
        items (sequence of Example): The examples.
        source (str, optional): Where they are from.
            Default: None (the name of the items' class)

    Examples::

        >>> dataset = ExampleDataset([Example("a", "a.png", ("cat",)), Example("b", "b.png", ("ant",))])
        >>> dataset.names(), dataset.class_names()
        (['a', 'b'], ['ant', 'cat'])
    """

    items: Sequence[Example]

    def without(self, folders: Iterable[Path]) -> ExampleDataset:
        """The dataset without the files in some folders."""
        left_out = {folder.resolve() for folder in folders}

        def is_kept(image: Any) -> bool:
            return not isinstance(image, (str, Path)) or left_out.isdisjoint(Path(image).resolve().parents)

        wanted = [example for example in self.items[: len(self)] if is_kept(example.image)]
        rest = [example for example in self.items[len(self) :] if is_kept(example.image)]
        kept = ExampleDataset([*wanted, *rest], self.source)
        kept._length = len(wanted)
        return kept

    def names(self) -> list[str]:
        """The names of the examples.

        Raises:
            ValueError: If two of them are the same.
        """
        names = [example.name for example in self.items[: len(self)]]
        if len(set(names)) < len(names):
            raise ValueError("dataset: two examples have the same name")
        return names

    def class_names(self) -> list[str]:
        """The labels that are names, sorted: for a folder of folders, the folders' names."""
        labels = (label for example in self.items for label in _classes(example.label))
        return sorted({label for label in labels if isinstance(label, str)})

    def shared_pictures(self) -> dict[str, str]:
        """For each example the name of the first one with the same picture."""
        first: dict[Any, str] = {}
        return {
            example.name: first.setdefault(
                str(example.image) if isinstance(example.image, (str, Path)) else id(example.image), example.name
            )
            for example in self.items[: len(self)]
        }


def as_dataset(items: Items) -> Dataset:
    """The :class:`Dataset` that knows as much as can be known about some items.

    Args:
        items (Items): A dataset, a list, or anything with a length whose items :func:`as_example` takes.

    Returns:
        Dataset: The same object if it is one already.

    Examples::

        >>> type(as_dataset([Example("a", "a.png")])).__name__, type(as_dataset(["a.png"])).__name__
        ('ExampleDataset', 'ListDataset')
    """
    if isinstance(items, Dataset):
        return items
    if not isinstance(items, (list, tuple)):
        return Dataset(items)
    return (ExampleDataset if all(isinstance(item, Example) for item in items) else ListDataset)(items)
