"""Runs that are interrupted, continued, moved aside or refused."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from segtrain.config import with_defaults
from segtrain.weights import checkpoint
from tests.helpers import zygote
from tests.helpers.checkout import TINY
from tests.helpers.runs import black_box, ended, launch, refused, same, small_run, state, until

# ------------------------------------------------------------------------------------------------ interrupted


@pytest.fixture(scope="module")
def whole(scenes, tmp_path_factory):
    """The folder of an uninterrupted run; read only."""
    folder = tmp_path_factory.mktemp("whole")
    options = ["trainer.max_steps=6", "trainer.validate_every=3", "loader.workers=1", "run=whole"]
    result = zygote.call(["train", *small_run(scenes, *options)], folder)
    assert result.returncode == 0, result.stderr
    return folder / "whole"


def start(scenes, *more):
    """A training process that runs long enough to be interrupted."""
    return zygote.start(["train", *small_run(scenes, "trainer.max_steps=6", "run=cut", *more)], {})


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGKILL, -9)],
    ids=["INT", "TERM", "KILL"],
)
def test_an_interrupted_run_goes_on_and_equals_the_uninterrupted_one(scenes, whole, number, status):
    words = ["trainer.max_steps=6", "trainer.validate_every=3", "loader.workers=1"]
    process = start(scenes, *words[1:])
    for line in process.stdout:
        if line.startswith("step 3/"):
            while not Path("cut/step_0000002.pt").exists():  # it is written beside the training
                time.sleep(0.02)
            os.killpg(process.pid, number)  # as a terminal does it, loader processes included
            break
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, out + err
    assert "Traceback" not in err
    cut = state("cut/last.pt")
    assert 2 <= cut["step"] < 6
    if number != signal.SIGKILL:
        assert "the same command goes on" in err
    answer = zygote.call(["train", *small_run(scenes, *words, "run=cut")])
    assert answer.returncode == 0, answer
    assert f"going on at step {cut['step']}" in answer.stdout
    first, second = state(whole / "last.pt"), state("cut/last.pt")
    for key in ("model", "optimizer", "step", "best"):
        assert same(first[key], second[key]), key
    results = [json.loads(Path(f, "evaluation.json").read_text()) for f in (whole, "cut")]
    assert results[0]["per_class"] == results[1]["per_class"]
    steps = [json.loads(line)["step"] for line in Path("cut/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 3, 4, 5, 6, 6]


def test_dropout_resumes_exactly(scenes, segtrain):
    """Dropout draws from torch's generator, whose seed is a function of the step."""
    words = [f"plugins=[{TINY}]", "model.backbone=tiny", "model.backbone_options={dropout:0.5}"]
    one, two = small_run(scenes, *words, "trainer.max_steps=2"), small_run(scenes, *words, "trainer.max_steps=2")
    assert segtrain("train", *one, "run=whole").status == 0
    process = zygote.call(["-c", PROGRAM_STOPPING_AFTER_ONE_STEP, *two, "run=cut"])
    assert process.returncode == 75, process.stderr
    assert segtrain("train", *two, "run=cut").status == 0
    assert same(state("whole/last.pt")["model"], state("cut/last.pt")["model"])


PROGRAM_STOPPING_AFTER_ONE_STEP = """
import os, signal, sys
from segtrain import cli
from segtrain.engine import learner
step = learner.Learner.step
def once(*arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    return step(*arguments)
learner.Learner.step = once
cli.main(["train", *sys.argv[1:]])
"""


@pytest.mark.slow
def test_twenty_kills_at_any_moment_lose_no_more_than_a_save_interval(words):
    """Also while files are written and while the run starts. The rate is constant, because the length is unknown."""
    options = [*words, "run=r", "trainer.max_steps=2000", "trainer.save_every=3", "trainer.validate_every=500"]
    options += ["loader.workers=1", "schedule=constant"]
    rng = random.Random(0)
    reached = killed = 0
    for _ in range(20):
        process = launch(*options)
        if rng.random() < 0.8:  # most of them while it trains
            for line in process.stdout:
                if line.startswith("step "):
                    break
        time.sleep(rng.random() * 1.5)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        done = [line["step"] for line in black_box("r")] if Path("r/blackbox/rank0.jsonl").exists() else [0]
        state_now = checkpoint.newest(Path("r"))
        saved = 0 if state_now is None else state_now["step"]
        assert saved >= reached  # nothing that was saved is lost
        assert max(done, default=0) - saved <= 2 * 3  # one interval, and the save that was under way
        reached = saved
    assert killed == 20
    ended(launch(*[word for word in options if word != "run=r"], "run=whole", f"trainer.max_steps={reached}"))
    for key in ("model", "optimizer", "recent"):
        assert same(checkpoint.newest(Path("r"))[key], state("whole/last.pt")[key]), key


def test_resuming_takes_no_longer_however_far_the_run_is(segtrain, words, monkeypatch):
    """No sample of the million steps before is read again."""
    from segtrain.data import loader

    assert segtrain("train", *words, "run=r", "trainer.max_steps=1").status == 0
    far = 10**6
    checkpoint.save(Path("r/last.pt"), state("r/last.pt") | {"step": far, "validated": far})
    read, get = [], loader.TrainingData.__getitem__
    monkeypatch.setattr(loader.TrainingData, "__getitem__", lambda self, n: (read.append(n), get(self, n))[1])
    answer = segtrain("train", *words, "run=r", f"trainer.max_steps={far + 1}")
    assert answer.status == 0, answer
    assert read == [4 * far + place for place in range(4)]


def test_an_early_end_without_its_evaluation_is_not_trained_on(segtrain, words):
    """Killed between the last save and its evaluation."""
    options = [
        *words,
        "run=r",
        "trainer.max_steps=40",
        "trainer.validate_every=1",
        "trainer.patience=2",
        "optimizer.lr=1e-9",
    ]
    assert segtrain("train", *options).status == 0
    before = state("r/last.pt")
    Path("r/evaluation.json").unlink()
    assert segtrain("train", *options).status == 0
    after = state("r/last.pt")
    for key in ("step", "best", "model", "recent"):
        assert same(before[key], after[key]), key
    assert Path("r/evaluation.json").exists()


def test_an_early_end_is_found_again_by_the_validation_that_was_cut_off(segtrain, words):
    """Killed between a save and the validation that would have ended the training."""
    options = [
        *words,
        "run=r",
        "trainer.max_steps=40",
        "trainer.validate_every=1",
        "trainer.patience=1",
        "optimizer.lr=1e-9",
    ]
    assert segtrain("train", *options).status == 0
    end = state("r/last.pt")
    before = {"validated": end["step"] - 1, "best": end["best"] | {"since": 0}}
    checkpoint.save(Path("r/last.pt"), end | before)
    Path("r/evaluation.json").unlink()
    answer = segtrain("train", *options)
    assert answer.status == 0, answer
    assert "ending early" in answer.out
    assert same(state("r/last.pt")["model"], end["model"])
    assert state("r/last.pt")["step"] == end["step"]


# ------------------------------------------------------------------------------------------------ whose run it is


def test_restart_moves_the_old_run_aside(finished, scenes, segtrain):
    words = small_run(scenes, "trainer.max_steps=1", "run=r")
    segtrain("train", *words)
    old = Path("r/last.pt").read_bytes()
    answer = segtrain("train", *words, "restart=true")
    assert answer.status == 0
    assert "moved the old run to r.old-1" in answer.out
    assert Path("r.old-1/last.pt").read_bytes() == old


def test_more_steps_go_on_and_other_options_are_refused(scenes, segtrain, folder_data):
    root, overrides = folder_data
    assert segtrain("train", *overrides, "run=r").status == 0
    before = Path("r/last.pt").read_bytes()
    changed = segtrain("train", *overrides, "run=r", "optimizer.lr=0.5", "trainer.seed=9")
    refused(
        changed, "optimizer.lr: 0.0025 in the run, 0.5 asked for", "trainer.seed: 0 in the run, 9", "name=", status=1
    )
    assert Path("r/last.pt").read_bytes() == before
    longer = segtrain("train", *overrides, "run=r", "trainer.max_steps=3", "loader.workers=1")
    assert longer.status == 0
    assert "going on at step 2" in longer.out
    refused(segtrain("train", *overrides, "run=r", "trainer.max_steps=2"), "trainer.max_steps", status=1)


def test_defaults_of_todays_options_fill_an_older_configuration():
    full = with_defaults({"dataset": {"name": "kitti"}, "trainer": {"seed": 3}})
    assert full["trainer"]["seed"] == 3
    assert full["trainer"]["on_bad_step"] == "stop"
    assert full["dataset"]["val_list"] == "mseg_150_50"


def test_a_second_process_in_the_same_run_is_refused(segtrain, words):
    first = launch(*words, "run=r", "trainer.max_steps=100000")
    until(first, "step 1/")
    refused(
        segtrain("train", *words, "run=r", "trainer.max_steps=100000"), "another process is training in r", status=1
    )
    first.terminate()
    ended(first, 75)


def test_restart_does_not_move_a_run_away_under_its_process(segtrain, words):
    first = launch(*words, "run=r", "trainer.max_steps=100000")
    until(first, "step 1/")
    refused(segtrain("train", *words, "run=r", "restart=true"), "another process is training in r", status=1)
    assert json.loads(Path("r/state.json").read_text())["state"] == "running"
    assert not Path("r.old-1").exists()
    first.terminate()
    ended(first, 75)


def test_restart_is_of_the_first_start_of_a_job(segtrain, words, monkeypatch):
    assert segtrain("train", *words, "run=r", "trainer.max_steps=2").status == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    answer = segtrain("train", *words, "run=r", "trainer.max_steps=3", "restart=true")
    assert "a requeued one goes on" in answer.out
    assert "going on at step 2" in answer.out


def test_a_run_that_was_trained_on_meanwhile_is_not_overwritten(segtrain, words, monkeypatch):
    """Another process saves and ends after this one has read last.pt and before it claims the folder."""
    from segtrain.engine import run
    from segtrain.tasks.segmentation import Segmentation

    assert segtrain("train", *words, "run=r", "trainer.max_steps=2").status == 0
    check = Segmentation.check
    monkeypatch.setattr(Segmentation, "check", lambda self: (os.utime("r/last.pt"), check(self)))
    refused(segtrain("train", *words, "run=r", "trainer.max_steps=3"), "trained on meanwhile", status=1)
    assert run.modified(Path("r/none.pt")) is None


def test_other_pictures_are_refused_and_a_moved_run_is_not(segtrain, words, folder_data):
    assert segtrain("train", *words, "run=r", "trainer.max_steps=2").status == 0
    shutil.move("r", "elsewhere")
    assert "going on at step 2" in segtrain("train", *words, "run=elsewhere", "trainer.max_steps=3").out
    for path in (folder_data[0] / "train/images/p3.png", folder_data[0] / "train/labels/p3.png"):
        path.unlink()
    refused(segtrain("train", *words, "run=elsewhere", "trainer.max_steps=4"), "trained on 4 images", status=1)
