"""Data, checkpoints and disks that cannot be used, and a diverged run."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.runs import refused, small_run, state

# ------------------------------------------------------------------------------------------------ data


def test_a_folder_of_ones_own_trains_by_configuration(folder_data, segtrain):
    root, overrides = folder_data
    # So few steps on four pictures end anywhere from 0.36 to 0.91, by the seed.
    longer = [
        "trainer.max_steps=60",
        "trainer.batch_size=8",
        "optimizer.lr=0.02",
        "loss=cross_entropy",
        "trainer.seed=4",
    ]
    answer = segtrain("train", *overrides, "name=mine", *longer)
    assert answer.status == 0, answer
    result = json.loads(Path("runs/mine/evaluation.json").read_text())
    assert set(result["per_class"]) == {"water", "land"}
    assert result["miou"] > 0.6
    predicted = segtrain("predict", "run=runs/mine", f"input={root / 'val/images'}", "output=o", "device=cpu")
    assert predicted.status == 0
    assert set(np.unique(np.asarray(Image.open("o/labels/p0.png")))) <= {0, 7}
    # the checkpoint knows the data set: no data options needed
    assert segtrain("evaluate", "run=runs/mine", "device=cpu", "loader.workers=0").status == 0


@pytest.mark.parametrize(
    ("damage", "words", "status"),
    [
        (lambda r: (r / "train/labels/p1.png").unlink(), ["1 of 4 images have no label", "p1.png"], 1),
        (lambda r: (r / "train/images/p1.png").unlink(), ["1 of 4 labels have no image", "p1.png"], 1),
        (lambda r: Image.new("L", (9, 9)).save(r / "val/labels/p1.png"), ["64x48", "9x9", "p1.png"], 1),
        (lambda r: Image.new("L", (64, 48), 5).save(r / "train/labels/p2.png"), ["p2.png: label id 5", "0, 7, 9"], 1),
        (lambda r: Image.new("RGB", (64, 48)).save(r / "train/labels/p2.png"), ["p2.png is a RGB"], 1),
        (lambda r: cut_short(r / "train/images/p3.png"), ["p3.png cannot be read", "truncated"], 1),
        (lambda r: [p.unlink() for p in (r / "val").rglob("*.png")], ["split 'val'", "empty"], 1),
        (lambda r: (r / "classes.csv").unlink(), ["cannot read the class table"], 1),
    ],
)
def test_bad_data_stops_before_the_first_step(folder_data, segtrain, damage, words, status):
    root, overrides = folder_data
    damage(root)
    refused(segtrain("train", *overrides), *words, status=status)
    assert not Path("runs").exists()


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-40])


def test_a_crop_that_nothing_can_fill(folder_data, segtrain):
    root, overrides = folder_data
    refused(segtrain("train", *overrides, "augmentation.crop_size=[64,96]"), "crop_size=[64, 96]", "[53, 71]")


def test_missing_data_folder(segtrain):
    answer = refused(
        segtrain("train", "dataset=cityscapes"), "datasets/cityscapes", "www.cityscapes-dataset.com", status=1
    )
    assert "gtFine" in answer.err


# ------------------------------------------------------------------------------------------------ checkpoints


class Danger:
    def __reduce__(self):
        return (os.system, ("touch hacked",))


def test_checkpoints_that_are_none(segtrain, finished):
    torch.save({"a": Danger()}, "danger.pt")
    torch.save({"state_dict": {}}, "other.pt")
    Path("text.pt").write_text("hello")
    Path("short.pt").write_bytes((finished / "last.pt").read_bytes()[:5000])
    Path("empty.pt").touch()
    for verb in (["evaluate"], ["predict", "input=."], ["info"]):
        refused(segtrain(*verb, "checkpoint=danger.pt"), "danger.pt", "never loaded", status=1)
        neither = "other.pt is neither a checkpoint that segtrain wrote nor a file of weights that it knows"
        refused(segtrain(*verb, "checkpoint=other.pt"), neither, status=1)
        refused(segtrain(*verb, "checkpoint=short.pt"), "short.pt", "damaged or cut short", status=1)
        for name in ("text.pt", "empty.pt"):
            refused(segtrain(*verb, f"checkpoint={name}"), name, status=1)
        refused(segtrain(*verb, "checkpoint=no.pt"), "no checkpoint file no.pt")
    assert not Path("hacked").exists()
    refused(segtrain("evaluate"), "checkpoint=FILE or run=FOLDER")


def test_a_checkpoint_of_another_model(segtrain, finished):
    content = state(finished / "last.pt")
    content["config"]["model"]["backbone"] = "resnext50"
    torch.save(content, "other.pt")
    refused(
        segtrain("evaluate", "checkpoint=other.pt", "device=cpu"),
        "belongs to another model",
        "tensors missing",
        status=1,
    )


def test_a_torn_last_checkpoint_is_named(segtrain, finished, scenes):
    Path("r").mkdir()
    Path("r/last.pt").write_bytes((finished / "last.pt").read_bytes()[:-1000])
    refused(segtrain("train", *small_run(scenes, "run=r")), "r/last.pt", "damaged or cut short", status=1)


# ------------------------------------------------------------------------------------------------ outputs


def test_an_output_that_cannot_be_written(scenes, segtrain, finished):
    Path("file").touch()
    refused(segtrain("train", *small_run(scenes, "run=file/run")), "cannot write", "file", status=1)
    Image.new("RGB", (40, 40)).save("p.png")
    refused(
        segtrain("predict", f"run={finished}", "input=p.png", "output=file/o", "device=cpu"), "cannot write", status=1
    )


def test_a_diverged_run_stops_and_keeps_the_good_checkpoint(folder_data, segtrain):
    root, overrides = folder_data
    words = [*overrides, "run=r", "trainer.save_every=1", "trainer.max_steps=40", "optimizer.lr=1e30"]
    refused(segtrain("train", *words), "diverged", "optimizer.lr", status=1)
    if Path("r/last.pt").exists():
        assert all(value.isfinite().all() for value in state("r/last.pt")["model"].values())
