"""The first command that `segtrain check write_config=` suggests, and what a run says that has learned nothing."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaml
from PIL import Image

import segtrain as package
from segtrain.data.verify.guess import looks_like
from segtrain.data.verify.suggest import suggested_words, typical_size
from segtrain.engine.prior_hint import prior_hint
from tests.helpers.checkout import TINY

CASES = [
    (72, (360, 480), "CPU"), (3000, (1080, 1920), "GPU"), (1, (20, 30), "CPU"), (12, (96, 128), "GPU"),
    (30, (3000, 4000), "CPU"), (3, (40, 1000), "GPU"), (3000, (33, 32), "CPU"),
]  # fmt: skip


@pytest.mark.parametrize(("images", "size", "device"), CASES)
def test_what_is_suggested_can_be_trained(images, size, device):
    """It composes, and the images fill the crop, as the check before a training asks for."""
    made = package.compose("dataset=folder", *suggested_words(images, size, device))
    crop, scale = made.augmentation.crop_size, made.augmentation.scale
    assert all(side <= extent * scale[1] for side, extent in zip(crop, size, strict=True))
    assert crop[0] * crop[1] <= 1.3 * {"CPU": 256, "GPU": 512}[device] ** 2
    steps = made.trainer.steps(images)
    assert 1 <= made.trainer.epochs <= 400 and made.trainer.images <= max(2, images)
    assert steps <= {"CPU": 2000, "GPU": 5400}[device]
    if made.inference.scales != [1.0]:
        assert scale[0] < made.inference.scales[0] < scale[1]


def test_small_data_trains_long_and_at_a_rate_that_fits_the_batch():
    words = dict(word.split("=") for word in suggested_words(72, (360, 480), "CPU"))
    assert (words["optimizer.lr"], words["trainer.batch_size"], words["trainer.epochs"]) == ("0.1", "8", "67")
    words = dict(word.split("=") for word in suggested_words(4, (360, 480), "CPU"))
    assert (words["optimizer.lr"], words["trainer.batch_size"], words["trainer.epochs"]) == ("0.05", "4", "400")


def test_the_size_is_the_median_of_what_can_be_read(tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for path, size in zip(paths, ((10, 20), (30, 40), (500, 600)), strict=False):
        Image.new("RGB", size).save(path)
    paths[3].write_bytes(b"nothing")
    assert typical_size(paths) == (40, 30)
    assert typical_size(paths[3:]) is None


def test_the_suggested_command_trains_as_printed(folder_data, segtrain):
    root, _ = folder_data
    (root / "classes.csv").unlink()
    out = segtrain("check", "dataset=folder", f"dataset.root={root}", "write_config=mine.yaml").out
    (line,) = re.findall(r"^and +(segtrain train .*)$", out, re.MULTILINE)
    words = shlex.split(line)[1:]
    assert "name=mine" in words and "for 4 images of about 64x48, random weights and a" in out
    assert "optimizer.lr=0.015)" in out  # of trained weights, with half a batch
    small = ["trainer.max_steps=1", "model.head_channels=8", "loader.workers=0", "device=cpu", "model.backend=aten",
             f"plugins=[{TINY}]", "model.backbone=tiny"]  # fmt: skip
    words = [word for word in words if not word.startswith("trainer.epochs")]
    answer = segtrain(*words, *small)
    assert answer.status == 0, answer
    assert Path("runs/mine/last.pt").exists()


def test_a_run_without_success_says_what_to_change():
    made = package.compose("experiment=toy", "loss=bootstrapped", "optimizer.lr=0.0025", "trainer.max_steps=40")
    (line,) = prior_hint(made, {"miou": 0.12, "position_prior_miou": 0.15})
    for part in ("optimizer.lr=0.1 optimizer.nesterov=true loss=cross_entropy, not 0.0025",
                 "a longer training than trainer.max_steps=40",
                 "model.weights=FILE optimizer.lr=0.03"):  # fmt: skip
        assert part in line
    for rate, part in ((0.02, "a higher rate (optimizer.lr=0.03 optimizer.nesterov=true, not 0.02)"),
                       (0.03, "another rate than optimizer.lr=0.03")):  # fmt: skip
        made = package.compose("experiment=toy", "model.weights=a.pt", f"optimizer.lr={rate}")
        assert part in prior_hint(made, {"miou": 0.1, "position_prior_miou": 0.1})[0]
    for better in ({"miou": 0.16, "position_prior_miou": 0.15}, {"miou": 0.1}, {"top1": 0.1}, {}):
        assert prior_hint(made, better) == []


@pytest.mark.parametrize(("bands", "dtype"), [(4, np.uint8), (2, np.uint16), (5, np.uint8)])
def test_bands_that_would_be_lost_are_named_and_the_suggested_command_trains(segtrain, tmp_path, bands, dtype):
    values = {}
    for split in ("train", "val"):
        for i in range(4):
            random = np.random.default_rng([i, len(split)])
            pixels = random.integers(0, 250, (64, 96, bands)).astype(dtype) * (257 if dtype == np.uint16 else 1)
            path = tmp_path / "data" / split / "images" / f"{i}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig")
            values[split, i] = pixels / np.iinfo(dtype).max
            label = tmp_path / "data" / split / "labels" / f"{i}.png"
            label.parent.mkdir(exist_ok=True)
            Image.fromarray((pixels[..., -1] > np.iinfo(dtype).max // 2).astype(np.uint8)).save(label)
    answer = segtrain("check", "dataset=folder", "dataset.root=data", "write_config=mine.yaml")
    assert answer.status == 0, answer
    written = yaml.safe_load(Path("mine.yaml").read_text())
    assert written["channels"] == list(range(bands)) and f"channels    {list(range(bands))}, all bands" in answer.out
    (line,) = re.findall(r"^and +(segtrain train .*)$", answer.out, re.MULTILINE)
    words = shlex.split(line)[1:]
    assert f"model.in_channels={bands}" in words
    (mean,) = (json.loads(word.split("=")[1]) for word in words if word.startswith("model.mean"))
    expected = np.mean([values["train", i].reshape(-1, bands).mean(0) for i in range(4)], axis=0)
    np.testing.assert_allclose(mean, expected, atol=1 / 255)
    small = ["trainer.max_steps=1", "model.head_channels=8", "loader.workers=0", "device=cpu", "model.backend=aten",
             f"plugins=[{TINY}]", "model.backbone=tiny"]  # fmt: skip
    answer = segtrain(*(word for word in words if not word.startswith("trainer.epochs")), *small)
    assert answer.status == 0, answer


def test_images_of_different_bands_are_left_to_the_user(segtrain, tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 30, 4 if i else 3), np.uint8)
        colours = "minisblack" if i else "rgb"
        tifffile.imwrite(tmp_path / f"data/images/{i}.tif", pixels, photometric=colours, planarconfig="contig")
        Image.fromarray(pixels[..., 0] % 2).save(tmp_path / "data/labels" / f"{i}.png")
    answer = segtrain("check", "dataset=folder", "dataset.root=data", "write_config=mine.yaml")
    assert answer.status == 0 and "some images have 4 bands and others not: add channels" in answer.out, answer
    assert "channels" not in yaml.safe_load(Path("mine.yaml").read_text())


def test_grey_images_of_16_bits_are_images_and_labels_of_16_bits_labels(tmp_path):
    random = np.random.default_rng(0)
    tifffile.imwrite(tmp_path / "image.tif", random.integers(0, 65536, (40, 40)).astype(np.uint16))
    tifffile.imwrite(tmp_path / "label.tif", random.integers(0, 5, (40, 40)).astype(np.uint16))
    (tmp_path / "broken.tif").write_bytes((tmp_path / "image.tif").read_bytes()[:300])
    kinds = [looks_like(tmp_path / f"{name}.tif") for name in ("image", "label", "broken")]
    assert kinds == ["image", "label", "other"]
