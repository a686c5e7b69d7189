"""A warm-up is shorter than its training, and a score on training images says so."""

import json
from pathlib import Path

import pytest

import segtrain
from segtrain.errors import UsageError
from tests.helpers.runs import refused


def test_a_recipes_warm_up_is_shortened_to_typed_steps(tmp_path, capsys):
    recipe = tmp_path / "experiment" / "slow_start.yaml"
    recipe.parent.mkdir()
    recipe.write_text(
        "# @package _global_\nschedule: {warmup_steps: 500, warmup_factor: 0.2}\n"
        "trainer: {epochs: null, max_steps: 900}\n"
    )

    def schedule(*words):
        return segtrain.compose("experiment=slow_start", *words, config_dir=str(tmp_path)).schedule

    whole = schedule()
    assert whole.warmup_steps == 500
    assert schedule("trainer.max_steps=501") == whole
    assert schedule("trainer.max_steps=10", "schedule.warmup_steps=500") == whole  # which the start refuses
    assert schedule("trainer.epochs=1") == whole
    assert capsys.readouterr().err == ""
    short = schedule("trainer.max_steps=10")
    assert (short.warmup_steps, short.warmup_factor) == (5, 0.2)
    told = "segtrain: schedule.warmup_steps=500 becomes 5: trainer.max_steps=10 is no longer\n"
    assert capsys.readouterr().err == told
    none = schedule("trainer.max_steps=1")
    assert (none.warmup_steps, none.warmup_factor) == (0, 0.1)


def test_a_warm_up_that_ends_with_the_training_is_refused(words, segtrain):
    for length in (
        ["schedule.warmup_steps=6"],
        ["trainer.max_steps=null", "trainer.epochs=1", "schedule.warmup_steps=1"],
    ):
        answer = segtrain("train", *words, "run=r", *length)
        refused(answer, "schedule.warmup_steps", "the training has", "steps: give fewer, or 0")
        assert not Path("r").exists()


def test_validation_on_training_images_is_told_and_marked(words, segtrain):
    answer = segtrain("train", *words, "run=r", "trainer.max_steps=1", "dataset.val_split=train")
    assert answer.status == 0, answer
    assert (
        "WARNING    4 of these 4 validation images are trained on: their score says nothing about other" in answer.out
    )
    marked = ["4 of the 4 images were in this checkpoint's training: the score is too high"]
    assert json.loads(Path("r/evaluation.json").read_text())["protocol"]["warnings"] == marked
    plugins = next(word for word in words if word.startswith("plugins="))
    again = segtrain("evaluate", "run=r", plugins, "device=cpu", "loader.workers=0", "output=e")
    assert again.status == 0, again
    assert json.loads(Path("e/evaluation.json").read_text())["protocol"]["warnings"] == marked
    other = segtrain("train", *words, "run=o", "trainer.max_steps=1")
    assert "trained on: their score" not in other.out
    assert json.loads(Path("o/evaluation.json").read_text())["protocol"]["warnings"] == []


def test_a_taxonomy_needs_weights():
    with pytest.raises(UsageError, match="nothing to map"):
        segtrain.compose("experiment=toy", "model.weights_taxonomy=vistas_to_cityscapes")
