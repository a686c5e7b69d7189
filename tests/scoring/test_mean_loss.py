"""Validation loss and scores of a fixed sample of training images, which show overfitting."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import segtrain as package
from segtrain.config import IGNORE_INDEX, InferenceConfig
from segtrain.data.sample import spread
from segtrain.distributed.group import World
from segtrain.scoring import inference, mean_loss
from segtrain.scoring.inference import segment
from segtrain.scoring.mean_loss import MeanLoss
from segtrain.tasks.classification import Classification
from segtrain.tasks.segmentation import Segmentation
from tests.helpers.checkout import TINY
from tests.helpers.runs import small_run, state

CPU = torch.device("cpu")


@pytest.mark.parametrize("options", [{}, {"flip": True}, {"scales": [0.5, 1.0], "flip": True}], ids=["1", "2", "4"])
def test_the_loss_is_that_of_the_mean_probability(options, monkeypatch):
    """Against float64: every view enlarged to the target's own size, and its probabilities averaged."""
    monkeypatch.setattr(inference, "STRIP", 5 * 37 * 4)  # strips of four rows
    torch.manual_seed(0)
    image, convolution = torch.randn(1, 3, 40, 32), torch.nn.Conv2d(3, 5, 8, 8)
    views = []

    def network(window):
        views.append(convolution(F.pad(window, (0, -window.shape[3] % 8, 0, -window.shape[2] % 8))))
        return views[-1]

    target = torch.randint(0, 5, (46, 37))  # another size, as with inference.longest_side
    target[:7] = IGNORE_INDEX
    found = segment(network, image, InferenceConfig(**options), target=target)
    with torch.no_grad():
        whole = [F.interpolate(one.double(), size=(46, 37), mode="bilinear") for one in views]
        whole = [one.flip(3) if options and number % 2 else one for number, one in enumerate(whole)]
        mean = torch.stack([one.softmax(1) for one in whole]).mean(0)
        expected = F.nll_loss(mean.log(), target[None], ignore_index=IGNORE_INDEX, reduction="sum")
    assert len(views) == {0: 1, 1: 2, 2: 4}[len(options)]
    assert found.loss == pytest.approx(expected.item(), rel=1e-6)
    assert segment(network, image, InferenceConfig(**options)).loss is None


def test_a_mean_is_over_all_processes_and_never_nan(monkeypatch):
    loss = MeanLoss()
    assert loss.result() is None
    loss.add(3.0, 4)
    loss.add(1.0, 0)
    monkeypatch.setattr(mean_loss, "all_reduce_arrays", lambda sums: np.multiply(sums, [2, 4], out=sums))
    loss.all_reduce()
    assert loss.result() == 0.5
    loss.add(math.nan, 1)
    assert loss.result() is None


def test_a_sample_is_spread_over_all_images():
    assert [spread(range(10), most) for most in (0, 1, 2, 4)] == [[], [0], [0, 9], [0, 3, 6, 9]]
    assert spread(range(3), 9) == [0, 1, 2]


def test_training_images_are_scored_no_more_than_validate(folder_data):
    """Of 4 training and 2 validation images, 2; their scores are those of an evaluation of just these."""
    task = Segmentation(package.compose(*folder_data[1]))
    torch.manual_seed(0)
    network = torch.nn.Conv2d(3, task.num_classes, 8, 8)
    network.forward = lambda images, upsample: torch.nn.Conv2d.forward(network, images)
    evaluator = task.training_sample(64)
    assert [sample.name for sample in evaluator.samples] == [task.samples[0].name, task.samples[-1].name]
    assert len(task.training_sample(1).samples) == 1
    assert set(evaluator.brief(network, CPU, World(), 0)) == {"miou"}
    evaluator.with_loss = True
    found = evaluator.brief(network, CPU, World(), 0)
    whole = task.evaluator("train")
    whole.samples, whole.images, whole.prior_samples = evaluator.samples, 2, None
    counts, _ = whole.counted(network, CPU, World(), 0, None, 0, lambda: False)
    assert found["miou"] == counts.network.result()["miou"]
    pixels = [F.cross_entropy(
        F.interpolate(network((torch.from_numpy(item.image).permute(2, 0, 1)[None] / 255 - mean) / std, False),
                      size=item.target.shape, mode="bilinear"),
        torch.from_numpy(item.target)[None].long(), ignore_index=IGNORE_INDEX, reduction="none",
    ) for item, mean, std in items_of(evaluator, task)]  # fmt: skip
    labelled = torch.cat([one.flatten() for one in pixels]).detach()
    count = sum(int((item.target != IGNORE_INDEX).sum()) for item, _, _ in items_of(evaluator, task))
    assert found["loss"] == pytest.approx(float(labelled.double().sum()) / count, rel=1e-5)
    assert Segmentation(package.compose(*folder_data[1], "trainer.overfit=2")).training_sample(64) is None


def items_of(evaluator, task):
    from segtrain.data.loader import evaluation_samples

    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (task.config.model.mean, task.config.model.std))
    return [(item, mean, std) for item in evaluation_samples(evaluator.samples, task.table, 0)]


def test_image_classification_too(class_images):
    words = [
        "dataset=imagenet", f"dataset.root={class_images}", f"plugins=[{TINY}]", "model.backbone=tiny",
        "model.head=classifier", "loss=cross_entropy", "augmentation=imagenet", "inference=center224",
        "inference.resize=36", "inference.crop=32",
    ]  # fmt: skip
    task = Classification(package.compose(*words))
    evaluator = task.training_sample(5)
    evaluator.with_loss = True
    logits = torch.tensor([[float(number) for number in range(task.num_classes)]])
    network = torch.nn.Identity()
    network.forward = lambda images: logits.expand(len(images), -1)
    found = evaluator.brief(network, CPU, World(), 0)
    targets = torch.from_numpy(evaluator.samples.targets)
    assert len(targets) == 5
    assert found["loss"] == pytest.approx(F.cross_entropy(logits.expand(5, -1), targets).item(), rel=1e-6)
    assert found["top1"] == float((targets == task.num_classes - 1).double().mean())


def test_a_training_logs_both_and_the_weights_stay_the_same(segtrain, scenes):
    """Switched off, the run is the same to the bit."""
    tiny = (f"plugins=[{TINY}]", "model.backbone=tiny", "model.backend=aten", "trainer.max_steps=2")
    words = [*small_run(scenes, *tiny), "trainer.validate_every=1", "logging.pictures=0"]
    answer = segtrain("train", *words, "run=on")
    assert answer.status == 0, answer
    shown = [line for line in answer.out.splitlines() if line.startswith("validation at step")]
    logged = [json.loads(line) for line in Path("on/metrics.jsonl").read_text().splitlines()]
    lines = [line for line in logged if "val/miou" in line]
    assert len(shown) == len(lines) == 2
    for text, line in zip(shown, lines, strict=True):
        assert text.endswith(
            f", loss {line['val/loss']:.4f}; 3 training images: mIoU {100 * line['train_sample/miou']:.1f} %, "
            f"loss {line['train_sample/loss']:.4f}"
        )
    assert segtrain("train", *words, "run=off", "logging.train_sample=0").status == 0
    off = [json.loads(line) for line in Path("off/metrics.jsonl").read_text().splitlines()]
    added = {"val/loss", "train_sample/miou", "train_sample/loss"}
    kept = [{key: value for key, value in line.items() if key not in added} for line in lines]
    assert [line for line in off if "val/miou" in line] == kept
    on, other = state("on/last.pt")["model"], state("off/last.pt")["model"]
    assert all(torch.equal(on[name], other[name]) for name in on)
