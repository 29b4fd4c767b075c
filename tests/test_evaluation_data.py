"""Where examples come from: folders, CSV files, ImageNet's and PASCAL VOC's layouts, datasets of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import FakeData

from captum_fusion.evaluation import Example, Region, as_example, load_image, open_dataset
from tests.real_data import DATA


def picture(path: Path, size: tuple[int, int] = (40, 30), colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def test_a_folder_of_folders_has_the_folders_names_as_labels(tmp_path: Path) -> None:
    for name in ("cat/b.png", "cat/a.jpg", "ant/x/deep.png"):
        picture(tmp_path / name)
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    found = {example.name: example.label for example in open_dataset(tmp_path)}
    assert found == {"ant/x/deep.png": ("ant",), "cat/a.jpg": ("cat",), "cat/b.png": ("cat",)}


def test_the_first_pictures_of_folders_are_of_many_classes(tmp_path: Path) -> None:
    for label in "abcdefgh":
        for number in range(10):
            picture(tmp_path / label / f"{number}.png", (2, 2))
    found = [example.name for example in open_dataset(tmp_path)]
    assert len({name[0] for name in found[:20]}) >= 6
    for name in found[::2]:
        (tmp_path / name).unlink()
    assert [example.name for example in open_dataset(tmp_path)] == found[1::2], "others do not change the order"


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    picture(tmp_path / "b.png")
    picture(tmp_path / "a.PNG")
    assert [(example.name, example.label) for example in open_dataset(tmp_path)] == [("a.PNG", ()), ("b.png", ())]


def test_what_is_not_there_or_empty_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file or folder"):
        open_dataset(tmp_path / "missing")
    with pytest.raises(ValueError, match="no pictures in"):
        open_dataset(tmp_path)


def test_a_csv_of_labels_boxes_and_masks(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text(
        "\ufeffFilename,class_index,x0,y0,x1,y1,mask\n"
        "a.png,3,0,1,10,11,\n"
        "a.png,3,5,5,20,20.5,\n"
        "b.png,7,,,,,b_mask.png\n"
        "c.png,1 2,,,,,\n"
        "d.png,4.0,,,,,\n"
        "e.png,\u00b2,,,,,\n"
    )
    first, second, third, fourth, fifth = open_dataset(table)
    assert (fourth.label, fifth.label) == ((4,), ("\u00b2",))
    assert first == Example("a.png", tmp_path / "a.png", (3,), (Region((3,), ((0, 1, 10, 11), (5, 5, 20, 20.5))),))
    assert second.regions == (Region((7,), mask=tmp_path / "b_mask.png"),)
    assert third.label == (1, 2)
    assert third.regions == ()


def test_one_picture_with_several_labels_is_as_many_examples(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(
        "filename,class_index,accepted_class_indices,x0,y0,x1,y1\n"
        "d.png,243,242 243,0,0,5,5\nd.png,282,281 282,5,5,9,9\n"
    )
    dog, cat = open_dataset(tmp_path / "t.csv")
    assert (dog.name, cat.name) == ("d.png#243", "d.png#282")
    assert dog.label == (243,)
    assert cat.regions == (Region((281, 282), ((5, 5, 9, 9),)),)


def test_a_folder_with_labels_and_boxes(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("filename,class_index,class_name\na.png,3,bird\nb.png,4,dog\n")
    (tmp_path / "boxes.csv").write_text("filename,x0,y0,x1,y1\na.png,1,2,3,4\na.png,5,6,7,8\n")
    first, second = open_dataset(tmp_path)
    assert first.regions == (Region((3,), ((1, 2, 3, 4), (5, 6, 7, 8))),)
    assert second.regions == ()
    assert second.label == (4,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label\n3\n", "line 2 of .* names no picture"),
        ("file;label\ncat.png;3\n", "has 'file;label'; columns are separated by commas"),
        ("file,x0,y0,x1,y1\na.png,1,2,3,\n", "line 2 of .* needs numbers"),
        ("file,x0,y0,x1,y1\na.png,1,2,3,4\nb.png,1,two,3,4\n", "line 3 of .* needs numbers"),
        ("file\n", "no pictures in"),
    ],
)
def test_a_csv_that_makes_no_sense_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_dataset(tmp_path / "t.csv")


def test_a_binary_file_is_no_csv(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(bytes(range(128, 256)))
    with pytest.raises(ValueError, match="could not be read as a CSV"):
        open_dataset(tmp_path / "t.csv")


def test_imagenets_layout(tmp_path: Path) -> None:
    wnids = ["n02", "n01"]  # their order in the meta file is not the classes'
    torch.save(({"n01": ("tench",), "n02": ("goldfish",)}, wnids), tmp_path / "meta.bin")
    for name in ("n01/x.JPEG", "n02/y.JPEG"):
        picture(tmp_path / "val" / name)
    found = open_dataset(tmp_path)
    assert {example.name: example.label for example in found} == {"n01/x.JPEG": (0,), "n02/y.JPEG": (1,)}


ANNOTATION = """<annotation><filename>{name}.jpg</filename>{objects}</annotation>"""
OBJECT = (
    """<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"""
)


def voc(root: Path, year: str = "2007") -> None:
    base = root / "VOCdevkit" / f"VOC{year}"
    for folder in ("Annotations", "ImageSets/Main", "ImageSets/Segmentation", "SegmentationClass"):
        (base / folder).mkdir(parents=True)
    objects = OBJECT.format("dog", 1, 1, 20, 10) + OBJECT.format("cat", 11, 11, 40, 30)
    (base / "Annotations/000001.xml").write_text(ANNOTATION.format(name="000001", objects=objects))
    (base / "Annotations/000002.xml").write_text(
        ANNOTATION.format(name="000002", objects=OBJECT.format("dog", 5, 5, 9, 9))
    )
    (base / "ImageSets/Main/val.txt").write_text("000001\n000002\n")
    (base / "ImageSets/Segmentation/val.txt").write_text("000001\n")
    for name in ("000001", "000002"):
        picture(base / "JPEGImages" / f"{name}.jpg")
    pixels = np.zeros((30, 40), np.uint8)
    pixels[0:10, 0:20], pixels[12:30, 12:40], pixels[11, 12:40] = 12, 8, 255  # dog, cat, void
    mask = Image.fromarray(pixels, mode=None)
    mask.putpalette([i % 256 for i in range(768)])
    mask.save(base / "SegmentationClass/000001.png")


def test_pascal_voc(tmp_path: Path) -> None:
    voc(tmp_path)
    first, second = open_dataset(tmp_path)
    assert first.label == ("cat",), "the class of the largest object"
    assert [region.classes for region in first.regions] == [("cat",), ("dog",)]
    assert first.regions[1].boxes == ((0, 0, 20, 10),)
    (box,) = (np.asarray(canvas) > 0 for canvas in first.regions[1].paint_boxes((40, 30)))
    mask = np.asarray(first.regions[1].paint_mask((40, 30))) > 0
    assert box.sum() == 200
    assert np.array_equal(box, mask)
    assert int((np.asarray(first.regions[0].paint_mask((40, 30))) > 0).sum()) == 18 * 28
    assert second.regions == (Region(("dog",), ((4, 4, 9, 9),)),)
    with pytest.raises(ValueError, match="holds 2007 of PASCAL VOC, not 2012"):
        open_dataset(tmp_path, year="2012")
    with pytest.raises(ValueError, match="could not be read as PASCAL VOC"):
        open_dataset(tmp_path, image_set="test")
    annotations = tmp_path / "VOCdevkit/VOC2007/Annotations"
    (annotations / "000002.xml").write_text("<annotation><filename>x</filename></annotation>")
    assert open_dataset(tmp_path)[1].label == ()
    (annotations / "000002.xml").write_text("<annotation>")
    with pytest.raises(ValueError, match=r"000002.xml could not be read as an annotation"):
        open_dataset(tmp_path)


def test_datasets_of_the_users() -> None:
    image = Image.new("RGB", (4, 4))
    assert as_example(image, 3) == Example("3", image)
    assert as_example((image, torch.tensor(5)), 3).label == (5,)
    assert as_example((image, "cat"), 3).label == ("cat",)
    found = as_example({"image": "x.png", "label": [1, 2], "regions": [Region((1,))]}, 9)
    assert found == Example("9", "x.png", (1, 2), (Region((1,)),))
    label = as_example(FakeData(2, (3, 8, 8), 4)[1], 1).label
    assert len(label) == 1
    assert 0 <= int(label[0]) < 4
    with pytest.raises(TypeError, match="dataset: item 4 must be"):
        as_example(object(), 4)
    assert as_example(Example("a", image, 3), 0).label == (3,)
    with pytest.raises(TypeError, match="must not name a class twice"):
        as_example((image, [0, 0, 1]), 0)
    for label in (torch.eye(3)[1], torch.eye(3).long()[1], torch.tensor([0, 1]), 2.5, [1, 2.5], True):
        with pytest.raises(TypeError, match="label must be a class's index or name"):
            as_example((image, label), 0)


def test_regions_that_cannot_be_painted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not fit a picture of 30 x 40"):
        Region((0,), mask=np.ones((5, 5), bool)).paint_mask((40, 30))
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"broken.png could not be read"):
        Region((0,), mask=tmp_path / "broken.png").paint_mask((40, 30))
    assert Region((0,)).paint_mask((40, 30)) is None
    assert Region((0,), ((5, 5, 5, 9),)).paint_boxes((40, 30)) == []
    with pytest.raises(ValueError, match="is not finite"):
        Region((0,), ((5, 5, float("nan"), 9),)).paint_boxes((40, 30))


def test_pictures_are_upright_and_in_eight_bits(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 30))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    upright: Any = load_image(tmp_path / "turned.jpg")
    assert upright.size == (30, 40)
    Image.fromarray(np.full((4, 4), 257 * 100, np.uint16)).save(tmp_path / "deep.png")
    deep: Any = load_image(tmp_path / "deep.png")
    assert deep.getpixel((0, 0)) == (100, 100, 100)
    with pytest.raises(ValueError, match="there is no file"):
        load_image(tmp_path / "missing.png")


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real photographs at {DATA}")
@pytest.mark.parametrize(
    ("source", "number"),
    [("val_boxes_dev", 200), ("images_dev", 200), ("coco_masks/masks.csv", 81), ("two_objects/boxes.csv", 4)],
)
def test_the_layouts_of_real_datasets(source: str, number: int) -> None:
    found = open_dataset(DATA / source)
    assert len(found) == len({example.name for example in found}) == number
    for example in (found[0], found[-1]):
        image: Any = load_image(example.image)
        assert example.label
        for region in example.regions:
            painted = [*region.paint_boxes(image.size), region.paint_mask(image.size)]
            assert all(np.asarray(canvas).any() for canvas in painted if canvas is not None)


def test_a_picture_with_several_labels(tmp_path: Path) -> None:
    """An example for each label, or one that knows the places of all."""
    picture(tmp_path / "images" / "a.png")
    (tmp_path / "labels.csv").write_text("file,label\na.png,3\na.png,4\n")
    (tmp_path / "boxes.csv").write_text(
        "file,label,x0,y0,x1,y1\n./a.png,3,1,2,3,4\na.png,4,5,6,7,8\na.png,9,0,0,1,1\nb.png,3,0,0,1,1\n"
    )
    three, four = open_dataset(tmp_path)
    assert (three.name, three.label, four.name, four.label) == ("a.png#3", (3,), "a.png#4", (4,))
    assert three.regions[0] == Region((3,), ((1, 2, 3, 4),))
    assert four.regions[0] == Region((4,), ((5, 6, 7, 8),))
    (both,) = open_dataset(tmp_path, for_each_label=False)
    assert (both.name, both.label) == ("a.png", (3, 4))
    assert both.regions == (
        Region((3,), ((1, 2, 3, 4),)), Region((4,), ((5, 6, 7, 8),)), Region((9,), ((0, 0, 1, 1),)),
    )  # fmt: skip


def test_boxes_that_do_not_fit(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text("file,label\na.png,3\n")
    for line, message in (
        ("a.png,7,6,5,8", r"line 2 of .*boxes.csv has a box whose .* are not in order"),
        ("a.png,7,,5,8", r"line 2 of .*boxes.csv needs numbers"),
        ("b.png,1,2,3,4", r"boxes.csv has no box of a picture of .*labels.csv"),
    ):
        (tmp_path / "boxes.csv").write_text(f"file,x0,y0,x1,y1\n{line}\n")
        with pytest.raises(ValueError, match=message):
            open_dataset(tmp_path)
