"""Trainings with model.recompute=both: what is printed, resumed and refused."""

from pathlib import Path

import pytest

from segtrain.weights import checkpoint
from tests.helpers.checkout import ROOT
from tests.helpers.runs import refused, same, small_run, state


@pytest.fixture
def words(scenes):
    plugin = ROOT / "tests" / "helpers" / "rebuilt.py"
    return [*small_run(scenes), f"plugins=[{plugin}]", "model=chained", "model.recompute=both", "schedule=constant"]


def test_a_resumed_run_equals_the_uninterrupted_one(segtrain, words):
    """It checks a step that the other does not check, and says what it rebuilds."""
    answer = segtrain("train", *words, "run=whole")
    assert answer.status == 0, answer
    assert (
        "rebuilt    the last convolution's input in 3 grouped blocks and the input of 2 identity blocks, walking "
        "backward; checked every 100 passes\n" in answer.out
    )
    assert "rebuilt    maps are " in answer.out
    assert segtrain("train", *words, "run=cut", "trainer.max_steps=2").status == 0
    assert segtrain("train", *words, "run=cut").status == 0
    for key in ("model", "optimizer", "recent", "rebuilding_drift"):
        assert same(state("whole/last.pt")[key], state("cut/last.pt")[key]), key


def test_a_run_that_gave_up_keeps_maps_when_it_is_resumed(segtrain, words):
    assert segtrain("train", *words, "run=r", "trainer.max_steps=2").status == 0
    saved = state("r/last.pt")
    assert saved["rebuilding_drift"] is None
    checkpoint.save(Path("r/last.pt"), saved | {"rebuilding_drift": 0.01})
    answer = segtrain("train", *words, "run=r")
    assert answer.status == 0, answer
    assert "rebuilt    no maps: they were 1.0e-02 from the true ones, and are kept\n" in answer.out
    assert state("r/last.pt")["rebuilding_drift"] == 0.01


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["model.norm=batch_norm"], "it rebuilds what In-Place ABN keeps, not batch_norm"),
        (["model.keep=8bit"], "model.keep=8bit rounds them; choose model.keep=exact"),
        (["model=wider_resnet38"], "no grouped convolution before In-Place ABN"),
        (["trainer.compile=true"], "model.recompute=both must be none"),
    ],
)
def test_what_cannot_be_combined_is_refused(segtrain, words, more, text):
    refused(segtrain("train", *words, "run=r", *more), "model.recompute=both", text)
