"""`segtrain suspects`: planted errors come first, and the files say where they are."""

import csv
import io

import numpy as np
import pytest
import torch
from PIL import Image

from segtrain.commands import suspects as command
from segtrain.scoring.contradictions import contradictions
from segtrain.scoring.inference import Prediction
from tests.helpers import zygote
from tests.helpers.checkout import TINY
from tests.helpers.runs import refused


def test_regions_worked_by_hand():
    """A relabelled object, an erased one, a strip along an edge, and a region without a label."""
    truth = np.zeros((60, 80), np.uint8)
    truth[5:15, 10:20], truth[30:40, 40:60] = 1, 2
    target = truth.copy()
    target[5:15, 10:20] = 3  # relabelled
    target[30:40, 40:60] = 0  # erased
    target[:, 70:72] = 255
    prediction = truth.copy()
    prediction[:, 70:72] = 1
    prediction[14:20, 10:12] = 1  # 2 x 5 pixels of the network's own, too small
    probability = np.where(truth > 0, 0.9, 0.6).astype(np.float32)
    found = {(one.label, one.predicted): one for one in contradictions(target, prediction, probability, 4)}
    assert found.keys() == {(3, 1), (0, 2)}
    one, two = found[3, 1], found[0, 2]
    assert one[:4] == (10, 5, 10, 10) and one.area == 100 and one.confidence == pytest.approx(0.9)
    assert one.covered == 1.0 and two[:4] == (40, 30, 20, 10) and two.covered == 1.0  # of the predicted object
    assert 0 < one.suspicion < two.suspicion < 0.9
    assert one.suspicion == pytest.approx(0.9 * (1 - np.exp(-100 / 400)))
    target[5:10, 10:20] = 1
    half = {one.label: one for one in contradictions(target, prediction, probability, 4)}[3]
    assert (half.area, half.covered) == (50, 1.0)  # half of the predicted object, and all of the labelled one
    assert list(contradictions(truth, truth, probability, 4)) == []
    cut = truth.copy()
    cut[5:15, 15:20] = 0  # the label is half as wide as the object
    assert [one.covered for one in contradictions(cut, truth, probability, 4)] == [0.5]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A run, data of 12 images in which two objects are relabelled, and the true labels."""
    root = tmp_path_factory.mktemp("suspects")
    rng, truths = np.random.default_rng(0), {}
    for split, count in (("train", 8), ("val", 4)):
        for kind in ("images", "labels"):
            (root / "data" / split / kind).mkdir(parents=True)
        for number in range(count):
            label = np.zeros((64, 96), np.uint8)
            label[40:], label[10:30, 10 * number : 10 * number + 15] = 1, 2
            truths[f"{split}/images/{number}.png"] = label
            image = np.choose(label[..., None], [(60, 90, 200), (40, 120, 50), (200, 60, 40)])
            image = (image + rng.integers(0, 30, (64, 96, 3))).astype(np.uint8)
            Image.fromarray(image).save(root / "data" / split / "images" / f"{number}.png")
            wrong = np.where(label == 2, 1, label) if (split, number) in (("train", 3), ("val", 2)) else label
            Image.fromarray(wrong.astype(np.uint8)).save(root / "data" / split / "labels" / f"{number}.png")
    (root / "data" / "classes.csv").write_text("id,name\n0,sky\n1,land\n2,ship\n")
    words = [
        "dataset=folder", f"dataset.root={root / 'data'}", "dataset.classes=classes.csv", "run=run", "device=cpu",
        "dataset.splits.train={images:train/images/*.png,labels:train/labels/*.png}",
        "dataset.splits.val={images:val/images/*.png,labels:val/labels/*.png}", f"plugins=[{TINY}]",
        "model.backbone=tiny", "model.output_stride=16", "model.head_channels=8", "augmentation.crop_size=[32,48]",
        "augmentation.scale=[0.9,1.1]", "trainer.batch_size=4", "trainer.epochs=null", "trainer.max_steps=2",
        "loader.workers=0", "loss=cross_entropy",
    ]  # fmt: skip
    answer = zygote.call(["train", *words], root)
    assert answer.returncode == 0, answer.stderr
    return root / "run", truths


def test_planted_errors_come_first(segtrain, planted, tmp_path, monkeypatch):
    """With the answers of a network that is right but for unsure strips and blots."""
    run, truths = planted
    load = command.load_predictor

    class Oracle:
        device = torch.device("cpu")

        def __init__(self, *more):
            self.table = load(*more).table
            self.names = iter([name for split in ("train", "val") for name in truths if name.startswith(split)])

        def seen(self, images, options):
            return torch.zeros(len(images))

        def segment_batch(self, images, seen, options, probability, targets):
            assert probability and len(images) == 1
            truth = truths[next(self.names)].copy()
            certain = np.full(truth.shape, 0.95, np.float32)
            truth[40:42], certain[40:42] = 0, 0.55  # along an edge
            truth[50:60, 60:70], certain[50:60, 60:70] = 2, 0.5
            return [Prediction(truth, certain)]

    monkeypatch.setattr(command, "load_predictor", Oracle)
    answer = segtrain("suspects", run, "top=5", f"output={tmp_path / 'o'}", f"plugins=[{TINY}]", "device=cpu")
    assert answer.status == 0 and answer.out.splitlines()[-1] == str(tmp_path / "o" / "suspects.csv"), answer
    text = (tmp_path / "o" / "suspects.csv").read_text()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert text.splitlines()[0] == "file,x,y,w,h,label,predicted,confidence,area" and len(rows) == 5
    assert [row["file"] for row in rows[:2]] == ["train/images/3.png", "val/images/2.png"]
    assert list(rows[0].values())[1:] == ["30", "10", "15", "20", "land", "ship", "0.9500", "300"]
    assert [float(row["confidence"]) < 0.6 for row in rows] == [False, False, True, True, True]
    with Image.open(tmp_path / "o" / "suspects.png") as image:
        assert image.height == 3 * (160 + 18)


def test_the_runs_own_network_is_asked(segtrain, planted, tmp_path):
    run, _ = planted
    answer = segtrain("suspects", run, "split=val", "top=3", f"plugins=[{TINY}]", "device=cpu")
    assert answer.status == 0 and "examining   the labels of 4 images of folder val" in answer.out, answer
    rows = list(csv.DictReader(io.StringIO((run / "suspects" / "suspects.csv").read_text())))
    assert all(row["file"].startswith("val/images/") for row in rows)
    answer = segtrain("suspects", run, f"root={tmp_path}", f"plugins=[{TINY}]", "device=cpu")
    assert answer.status == 1 and "Traceback" not in answer.err
    refused(segtrain("suspects", tmp_path), "is no run", status=1)
