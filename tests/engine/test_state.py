"""The progress of a training: what is due after a step, what a validation changes, what a checkpoint stores."""

import pytest

from segtrain.config import TrainerConfig
from segtrain.engine.state import TrainState


def test_what_is_due():
    options = TrainerConfig(max_steps=10, epochs=None, validate_every=4, save_every=3)
    state = TrainState(options, 100, "miou")
    found = []
    for step in range(1, 11):
        state.step = step
        found.append((state.save_due, state.validation_due, state.validation_missing, state.finished))
    nothing, saved, both = (False, False), (True, False), (True, True)
    wanted = [nothing, nothing, saved, both, nothing, saved, nothing, both, saved, both]
    assert [due[:2] for due in found] == wanted
    assert all(due[1] == due[2] for due in found)  # nothing was validated
    assert [due[3] for due in found] == [False] * 9 + [True]
    assert state.progress == 1
    assert str(state) == "10 steps"


def test_validations_without_progress_end_a_training():
    state = TrainState(TrainerConfig(max_steps=10, epochs=None, patience=2), 100, "miou")
    for step, score in ((1, 0.5), (2, 0.6), (3, 0.6), (4, 0.1)):
        assert not state.stalled
        state.step = step
        assert state.add_validation(score) == (step <= 2)
    assert state.stalled and state.finished
    assert state.best == {"miou": 0.6, "step": 2, "since": 2}
    state.add_validation(0.1)  # of the same step again, after a restart
    assert state.best["since"] == 2


def test_a_checkpoint_keeps_step_clock_and_best_score():
    options = TrainerConfig(hours=1.0, max_steps=None, epochs=None)
    state = TrainState(
        options, 100, "top1", {"step": 7, "validated": 5, "best": {"top1": 0.3, "step": 5}, "elapsed": 60.0}
    )
    assert state.best["since"] == 0  # which was added later
    assert state.progress == pytest.approx(1 / 60, abs=1e-3)
    saved = state.state_dict()
    assert (saved["step"], saved["validated"], saved["best"]) == (7, 5, {"top1": 0.3, "step": 5, "since": 0})
    assert saved["elapsed"] >= 60
    assert not state.finished
    assert TrainState(options, 100, "top1", saved | {"elapsed": 3600.0}).finished
    assert str(state) == "1 hours in steps"
