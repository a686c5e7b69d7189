"""`segtrain check` finds images that are in two splits, whatever their names and files are."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segtrain.data.verify.leakage import find_leakage
from tests.helpers.runs import refused


def photograph(seed, size=(120, 160)):
    """Smooth random colours with a little noise, RGB uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    smooth = np.asarray(coarse.resize(size[::-1], Image.Resampling.BICUBIC)).astype(float)
    return np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)


@pytest.fixture
def splits(tmp_path):
    """Four images to train on and three others to validate on: name of the split -> images by name."""
    result = {}
    for split, seeds in (("train", range(4)), ("val", range(4, 7))):
        (tmp_path / split).mkdir()
        for seed in seeds:
            Image.fromarray(photograph(seed)).save(tmp_path / split / f"{seed}.png")
        result[split] = {path.stem: path for path in (tmp_path / split).iterdir()}
    return result


def found(splits, tmp_path):
    return [(one.severity, one.text) for one in find_leakage(splits, tmp_path / "cache", progress=False)]


def test_different_images_are_not_found(splits, tmp_path):
    assert found(splits, tmp_path) == []


def test_a_copy_under_another_name_is_an_error(splits, tmp_path):
    copy = tmp_path / "val" / "copy.png"
    shutil.copy(splits["train"]["2"], copy)
    splits["val"]["copy"] = copy
    for _ in range(2):  # the second time from what is saved
        ((severity, text),) = found(splits, tmp_path)
        assert severity == "error"
        assert text.startswith("1 of the 4 images of val are in train too, with the same content: ")
        assert f"{copy} = {splits['train']['2']}" in text
    splits["val"] = dict(splits["train"])  # the very same files
    assert found(splits, tmp_path)[0] == (
        "note", "4 of the 4 images of val are the same files as in train: their score says nothing about other images"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("a.jpg", lambda image: (image, {"quality": 60})),
        ("a.png", lambda image: (image.resize((80, 60), Image.Resampling.BILINEAR), {})),
        ("a.jpg", lambda image: (image.resize((320, 240)), {"quality": 80})),
        ("a.png", lambda image: (image, {"compress_level": 1})),
        ("a.webp", lambda image: (image, {"quality": 50})),
    ],
)
def test_an_image_encoded_or_resized_anew_is_a_note(splits, tmp_path, kind, change):
    image, options = change(Image.open(splits["train"]["1"]))
    image.save(tmp_path / kind, **options)
    splits["val"]["again"] = tmp_path / kind
    ((severity, text),) = found(splits, tmp_path)
    assert severity == "note" and text.startswith("1 images of val are nearly equal to images of train")
    assert f"{tmp_path / kind} = {splits['train']['1']}" in text


def test_images_that_are_all_of_one_colour_are_not_taken_for_each_other(splits, tmp_path):
    for split, colour in (("train", 20), ("val", 21)):
        path = tmp_path / split / "night.png"
        Image.fromarray(np.full((50, 60, 3), colour, np.uint8)).save(path)
        splits[split]["night"] = path
    assert found(splits, tmp_path) == []


def test_frames_of_other_moments_are_not_found(splits, tmp_path):
    """The same place with something else in an eighth of the image."""
    image = photograph(1)
    image[40:100, 60:110] = photograph(99)[40:100, 60:110]
    Image.fromarray(image).save(tmp_path / "later.png")
    splits["val"]["later"] = tmp_path / "later.png"
    assert found(splits, tmp_path) == []


def test_check_refuses_a_folder_with_a_copy(segtrain, folder_data):
    root, words = folder_data
    words = [word for word in words if word.startswith("dataset")]
    clean = segtrain("check", *words, "output=out")
    assert "in train too" not in clean.out
    for kind in ("images", "labels"):
        shutil.copy(root / "train" / kind / "p1.png", root / "val" / kind / "other.png")
    answer = refused(segtrain("check", *words, "output=out"), "1 of the 3 images of val are in train too", status=1)
    assert "error: 1 of the 3 images of val" in answer.out
    kinds = [one["kind"] for one in json.loads(Path("out/report.json").read_text())["findings"]]
    assert "leakage" in kinds
