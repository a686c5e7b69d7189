"""Labels in which fewer than two classes are left: every score would be 100 %, so it is said or refused."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.helpers.checkout import TINY
from tests.helpers.runs import refused, small_run


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """make(values of train, values of val): a folder of images with masks that hold these values."""
    monkeypatch.chdir(tmp_path)

    def make(train, val=None):
        for split, values in (("train", train), ("val", val or train)):
            for kind in ("images", "masks"):
                (tmp_path / "data" / split / kind).mkdir(parents=True)
            for i in range(4):
                rng = np.random.default_rng([i, len(split)])
                image = rng.integers(0, 255, (64, 96, 3), np.uint8)
                mask = np.array(values, np.uint8)[(np.indices((64, 96)).sum(0) // 32 + i) % len(values)]
                Image.fromarray(image).save(tmp_path / "data" / split / "images" / f"{i}.png")
                Image.fromarray(mask).save(tmp_path / "data" / split / "masks" / f"{i}.png")

    return make


def table(*rows):
    from pathlib import Path

    Path("classes.csv").write_text("id,name,ignore\n" + "".join(f"{row}\n" for row in rows))
    splits = [f"dataset.splits.{s}={{images:{s}/images/*.png,labels:{s}/masks/*.png}}" for s in ("train", "val")]
    return ["dataset=folder", "dataset.root=data", "dataset.classes=classes.csv", *splits]


def training(*dataset):
    own = [word for word in small_run("x") if not word.startswith(("dataset.", "augmentation.scale"))]
    return [*dataset, *own, f"plugins=[{TINY}]", "model.backbone=tiny", "run=r", "augmentation.scale=[1,1]"]


def test_masks_of_one_class_work_as_they_are_guessed(segtrain, mine):
    """Foreground over background: check write_config=, check and train, unedited."""
    mine([0, 255])
    answer = segtrain("check", "dataset=folder", "dataset.root=data", "write_config=mine.yaml")
    assert answer.status == 0, answer
    with open("mine_classes.csv") as file:  # noqa: PTH123
        assert file.read() == "id,name,color,ignore\n0,background,,\n255,foreground,,\n"
    assert segtrain("check", "dataset=mine.yaml").status == 0
    answer = segtrain("train", *training("dataset=mine.yaml"))
    assert answer.status == 0, answer.err
    with open("r/evaluation.json") as file:  # noqa: PTH123
        result = json.load(file)
    assert result["classes_in_ground_truth"] == 2 and result["miou"] < 1


def test_a_void_value_beside_two_classes_stays_void(segtrain, mine):
    mine([0, 1, 255])
    assert segtrain("check", "dataset=folder", "dataset.root=data", "write_config=mine.yaml").status == 0
    with open("mine_classes.csv") as file:  # noqa: PTH123
        assert file.read().endswith("0,class 0,,\n1,class 1,,\n255,void,,true\n")


@pytest.mark.parametrize("values", [[0], [3], [0, 1]])
def test_one_value_is_named_where_the_configuration_is_guessed(segtrain, mine, values):
    mine(values)
    answer = segtrain("check", "dataset=folder", "dataset.root=data", "write_config=mine.yaml")
    assert ("at least two classes are needed" in answer.out) == (len(values) == 1)


def test_255_that_is_ignored_though_it_is_the_only_other_value(segtrain, mine):
    mine([0, 255])
    words = table("0,land,", "1,water,", "255,void,true")
    text = "ignores 255: one class is left, and every score is 100 %; give 255 a class of its own"
    assert text in refused(segtrain("check", *words), status=1).err + segtrain("check", *words).out
    refused(segtrain("train", *training(*words)), text, status=1)


def test_check_prints_the_share_of_each_class(segtrain, mine):
    """Of the labelled pixels: void counts nowhere."""
    mine([0, 1, 255], [1, 1, 0, 255])
    answer = segtrain("check", *table("0,land,", "1,water,", "255,void,true", "7,snow,"))
    assert answer.status == 0, answer.err
    with open("segtrain-out/check/report.json") as file:  # noqa: PTH123
        report = json.load(file)["splits"]
    at = answer.out.splitlines().index("pixels %           train       val")
    lines = answer.out.splitlines()[at + 1 : at + 4]
    for line, (name, values) in zip(lines, {"land": 0, "water": 1, "snow": 7}.items(), strict=True):
        shares = []
        for split in ("train", "val"):
            masks = [np.asarray(Image.open(f"data/{split}/masks/{i}.png")) for i in range(4)]
            count, labelled = sum((m == values).sum() for m in masks), sum((m != 255).sum() for m in masks)
            assert report[split]["class_pixels"][name] == count
            shares.append(f"{100 * count / labelled:.3g}")
        assert line.split() == [name, *shares]


def test_a_table_of_one_class_is_refused(segtrain, mine):
    mine([0, 255])
    for command in (["check"], ["train"]):
        answer = segtrain(*command, *(table("0,land,", "255,void,true") if command == ["check"] else training(
            *table("0,land,", "255,void,true"))))  # fmt: skip
        refused(answer, "found 1 classes that are not ignored", "the background among them", status=1)


def test_one_of_two_classes_that_training_never_shows(segtrain, mine):
    mine([1], [0, 1])
    words = table("0,land,", "1,water,")
    refused(segtrain("train", *training(*words)), "all labelled pixels are of the class water", "add images with land",
            status=1)  # fmt: skip
    assert segtrain("check", *words).status == 1


def test_one_class_in_validation_is_said(segtrain, mine):
    mine([0, 1, 2], [1])
    words = table("0,land,", "1,water,", "2,wood,")
    answer = segtrain("check", *words)
    assert answer.status == 0 and "all labelled pixels are of the class water" in answer.out
    answer = segtrain("train", *training(*words))
    assert answer.status == 0, answer.err
    assert "WARNING    all labelled pixels are of the class water" in answer.out
    assert "one class occurs in the ground truth" in answer.out
