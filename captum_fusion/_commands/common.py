"""What several commands share: options, checks, and files."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from captum_fusion import functional
from captum_fusion.evaluation.store import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCORE_FUNCTIONS = ("softmax", "sigmoid", "identity")


class CommandError(Exception):
    """A mistake of the user's; the message explains it in one line."""


def add_network(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Add the options that name the network, or several networks."""
    many: dict[str, Any] = {"nargs": "+"} if several else {}
    network = parser.add_argument_group("the network")
    network.add_argument(
        "--model",
        default=["resnet50"] if several else "bundled",
        help="'bundled', a SqueezeNet 1.1 that needs no download; 'digits', a network for the bundled digit scenes; a "
        "torchvision classification model; or package.module:function, a function without arguments that returns a "
        "torch.nn.Module (modules in the current folder are found, too; the network gets 224 x 224 RGB pictures with "
        "ImageNet's normalisation)"
        + ("; several are compared (default: resnet50)" if several else " (default: bundled)"),
        **many,
    )
    network.add_argument(
        "--weights",
        metavar="NAME|FILE",
        help="torchvision's name of published weights, or a state dict in a .safetensors or .pt file (default: "
        "torchvision's DEFAULT, downloaded on first use)" + (", one for each model" * several),
        **many,
    )
    network.add_argument("--classes", metavar="FILE", help="class names, a JSON list or one a line")
    network.add_argument(
        "--device",
        default=None if several else "cpu",
        help="cuda if available, else cpu (default)" if several else "cpu (default), cuda, cuda:1, mps, ...",
    )
    network.add_argument(
        "--whole-image",
        action="store_true",
        help="squeeze the whole picture into the network's input instead of cropping its centre (the digit network "
        "always does)",
    )


def add_methods(group: Any, default: str, usual: list[str] | None = None) -> None:
    """Add ``--methods``."""
    group.add_argument(
        "--methods",
        "--method",
        nargs="+",
        default=usual,
        metavar="METHOD",
        help="names from 'captum-fusion methods', with options (fusion-cam:theta=20), 'all', or your own: "
        "package.module:object, an attribution class or a function(model, layer, inputs, target); separated by spaces "
        f"or commas (default: {default})",
    )


def add_layers(group: Any, meaning: str) -> None:
    """Add ``--layers``."""
    group.add_argument(
        "--layers",
        "--layer",
        nargs="+",
        metavar="LAYER",
        help=f"dotted names of layers, separated by spaces or commas: {meaning}",
    )


def add_reshape(group: Any, several: bool = False) -> None:
    """Add ``--reshape``, for one network or several."""
    many: dict[str, Any] = {"nargs": "+"} if several else {}
    group.add_argument(
        "--reshape",
        metavar="RESHAPE",
        help="how the layers' outputs become maps: 14x14+1 for a grid of tokens, height first, after one other token "
        "(14x14 without one), channels-last, or none for maps"
        + (", one for all models, or one for each" * several)
        + " (default: found by itself)",
        **many,
    )


def add_score_fn(group: Any) -> None:
    """Add ``--score-fn``."""
    group.add_argument(
        "--score-fn",
        choices=SCORE_FUNCTIONS,
        help="turns outputs into scores: softmax over classes, sigmoid for binary and multi-label heads, identity for "
        "a network that returns scores (default: softmax, and for a method's weights what its paper uses)",
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add ``--output`` for figures."""
    parser.add_argument(
        "--output", default=".", type=Path, metavar="FOLDER", help="the folder for figures (default: the current one)"
    )


def layer_names(texts: Iterable[str] | None) -> list[str] | None:
    """The names of ``--layers``; None for the default."""
    return None if texts is None else [name.strip() for text in texts for name in text.split(",")]


def scores(model: nn.Module, inputs: Tensor, target: list[int], score_fn: str | None = None) -> list[float]:
    """The score of each example's target."""
    with torch.no_grad():
        found = functional.score_function(score_fn or "softmax")(model(inputs.clone()))
    return [float(row[index]) for row, index in zip(found, target, strict=True)]


def check_folder(folder: Path) -> None:
    """Refuse a folder that is, or lies below, a file.

    Raises:
        CommandError: If it is.
    """
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise CommandError(f"output: {path} is a file, not a folder")


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder for output before the work, and check that it can be written to.

    If the work fails, folders that were made and are still empty are removed.

    Raises:
        CommandError: If it cannot be made or written to.
    """
    check_folder(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CommandError(f"output: {folder} could not be written ({error})") from error
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # it is not empty
            for path in made:
                path.rmdir()
        raise


def write_figure(path: Path, figure: Figure, format: str = "png", dpi: int = 110) -> None:
    """Write a figure, whole or not at all."""
    write(path, partial(figure.savefig, dpi=dpi, format=format, bbox_inches="tight", pad_inches=0.08))


def write(path: Path, save: Callable[[Any], Any]) -> None:
    """Write what ``save`` writes to a file object, whole or not at all.

    Raises:
        CommandError: If it cannot be written.
    """
    content = BytesIO()
    try:
        save(content)
        write_whole(path, content.getvalue())
    except OSError as error:
        raise CommandError(f"output: {path} could not be written ({error})") from error
