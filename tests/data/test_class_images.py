"""Image classification: the folders, `segtrain check`, the published augmentation and the published views."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as tv

from segtrain.config import AugmentationConfig, ImageNetConfig, InferenceConfig
from segtrain.data.classify.loader import TrainingImages
from segtrain.data.classify.views import COMPONENTS, RandomView, crop_views
from segtrain.data.registry import list_images
from segtrain.errors import DataError

CENTER = InferenceConfig(resize=256, crop=224)
TEN = InferenceConfig(resize=256, crop=224, crops="ten")


def noise(height, width, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def test_classes_are_the_sorted_folders(class_images):
    found = list_images(ImageNetConfig("imagenet", str(class_images)), "train")
    assert found.classes == [f"n{n:08d}" for n in range(6)]
    assert len(found) == 24
    assert found.targets.tolist() == [n for n in range(6) for _ in range(4)]
    assert all(name.startswith(found.classes[target]) for name, target in zip(found.names, found.targets, strict=True))
    assert len(set(found.first(6).targets.tolist())) > 3


def test_classes_without_pictures_are_named(class_images, tmp_path):
    for number in range(4):
        (tmp_path / "val" / f"n0000000{number}").mkdir(parents=True)
    (tmp_path / "val" / "n00000009").symlink_to(class_images / "val" / "n00000000")
    with pytest.raises(DataError, match=r"4 of the 5 classes in .*val have no images .n00000000, n0000"):
        list_images(ImageNetConfig("imagenet", str(tmp_path)), "val")


def test_check_reads_every_picture_and_compares_the_splits(segtrain, class_images, tmp_path):
    call = ["check", "dataset=imagenet", "output=o"]
    answer = segtrain(*call, f"dataset.root={class_images}")
    assert answer.status == 0, answer.err
    report = json.loads(Path("o/report.json").read_text())
    assert (report["ok"], len(report["classes"]), report["findings"]) == (True, 6, [])
    assert [report["splits"][name]["images"] for name in ("train", "val")] == [24, 18]
    bad = tmp_path / "bad"
    shutil.copytree(class_images, bad)
    (bad / "val" / "n00000000").rename(bad / "val" / "n00000077")
    for number in range(6):
        path = bad / "train" / "n00000001" / f"broken{number}.JPEG"
        path.write_bytes((bad / "train" / "n00000001" / "n00000001_0.JPEG").read_bytes()[:400])
    answer = segtrain(*call, f"dataset.root={bad}")
    assert answer.status == 1
    report = json.loads(Path("o/report.json").read_text())
    assert [(found["severity"], found["kind"]) for found in report["findings"]] == [
        ("error", "unreadable"), ("error", "classes"),
    ]  # fmt: skip
    assert "train: 6 of 30 images cannot be read: " in answer.out
    assert "broken4.JPEG" in answer.out and "broken5.JPEG" not in answer.out
    assert "n00000077" in answer.out
    assert segtrain(*call, f"dataset.root={bad}", "split=val").status == 0  # of itself it is whole
    (bad / "val" / "n00000078").mkdir()
    answer = segtrain(*call, f"dataset.root={bad}", "split=val")
    assert (answer.status, "1 of the 7 classes in" in answer.err) == (1, True)


def test_check_compares_the_published_classes_with_the_published_counts(segtrain, class_images, tmp_path):
    for number in range(1000):
        (tmp_path / "val").mkdir(exist_ok=True)
        (tmp_path / "val" / f"n{number:08d}").symlink_to(class_images / "val" / "n00000000")
    answer = segtrain("check", "dataset=imagenet", f"dataset.root={tmp_path}", "split=val", "output=o")
    assert answer.status == 1
    assert "val: 3000 images, published are 50000" in answer.err


# ---------------------------------------------------------------------------------------------------- augmentation


def test_windows_are_within_the_limits_and_as_torchvision_draws_them():
    """Area and log aspect of the windows have the distributions of torchvision's RandomResizedCrop."""
    ours, theirs = [], []
    view, rng = RandomView(AugmentationConfig(name="imagenet")), np.random.default_rng(0)
    torch.manual_seed(0)
    picture = Image.new("RGB", (300, 200))
    for _ in range(4000):
        top, left, height, width, _ = view.draw(200, 300, rng)
        assert 0 <= top <= 200 - height
        assert 0 <= left <= 300 - width
        ours.append((height * width / 60000, math.log(width / height), top / 200, left / 300))
        i, j, h, w = transforms.RandomResizedCrop.get_params(picture, [0.08, 1.0], [3 / 4, 4 / 3])
        theirs.append((h * w / 60000, math.log(w / h), i / 200, j / 300))
    mine, other = np.array(ours), np.array(theirs)
    quantiles = np.linspace(0.05, 0.95, 10)
    for column in range(4):
        found, wanted = (np.quantile(one[:, column], quantiles) for one in (mine, other))
        assert np.abs(found - wanted).max() < 0.03


def test_a_picture_that_no_window_fits_is_cut_in_the_middle():
    view = RandomView(AugmentationConfig(name="imagenet", area=[0.99, 1.0], flip=0))
    assert view.draw(30, 300, np.random.default_rng(0)) == (0, 130, 30, 40, False)
    assert view.draw(300, 30, np.random.default_rng(0)) == (130, 0, 40, 30, False)


def test_colours_change_as_published():
    """Against torchvision's factors on float images, in the drawn order, where nothing would be clipped."""
    view = RandomView(AugmentationConfig(name="imagenet", color=0.4))
    image = (100 + 20 * np.random.default_rng(1).random((8, 9, 3))).astype(np.float32)
    orders = set()
    for seed in range(12):
        rng, same = np.random.default_rng(seed), np.random.default_rng(seed)
        found = view.recolored(image, rng)
        expected = torch.from_numpy(image).permute(2, 0, 1) / 255
        order = same.permutation(3).tolist()
        orders.add(tuple(order))
        for change in order:
            adjust = (tv.adjust_brightness, tv.adjust_saturation, tv.adjust_contrast)[change]
            expected = adjust(expected, same.uniform(0.6, 1.4))
        assert np.allclose(found / 255, expected.permute(1, 2, 0), atol=2e-4)  # torchvision's grey is 0.2989, ...
    assert len(orders) > 3


def test_light_shifts_all_pixels_along_the_components():
    assert np.allclose(COMPONENTS @ COMPONENTS.T, np.eye(3), atol=2e-3)
    view = RandomView(AugmentationConfig(name="imagenet", lighting=0.1))
    rng = np.random.default_rng(0)
    shifts = np.array([view.lit(np.zeros((1, 1, 3), np.float32), rng)[0, 0] for _ in range(4000)]) / 255
    wanted = COMPONENTS @ np.diag((0.1 * np.array([0.2175, 0.0188, 0.0045])) ** 2) @ COMPONENTS.T
    assert np.abs(np.cov(shifts.T) - wanted).max() < 2e-5
    assert np.abs(shifts.mean(0)).max() < 1e-3


def test_a_sample_is_a_function_of_seed_and_position(class_images):
    pictures = list_images(ImageNetConfig("imagenet", str(class_images)), "train")
    options = AugmentationConfig(name="imagenet", crop_size=[32, 48], color=0.4, lighting=0.1)
    first, again, other = (TrainingImages(pictures, options, seed) for seed in (0, 0, 1))
    image, target, name, position, window = first[7]
    assert image.shape == (32, 48, 3)
    assert image.dtype == np.float32
    assert target.shape == ()
    assert name.startswith(pictures.classes[int(target)])
    assert (position, len(window)) == (7, 5)
    assert np.array_equal(image, again[7][0])
    assert [first[p][2] for p in range(24)] != [other[p][2] for p in range(24)]
    assert sorted(first[p][2] for p in range(24)) == sorted(pictures.names)  # an epoch shows each once


# ---------------------------------------------------------------------------------------------------- views


@pytest.mark.parametrize("size", [(300, 200), (180, 333), (256, 256), (231, 517)])
def test_views_are_torchvisions(size):
    image = noise(*size)
    picture = Image.fromarray(image)
    shrunk = transforms.Resize(256)(picture)
    assert np.array_equal(crop_views(image, CENTER)[0], np.asarray(transforms.CenterCrop(224)(shrunk)))
    theirs = {np.asarray(one).tobytes() for one in transforms.TenCrop(224)(shrunk)}
    assert {one.tobytes() for one in crop_views(image, TEN)} == theirs
    assert crop_views(image, InferenceConfig(resize=320, crop=320)).shape == (1, 320, 320, 3)


def test_a_damaged_picture_is_named(class_images, tmp_path):
    folder = tmp_path / "train" / "n0"
    folder.mkdir(parents=True)
    (folder / "a.JPEG").write_bytes(b"\xff\xd8 half a picture")
    data = TrainingImages(list_images(ImageNetConfig("imagenet", str(tmp_path)), "train"), AugmentationConfig(), 0)
    assert isinstance(data[0], DataError)
    assert "a.JPEG" in str(data[0])
