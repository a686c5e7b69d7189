"""Trainings with loader processes end, and leave none behind, whatever ends them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import zygote
from tests.helpers.checkout import TINY, environment
from tests.helpers.runs import launch, state, until

SECONDS = 60  # within which all ends, on a loaded machine


def children(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pids):
    """Whether the processes end within a few seconds; a zombie has ended."""
    until = time.monotonic() + 5
    while time.monotonic() < until:
        states = [path.read_text().rpartition(")")[2].split()[0] for pid in pids if (path := stat(pid)).exists()]
        if all(state == "Z" for state in states):
            return True
        time.sleep(0.1)
    return False


def stat(pid):
    return Path(f"/proc/{pid}/stat")


def plugin(text):
    Path("broken.py").write_text(text)
    return f"plugins=[{TINY},./broken.py]"


SLOW_VALIDATION = """
import time
from segtrain.data import loader
loader.EvaluationData.__getitem__ = lambda self, number: time.sleep(600)
"""
SLOW_PLAN = """
import time
from segtrain.engine.planning import solve
solve.answers_of = lambda questions: time.sleep(600)
"""
BAD_SAMPLE = """
from segtrain.data import loader
get = loader.TrainingData.__getitem__
loader.TrainingData.__getitem__ = lambda self, number: get(self, number) if number < 20 else 1 // 0
"""


def in_validation(process):
    """The loader processes, once those of a validation that never ends are there too."""
    while len(found := children(process.pid)) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    return found


@pytest.fixture
def long(words):
    return [*words, "run=r", "loader.workers=1", "trainer.max_steps=100000"]


def test_a_plugins_mistake_in_a_loader_process_ends_the_program(words):
    """Not forked as the other tests' are, because a hang comes at the end of the interpreter."""
    options = [*words, "run=r", "trainer.max_steps=100000", "loader.workers=2", plugin(BAD_SAMPLE)]
    command = [sys.executable, "-m", "segtrain", "train", *options]
    answer = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=2 * SECONDS)
    assert answer.returncode == 1
    assert answer.stderr.rstrip().endswith("ZeroDivisionError: integer division or modulo by zero")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_loader_process_that_is_killed_or_stopped_does_not_hold_the_run(long, number):
    """Stopped, as a batch that does not come in time; the time is shortened for the test."""
    short = plugin("from segtrain.data import workers\nworkers.PATIENCE, workers.REMINDER = 3, 1\n")
    process = launch(*long, short, "trainer.save_every=1")
    until(process, "step 3/")
    (worker,) = children(process.pid)
    os.kill(worker, number)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 1, out + err
    assert "Traceback" not in err
    told = "was killed (SIGKILL)" if number == signal.SIGKILL else f"loader process {worker} is stopped"
    assert told in err and "loader.workers=0" in err
    assert gone([worker]) and state("r/last.pt")["step"] >= 2


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_run_that_ends_in_its_validation_leaves_no_process(long, number, status):
    process = launch(*long, plugin(SLOW_VALIDATION), "trainer.validate_every=3")
    workers = in_validation(process)
    process.send_signal(number)
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == status, err
    assert gone(workers)
    if number != signal.SIGKILL:
        assert "the same command goes on" in err and state("r/last.pt")["step"] == 3


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGKILL, -9), (signal.SIGTERM, 143), pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow)],
)
def test_an_evaluation_that_is_ended_leaves_no_process(segtrain, words, number, status):
    assert segtrain("train", *words, "run=r", "trainer.max_steps=1").status == 0
    data = [word for word in words if word.startswith("dataset")]
    options = ["run=r", *data, plugin(SLOW_VALIDATION), "position_prior=false", "loader.workers=2", "device=cpu"]
    process = zygote.start(["evaluate", *options], {})
    workers = in_validation(process)
    process.send_signal(number)
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == status, err
    assert gone(workers)
    if number != signal.SIGKILL:
        assert err.endswith(f"segtrain: ended by {number.name}; nothing was saved since the last checkpoint\n")


@pytest.mark.slow
def test_a_hang_up_saves_the_run_unless_it_is_ignored(long):
    process = launch(*long)
    until(process, "step 2/")
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 75, err
    ignoring = "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); from segtrain.cli import main; "
    options = [*(word for word in long if word != "run=r"), "run=other", "trainer.max_steps=200"]
    process = zygote.start(["-c", ignoring + "main(sys.argv[1:])", "train", *options], {})
    until(process, "step 1")
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, out + err


@pytest.mark.parametrize("moment", range(6))
def test_a_signal_while_processes_start_that_draw(moment):
    """At several moments of their start, when some of them are half started."""
    process = zygote.start(["streets", "output=drawn", "scenes=5000", "workers=2"], {})
    while len(workers := children(process.pid)) < 1 + moment % 3:
        assert process.poll() is None, process.communicate()
    time.sleep(moment // 3 * 0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 143, err
    assert err == "segtrain: ended by SIGTERM; nothing was saved since the last checkpoint\n"
    assert gone(workers)


def test_a_plan_that_is_ended_does_not_wait_for_its_processes():
    process = zygote.start(["plan", "experiment=toy", "output=plan", plugin(SLOW_PLAN)], {})
    workers = in_validation(process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 143, err
    assert err.endswith("segtrain: ended by SIGTERM; nothing was saved since the last checkpoint\n")
    assert "Traceback" not in err
    assert gone(workers)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_drawing_scenes_leaves_no_process(number):
    process = zygote.start(["streets", "output=drawn", "scenes=5000", "workers=2"], {})
    workers = in_validation(process)
    process.send_signal(number)
    process.communicate(timeout=SECONDS)
    assert process.returncode == (-9 if number == signal.SIGKILL else 143)
    assert gone(workers)
