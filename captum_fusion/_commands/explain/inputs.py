"""Reading what the user names: pictures, folders, patterns, classes, and the place for the output."""

from __future__ import annotations

import argparse
import glob
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from captum_fusion._arguments import near_misses
from captum_fusion._commands.common import CommandError
from captum_fusion.evaluation.data import load_image
from captum_fusion.evaluation.sources import PICTURES

#: The formats of figures, the default first.
FORMATS = ("png", "pdf", "svg")


def pictures(options: argparse.Namespace) -> list[Path]:
    """The picture files that are named. Each is opened once, so that a broken one is found before the run.

    Raises:
        CommandError: If there is none, or one cannot be read.
    """
    if not options.images:
        taken = [word for words in (options.target, options.methods, options.layers) for word in words or ()]
        swallowed = next((word for word in taken if Path(word).suffix.lower() in PICTURES), None)
        hint = f": {swallowed} was read as a part of the option before it; put pictures first" if swallowed else ""
        options.refuse(f"the following arguments are required: IMAGE{hint}")
    files = list(dict.fromkeys(file for name in options.images for file in _expanded(name)))
    for file in files:
        open_image(file)
    return files


def _expanded(name: str) -> list[Path]:
    """The files of a name: itself, the pictures of a folder, or what a pattern matches."""
    path = Path(name)
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES and file.is_file())
        if not found:
            below = " (its subfolders are not searched)" if any(file.is_dir() for file in path.iterdir()) else ""
            raise CommandError(f"there are no pictures in the folder {name}{below}")
        return found
    if not path.exists() and glob.has_magic(name):
        matches = sorted(Path(match) for match in glob.glob(name, recursive=True))
        if not matches:
            raise CommandError(f"no file matches {name!r}")
        return [file for file in matches if file.is_file()]
    return [path]


def open_image(path: Path) -> Image.Image:
    """Open a picture.

    Raises:
        CommandError: If it cannot be opened.
    """
    try:
        if path.is_file() and not path.stat().st_size:
            raise ValueError(f"{path} is empty")
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", Image.DecompressionBombWarning
            )  # Pillow refuses pictures of twice this size
            image = load_image(path)
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from error
    assert isinstance(image, Image.Image)
    return image


def frames(path: Path) -> int:
    """How many pictures a file holds; only the first is explained."""
    with Image.open(path) as opened:
        return int(getattr(opened, "n_frames", 1))


def target(wanted: str, outputs: int, names: Sequence[str] | None) -> int | None:
    """The output that a class name or index stands for; None for the prediction.

    Raises:
        CommandError: If there is no such class.
    """
    if wanted == "auto":
        return None
    if re.fullmatch("-?[0-9]+", wanted):
        if not 0 <= int(wanted) < outputs:
            raise CommandError(f"target: {wanted} is not one of the classes 0 to {outputs - 1}")
        return int(wanted)
    if names is None:
        raise CommandError(f"target: the class names are not known, so {wanted!r} must be an index (or give --classes)")
    matching = [i for i, name in enumerate(names) if name.casefold() == wanted.casefold()]
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise CommandError(f"target: {len(matching)} classes are called {wanted!r}; give the index: {matching}")
    near = ", ".join(map(repr, near_misses(wanted, names)))
    hint = f"; did you mean {near}?" if near else ""
    if Path(wanted).is_file():
        hint = ", but a file of that name: put pictures before the options"
    raise CommandError(f"target: there is no class {wanted!r}{hint}")


def destination(options: argparse.Namespace, pictures: int) -> tuple[Path, str | None, str]:
    """The folder for all files, the stem of the figure if it has been named, and the figure's format.

    Raises:
        CommandError: If one file is named for several pictures, or two formats are given.
    """
    output: Path = options.output
    ending = output.suffix.lower().removeprefix(".")
    if output.is_dir() or not ending:
        return output, None, options.format or FORMATS[0]
    if ending not in FORMATS:
        if ending in {suffix.removeprefix(".") for suffix in PICTURES}:
            raise CommandError(f"output: figures are written as {', '.join(FORMATS)}, not {ending}")
        return output, None, options.format or FORMATS[0]
    if options.format not in (None, ending):
        raise CommandError(f"output: {output} does not end in .{options.format}, which --format asks for")
    if pictures > 1:
        raise CommandError(f"output: {output} is one file for {pictures} pictures; give a folder")
    return output.parent, output.stem, ending


def file_name(text: str) -> str:
    """A text as a part of a file name on any system."""
    return re.sub(r"[^\w+=.,-]+", "_", text)


def distinct(names: Iterable[str]) -> list[str]:
    """The names, those that repeat with a number.

    Examples::

        >>> distinct(["a", "b", "a"])
        ['a', 'b', 'a_2']
    """
    distinct: list[str] = []
    for name in names:
        other, number = name, 2
        while other in distinct:
            other, number = f"{name}_{number}", number + 1
        distinct.append(other)
    return distinct
