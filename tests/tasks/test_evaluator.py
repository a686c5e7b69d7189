"""The evaluator of each task: division among processes, the guard, and what an Evaluation writes."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import segtrain as package
from segtrain.distributed.group import World
from segtrain.tasks.base import NetworkFacts, Task
from segtrain.tasks.classification import Classification
from segtrain.tasks.segmentation import Segmentation, SegmentationCounts
from tests.helpers.checkout import TINY

CPU = torch.device("cpu")
FACTS = NetworkFacts("a.pt", 7, None, {"weights": "raw"})


class Cells(nn.Module):
    """A network of either task that counts its calls."""

    def __init__(self, classes, pooled):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, classes, 8, 8)
        self.pooled = pooled
        self.calls = 0

    def forward(self, images, upsample=False):
        self.calls += 1
        logits = self.conv(images)
        return logits.mean((2, 3)) if self.pooled else logits


@pytest.fixture
def segmentation(folder_data):
    """2 validation and 4 training images of 2 classes."""
    return Segmentation(package.compose(*folder_data[1]))


@pytest.fixture
def classification(class_images):
    """18 validation images of 6 classes, in batches of 2."""
    words = [
        "dataset=imagenet", f"dataset.root={class_images}", f"plugins=[{TINY}]", "model.backbone=tiny",
        "model.head=classifier", "loss=cross_entropy", "augmentation=imagenet", "inference=center224",
        "inference.resize=36", "inference.crop=32",
    ]  # fmt: skip
    return Classification(package.compose(*words))


@pytest.fixture(params=["segmentation", "classification"])
def task(request):
    return request.getfixturevalue(request.param)


def network_of(task):
    return Cells(task.num_classes, isinstance(task, Classification))


def prepared(task, split="train"):
    evaluator = task.evaluator(split)
    evaluator.batch_size = 2 if isinstance(task, Classification) else 1
    return evaluator


class OneOf(World):
    """One of several processes, of which rank 0 runs first: the others then know what it has gathered."""

    gathered = None

    def all_gather(self, value):
        if self.main:
            OneOf.gathered = value
        return [OneOf.gathered, *[value] * (self.size - 1)]


def totals(counts):
    """The counts that add up over processes."""
    if isinstance(counts, SegmentationCounts):
        return np.hstack([counts.network.confusion(), counts.of_prior.confusion()])
    return np.stack([counts.seen, counts.first, counts.among])


def prepared_run(task, network, world, guard, monkeypatch):
    """The counts of one process, whose evaluator is its own."""
    evaluator = prepared(task)
    monkeypatch.setattr(evaluator, "protocol", lambda *more: {})  # which wants all images in a share
    monkeypatch.setattr(evaluator, "evaluation", lambda counts, *more: counts)
    return evaluator.run(network, CPU, world, 0, guard, facts=FACTS)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shares_add_up_and_have_the_same_rounds(task, size, monkeypatch):
    """With 5 processes and 4 images of the segmentation, one process has none."""
    network, rounds, answered = network_of(task), set(), []

    def guard(answers, most):
        rounds.add(most)
        found = list(answers)
        answered.append(len(found))
        return iter(found)

    whole = totals(prepared_run(task, network, World(), None, monkeypatch))
    assert network.calls == {"segmentation": 4, "classification": 12}[type(task).__name__.lower()]
    made = World if size == 1 else OneOf
    shares = [totals(prepared_run(task, network, made(rank, size), guard, monkeypatch)) for rank in range(size)]
    assert (sum(shares) == whole).all() and whole.any()
    assert rounds == {max(answered)} and len(answered) == size
    assert (0 in answered) == (size == 5 and isinstance(task, Segmentation))


def test_a_guard_ends_an_evaluation_between_images(task):
    evaluator, network = prepared(task), network_of(task)

    def guard(answers, rounds):
        yield next(answers)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        evaluator.run(network, CPU, World(), 0, guard, facts=FACTS)
    assert network.calls == 1


def test_the_network_and_the_images_are_described(task):
    task.config.inference.name = "mine"
    result = task.evaluator().run(network_of(task), CPU, World(), 0, facts=FACTS).result
    assert (result["split"], result["checkpoint"], result["step"]) == ("val", "a.pt", 7)
    assert result["images"] == task.num_val
    card = result["protocol"]
    assert (card["weights"], card["inference"]["name"], card["images"]["seen"]) == ("raw", "mine", task.num_val)
    assert not [text for text in card["warnings"] if "this checkpoint's training" in text]
    train = task.evaluator("train").run(network_of(task), CPU, World(), 0, facts=FACTS).result
    assert (train["split"], train["images"]) == ("train", task.num_train)


def test_overfitting_is_validated_on_the_training_images(folder_data):
    task = Segmentation(package.compose(*folder_data[1], "trainer.overfit=3"))
    result = task.evaluator().run(network_of(task), CPU, World(), 0, facts=FACTS).result
    assert (result["split"], result["images"], task.num_train, task.num_val) == ("train", 3, 3, 3)


def test_an_evaluation_writes_and_prints_its_scores(task, tmp_path):
    network, pixels = network_of(task), isinstance(task, Segmentation)
    evaluation = task.evaluator().run(network, CPU, World(), 0, figures=2, facts=FACTS)
    folder = tmp_path / "o"
    assert evaluation.write(folder) == folder / "evaluation.json"
    content = json.loads((folder / "evaluation.json").read_text())
    assert content.pop("confusion_matrix", None) == (evaluation.confusion.tolist() if pixels else None)
    assert content == evaluation.result
    plots = {"confusion.png", "images.npz"} if pixels else set()
    assert {path.name for path in folder.iterdir()} == {"evaluation.json", *plots}
    evaluation.write(folder, examples=True)
    assert {path.name for path in folder.iterdir()} == {"evaluation.json", "predictions.png", *plots}
    assert any(image is evaluation.examples for image in evaluation.figures.values())
    assert len(evaluation.figures) == 1 + pixels
    assert any(line.startswith("mIoU" if pixels else "top-1") for line in evaluation.lines())
    assert evaluation.scalars[f"val/{task.metric}"] == evaluation.result[task.metric]
    bare = task.evaluator().run(network, CPU, World(), 0, facts=FACTS)
    assert bare.examples is None and len(bare.figures) == pixels
    assert len(list(bare.write(tmp_path / "bare", examples=True).parent.iterdir())) == 1 + len(plots)


def test_training_data_are_checked_first_and_returned(task):
    asked = []
    task.check = lambda: asked.append("check")
    data = task.prepare(World())
    assert asked == ["check"] and len(data[0]) == 5
    assert isinstance(task, Task) and len(task.image_ids) == task.num_train


def test_the_network_of_either_task_computes_in_inference_precision(task):
    network, seen = network_of(task), set()
    network.conv.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        task.config.inference.precision = name
        card = task.evaluator().run(network, CPU, World(), 0, facts=FACTS).result["protocol"]
        assert (seen, f"torch.{card['precision']}") == ({dtype}, str(dtype))
        seen.clear()


def test_a_batch_changes_neither_scores_nor_their_order(task):
    """evaluation.json and images.npz, but for one entry of the protocol."""
    network, found = network_of(task), []
    for batch in (None, 1, 3):
        task.config.inference.batch_size = batch
        evaluation = task.evaluator("train").run(network, CPU, World(), 0, figures=3, facts=FACTS)
        card = evaluation.result["protocol"]
        assert card.pop("batch_size", None) == batch and "batch_size" not in evaluation.result["inference"]
        found.append(evaluation)
    assert found[0].result == found[1].result == found[2].result
    assert (found[0].examples == found[2].examples).all()
    if isinstance(task, Segmentation):
        for one, other in zip(found[0].images, found[2].images, strict=True):
            assert np.array_equal(one, other)
