"""Runs that are killed at any of their file operations and go on equal runs that were not: every file of the folder."""

import json
import random
import re
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from segtrain.commands.verify_resume import KILLED, metrics
from segtrain.engine.checkpoint_writer import CheckpointWriter
from segtrain.engine.progress_line import CLOCK
from tests.helpers import zygote
from tests.helpers.checkout import TINY
from tests.helpers.runs import ONE_THREAD, same, small_run, state

LIVE = ("config", "elapsed", "environment")  # of a checkpoint: what sessions do not share


def run(folder, words, kill=0):
    """A training in the folder, killed at that file operation; the status, and all that was printed."""
    folder.mkdir(exist_ok=True)
    process = zygote.start(["-c", KILLED, "r", "", kill, "train", *words, "run=r"], ONE_THREAD, folder)
    out, err = process.communicate(timeout=120)
    return process.returncode, out + err


def points(run):
    """What TensorBoard shows: scalars, and the steps of pictures."""
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    names = [name for name in events.Tags()["scalars"] if name not in CLOCK]
    scalars = {name: [(point.step, point.value) for point in events.Scalars(name)] for name in names}
    return scalars, {name: [image.step for image in events.Images(name)] for name in events.Tags()["images"]}


def content(run):
    """All that a run leaves, without times."""
    found = {path.relative_to(run).as_posix(): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    weights = {name: state(run / name) for name in found if name.endswith(".pt")}
    weights = {name: {k: v for k, v in content.items() if k not in LIVE} for name, content in weights.items()}
    files = {name: data for name, data in found.items() if not name.endswith(".pt") and "tfevents" not in name}
    status = json.loads(files.pop("state.json"))
    files["state.json"] = {key: value for key, value in status.items() if key != "heartbeat"}
    files["metrics.jsonl"] = metrics(run)
    files["summary.txt"] = re.sub(rb"steps in .*, seed", b"steps, seed", files["summary.txt"])
    files["environment.json"] = None
    return files, weights, points(run)


def require_equal(run, whole):
    (files, weights, shown), expected = content(run), content(whole)
    assert files.keys() == expected[0].keys() and weights.keys() == expected[1].keys()
    assert [name for name, data in files.items() if data != expected[0][name]] == []
    assert [name for name in weights if not same(weights[name], expected[1][name])] == []
    assert shown == expected[2]


@pytest.fixture
def options(words):
    return [*words, "trainer.validate_every=3", "trainer.save_every=2", "logging.every=4", "trainer.keep_last=1"]


def killed_and_resumed(tmp_path, options, numbers):
    killed = 0
    for number in numbers:
        folder = tmp_path / f"killed-{number}"
        status, text = run(folder, options, number)
        assert status in (-9, 0), text  # state.json is written every ten seconds too: the last number may not come
        killed += status == -9
        status, text = run(folder, options)
        assert status == 0, f"killed at operation {number}: {text}"
        try:
            require_equal(folder / "r", tmp_path / "whole/r")
        except AssertionError as error:
            raise AssertionError(f"killed at operation {number}: {error}") from error
    assert killed >= 0.9 * len(numbers)


COUNTED = """
import sys
from segtrain.commands import verify_resume
from segtrain.cli import main
count, changes = [], verify_resume.changes
def counted(*arguments):
    if changes(*arguments):
        count.append(arguments)
verify_resume.changes = counted
verify_resume.kill_at("r", "", 0)
main(sys.argv[1:])
open("count", "w").write(str(len(count)))
"""


def operations(tmp_path, options):
    """How many file operations a run has, which is then in whole/r."""
    (tmp_path / "whole").mkdir()
    process = zygote.start(["-c", COUNTED, "train", *options, "run=r"], ONE_THREAD, tmp_path / "whole")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    return int(Path(tmp_path, "whole/count").read_text())


def test_a_run_that_was_killed_at_a_file_operation_equals_one_that_was_not(tmp_path, options):
    """At one of them; all others below."""
    total = operations(tmp_path, options)
    assert total > 60
    killed_and_resumed(tmp_path, options, random.Random(total).sample(range(8, total - 8), 1))


@pytest.mark.slow
def test_at_any_of_a_hundred_and_thirteen_file_operations(tmp_path, options):
    total = operations(tmp_path, options)
    numbers = range(1, total + 1) if total <= 113 else sorted(random.Random(0).sample(range(1, total + 1), 113))
    killed_and_resumed(tmp_path, options, numbers)


def test_scores_are_written_after_the_checkpoint_that_they_belong_to(segtrain, scenes, monkeypatch):
    """A run with evaluation.json is finished: killed in between, it would never draw the pictures of its end."""
    write, there = CheckpointWriter.write, []

    def slow(self, content, best):
        time.sleep(0.5)
        there.append((self.folder / "evaluation.json").exists())
        write(self, content, best)

    monkeypatch.setattr(CheckpointWriter, "write", slow)
    answer = segtrain("train", *small_run(scenes), f"plugins=[{TINY}]", "model.backbone=tiny", "run=r")
    assert answer.status == 0, answer.err
    assert Path("r/evaluation.json").exists() and len(there) >= 2 and not any(there)
