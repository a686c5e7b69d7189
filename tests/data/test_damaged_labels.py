"""Labels of annotation tools that are damaged: a sentence with the file, the record and what was expected."""

import base64
import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from segtrain.commands.convert_labels import convert_labels
from segtrain.config import ConvertLabelsConfig
from segtrain.errors import SegtrainError
from tests.helpers.annotations import png, write_annotations, write_json
from tests.helpers.runs import refused

TRAIN = {
    "coco": "data/annotations/instances_train2017.json", "coco_rle": "data/annotations/instances_train2017.json",
    "labelme": "data/train/train1.json", "label_studio": "data/train.json", "label_studio_polygons": "data/train.json",
    "supervisely": "data/train/ann/train1.png.json",
}  # fmt: skip


def changed(*path, to=None, drop=False):
    """A function that changes or drops one value of a JSON file; path: keys and numbers that lead to it."""

    def change(content):
        for key in path[:-1]:
            content = content[key]
        if drop:
            del content[path[-1]]
        else:
            content[path[-1]] = to

    return change


A = "annotations"
RESULT = (1, A, 0, "result", 0)
JSON_CASES = [
    ("coco", changed(A, 4, "category_id", to=99), ["train1.png", "category_id 99 is not the id of one"]),
    ("coco", changed(A, 4, "image_id", to=77), ["annotation 5", "image_id 77 is not the id of one of the images"]),
    ("coco", changed(A, 4, "segmentation", 0, 3, to=float("nan")), ["annotation 5", "NaN or infinite"]),
    ("coco", changed(A, 4, "segmentation", 0, 3, to=1e12), ["annotation 5", "outside of any image"]),
    ("coco", changed(A, 4, "segmentation", 0, 3, to="7"), ["annotation 5", "expected a list of points"]),
    ("coco", changed(A, 4, "segmentation", 0, 0, drop=True), ["annotation 5", "of even length"]),
    ("coco", changed(A, 4, "segmentation", to="x"), ["annotation 5", "polygons or run lengths"]),
    ("coco", changed(A, 4, "segmentation", to=[]), ["1 annotations are not drawn: box without a segmentation"]),
    ("coco", changed("images", 1, "file_name", to="other.png"), ["image 2", "'other.png' is missing"]),
    ("coco", changed("images", 1, "file_name", drop=True), ["image 2", "expected 'file_name' (a text)"]),
    ("coco", changed("images", 1, "height", to=41), ["image 2", "the labels are for 48x41, but", "is 48x40"]),
    ("coco", changed("images", 1, "file_name", to="train0.png"), ["image 2", "has labels already, in"]),
    ("coco", changed("images", 1, "id", to=1), ["image 2", "the id 1 occurs twice"]),
    ("coco", changed("categories", 1, "id", to=17), ["category 2", "the id 17 occurs twice"]),
    ("coco_rle", changed(A, 2, "segmentation", "counts", 0, to=7), ["annotation 3", "add up to"]),
    ("coco_rle", changed(A, 2, "segmentation", "size", drop=True), ["annotation 3", "expected 'size'"]),
    ("coco_rle", changed(A, 2, "segmentation", to={"size": [1, 2], "counts": [2]}), ["of the mask is [1, 2]"]),
    ("labelme", changed("shapes", 0, "shape_type", to="circle"), ["1 annotations are not drawn: circle"]),
    ("labelme", changed("shapes", 0, "shape_type", to="line"), ["1 annotations are not drawn: line"]),
    ("labelme", changed("shapes", 1, "shape_type", to="spline"), ["shape 2", "shape_type must be polygon", "'spline'"]),
    ("labelme", changed("shapes", 1, "points", drop=True), ["shape 2", "expected 'points'"]),
    ("labelme", changed("shapes", 1, "shape_type", to="rectangle"), ["shape 2", "a rectangle must have two points"]),
    ("labelme", changed("shapes", 1, "shape_type", to="mask"), ["shape 2", "'mask' must be a text"]),
    ("labelme", changed("shapes", drop=True), ["train1.json: expected 'shapes' (a list)"]),
    ("labelme", changed("imageHeight", to=48), ["the labels are for 48x48"]),
    ("label_studio", changed(*RESULT, "value", "rle", to=[1, 2, 3]), ["task 2, region 1", "is cut short"]),
    ("label_studio", changed(*RESULT, "value", "rle", to="abc"), ["task 2, region 1", "'rle' must be a list"]),
    ("label_studio", changed(*RESULT, "type", to="ellipselabels"), ["1 annotations are not drawn: ellipse"]),
    ("label_studio", changed(*RESULT, "type", to="keypointlabels"), ["1 annotations are not drawn: keypoint"]),
    ("label_studio", changed(*RESULT, "type", to="somelabels"), ["region 1", "the type must be polygonlabels"]),
    ("label_studio", changed(*RESULT, "image_rotation", to=90), ["region 1", "rotated by 90 degrees"]),
    ("label_studio", changed(*RESULT, "original_width", to=9), ["task 2", "different sizes of the image"]),
    ("label_studio", changed(1, "data", to={}), ["task 2", "expected the image as data.image"]),
    ("label_studio", changed(1, "data", "image", to="/data/upload/1/x.png"), ["task 2", "x.png' is missing"]),
    ("label_studio_polygons", changed(*RESULT, "value", "points", 0, to=[1]), ["region 1", "a list of points"]),
    ("label_studio_polygons", changed(*RESULT, "value", "polygonlabels", to=[]), ["region 1", "expected one label"]),
    ("supervisely", changed("objects", 0, "geometryType", to="line"), ["1 annotations are not drawn: line"]),
    ("supervisely", changed("objects", 0, "geometryType", to="blob"), ["object 1", "geometryType must be polygon"]),
    ("supervisely", changed("objects", 1, "bitmap", "data", to="%%"), ["object 2", "expected an image in base64"]),
    ("supervisely", changed("objects", 1, "bitmap", "data", to="YWJj"), ["object 2", "compressed by zlib"]),
    ("supervisely", changed("objects", 1, "bitmap", "origin", to=[40, 39]), ["object 2", "leaves the image"]),
    ("supervisely", changed("objects", 0, "classTitle", to="cow"), ["object 1", "the class 'cow' is not in"]),
    ("supervisely", changed("size", to={"height": 40}), ["expected 'width' (a whole number)"]),
    ("supervisely", changed("objects", 0, to=5), ["object 1: expected a mapping, found 5"]),
]  # fmt: skip


@pytest.mark.parametrize(("form", "change", "words"), JSON_CASES)
def test_json_that_is_not_what_it_should_be(segtrain, form, change, words):
    write_annotations(form, Path("data"))
    path = Path(TRAIN[form])
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    refused(segtrain("convert-labels", "data", "output=out"), *words, status=1)


@pytest.mark.parametrize("form", TRAIN)
@pytest.mark.parametrize("text", ['{"shapes": [', "", "null", "\xff"])
def test_json_that_is_none(segtrain, form, text):
    write_annotations(form, Path("data"))
    path = Path(TRAIN[form])
    assert segtrain("check", "dataset=folder", "dataset.root=data", "write_config=mine.yaml").status == 0
    path.write_bytes(text.encode("latin-1"))
    refused(segtrain("check", "dataset=mine.yaml"), path.name, status=1)


def rewritten(path, text):
    def change():
        Path(path).write_text(text)

    return change


def saved(path, pixels, form="PNG"):
    def change():
        Image.fromarray(np.asarray(pixels, np.uint8)).save(path, form)

    return change


LABELS = "data/labels/train/train1.txt"
FILE_CASES = [
    ("yolo", rewritten(LABELS, "0 0.1 0.1 0.2 0.1 0.2\n"), ["train1.txt, line 1", "an even number of"]),
    ("yolo", rewritten(LABELS, "\n5 0.1 0.1 0.2 0.1 0.2 0.3\n"), ["train1.txt, line 2", "class 5 is not in 'names'"]),
    ("yolo", rewritten(LABELS, "0 a b c\n"), ["train1.txt, line 1", "expected a class and numbers"]),
    ("yolo", rewritten(LABELS, "0 nan 0.1 0.2 0.1 0.2 0.3\n"), ["train1.txt, line 1", "NaN or infinite"]),
    ("yolo", rewritten(LABELS, "0 10 10 20 10 20 30\n"), ["train1.txt, line 1", "fractions of the image", "found 30"]),
    ("yolo", rewritten(LABELS, "0 0.5 0.5 0.2 0.2\n"), ["1 annotations are not drawn: box"]),
    ("cvat", rewritten("data/labelmap.txt", "cat:1,2\n"), ["labelmap.txt, line 1", "expected label:red,green,blue"]),
    ("cvat", rewritten("data/labelmap.txt", "a:0,0,0::\nb:250,50,83::\n"), ["train0.png", "#24b353 ("]),
    ("cvat", saved("data/SegmentationClass/train1.png", np.zeros((3, 4, 3))), ["train1.png: the labels are for 4x3"]),
    ("cvat", rewritten("data/ImageSets/Segmentation/train.txt", "nowhere\n"), ["train.txt, line 1", "'nowhere'"]),
    ("colors", saved("data/train_labels/train1_L.png", np.full((40, 48, 3), 9)), ["1 colours are", "#090909 (1920"]),
    ("voc", saved("data/SegmentationClass/train1.png", np.full((40, 48), 99)), ["train1.png: the ids 99 are not in"]),
    ("class_masks", saved("data/masks/cat/train1.png", np.arange(1920).reshape(40, 48) % 7), ["has the values"]),
    ("class_masks", saved("data/masks/cat/train1.png", np.zeros((4, 8))), ["train1.png: the labels are for 8x4"]),
    ("pairs", rewritten("data/metadata.csv", "image,mask\nimages/a.png,truth/b.png\n"), ["a.png is missing"]),
    ("parquet", rewritten("data/data/train-00000-of-00001.parquet", "PAR1"), ["cannot be read as parquet"]),
]  # fmt: skip


@pytest.mark.parametrize(("form", "change", "words"), FILE_CASES)
def test_files_that_are_not_what_they_should_be(segtrain, form, change, words):
    write_annotations(form, Path("data"))
    asked = ["classes=classes.csv"] if form == "voc" else []
    Path("classes.csv").write_text("id,name\n0,background\n8,cat\n12,dog\n")
    change()
    refused(segtrain("convert-labels", "data", "output=out", *asked), *words, status=1)


def test_all_faults_are_listed_and_the_rest_is_written(segtrain):
    write_annotations("labelme", Path("data"))
    for name in ("train0", "train2"):
        path = Path(f"data/train/{name}.json")
        content = json.loads(path.read_text())
        content["shapes"][0]["label"] = "cow"
        write_json(path, content)
    Path("classes.csv").write_text("id,name\n0,background\n1,cat\n2,dog\n")
    answer = refused(
        segtrain("convert-labels", "data", "output=out", "classes=classes.csv"), "2 findings", "'cow'", status=1
    )
    assert "Traceback" not in answer.out
    report = json.loads(Path("out/report.json").read_text())
    assert not report["ok"] and len(report["findings"]) == 2
    assert sorted(path.name for path in Path("out/train").iterdir()) == ["train1.png"]
    assert Path("out/train.txt").read_text().count("\n") == 1
    mine = Path("mine.yaml")
    assert segtrain("check", "dataset=folder", "dataset.root=data", "write_config=mine.yaml").status == 0
    mine.write_text(mine.read_text().replace("mine_classes.csv", "classes.csv"))
    refused(segtrain("check", "dataset=mine.yaml"), "2 faults in the labels of train", "'cow'", status=1)


def test_a_class_table_with_one_colour_twice(segtrain):
    write_annotations("colors", Path("data"))
    Path("classes.csv").write_text("name,r,g,b\nbackground,0,0,0\ncat,0,0,0\n")
    refused(segtrain("convert-labels", "data", "output=out", "classes=classes.csv"), "have the same colour", status=1)


def test_masks_as_jpeg(segtrain):
    write_annotations("class_masks", Path("data"))
    path = Path("data/masks/cat/train1.png")
    with Image.open(path) as image:
        image.save("mask.jpg", quality=95)
    path.write_bytes(Path("mask.jpg").read_bytes())
    refused(segtrain("convert-labels", "data", "output=out"), "is a JPEG", status=1)


def test_a_mask_inside_labelme_and_one_in_a_class_without_image(segtrain):
    write_annotations("labelme", Path("data"))
    path = Path("data/train/train1.json")
    content = json.loads(path.read_text())
    mask = base64.b64encode(png(np.array([[0, 255], [255, 255]], np.uint8))).decode()
    content["shapes"] = [
        {"label": "cat", "shape_type": "mask", "points": [[3, 5], [4, 6]], "mask": mask},
        {"label": "dog", "shape_type": "rectangle", "points": [[20, 9], [10, 4]]},
    ]  # fmt: skip
    write_json(path, content)
    assert segtrain("convert-labels", "data", "output=out").status == 0
    found = np.asarray(Image.open("out/train/train1.png"))
    expected = np.zeros((40, 48), np.uint8)
    expected[5:7, 3:5] = [[0, 1], [1, 1]]
    expected[4:9, 10:20] = 2
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["input=nowhere"], "no such file or folder"), ([], "input=null"),
        (["data", "output=data"], "is the input itself"), (["input=note.txt"], "give a folder, or a file .json"),
        (["data", "format=coco"], "no labels of the format coco"),
        (["data", "format=cocoo"], "did you mean coco?"), (["data", "order=first"], "last, area"),
        (["data", "unlabelled=cow"], "is no name in"), (["input=empty.json"], "holds no annotations"),
    ],
)  # fmt: skip
def test_words_that_cannot_be(segtrain, words, message):
    write_annotations("labelme", Path("data"))
    Path("note.txt").write_text("x")
    Path("empty.json").write_text("{}")
    answer = segtrain("convert-labels", *words)
    refused(answer, message, status=answer.status)
    assert answer.status in (1, 2)


JUNK: Any = (
    None,
    True,
    -1,
    0,
    2.5,
    1e300,
    float("nan"),
    "",
    "x",
    [],
    {},
    [[]],
    [[1]],
    [{"a": 1}],
    {"a": [1]},
    [1, 2, 3, 4],
)


def nodes(content, path=()):
    """The paths to all values, but of long lists of numbers the first only."""
    yield path
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inner:
        if not (isinstance(key, int) and key > 2 and not isinstance(value, dict | list)):
            yield from nodes(value, (*path, key))


@pytest.mark.parametrize("form", TRAIN)
def test_no_value_in_place_of_another_ends_in_a_traceback(form, capsys):
    write_annotations(form, Path("data"), train=2, val=1)
    path = Path(TRAIN[form])
    text = path.read_text()
    places = [place for place in nodes(json.loads(text)) if place]
    rng = np.random.default_rng(len(form))
    for number in range(20):
        content = json.loads(text)
        change = changed(*places[rng.integers(len(places))], to=JUNK[rng.integers(len(JUNK))])
        change(content)
        path.write_text(json.dumps(content))
        with contextlib.suppress(SegtrainError):
            convert_labels(ConvertLabelsConfig(input="data", output=f"out{number}"))
