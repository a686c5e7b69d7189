"""`segtrain check` finds images that are in two splits, whatever their names and files are."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segtrain.data.sample import Sample
from segtrain.data.verify import file_facts
from segtrain.data.verify.files import content_hashes
from segtrain.data.verify.leakage import find_leakage
from segtrain.weights import checkpoint
from tests.helpers.checkout import TINY
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


def test_copies_of_training_images_are_known_by_their_content(segtrain, folder_data):
    """Under another name, in training and in an evaluation of other data; the checkpoint knows the contents."""
    root, words = folder_data
    words = [*words, "model.backbone=tiny", f"plugins=[{TINY}]", "trainer.max_steps=1"]
    for kind in ("images", "labels"):
        shutil.copy(root / "train" / kind / "p3.png", root / "val" / kind / "p1.png")
    answer = segtrain("train", *words, "run=r")
    assert answer.status == 0, answer
    assert "WARNING    1 of these 2 validation images are trained on" in answer.out
    marked = ["1 of the 2 images were in this checkpoint's training: the score is too high"]
    assert json.loads(Path("r/evaluation.json").read_text())["protocol"]["warnings"] == marked
    contents = checkpoint.load(Path("r/last.pt"))["contents"]
    assert contents.dtype == torch.int64 and len(contents) == 4
    moved = root.with_name("moved")
    for kind in ("images", "labels"):
        (moved / kind).mkdir(parents=True)
        for number in range(3):
            shutil.copy(root / "train" / kind / f"p{number}.png", moved / kind / f"other{number}.png")
        shutil.copy(root / "val" / kind / "p0.png", moved / kind / "new.png")
    data = ["dataset=folder", f"dataset.root={moved}", f"dataset.classes={root / 'classes.csv'}", "split=val",
            "dataset.splits.val={images:images/*.png,labels:labels/*.png}", "position_prior=false"]  # fmt: skip
    words = ["checkpoint=r/last.pt", f"plugins=[{TINY}]", "device=cpu", "loader.workers=0", "output=e"]
    again = segtrain("evaluate", *words, *data)
    assert again.status == 0, again
    expected = "3 of the 4 images were in this checkpoint's training: the score is too high"
    assert json.loads(Path("e/evaluation.json").read_text())["protocol"]["warnings"] == [expected]


def test_hashes_of_contents_are_kept_and_follow_the_file(folder_data, tmp_path, monkeypatch):
    root, _ = folder_data
    samples = [Sample(path.name, path, None) for path in sorted((root / "train" / "images").iterdir())]
    first = content_hashes(samples, tmp_path / "cache")
    assert len(set(first)) == 4
    digest = hashlib.blake2b(samples[0].image.read_bytes(), digest_size=16).digest()
    assert first[0] == int.from_bytes(digest[:8], "big", signed=True)
    shutil.copy(samples[1].image, samples[0].image)
    assert content_hashes(samples, tmp_path / "cache") == [first[1], *first[1:]]
    monkeypatch.setattr(file_facts, "read_bytes", lambda path: 1 / 0)  # not read again
    assert content_hashes(samples, tmp_path / "cache") == [first[1], *first[1:]]
