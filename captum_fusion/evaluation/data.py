"""From a folder, a CSV file or a dataset of the user's to examples: pictures, labels, and where the objects are."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch import Tensor

from captum_fusion import demo
from captum_fusion.evaluation.fingerprints import fingerprint_of

#: A class by its index or its name.
Class = int | str
#: Left, top, right and bottom edge, in pixels of the picture.
Box = tuple[float, float, float, float]

#: Endings of files that count as pictures in a folder.
PICTURES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# What columns of a CSV file are called, by the first that is there.
_FILE = ("file", "filename", "image", "path")
_LABEL = ("imagenet_class_indices", "class_index", "label", "target", "class", "class_name")
_ACCEPTED = ("accepted_class_indices",)
_MASK = ("mask", "mask_file")
_CORNERS = ("x0", "y0", "x1", "y1")


@dataclass(frozen=True)
class Region:
    """Where the objects of a class are in a picture.

    Attributes:
        classes: The classes that it belongs to: one, or several that mean the same.
        boxes: Boxes in pixels of the (upright) picture.
        mask: A picture of the same size whose pixels above 127 belong to the objects, its path, or a bool array.
        index: The value that stands for the class in a mask of several classes. Default: None
    """

    classes: tuple[Class, ...]
    boxes: tuple[Box, ...] = ()
    mask: Any = None
    index: int | None = None

    def paint_boxes(self, size: tuple[int, int]) -> list[Image.Image]:
        """One picture for each box, white on black, of a (width, height) in pixels; boxes of no area are left out.

        Raises:
            ValueError: If a box has corners that are not finite.
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
        """The mask, white on black, or None where there is none.

        Raises:
            ValueError: If it cannot be read or is of another size.
        """
        return None if self.mask is None else self._mask(size)

    def _mask(self, size: tuple[int, int]) -> Image.Image:
        if isinstance(self.mask, (str, Path)):
            try:
                with Image.open(self.mask) as opened:
                    pixels = np.asarray(opened if self.index is not None else opened.convert("L"))
            except (OSError, ValueError, SyntaxError) as error:
                raise ValueError(f"mask {self.mask} could not be read ({error})") from error
        else:
            pixels = np.asarray(self.mask)
        inside = pixels == self.index if self.index is not None else pixels if pixels.dtype == bool else pixels > 127
        if inside.shape != size[::-1]:
            raise ValueError(f"mask of shape {inside.shape} does not fit a picture of {size[1]} x {size[0]} pixels")
        return Image.fromarray(inside.astype(np.uint8) * 255)


@dataclass(frozen=True)
class Example:
    """A picture to explain.

    Attributes:
        name: What its rows are called by; no two examples of a dataset have the same.
        image: A file, a PIL picture, or a tensor (C, H, W) that is ready for the network; boxes and masks are then in
            its pixels.
        label: The classes that are right: one, several (the network's best of them counts), or none where unknown.
        regions: Where the objects are.
    """

    name: str
    image: Any
    label: tuple[Class, ...] = ()
    regions: tuple[Region, ...] = ()

    def fingerprint(self, with_label: bool) -> str:
        """What is explained, in a word that changes with it: for files, with their size or end."""
        return fingerprint_of(_content(self.image), repr(self.label) if with_label else "")

    def fingerprint_of_places(self) -> str:
        """Where the objects are, in a word that changes with it."""
        return fingerprint_of(
            *(f"{each.classes} {each.boxes} {each.index} {_content(each.mask)}" for each in self.regions)
        )


def _content(image: Any) -> str:
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
        return "not there"


class Examples(Protocol):
    """A dataset: anything with a length whose items are examples, or what :func:`as_example` makes one of."""

    def __len__(self) -> int:
        """The number of examples."""

    def __getitem__(self, index: int, /) -> Any:
        """An example, or what :func:`as_example` takes."""


def as_example(item: Any, index: int) -> Example:
    """An :class:`Example` of what a user's dataset returns.

    Args:
        item (Example, tuple, dict, Image or Tensor): An example; a picture or tensor, alone or with its label; or a
            dict of an example's fields.
        index (int): Its position, which names it if nothing else does.

    Returns:
        Example: With ``label`` and ``regions`` as tuples.

    Raises:
        TypeError: For anything else, also a label that is neither an index nor a name (a one-hot vector, say).

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
    for each in labels:
        if isinstance(each, bool) or not isinstance(each, (str, Integral)):
            raise TypeError(f"label must be a class's index or name, or several of these, not {label!r:.80}")
    if len(set(labels)) < len(labels):  # a one-hot list, say
        raise TypeError(f"label must not name a class twice, as {label!r:.80} does")
    return tuple(each if isinstance(each, str) else int(each) for each in labels)


def load_image(image: Any) -> Image.Image | Tensor:
    """The upright RGB picture of an example, or its tensor as it is.

    Args:
        image (str, Path, Image or Tensor): As in :class:`Example`.

    Returns:
        Image or Tensor: 8-bit RGB, rotated as its EXIF tag says; pictures of 16 bits are scaled, not clipped.

    Raises:
        ValueError: If the file is not there, is no picture, or could not be read; the message names it.

    Examples::

        >>> load_image(demo.scene_path("four_and_six")).size
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
    if image.mode.startswith("I"):  # Pillow would clip what has more than 8 bits
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"{name} holds more than 16 bits a pixel; save it as an 8 or 16 bit picture")
        image = Image.fromarray((pixels / 257).round().astype(np.uint8))
    upright: Image.Image = ImageOps.exif_transpose(image).convert("RGB")
    return upright


# ------------------------------------------------------------------------------------------------------------ sources


def open_dataset(
    source: str | Path, *, year: str | None = None, image_set: str = "val", for_each_label: bool = True
) -> list[Example]:
    """Find the examples of a folder or a CSV file. No picture is opened.

    Args:
        source (str or Path): One of

            - ``"bundled"``: the bundled scenes, with the masks of their digits;
            - a CSV file with a line for each picture or box: a column ``file`` (or ``filename``, ``image``, ``path``;
              relative to the CSV file), and where known ``label`` (or ``target``, ``class_index``, ``class_name``,
              ``imagenet_class_indices``: an index, a name, or several indices with spaces between them), ``x0``,
              ``y0``, ``x1``, ``y1`` (a box in pixels of the picture), and ``mask`` (a file);
            - a folder with a ``labels.csv`` of that form, and perhaps a ``boxes.csv`` whose lines may have labels, too;
            - the root of ImageNet as torchvision knows it (``meta.bin`` or the development kit, and ``val``);
            - the root of PASCAL VOC (``VOCdevkit``), read by torchvision's ``VOCDetection`` and ``VOCSegmentation``;
            - a folder with a folder of pictures for each class, named by the class (``ImageFolder``);
            - a folder of pictures without labels.
        year (str, optional): Of PASCAL VOC.
            Default: None (the only one there is, or the latest)
        image_set (str, optional): Of ImageNet and PASCAL VOC.
            Default: ``"val"``
        for_each_label (bool, optional): A picture that a CSV file has lines with different labels of is an example for
            each of them (named ``picture#label``); with False it is one example that knows the places of all.
            Default: True

    Returns:
        list[Example]: In a stable order; of folders of classes one that mixes them, so that the first pictures are of
        many classes.

    Raises:
        ValueError: If there is no such source, or nothing in it.

    Examples::

        >>> [example.name for example in open_dataset("bundled")][:2]
        ['four_and_six', 'zero_and_nine']
    """
    path = Path(source)
    if str(source) == "bundled":
        found = list(_bundled())
    elif not _exists(path):
        raise ValueError(f"dataset: there is no file or folder {source}")
    elif path.is_file():
        found = _from_csv(path, None, for_each_label)
    elif (path / "labels.csv").is_file():
        boxes = path / "boxes.csv"
        found = _from_csv(path / "labels.csv", boxes if boxes.is_file() else None, for_each_label)
    elif (path / "VOCdevkit").is_dir():
        found = list(_from_voc(path, year, image_set))
    elif (path / image_set).is_dir() and ((path / "meta.bin").is_file() or list(path.glob("ILSVRC*devkit*"))):
        found = _from_imagenet(path, image_set)
    else:
        found = _from_folder(path)
    if not found:
        raise ValueError(f"dataset: there are no pictures in {source}")
    return found


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _bundled() -> Iterator[Example]:
    for scene in demo.load_scenes():
        if scene.labels:
            pairs = zip(scene.labels, scene.masks, strict=True)
            regions = tuple(Region((label,), mask=mask.numpy()) for label, mask in pairs)
            yield Example(scene.name, demo.scene_path(scene.name), scene.labels, regions)


def _from_folder(folder: Path) -> list[Example]:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES and p.is_file())
    names = [file.relative_to(folder) for file in files]
    found = [
        Example(name.as_posix(), file, (name.parts[0],) if len(name.parts) > 1 else ())
        for name, file in zip(names, files, strict=True)
    ]
    return _mixed(found) if any(example.label for example in found) else found


def _mixed(examples: list[Example]) -> list[Example]:
    """Examples class by class in an order that only depends on each one's name, in which the first are of any class."""
    return sorted(examples, key=lambda example: fingerprint_of(example.name))


def _from_imagenet(root: Path, split: str) -> list[Example]:
    from torchvision.datasets import ImageNet

    try:
        samples = ImageNet(str(root), split=split).samples
    except (OSError, RuntimeError, EOFError) as error:
        raise ValueError(f"dataset: {root} could not be read as ImageNet ({error})") from error
    return _mixed(
        [Example(Path(file).relative_to(root / split).as_posix(), Path(file), (label,)) for file, label in samples]
    )


def _from_voc(root: Path, year: str | None, image_set: str) -> Iterator[Example]:
    from torchvision.datasets import VOCDetection, VOCSegmentation

    years = sorted(p.name.removeprefix("VOC") for p in (root / "VOCdevkit").glob("VOC*") if p.is_dir())
    if not years or (year is not None and year not in years):
        raise ValueError(f"dataset: {root} holds {', '.join(years) or 'no year'} of PASCAL VOC, not {year}")
    year = year or years[-1]
    try:
        pictures = VOCDetection(str(root), year=year, image_set=image_set)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"dataset: {root} could not be read as PASCAL VOC ({error})") from error
    outlines = root / "VOCdevkit" / f"VOC{year}" / "ImageSets" / "Segmentation" / f"{image_set}.txt"
    masks: dict[str, str] = {}
    if outlines.is_file():
        masks = {Path(mask).stem: mask for mask in VOCSegmentation(str(root), year=year, image_set=image_set).masks}
    for image, annotation in zip(pictures.images, pictures.annotations, strict=True):
        yield _voc_example(pictures, Path(image), annotation, masks.get(Path(image).stem))


#: The classes of PASCAL VOC; a mask has 1 for the first.
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


def _voc_example(pictures: Any, image: Path, annotation: str, mask: str | None) -> Example:
    from xml.etree import ElementTree

    boxes: dict[str, list[Box]] = {}
    try:
        found = pictures.parse_voc_xml(ElementTree.parse(annotation).getroot())["annotation"]
        for each in found.get("object", []):
            corners = each["bndbox"]
            left, top, right, bottom = (float(corners[key]) for key in ("xmin", "ymin", "xmax", "ymax"))
            boxes.setdefault(each["name"], []).append((left - 1, top - 1, right, bottom))  # from 1, inclusive
    except (OSError, ElementTree.ParseError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"dataset: {annotation} could not be read as an annotation of PASCAL VOC ({error})") from error
    if not boxes:
        return Example(image.name, image)
    regions = [
        Region((name,), tuple(of_class), mask, VOC_CLASSES.index(name) + 1)
        if mask is not None and name in VOC_CLASSES
        else Region((name,), tuple(of_class))
        for name, of_class in sorted(boxes.items())
    ]
    largest = max(boxes, key=lambda name: max((b[2] - b[0]) * (b[3] - b[1]) for b in boxes[name]))
    return Example(image.name, image, (largest,), tuple(regions))


#: Of the classes that a region belongs to: its boxes and its masks.
_Places = dict[tuple[Class, ...], tuple[list[Box], list[Path]]]


def _from_csv(file: Path, boxes: Path | None, for_each_label: bool) -> list[Example]:
    pictures: dict[str, dict[tuple[Class, ...], _Places]] = {}
    labels: dict[str, dict[Class, None]] = {}  # of each picture, in their order
    for line, row in _lines(file):
        name = _file_of(row)
        if not name:
            raise ValueError(f"dataset: line {line} of {file} names no picture (a column {', '.join(_FILE)})")
        label = _label(_column(row, _LABEL))
        labels.setdefault(name, {}).update(dict.fromkeys(label))
        places = pictures.setdefault(name, {}).setdefault(label if for_each_label else (), {})
        corners, masks = places.setdefault(_label(_column(row, _ACCEPTED)) or label, ([], []))
        box, mask = _box(row, file, line), _column(row, _MASK)
        corners += [] if box is None else [box]
        masks += [_beside(file, mask, ("", "masks"))] if mask else []
    known = 0
    for line, row in _lines(boxes) if boxes else ():
        box, label = _box(row, boxes or file, line), _label(_column(row, _ACCEPTED) or _column(row, _LABEL))
        if box is None:
            continue
        for places in pictures.get(_file_of(row), {}).values():
            known += 1
            fitting = [classes for classes in places if not label or set(label) & set(classes)]
            for classes in fitting or [label]:
                places.setdefault(classes, ([], []))[0].append(box)
    if boxes and not known:
        raise ValueError(f"dataset: {boxes} has no box of a picture of {file}")
    return [
        Example(
            name if len(by_label) == 1 else f"{name}#{' '.join(map(str, label))}",
            _beside(file, name, ("", "images")),
            label if for_each_label else tuple(labels[name]),
            tuple(
                region for classes, (corners, masks) in places.items() for region in _regions(classes, corners, masks)
            ),
        )
        for name, by_label in pictures.items()
        for label, places in by_label.items()
    ]


def _regions(classes: tuple[Class, ...], boxes: Sequence[Box], masks: Sequence[Path]) -> Iterator[Region]:
    """A region with the boxes and the first mask, and one for each further mask."""
    if boxes or masks:
        yield Region(classes, tuple(boxes), masks[0] if masks else None)
    yield from (Region(classes, mask=mask) for mask in masks[1:])


def _file_of(row: dict[str, str]) -> str:
    name = _column(row, _FILE)
    return os.path.normpath(name) if name else ""


def _lines(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            for line, row in enumerate(csv.DictReader(opened), 2):
                yield line, {key.strip().lower(): value.strip() for key, value in row.items() if key and value}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"dataset: {file} could not be read as a CSV file ({error})") from error


def _column(row: dict[str, str], names: Sequence[str]) -> str:
    return next((row[name] for name in names if row.get(name)), "")


def _label(text: str) -> tuple[Class, ...]:
    try:  # "4.0" is what a table makes of 4 in a column with gaps
        numbers = [float(part) for part in text.split()]
    except ValueError:
        return (text,)
    whole = all(math.isfinite(number) and number == int(number) for number in numbers)
    return tuple(map(int, numbers)) if whole else (text,)


def _box(row: dict[str, str], file: Path, line: int) -> Box | None:
    given = [row[name] for name in _CORNERS if row.get(name)]
    if not given:
        return None
    try:
        left, top, right, bottom = (float(each) for each in given)
    except ValueError as error:
        raise ValueError(f"dataset: line {line} of {file} needs numbers for all of {', '.join(_CORNERS)}") from error
    if right < left or bottom < top:
        raise ValueError(f"dataset: line {line} of {file} has a box whose {_CORNERS} are not in order: {given}")
    return left, top, right, bottom


def _beside(file: Path, name: str, folders: Sequence[str]) -> Path:
    """A file named in a CSV file: relative to it, or in one of the usual folders beside it."""
    places = [file.parent / folder / name for folder in folders]
    return next((place for place in places if place.exists()), places[0])
