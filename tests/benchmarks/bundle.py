"""Makes the files of captum_fusion/demo/photographs: the weights in half precision, the pictures and their facts.

    python -m tests.benchmarks.bundle weights ../shared/data
    python -m tests.benchmarks.bundle pictures scikit-image/skimage/data Detectron/demo

``weights`` takes a folder with ``squeezenet1_1_imagenet.safetensors``, and pictures with their labels in
``val_boxes_dev`` and ``images_dev``. It prints the accuracy before and after rounding. ``pictures`` takes the folders
of the originals: scikit-image's data, and the demo folder of facebookresearch/Detectron.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import squeezenet1_1

from captum_fusion.demo import photographs

FOLDER = Path(photographs.__file__).parent
QUALITY = 88

Polygon = list[tuple[float, float]]


class Original(NamedTuple):
    """A photograph as published: its objects are polygons in its pixels, drawn by hand."""

    file: str
    author: str
    licence: str
    source: str
    objects: dict[str, list[Polygon]]


ORIGINALS = {
    "two_dogs": Original(
        "16004479832_a748d55f21_k.jpg",
        "United States National Archives",
        "Public domain (work of the United States government)",
        "https://www.flickr.com/photos/archivesnews/16004479832, from facebookresearch/Detectron, demo/NOTICE",
        {
            "golden retriever": [
                [
                    (340, 252),
                    (352, 243),
                    (385, 237),
                    (408, 228),
                    (425, 203),
                    (455, 188),
                    (492, 185),
                    (530, 191),
                    (565, 205),
                    (605, 220),
                    (640, 229),
                    (658, 222),
                    (670, 208),
                    (684, 212),
                    (692, 224),
                    (735, 234),
                    (768, 254),
                    (810, 268),
                    (870, 285),
                    (906, 303),
                    (906, 600),
                    (769, 600),
                    (764, 560),
                    (748, 518),
                    (700, 496),
                    (655, 470),
                    (628, 440),
                    (600, 408),
                    (570, 388),
                    (535, 402),
                    (508, 372),
                    (480, 342),
                    (462, 330),
                    (415, 327),
                    (395, 318),
                    (362, 306),
                    (345, 290),
                    (342, 270),
                ]
            ],
            "redbone": [
                [
                    (0, 335),
                    (8, 310),
                    (16, 268),
                    (24, 226),
                    (26, 206),
                    (42, 185),
                    (60, 150),
                    (82, 122),
                    (108, 106),
                    (135, 98),
                    (160, 99),
                    (177, 114),
                    (176, 124),
                    (164, 121),
                    (172, 150),
                    (178, 178),
                    (194, 200),
                    (193, 214),
                    (178, 223),
                    (158, 220),
                    (172, 233),
                    (205, 216),
                    (250, 188),
                    (268, 168),
                    (285, 156),
                    (300, 152),
                    (303, 175),
                    (296, 193),
                    (284, 212),
                    (262, 236),
                    (225, 262),
                    (192, 290),
                    (180, 299),
                    (160, 297),
                    (143, 304),
                    (139, 330),
                    (124, 356),
                    (100, 390),
                    (80, 420),
                    (56, 446),
                    (46, 462),
                    (57, 474),
                    (50, 484),
                    (22, 494),
                    (14, 520),
                    (5, 558),
                    (0, 570),
                ]
            ],
        },
    ),
    "cat": Original(
        "chelsea.png",
        "Stefan van der Walt",
        "CC0 1.0",
        "scikit-image 0.26, skimage.data.chelsea",
        {
            "Egyptian cat": [
                [
                    (40, 0),
                    (395, 0),
                    (385, 14),
                    (372, 40),
                    (357, 68),
                    (352, 90),
                    (366, 112),
                    (362, 150),
                    (352, 178),
                    (342, 196),
                    (336, 215),
                    (322, 240),
                    (305, 270),
                    (302, 300),
                    (0, 300),
                    (0, 165),
                    (20, 120),
                    (36, 95),
                    (34, 40),
                ]
            ]
        },
    ),
    "coffee": Original(
        "coffee.png",
        "Rachel Michetti, courtesy of Pikolo Espresso Bar",
        "CC0 1.0",
        "scikit-image 0.26, skimage.data.coffee",
        {
            "espresso": [
                [
                    (173, 96),
                    (177, 72),
                    (192, 50),
                    (216, 32),
                    (250, 21),
                    (290, 17),
                    (330, 22),
                    (366, 37),
                    (392, 60),
                    (406, 88),
                    (409, 118),
                    (402, 150),
                    (385, 190),
                    (366, 228),
                    (348, 252),
                    (320, 275),
                    (285, 284),
                    (262, 280),
                    (250, 300),
                    (228, 308),
                    (206, 303),
                    (196, 288),
                    (198, 265),
                    (210, 245),
                    (222, 234),
                    (205, 218),
                    (190, 190),
                    (178, 150),
                ]
            ]
        },
    ),
    "street_sign": Original(
        "34501842524_3c858b3080_k.jpg",
        "United States Department of Energy",
        "Public domain (work of the United States government)",
        "https://www.flickr.com/photos/departmentofenergy/34501842524, from facebookresearch/Detectron, demo/NOTICE",
        {
            "street sign": [
                [(204, 16), (448, 133), (450, 187), (198, 93)],
                [(377, 147), (418, 189), (420, 286), (377, 353), (331, 352), (306, 305), (308, 227), (334, 160)],
            ]
        },
    ),
}


class Tile(NamedTuple):
    """A part of an original, ``box`` = (left, upper, right, lower), and its place in the picture, in pixels."""

    original: str
    box: tuple[int, int, int, int]
    place: tuple[int, int, int, int]


#: The pictures: their size and their tiles. The mosaic's tiles were found by a random search for parts of the originals
#: in which the network gives both classes a high probability.
PICTURES = {
    "cat_and_coffee": (
        (448, 448),
        [
            Tile("coffee", (60, 27, 572, 235), (0, 0, 448, 182)),
            Tile("cat", (5, 4, 449, 268), (0, 182, 448, 448)),
        ],
    ),
    "two_dogs": ((585, 585), [Tile("two_dogs", (26, 3, 611, 588), (0, 0, 585, 585))]),
    "cat": ((451, 300), [Tile("cat", (0, 0, 451, 300), (0, 0, 451, 300))]),
    "coffee": ((600, 400), [Tile("coffee", (0, 0, 600, 400), (0, 0, 600, 400))]),
    "street_sign": ((750, 500), [Tile("street_sign", (0, 0, 900, 600), (0, 0, 750, 500))]),
}


# ------------------------------------------------------------------------------------------------------------- weights


def weights(data: Path) -> None:
    """Round the weights, write them, and print the accuracy of both."""
    state = safetensors.torch.load_file(data / "squeezenet1_1_imagenet.safetensors")
    safetensors.torch.save_file(
        {name: value.half() for name, value in state.items()}, FOLDER / "squeezenet1_1.safetensors"
    )
    exact = squeezenet1_1(weights=None).eval()
    exact.load_state_dict(state)
    networks = {"float32": exact, "float16": photographs.load_model()}
    for folder, squeezed in (("val_boxes_dev", True), ("images_dev", False)):
        inputs, labels = _labelled(data / folder, squeezed)
        for name, network in networks.items():
            top = _logits(network, inputs).topk(5).indices == labels[:, None]
            print(f"{folder}, {len(labels)} pictures, {name}: ", end="")
            print(f"top-1 {top[:, 0].float().mean():.1%}, top-5 {top.any(1).float().mean():.1%}")


def _labelled(folder: Path, squeezed: bool) -> tuple[Tensor, Tensor]:
    inputs, labels = [], []
    with (folder / "labels.csv").open(encoding="utf-8") as file:
        for line in csv.DictReader(file):
            image = Image.open(folder / line["filename"]).convert("RGB")
            if squeezed:  # the pictures are the whole image already, made square
                image = image.resize((224, 224), Image.Resampling.BILINEAR)
                image = _bordered(image)
            inputs.append(photographs.preprocess(image))
            labels.append(int(line["class_index"]))
    return torch.cat(inputs), torch.tensor(labels)


def _bordered(image: Image.Image) -> Image.Image:
    """A 256 x 256 picture whose centre, which the preprocessing keeps, is this one."""
    bordered = Image.new("RGB", (256, 256))
    bordered.paste(image, (16, 16))
    return bordered


def _logits(network: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([network(chunk) for chunk in inputs.split(20)])


# ------------------------------------------------------------------------------------------------------------ pictures


def pictures(folders: list[Path]) -> None:
    """Cut the pictures out of the originals, and write them with their facts."""
    (FOLDER / "pictures").mkdir(exist_ok=True)
    for name, (size, tiles) in PICTURES.items():
        picture = Image.new("RGB", size)
        for tile in tiles:
            left, upper, right, lower = tile.place
            part = _open(ORIGINALS[tile.original].file, folders).resize(
                (right - left, lower - upper), Image.Resampling.LANCZOS, box=tile.box
            )
            picture.paste(part, (left, upper))
        picture.save(FOLDER / "pictures" / f"{name}.jpg", quality=QUALITY, optimize=True)
    write_facts()


def write_facts() -> None:
    """Write the facts of the pictures, which need no originals."""
    text = json.dumps(facts(), indent=1, ensure_ascii=False)
    (FOLDER / "photographs.json").write_text(text + "\n", encoding="utf-8")


def facts() -> list[dict[str, Any]]:
    """The facts of the pictures: authors, licences, sources, classes and outlines."""
    return [_facts(name, tiles) for name, (_, tiles) in PICTURES.items()]


def _open(name: str, folders: list[Path]) -> Image.Image:
    for folder in folders:
        if (folder / name).is_file():
            return Image.open(folder / name).convert("RGB")
    raise SystemExit(f"{name} is in none of the folders")


def _moved(polygon: Polygon, tile: Tile) -> list[list[float]]:
    """A polygon of an original in the pixels of the picture, cut at the edges of its tile."""
    (x0, y0, x1, y1), (left, upper, right, lower) = tile.box, tile.place
    moved = [
        (left + (x - x0) / (x1 - x0) * (right - left), upper + (y - y0) / (y1 - y0) * (lower - upper))
        for x, y in polygon
    ]
    for axis, edge, sign in ((0, left, 1), (0, right - 1, -1), (1, upper, 1), (1, lower - 1, -1)):
        moved = _cut(moved, axis, edge, sign)
    return [[round(x, 1), round(y, 1)] for x, y in moved]


def _cut(polygon: Polygon, axis: int, edge: float, sign: int) -> Polygon:
    """The part of a polygon with coordinates from ``edge`` on, upwards or downwards (Sutherland-Hodgman)."""
    cut: Polygon = []
    for start, end in zip(polygon[-1:] + polygon[:-1], polygon, strict=True):
        inside = [sign * (point[axis] - edge) >= 0 for point in (start, end)]
        if inside[0] != inside[1]:
            part = (edge - start[axis]) / (end[axis] - start[axis])
            cut.append((start[0] + part * (end[0] - start[0]), start[1] + part * (end[1] - start[1])))
        if inside[1]:
            cut.append(end)
    return cut


def _facts(name: str, tiles: list[Tile]) -> dict[str, Any]:
    originals = [ORIGINALS[tile.original] for tile in tiles]
    changes = "a mosaic of parts of the originals" if len(tiles) > 1 else f"the part {tiles[0].box} of the original"
    objects = {
        label: [_moved(polygon, tile) for polygon in polygons]
        for tile, original in zip(tiles, originals, strict=True)
        for label, polygons in original.objects.items()
    }
    found: dict[str, Any] = {
        "name": name,
        "classes": list(objects),
        "author": "; ".join(original.author for original in originals),
        "licence": "; ".join(dict.fromkeys(original.licence for original in originals)),
        "source": "; ".join(original.source for original in originals) + f" ({changes})",
    }
    if all(objects.values()):
        found["polygons_drawn_by_hand"] = list(objects.values())
    return found


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["weights", "pictures"])
    parser.add_argument("folders", nargs="+", type=Path)
    options = parser.parse_args()
    if options.what == "weights":
        weights(*options.folders)
    else:
        pictures(options.folders)


if __name__ == "__main__":
    main()
