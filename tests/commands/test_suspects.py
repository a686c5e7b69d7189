"""`segtrain suspects`: planted errors come first, and the files say where they are."""

import csv
import io

import numpy as np
import pytest
import torch
from PIL import Image

from segtrain.commands import suspects as command
from segtrain.data.images import read_image
from segtrain.scoring.contradictions import Ranking, contradictions, surprise
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
    prediction[16:21, 10:12] = 1  # 2 x 5 pixels of the network's own, too small
    probability = np.where(truth > 0, 0.9, 0.6).astype(np.float32)
    of_label = np.full(truth.shape, 0.1, np.float32)
    of_label[30:40, 40:50], of_label[30:40, 50:60] = 0.09, 0.0009  # the geometric mean is 0.009
    of_label[5:15, 10:20] = 1e-9  # counts as 1e-4
    found = {(one.label, one.predicted): one for one in contradictions(target, prediction, probability, of_label, 4)}
    assert found.keys() == {(3, 1), (0, 2)}
    one, two = found[3, 1], found[0, 2]
    assert one[:4] == (10, 5, 10, 10) and one.area == 100 and one.confidence == pytest.approx(0.9)
    assert one.covered == 1.0 and two[:4] == (40, 30, 20, 10) and two.covered == 1.0  # of the predicted object
    assert one.odds == pytest.approx(9000, rel=1e-4) and two.odds == pytest.approx(100, rel=1e-4)
    assert one.strength == pytest.approx(9000 * (1 - np.exp(-100 / 400)), rel=1e-4)
    target[5:10, 10:20] = 1
    half = {one.label: one for one in contradictions(target, prediction, probability, of_label, 4)}[3]
    assert (half.area, half.covered) == (50, 0.5)  # half of the predicted object, although all of the labelled one
    assert half.strength == pytest.approx(9000 * 0.5 * (1 - np.exp(-50 / 400)), rel=1e-4)
    assert list(contradictions(truth, truth, probability, of_label, 4)) == []


def test_surprise_worked_by_hand():
    """Of 100 pixels of class 0, 90 are predicted so; of 400 of class 1, 40 are predicted as 0, and none as 2."""
    counts = np.array([[90, 10, 0], [40, 360, 0], [0, 0, 0]])
    found = surprise(counts)
    assert found[1, 0] == pytest.approx(3.0)  # sqrt(0.9 / 0.1)
    assert found[0, 1] == pytest.approx(3.0) and found[0, 0] == found[1, 1] == 1.0
    assert not found[2].any() and not found[:, 2].any()  # not labelled, and never predicted
    assert np.array_equal(surprise(counts * 7), found)


def blots(*places):
    """Labels of class 0, in which the network sees squares of 10 x 10 pixels: (row, column, class, of the label)."""
    target, prediction = np.zeros((2, 40, 100), np.uint8)
    of_label = np.full(target.shape, 0.01, np.float32)
    for row, column, label, seen, sure in places:
        box = slice(row, row + 10), slice(column, column + 10)
        target[box], prediction[box], of_label[box] = label, seen, sure
    return target, prediction, np.full(target.shape, 0.9, np.float32), of_label


def test_a_common_mistake_comes_after_a_rare_one():
    """The same region, but class 2 is often predicted as 1, and class 3 hardly ever."""
    images = [
        blots((0, 0, 2, 1, 0.02), (0, 20, 2, 1, 0.1), (20, 0, 2, 2, 0.9), (20, 20, 1, 1, 0.9)),
        blots((0, 0, 3, 1, 0.03), (0, 20, 3, 3, 0.9), (0, 40, 3, 3, 0.9), (0, 60, 3, 3, 0.9), (20, 0, 3, 3, 0.9)),
    ]
    ranking = Ranking(4, 2)
    for number, image in enumerate(images):
        ranking.add(number, *image)
    # Of class 1 all 100 pixels are found; of class 2, 200 of 300 are predicted as 1, and of class 3, 100 of 500.
    first, second = ranking.best()
    assert ranking.regions == 3 and (first.image, first.found.label) == (1, 3) and second.image == 0
    assert first.suspicion == pytest.approx(np.sqrt(5.0) * first.found.strength)
    assert second.suspicion == pytest.approx(np.sqrt(1.5) * second.found.strength)
    assert second.found.strength > first.found.strength and second.found.x == 0
    equal = Ranking(4, 3)
    for number in range(5):
        equal.add(number, *images[0])
    assert [(one.image, one.found.x) for one in equal.best()] == [(0, 0), (1, 0), (2, 0)]


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
        def __init__(self, *more):
            self.table = load(*more).table
            self.device = torch.device("cpu")
            self.known = {read_image(run.parent / "data" / name).tobytes(): name for name in truths}

        def seen(self, images, options):
            return torch.zeros(len(images))

        def segment_batch(self, images, seen, options, probability, targets, asked):
            return [self.answer(*one) for one in zip(images, asked, strict=True)]

        def answer(self, image, asked):
            truth = truths[self.known[image.tobytes()]].copy()
            certain = np.full(truth.shape, 0.95, np.float32)
            truth[40:42], certain[40:42] = 0, 0.55  # along an edge
            truth[50:60, 60:70], certain[50:60, 60:70] = 2, 0.5
            return Prediction(truth, certain, None, np.where(asked == truth, certain, 1 - certain))

    monkeypatch.setattr(command, "load_predictor", Oracle)
    answer = segtrain("suspects", run, "top=5", f"output={tmp_path / 'o'}", f"plugins=[{TINY}]", "device=cpu")
    assert answer.status == 0 and answer.out.splitlines()[-1] == str(tmp_path / "o" / "suspects.csv"), answer
    text = (tmp_path / "o" / "suspects.csv").read_text()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert text.splitlines()[0] == "file,x,y,w,h,label,predicted,confidence,area,suspicion" and len(rows) == 5
    assert [row["file"] for row in rows[:2]] == ["train/images/3.png", "val/images/2.png"]
    assert list(rows[0].values())[1:-1] == ["30", "10", "15", "20", "land", "ship", "0.9500", "300"]
    assert np.all(np.diff([float(row["suspicion"]) for row in rows]) <= 0)
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
