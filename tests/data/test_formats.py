"""Labels of annotation tools: from masks to each format and back, bit for bit, and what the report says."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaml
from PIL import Image

from segtrain.config import FolderConfig
from segtrain.data.formats import splits
from segtrain.data.label_files import read_label
from segtrain.data.loader import read_pixels
from segtrain.data.registry import label_table, split_files, split_samples
from tests.helpers import annotations
from tests.helpers.annotations import NAMES, WRITERS, photograph, truth, write_annotations, write_json
from tests.helpers.checkout import TINY
from tests.helpers.runs import refused, small_run

ONE_SPLIT = ("class_masks",)  # whose layout names no split


def configured(path="mine.yaml"):
    return FolderConfig(**yaml.safe_load(Path(path).read_text()))


def painted(config, split):
    """name -> ids by the order of NAMES, of the label images that a split has."""
    table = label_table(config)
    files = split_files(config, split)
    assert files.images.keys() == files.labels.keys()
    number = {int(row["id"]): NAMES.index(row["name"]) if row["name"] in NAMES else 255 for row in table.rows}
    # VOC's names and those of label images without a table are others than NAMES.
    number = {label: label for label in number} if not set(NAMES) <= {row["name"] for row in table.rows} else number
    lookup = np.full(256, 255, np.uint8)
    lookup[list(number)] = list(number.values())
    return {Path(name).name: lookup[read_label(path)] for name, path in files.labels.items()}


@pytest.mark.parametrize("form", WRITERS)
def test_every_format_comes_back_bit_for_bit_unedited(segtrain, form):
    masks = write_annotations(form, Path("data"))
    answer = segtrain("check", "dataset=folder", "dataset.root=data", "write_config=mine.yaml")
    assert answer.status == 0, answer.err
    answer = segtrain("check", "dataset=mine.yaml")
    assert answer.status == 0 or form in ONE_SPLIT, answer.out  # there val is the same images as train
    config = configured()
    expected = {"train": masks["train"] | masks["val"]} if form in ONE_SPLIT else masks
    for split, some in expected.items():
        found = painted(config, split)
        assert found.keys() == some.keys()
        for name, mask in some.items():
            np.testing.assert_array_equal(found[name], mask, err_msg=f"{split} {name}")


@pytest.mark.parametrize("form", WRITERS)
def test_every_format_goes_with_images_of_five_bands(segtrain, monkeypatch, form):
    def five_bands(path, seed, shape):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (*shape, 5)).astype(np.uint8)
        tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig")

    monkeypatch.setattr(annotations, "photograph", five_bands)
    masks = write_annotations(form, Path("data"))
    answer = segtrain("check", "dataset=folder", "dataset.root=data", "write_config=mine.yaml")
    if form == "parquet":  # whose images are not in files
        assert "channels" not in yaml.safe_load(Path("mine.yaml").read_text())
        answer = segtrain("check", "dataset=mine.yaml", "dataset.channels=[0,1,2,3,4]")
        refused(answer, "dataset.channels=[0, 1, 2, 3, 4]", "dataset.format=parquet reads RGB images", status=2)
        return
    assert answer.status == 0 and configured().channels == [0, 1, 2, 3, 4], answer
    answer = segtrain("check", "dataset=mine.yaml")
    assert answer.status == 0 or form in ONE_SPLIT, answer.out
    assert "model.in_channels=5 model.mean=[0." in answer.out
    config, split = configured(), "train"
    expected = masks["train"] | masks["val"] if form in ONE_SPLIT else masks["train"]
    found = painted(config, split)
    assert found.keys() == expected.keys() and all((found[name] == mask).all() for name, mask in expected.items())
    assert all(read_pixels(sample)[0].shape == (40, 48, 5) for sample in split_samples(config, split))
    assert segtrain("convert-labels", "data", "output=labels").status == 0


@pytest.mark.parametrize("form", WRITERS)
def test_convert_labels_writes_the_same_pixels(segtrain, form):
    masks = write_annotations(form, Path("data"))
    answer = segtrain("convert-labels", "data", "output=labels")
    assert answer.status == 0, answer.err
    report = json.loads(Path("labels/report.json").read_text())
    assert report["ok"] and report["findings"] == [] and answer.out.splitlines()[-1] == "labels/report.json"
    files = {path.stem: path for path in Path("labels").rglob("*.png") if path.parts[1] != "parquet"}
    every = masks["train"] | masks["val"]
    assert files.keys() == every.keys()
    rows = [line.split(",") for line in Path("labels/classes.csv").read_text().splitlines()[1:]]
    ids = {name: int(label) for label, name, *_ in rows}
    values = [ids[name] for name in NAMES] if set(NAMES) <= ids.keys() else [0, 1, 2]
    for name, path in files.items():
        with Image.open(path) as image:
            assert image.mode == "L"
            np.testing.assert_array_equal(np.asarray(image), np.array(values, np.uint8)[every[name]])
    before = {path: path.stat().st_mtime_ns for path in files.values()}
    next(iter(files.values())).unlink()
    assert segtrain("convert-labels", "data", "output=labels").status == 0
    changed = [path for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert len(changed) == 1, "only the missing file is written again"
    pairs = ",".join(f"{split}:{{pairs:{split}.txt}}" for split in report["splits"])
    words = ["dataset=folder", "dataset.root=labels", "dataset.classes=classes.csv", f"dataset.splits={{{pairs}}}"]
    words += ["dataset.val_split=train"] if form in ONE_SPLIT else []
    assert segtrain("check", *words).status in ((0, 1) if form in ONE_SPLIT else (0,))


def test_a_written_configuration_trains(segtrain):
    write_annotations("coco", Path("data"))
    assert segtrain("check", "dataset=folder", "dataset.root=data", "write_config=mine.yaml").status == 0
    words = [word for word in small_run("r") if not word.startswith(("dataset", "augmentation"))]
    words += [
        "augmentation.crop_size=[32,32]",
        "augmentation.scale=[1,1]",
        "trainer.max_steps=1",
        f"plugins=[{TINY}]",
        "model.backbone=tiny",
    ]
    answer = segtrain("train", "dataset=mine.yaml", *words)
    assert answer.status == 0, answer.err
    assert "labels of train: coco, 3 images, 9 objects" in answer.out


# ------------------------------------------------------------------------------------------------ order and report


def square(x, y, size):
    return [x, y, x + size, y, x + size, y + size, x, y + size]


@pytest.fixture
def scene():
    """One image in COCO's format: a small cat, a large dog over it, a crowd, and what has no pixels."""
    photograph(Path("data/a.png"), 0, (20, 30))

    def one(category, *rings, crowd=0):
        return {"id": 1, "image_id": 5, "category_id": category, "segmentation": list(rings), "iscrowd": crowd}

    annotations = [
        one(1, square(4, 4, 4)), one(2, square(2, 2, 10)), one(1, square(0, 0, 14), crowd=1),
        one(1, [1, 1, 2, 2]), one(1, [1, 1, 5, 5, 9, 9]), one(1, [15.1, 15.1, 15.3, 15.1, 15.3, 15.3]),
        one(2, square(18, 2, 8), square(20, 4, 2)), one(1, square(26, 16, 8)),
    ]  # fmt: skip
    content = {
        "images": [{"id": 5, "file_name": "a.png", "height": 20, "width": 30}], "annotations": annotations,
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }  # fmt: skip
    write_json(Path("data/train.json"), content)
    return content


@pytest.mark.parametrize("order", ["last", "area"])
def test_what_covers_what_and_what_is_counted(segtrain, scene, order):
    answer = segtrain("convert-labels", "input=data/train.json", "output=out", f"order={order}")
    assert answer.status == 0, answer.err
    expected = np.zeros((20, 30), np.uint8)
    expected[:14, :14] = 1  # the crowd, below everything
    expected[2:12, 2:12] = 2
    if order == "area":
        expected[4:8, 4:8] = 1
    expected[2:10, 18:26] = 2  # a polygon within another of its object is no hole
    expected[16:, 26:] = 1
    np.testing.assert_array_equal(read_label(Path("out/train/a.png")), expected)
    facts = json.loads(Path("out/report.json").read_text())["splits"]["train"]["facts"]
    assert facts == {
        "objects": 8, "polygons": 9, "crowds": 1, "degenerate polygons": 2, "empty polygons": 1, "pixels": 600,
        "polygons within others of their object": 1, "polygons that reach outside": 1,
        "pixels of objects of different classes": 100, "unlabelled pixels": 600 - 196 - 64 - 16,
    }  # fmt: skip
    assert "54 % of the pixels unlabelled" in answer.out


def test_pixels_without_an_object_must_be_something(segtrain, scene):
    Path("classes.csv").write_text("id,name,ignore\n3,cat,\n7,dog,\n9,nothing,true\n")
    words = ["dataset=folder", "dataset.root=data", "dataset.classes=../classes.csv", "dataset.format=coco",
             "dataset.splits={train:{images:'*',labels:train.json},val:{images:'*',labels:train.json}}"]  # fmt: skip
    answer = segtrain("check", *words)
    assert answer.status == 2 and "dataset.unlabelled=null" in answer.err and "background" in answer.err
    answer = segtrain("check", *words, "dataset.unlabelled=nothin")
    assert answer.status == 2 and "did you mean nothing?" in answer.err
    answer = segtrain("check", "dataset=folder", "dataset.root=data", "dataset.unlabelled=nothing")
    assert answer.status == 2 and "dataset.format=masks does not read it" in answer.err
    answer = segtrain("convert-labels", "data", "output=out", "classes=classes.csv", "unlabelled=nothing")
    assert answer.status == 0, answer.err
    assert sorted(np.unique(read_label(Path("out/train/a.png")))) == [3, 7, 9]
    answer = segtrain("convert-labels", "data", "output=guess")
    assert "pixels without an object are 'background', a guess" in answer.out


def test_labels_are_painted_once_and_again_when_they_change(segtrain, scene):
    assert segtrain("check", "dataset=folder", "dataset.root=data", "write_config=mine.yaml").status == 0
    config = configured()
    first = split_files(config, "train").labels["a"]
    made = first.stat().st_mtime_ns
    assert split_files(configured(), "train").labels["a"].stat().st_mtime_ns == made
    for _ in range(2):  # also at the second start
        splits.announced.clear()
        answer = segtrain("check", "dataset=mine.yaml")
        assert answer.out.count("labels of train: coco, 1 images, 8 objects") == 1, answer.out
    config.order = "area"
    other = split_files(config, "train").labels["a"]
    assert other != first and (read_label(other) != read_label(first)).any()
    scene["annotations"] = scene["annotations"][:2]
    write_json(Path("data/train.json"), scene)
    os.utime("data/train.json", ns=(1, 1))
    again = split_files(configured(), "train").labels["a"]
    assert again == first and np.count_nonzero(read_label(again)) == 100
    first.write_bytes(first.read_bytes()[:60])
    Path("data/train.json").touch()
    assert np.count_nonzero(read_label(split_files(configured(), "train").labels["a"])) == 100


def test_holes_are_left_out(segtrain):
    """Supervisely's polygons have holes; a hole of the cat shows what is below."""
    masks = write_annotations("supervisely", Path("data"))
    for path in Path("data").rglob("*.png.json"):
        content = json.loads(path.read_text())
        content["objects"] = content["objects"][:1]
        write_json(path, content)
    answer = segtrain("convert-labels", "data", "output=out")
    assert answer.status == 0 and "5 holes" not in answer.err
    found = read_label(Path("out/val/val0.png"))
    np.testing.assert_array_equal(found, masks["val"]["val0"] == 1)
    assert json.loads(Path("out/report.json").read_text())["splits"]["train"]["facts"]["holes"] == 3
    assert (truth(0) == 2).any()
