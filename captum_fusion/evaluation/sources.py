"""Reading datasets from disk: folders, CSV files, and the layouts of ImageNet and PASCAL VOC."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from captum_fusion.demo import digits
from captum_fusion.evaluation.data import Box, Class, Example, ExampleDataset, Region
from captum_fusion.evaluation.fingerprints import fingerprint_of

#: Endings of files that count as pictures in a folder.
PICTURES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# Accepted names of a CSV file's columns; the first one that the file has is used.
_FILE = ("file", "filename", "image", "path")
_LABEL = ("imagenet_class_indices", "class_index", "label", "target", "class", "class_name")
_ACCEPTED = ("accepted_class_indices",)
_MASK = ("mask", "mask_file")
_CORNERS = ("x0", "y0", "x1", "y1")


def open_dataset(
    source: str | Path, *, year: str | None = None, image_set: str = "val", for_each_label: bool = True
) -> ExampleDataset:
    """Find the examples of a folder or a CSV file. No picture is opened.

    Args:
        source (str or Path): One of

            - ``"digits"``: the bundled scenes of :mod:`captum_fusion.demo.digits`, with masks of their digits;
            - a CSV file with a line for each picture or box: a column ``file`` (or ``filename``, ``image``, ``path``;
              relative to the CSV file), and where known ``label`` (or ``target``, ``class_index``, ``class_name``,
              ``imagenet_class_indices``: an index, a name, or several indices separated by spaces), ``x0``, ``y0``,
              ``x1``, ``y1`` (a box in pixels of the picture), and ``mask`` (a file);
            - a folder with a ``labels.csv`` of that form, and optionally a ``boxes.csv``, whose lines may have labels;
            - the root of ImageNet in torchvision's layout (``meta.bin`` or the development kit, and ``val``);
            - the root of PASCAL VOC (``VOCdevkit``), read by torchvision's ``VOCDetection`` and ``VOCSegmentation``;
            - a folder with a subfolder of pictures for each class, named after the class (``ImageFolder``);
            - a folder of pictures without labels.
        year (str, optional): The year of PASCAL VOC.
            Default: None (the latest that is there)
        image_set (str, optional): The split of ImageNet or PASCAL VOC.
            Default: ``"val"``
        for_each_label (bool, optional): If a CSV file has lines with different labels for one picture, make an example
            for each label (named ``picture#label``); with False make one example that has the regions of all.
            Default: True

    Returns:
        ExampleDataset: In a stable order. Folders of classes are mixed, so that the first pictures are of many classes.

    Raises:
        ValueError: If the source does not exist or has no pictures.

    Examples::

        >>> open_dataset("digits").names()[:2]
        ['four_and_six', 'zero_and_nine']
    """
    path = Path(source)
    name = str(source)
    if name != "digits":
        if not _exists(path):
            raise ValueError(f"dataset: there is no file or folder {source}")
        name = str(path.resolve())
    if name == "digits":
        examples = list(_digit_scenes())
    elif path.is_file():
        examples = _from_csv(path, None, for_each_label)
    elif (path / "labels.csv").is_file():
        boxes = path / "boxes.csv"
        examples = _from_csv(path / "labels.csv", boxes if boxes.is_file() else None, for_each_label)
    elif (path / "VOCdevkit").is_dir():
        year = _voc_year(path, year)
        examples, name = list(_from_voc(path, year, image_set)), f"{name} {year} {image_set}"
    elif (path / image_set).is_dir() and ((path / "meta.bin").is_file() or list(path.glob("ILSVRC*devkit*"))):
        examples, name = _from_imagenet(path, image_set), f"{name} {image_set}"
    else:
        examples = _from_folder(path)
    if not examples:
        raise ValueError(f"dataset: there are no pictures in {source}")
    return ExampleDataset(examples, name)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _digit_scenes() -> Iterator[Example]:
    for scene in digits.load_scenes():
        if scene.labels:
            pairs = zip(scene.labels, scene.masks, strict=True)
            regions = tuple(Region((label,), mask=mask.numpy()) for label, mask in pairs)
            yield Example(scene.name, digits.scene_path(scene.name), scene.labels, regions)


def _from_folder(folder: Path) -> list[Example]:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES and p.is_file())
    names = [file.relative_to(folder) for file in files]
    examples = [
        Example(name.as_posix(), file, (name.parts[0],) if len(name.parts) > 1 else ())
        for name, file in zip(names, files, strict=True)
    ]
    return _mixed(examples) if any(example.label for example in examples) else examples


def _mixed(examples: list[Example]) -> list[Example]:
    """Shuffle examples that are sorted by class, in an order that depends on nothing but their names."""
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


def _voc_year(root: Path, year: str | None) -> str:
    years = sorted(p.name.removeprefix("VOC") for p in (root / "VOCdevkit").glob("VOC*") if p.is_dir())
    if not years or (year is not None and year not in years):
        raise ValueError(f"dataset: {root} holds {', '.join(years) or 'no year'} of PASCAL VOC, not {year}")
    return year or years[-1]


def _from_voc(root: Path, year: str, image_set: str) -> Iterator[Example]:
    from torchvision.datasets import VOCDetection, VOCSegmentation

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
        parsed = pictures.parse_voc_xml(ElementTree.parse(annotation).getroot())["annotation"]
        for item in parsed.get("object", []):
            corners = item["bndbox"]
            left, top, right, bottom = (float(corners[key]) for key in ("xmin", "ymin", "xmax", "ymax"))
            boxes.setdefault(item["name"], []).append((left - 1, top - 1, right, bottom))  # from 1, inclusive
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


#: Boxes and masks by the classes that they belong to.
_Regions = dict[tuple[Class, ...], tuple[list[Box], list[Path]]]


def _from_csv(file: Path, boxes: Path | None, for_each_label: bool) -> list[Example]:
    pictures: dict[str, dict[tuple[Class, ...], _Regions]] = {}
    labels: dict[str, dict[Class, None]] = {}  # of each picture, in their order
    for line, row in _lines(file):
        name = _file_of(row)
        if not name:
            raise ValueError(
                f"dataset: line {line} of {file} names no picture; it needs a column {', '.join(_FILE[:-1])} or "
                f"{_FILE[-1]}, and has {', '.join(map(repr, row))}; columns are separated by commas"
            )
        label = _label(_column(row, _LABEL))
        labels.setdefault(name, {}).update(dict.fromkeys(label))
        regions = pictures.setdefault(name, {}).setdefault(label if for_each_label else (), {})
        corners, masks = regions.setdefault(_label(_column(row, _ACCEPTED)) or label, ([], []))
        box, mask = _box(row, file, line), _column(row, _MASK)
        corners += [] if box is None else [box]
        masks += [_beside(file, mask, ("", "masks"))] if mask else []
    if boxes:
        _add_boxes(pictures, boxes, file)
    return [
        Example(
            name if len(by_label) == 1 else f"{name}#{' '.join(map(str, label))}",
            _beside(file, name, ("", "images")),
            label if for_each_label else tuple(labels[name]),
            tuple(
                region for classes, (corners, masks) in regions.items() for region in _regions(classes, corners, masks)
            ),
        )
        for name, by_label in pictures.items()
        for label, regions in by_label.items()
    ]


def _add_boxes(pictures: dict[str, dict[tuple[Class, ...], _Regions]], boxes: Path, file: Path) -> None:
    """Add a file of boxes to the pictures of another file."""
    known = 0
    for line, row in _lines(boxes):
        box, label = _box(row, boxes, line), _label(_column(row, _ACCEPTED) or _column(row, _LABEL))
        if box is None:
            continue
        for regions in pictures.get(_file_of(row), {}).values():
            known += 1
            fitting = [classes for classes in regions if not label or set(label) & set(classes)]
            for classes in fitting or [label]:
                regions.setdefault(classes, ([], []))[0].append(box)
    if not known:
        raise ValueError(f"dataset: {boxes} has no box of a picture of {file}")


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
        left, top, right, bottom = map(float, given)
    except ValueError as error:
        raise ValueError(f"dataset: line {line} of {file} needs numbers for all of {', '.join(_CORNERS)}") from error
    if right < left or bottom < top:
        raise ValueError(f"dataset: line {line} of {file} has a box whose {_CORNERS} are not in order: {given}")
    return left, top, right, bottom


def _beside(file: Path, name: str, folders: Sequence[str]) -> Path:
    """A file named in a CSV file: relative to it, or in one of the usual folders beside it."""
    candidates = [file.parent / folder / name for folder in folders]
    return next((path for path in candidates if path.exists()), candidates[0])
