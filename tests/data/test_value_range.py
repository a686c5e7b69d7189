"""dataset.value_range reaches every place that reads an image: training, its cache, check, evaluation, prediction."""

import numpy as np
import pytest
from PIL import Image

from segtrain import load
from segtrain.config.plugin_files import load_plugin
from tests.helpers.checkout import TINY
from tests.helpers.runs import refused, small_run


@pytest.fixture
def words(tmp_path, monkeypatch):
    """A folder of images of 12 bits in 16, whose labels are their brightness, and the words of a training on it."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / "data" / split / kind).mkdir(parents=True)
        for i in range(4):
            mask = ((np.indices((64, 96)).sum(0) // 32 + i) % 2).astype(np.uint8)
            noise = np.random.default_rng([i, len(split)]).integers(0, 500, mask.shape)
            Image.fromarray((3000.0 * mask + noise + 100).astype(np.uint16)).save(
                tmp_path / "data" / split / "images" / f"{i}.png"
            )
            Image.fromarray(mask).save(tmp_path / "data" / split / "labels" / f"{i}.png")
    (tmp_path / "classes.csv").write_text("id,name\n0,dark\n1,light\n")
    splits = [f"dataset.splits.{s}={{images:{s}/images/*.png,labels:{s}/labels/*.png}}" for s in ("train", "val")]
    own = [word for word in small_run("x") if not word.startswith(("dataset.", "augmentation.scale"))]
    data = ["dataset=folder", "dataset.root=data", "dataset.classes=classes.csv", *splits]
    return data, [*data, *own, f"plugins=[{TINY}]", "model.backbone=tiny", "augmentation.scale=[1,1]"]


def test_twelve_bits_are_refused_by_name_and_work_with_their_range(segtrain, words):
    data, training = words
    remedy = "holds uint16 values from"
    assert remedy in segtrain("check", *data).out
    refused(segtrain("train", *training, "run=r"), remedy, "dataset.value_range=[0,", status=1)
    levels = "dataset.value_range=[0,4095]"
    assert segtrain("check", *data, levels).status == 0
    for cache in ("none", "decoded"):
        answer = segtrain("train", *training, levels, f"run={cache}", f"dataset.cache={cache}",
                                  "dataset.cache_dir=cache")  # fmt: skip
        assert answer.status == 0, answer.err
    with open("none/metrics.jsonl") as one, open("decoded/metrics.jsonl") as two:  # noqa: PTH123
        losses = [[line.partition('"train/loss": ')[2].partition(",")[0] for line in file] for file in (one, two)]
    assert losses[0] == losses[1] and any(losses[0])
    refused(segtrain("train", *training, "dataset.value_range=[0,1000]", "run=none", "trainer.max_steps=8"),
            "dataset.value_range", status=1)  # fmt: skip
    for command in (["evaluate"], ["predict", "input=data/val/images", "outputs=[raw]", "output=answers"]):
        answer = segtrain(*command, "run=none", f"plugins=[{TINY}]", "device=cpu")
        assert answer.status == 0, answer.err
    load_plugin(str(TINY))
    network = load("none/last.pt")
    assert network.value_range == (0, 4095)
    found = np.asarray(Image.open("answers/raw/0.png"))
    assert (network.predict("data/val/images/0.png") == found).all()


@pytest.mark.parametrize("value", ["[5,5]", "[5,1]", "[1]", "x"])
def test_a_range_that_is_none_is_refused(segtrain, words, value):
    refused(segtrain("check", *words[0], f"dataset.value_range={value}"), "dataset.value_range")
