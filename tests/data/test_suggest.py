"""The first command that `segtrain check write_config=` suggests, and what a run says that has learned nothing."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

import segtrain as package
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
    for part in ("optimizer.lr=0.1 optimizer.nesterov=true loss=cross_entropy, not 0.0025", "trainer.max_steps=40",
                 "model.weights=FILE optimizer.lr=0.03"):  # fmt: skip
        assert part in line
    for rate, part in ((0.02, "a higher rate (optimizer.lr=0.03 optimizer.nesterov=true, not 0.02)"),
                       (0.03, "another rate than optimizer.lr=0.03")):  # fmt: skip
        made = package.compose("experiment=toy", "model.weights=a.pt", f"optimizer.lr={rate}")
        assert part in prior_hint(made, {"miou": 0.1, "position_prior_miou": 0.1})[0]
    for better in ({"miou": 0.16, "position_prior_miou": 0.15}, {"miou": 0.1}, {"top1": 0.1}, {}):
        assert prior_hint(made, better) == []
