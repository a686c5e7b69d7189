"""Weights that are NaN or infinite: never saved, never used."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segtrain.errors import DataError
from segtrain.weights import checkpoint
from segtrain.weights.checkpoint import first_not_finite
from segtrain.weights.files import write_weights
from segtrain.weights.transfer import load_weights
from tests.helpers.runs import Ranks, refused
from tests.helpers.weights import PLAIN, network

BODY = "body.1.weight"  # of the tiny backbone: the weight of its first norm


def overflow_at_the_last_step(monkeypatch):
    """A learning rate of 1e300 at step 6: its loss and its gradient are finite, its weights are not."""
    from segtrain.engine import learner

    usual = learner.learning_rate
    monkeypatch.setattr(learner, "learning_rate", lambda *arguments: 1e300 if arguments[2] == 5 else usual(*arguments))


def left_as_before(answer, step):
    refused(answer, "the weights are NaN or infinite, first in body.", "they are not saved", "optimizer.lr", status=1)
    assert checkpoint.load(Path("r/last.pt"))["step"] == step
    assert json.loads(Path("r/state.json").read_text())["state"] == "failed"
    assert not Path("r/evaluation.json").exists()


@pytest.mark.parametrize("more", [[], ["trainer.ema_decay=0.9"], ["trainer.on_bad_step=skip"]])
def test_a_last_step_that_overflows_ends_the_run_with_an_error(segtrain, words, monkeypatch, more):
    overflow_at_the_last_step(monkeypatch)
    left_as_before(segtrain("train", *words, "run=r", "trainer.save_every=2", *more), 4)


def test_averaged_weights_are_checked_too(segtrain, words, monkeypatch):
    from segtrain.engine import learner

    step = learner.Learner.step

    def poisoned(self, *arguments):
        result = step(self, *arguments)
        if result.step == 5:
            self.average.module.cls.bias.data[0] = math.inf
        return result

    monkeypatch.setattr(learner.Learner, "step", poisoned)
    answer = segtrain("train", *words, "run=r", "trainer.ema_decay=0.9", "trainer.save_every=2")
    refused(answer, "first in cls.bias (1 of 2 values); they are not saved", status=1)
    assert checkpoint.load(Path("r/last.pt"))["step"] == 4


OVERFLOW = """
from segtrain.engine.optim import SCHEDULES
SCHEDULES["overflow"] = lambda config, progress: 1e300 if progress > 0.8 else 1.0
"""


def test_all_processes_end_together(words, tmp_path):
    (tmp_path / "overflow.py").write_text(OVERFLOW)
    words = [word.replace("plugins=[", f"plugins=[{tmp_path / 'overflow.py'},") for word in words]
    processes = Ranks(2, "train", *words, "schedule=overflow", "trainer.save_every=2", "run=r")
    _, err = processes.ended(1)
    assert err.count("the weights are NaN or infinite") == 1
    assert checkpoint.load(Path("r/last.pt"))["step"] == 4


@pytest.fixture
def poisoned(segtrain, words):
    """A run whose last checkpoint holds a NaN and an infinity, as earlier versions wrote them."""
    assert segtrain("train", *words, "run=r", "trainer.max_steps=2").status == 0
    path = Path("r/last.pt")
    content = checkpoint.load(path)
    content["model"][BODY][:2] = torch.tensor([math.nan, -math.inf])
    checkpoint.save(path, content)
    return path


def test_no_command_uses_them(segtrain, words, poisoned):
    Image.fromarray(np.zeros((32, 64, 3), np.uint8)).save("a.png")
    test = Path("kitti/testing/image_2")
    test.mkdir(parents=True)
    Image.fromarray(np.zeros((32, 64, 3), np.uint8)).save(test / "000000_10.png")
    plugins = next(word for word in words if word.startswith("plugins="))
    data = [word for word in words if word.startswith("dataset")]
    for command in (
        ["evaluate", poisoned, *data],
        ["predict", f"checkpoint={poisoned}", "input=a.png"],
        ["submit", f"checkpoint={poisoned}", "dataset=kitti", "dataset.root=kitti"],
    ):
        answer = segtrain(*command, "device=cpu", plugins)
        message = f"r/last.pt cannot be used: it holds NaN or infinite weights, first in {BODY} (2 of 8 values)"
        refused(answer, message, status=1)
        assert not answer.out.strip().endswith((".json", ".png", ".zip"))
    refused(segtrain("train", *words, "run=r"), BODY, "cannot be used", status=1)  # a longer run would go on from them


def test_only_the_weights_that_are_used_count(segtrain, words):
    """checkpoint_weights= chooses; the others may be anything."""
    options = [*words, "run=r", "trainer.max_steps=2", "trainer.ema_decay=0.9"]
    assert segtrain("train", *options).status == 0
    content = checkpoint.load(Path("r/last.pt"))
    content["model"][BODY][0] = math.nan
    checkpoint.save(Path("r/last.pt"), content)
    words = [word for word in words if word.startswith(("dataset", "plugins"))]
    assert segtrain("evaluate", "r/last.pt", *words, "device=cpu").status == 0
    refused(segtrain("evaluate", "r/last.pt", *words, "device=cpu", "checkpoint_weights=raw"), BODY, status=1)


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_files_of_weights(tmp_path, name):
    ours = network(**PLAIN)
    before, tensors = ours.state_dict()["cls.weight"].clone(), {k: t.clone() for k, t in ours.state_dict().items()}
    tensors["head.red_bn.running_var"][3] = math.inf
    write_weights(tmp_path / name, tensors, {})
    with pytest.raises(DataError, match=rf"{name} cannot be used: .* first in head\.red_bn\.running_var \(1 of 8"):
        load_weights(tmp_path / name, ours)
    assert torch.equal(ours.state_dict()["cls.weight"], before)  # nothing was copied


def test_the_first_in_order_is_named():
    steps, a, b, c = torch.tensor(3), torch.ones(2), torch.tensor([1.0, math.inf]), torch.full((2,), math.nan)
    tensors = {"steps": steps, "a": a, "b": b, "c": c}
    assert first_not_finite(tensors) == "b (1 of 2 values)"
    assert first_not_finite({"steps": torch.tensor(3), "a": torch.ones(2, dtype=torch.bfloat16)}) is None
    assert first_not_finite({}) is None
