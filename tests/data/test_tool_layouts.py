"""Folders as tools and their users lay them out, and what the words of dataset=folder make of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from segtrain.config import FolderConfig
from segtrain.data.label_files import read_label
from segtrain.data.loader import read_pixels
from segtrain.data.registry import split_samples
from tests.helpers.annotations import (
    COLORS,
    coco,
    colors,
    cvat,
    label_studio,
    labelme,
    photograph,
    truth,
    write_annotations,
    write_json,
    yolo,
)
from tests.helpers.runs import refused


def guessed(segtrain, root="data"):
    answer = segtrain("check", "dataset=folder", f"dataset.root={root}", "write_config=mine.yaml")
    assert answer.status == 0, answer.err
    return yaml.safe_load(Path("mine.yaml").read_text()), answer.out


def converted(segtrain, *words):
    answer = segtrain("convert-labels", *words, "output=out")
    assert answer.status == 0, answer.err
    return {path.stem: read_label(path) for path in Path("out").rglob("*.png")}


def test_roboflow_puts_annotations_beside_the_images_and_adds_a_category(segtrain):
    """https://roboflow.com/formats/coco-segmentation: train/_annotations.coco.json, valid/ and a category 0."""
    masks = {"train": {"a": truth(0)}, "valid": {"b": truth(1)}}
    coco(Path("made"), masks)
    for split in masks:
        folder = Path("data", split)
        folder.mkdir(parents=True)
        for path in Path("made", f"{split}2017").iterdir():
            path.rename(folder / path.name)
        content = json.loads(Path("made", "annotations", f"instances_{split}2017.json").read_text())
        content["categories"].insert(0, {"id": 0, "name": "animal", "supercategory": "none"})
        write_json(folder / "_annotations.coco.json", content)
    found, text = guessed(segtrain)
    assert found["splits"] == {
        "train": {"images": "train/*", "labels": "train/_annotations.coco.json"},
        "val": {"images": "valid/*", "labels": "valid/_annotations.coco.json"},
    }  # fmt: skip
    assert "the category 'animal' has no annotation and groups the others" in text
    assert Path("mine_classes.csv").read_text().splitlines()[1:] == [
        "0,background,,", "17,cat,,", "18,dog,,", "255,void,,true",
    ]  # fmt: skip
    labels = converted(segtrain, "data")
    np.testing.assert_array_equal(labels["b"], np.array([0, 17, 18])[truth(1)])


def test_roboflow_names_folders_one_level_too_high_in_yolo(segtrain):
    masks = {"train": {"a": truth(0)}, "valid": {"b": truth(1)}}
    yolo(Path("made"), masks)
    for split in masks:
        for kind in ("images", "labels"):
            Path("data", split).mkdir(parents=True, exist_ok=True)
            Path("made", kind, split).rename(Path("data", split, kind))
    Path("data/data.yaml").write_text("train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['cat', 'dog']\n")
    found, _ = guessed(segtrain)
    assert found["splits"]["val"] == {"images": "valid/images/*", "labels": "data.yaml"}
    np.testing.assert_array_equal(converted(segtrain, "data/data.yaml")["a"], truth(0))


def test_yolo_without_any_label_file_is_no_empty_dataset(segtrain):
    yolo(Path("data"), {"train": {"a": truth(0), "c": truth(2)}, "val": {"b": truth(1)}})
    found, _ = guessed(segtrain)
    assert found["format"] == "yolo"
    Path("data/labels/train/c.txt").unlink()
    assert "1 images without a label file" in segtrain("check", "dataset=mine.yaml").out
    Path("data/labels").rename("data/elsewhere")
    refused(segtrain("check", "dataset=mine.yaml"), "no image has a label file", "labels/train/a.txt", status=1)


def test_images_in_another_folder_than_labelme_files(segtrain):
    labelme(Path("made"), {"train": {"a b": truth(0), "c": truth(1)}})
    Path("data/json").mkdir(parents=True)
    Path("data/photos").mkdir()
    for path in Path("made/train").iterdir():
        path.rename(Path("data", "json" if path.suffix == ".json" else "photos", path.name))
    found, text = guessed(segtrain)
    assert found["splits"]["train"] == {"images": "photos/*", "labels": "json/*.json"}
    assert "val is the same images as train" in text
    np.testing.assert_array_equal(converted(segtrain, "data")["a b"], truth(0))


def test_coco_names_one_of_several_files_and_says_so(segtrain):
    write_annotations("coco", Path("data"))
    path = Path("data/annotations/instances_train2017.json")
    content = json.loads(path.read_text())
    write_json(path.with_name("person_keypoints_train2017.json"), content)
    write_json(path.with_name("captions_train2017.json"), {"images": [], "annotations": [{"caption": "a cat"}]})
    found, text = guessed(segtrain)
    assert found["splits"]["train"]["labels"] == "annotations/instances_train2017.json"
    assert "not used: data/annotations/person_keypoints_train2017.json" in text


def test_shapes_without_area_are_an_error_of_check_and_a_warning_of_training(segtrain):
    write_annotations("labelme", Path("data"))
    guessed(segtrain)
    path = Path("data/train/train1.json")
    content = json.loads(path.read_text())
    content["shapes"] += [
        {"label": "cat", "points": [[3, 3], [9, 9]], "shape_type": kind} for kind in ("line", "circle")
    ]
    write_json(path, content)
    answer = refused(segtrain("check", "dataset=mine.yaml"), "1 annotations are not drawn: circle", status=1)
    assert "WARNING    labels of train: 1 annotations are not drawn: line" in answer.out
    report = json.loads(Path("segtrain-out/check/report.json").read_text())
    assert [finding["kind"] for finding in report["findings"]].count("lost labels") == 2


def test_two_results_of_label_studio_with_one_id_are_one_region(segtrain):
    """The tags <Labels> and <Polygon>; of several annotations the ground truth counts, and cancelled ones do not."""
    label_studio(Path("data"), {"train": {"a": truth(0)}, "val": {"b": truth(1)}}, False)
    content = json.loads(Path("data/train.json").read_text())
    annotation = content[0]["annotations"][0]
    split = []
    for result in annotation["result"]:
        names = result["value"].pop("polygonlabels")
        split += [result | {"type": "polygon"}, result | {"type": "labels", "value": {"labels": names}}]
    rectangle = {"x": 0, "y": 50, "width": 25, "height": 10, "rotation": 0, "rectanglelabels": ["dog"]}
    split.append(annotation["result"][0] | {"id": "r", "type": "rectanglelabels", "value": rectangle})
    split.append({"id": "c", "type": "choices", "value": {"choices": ["sharp"]}, "from_name": "quality"})
    truths = {"id": 9, "ground_truth": True, "was_cancelled": False, "result": split}
    content[0]["annotations"] += [truths, {"id": 10, "was_cancelled": True, "ground_truth": True, "result": []}]
    annotation["result"] = annotation["result"][:1]
    write_json(Path("data/train.json"), content)
    expected = truth(0)
    expected[20:24, :12] = 2
    answer = segtrain("convert-labels", "data", "output=out")
    assert answer.status == 0, answer.err
    np.testing.assert_array_equal(read_label(Path("out/train/a.png")), expected)
    assert "1 answers about whole images, not used" in answer.out
    assert "1 further annotations of an image, not used" in answer.out


@pytest.mark.parametrize("classes", ["data/labelmap.txt", "rgb.csv", "hex.csv"])
def test_colours_by_any_table(segtrain, classes):
    cvat(Path("data"), {"train": {"a": truth(0), "b": truth(1)}, "val": {"c": truth(2)}})
    rows = list(zip(("background", "cat", "dog"), COLORS.tolist(), strict=True))
    lines = [f"{name},{r},{g},{b}" for name, (r, g, b) in rows]
    Path("rgb.csv").write_text("\n".join(["Class,Red,Green,Blue", *lines]))
    lines = [f"{5 * number},{name},#{r:02x}{g:02x}{b:02x}" for number, (name, (r, g, b)) in enumerate(rows)]
    Path("hex.csv").write_text("\n".join(["id,name,color", *lines]))
    splits = [f"dataset.splits.{split}={{images:JPEGImages/*,labels:SegmentationClass/*,list:ImageSets/Segmentation/"
              f"{split}.txt}}" for split in ("train", "val")]  # fmt: skip
    words = ["dataset=folder", "dataset.root=data", f"dataset.classes={Path(classes).absolute()}", *splits]
    answer = segtrain("check", *words, "dataset.format=colors")
    assert answer.status == 0, answer.out
    assert "labels of train: colors, 2 images" in answer.out
    refused(segtrain("check", *words), "shows the classes' colours", "dataset.format=colors", status=1)


def test_colours_without_a_table_get_a_class_each(segtrain):
    colors(Path("data"), {"train": {"a": truth(0), "b": truth(1)}, "val": {"c": truth(2), "d": truth(3)}})
    Path("data/class_dict.csv").unlink()
    found, text = guessed(segtrain)
    assert found["format"] == "colors" and "3 colours in the masks, and no table that names them" in text
    assert "1,class 24b353,#24b353," in Path("mine_classes.csv").read_text()
    assert segtrain("check", "dataset=mine.yaml").status == 0


def lay_on_its_side(path):
    """Store an image on its left side, with the EXIF tag by which a viewer turns it back."""
    tags = Image.Exif()
    tags[274] = 6
    with Image.open(path) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(path, exif=tags)


def test_labels_drawn_on_an_image_as_a_viewer_shows_it(segtrain):
    """The size that LabelMe states tells it; YOLO states none."""
    labelme(Path("data"), {"train": {"a": truth(0), "b": truth(1)}, "val": {"c": truth(2)}})
    lay_on_its_side(Path("data/train/a.png"))
    guessed(segtrain)
    answer = segtrain("check", "dataset=mine.yaml")
    assert answer.status == 0, answer.out
    samples = split_samples(FolderConfig(**yaml.safe_load(Path("mine.yaml").read_text())), "train")
    for sample, number in zip(samples, (0, 1), strict=True):
        image, label = read_pixels(sample)
        assert image.shape[:2] == label.shape == (40, 48)
        np.testing.assert_array_equal(label, truth(number))
    refused(segtrain("check", "dataset=mine.yaml", "dataset.exif=ignore"), "one of the two was rotated", status=1)

    yolo(Path("lines"), {"train": {"a": truth(0), "b": truth(1)}, "val": {"c": truth(2)}})
    lay_on_its_side(Path("lines/images/train/a.png"))
    guessed(segtrain, "lines")
    refused(segtrain("check", "dataset=mine.yaml"), "dataset.exif=apply for labels that fit", status=1)
    assert segtrain("check", "dataset=mine.yaml", "dataset.exif=apply").status == 0


def test_what_is_no_label_of_a_tool_is_guessed_as_before(segtrain):
    """A CSV of an image classification, JSON files of other programs, two versions of binary masks."""
    for number in range(3):
        photograph(Path(f"data/images/{number}.png"), number)
        for kind in ("masks", "masks_eroded"):
            Path("data", kind).mkdir(exist_ok=True)
            photograph(Path("x.png"), number)
    for number in range(3):
        mask = (truth(number) > 0).astype(np.uint8) * 255
        Image.fromarray(mask).save(f"data/masks/{number}.png")
        mask[::2] = 0
        Image.fromarray(mask).save(f"data/masks_eroded/{number}.png")
    Path("data/labels.csv").write_text("image,label\n0.png,cat\n")
    write_json(Path("data/package.json"), {"name": "x"})
    found, _ = guessed(segtrain)
    assert "format" not in found and found["splits"]["train"]["labels"] == "masks/*.png"
