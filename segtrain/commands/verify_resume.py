"""`segtrain verify-resume`: prove for a configuration that a killed and resumed run equals an uninterrupted one."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from segtrain.config import VerifyConfig
from segtrain.console import process_count, say
from segtrain.engine.blackbox import read_lines
from segtrain.engine.progress_line import CLOCK
from segtrain.engine.start import task_of
from segtrain.errors import DataError, SegtrainError, UsageError
from segtrain.weights import checkpoint

# Makes a program end with its parent, whose number is put in.
FOLLOWING = """
import os
from segtrain.threads import end_unless
end_unless(lambda: os.getppid() == {})
"""
# A training that is killed before its n-th file operation of a kind in its folder (0: never): arguments FOLDER, KIND,
# N, words.
KILLED = """
import sys
from segtrain.commands.verify_resume import kill_at
from segtrain.cli import main
kill_at(sys.argv[1], sys.argv[2], int(sys.argv[3]))
main(sys.argv[4:])
"""
TRIES = 3  # trainings, until one is killed where it should be: a busy machine is slow to kill
EXPECTED = ("model", "ema", "ema_updates", "optimizer", "scaler", "recent", "best", "validated", "step")


class NotProven(SegtrainError):
    """The two runs differ, or the run was killed at a step that proves nothing."""


def verify_resume(config: VerifyConfig) -> None:
    """Train, kill in the middle of an epoch between two saves, resume, kill between two files of a save, resume, and
    compare with an uninterrupted run: checkpoint and metrics.jsonl.

    Prints what differs, and a verdict as the last line. NotProven (exit status 1) unless all is equal, bit for bit.
    """
    output = Path(config.output or "segtrain-out/verify-resume")
    if any(output.glob("*/last.pt")):
        raise UsageError(f"output={output} holds runs already: give another folder")
    if process_count() > 1:
        raise UsageError("verify-resume starts its own runs, each in one process: start it without torchrun")
    samples = config.trainer.overfit or task_of(config)(config).num_train
    batch = config.trainer.images
    every, steps = schedule(batch, samples)
    say(f"plan       {steps} steps of {batch} of {samples} images, saved every {every}, killed between two saves")
    words = [*config.overrides, "trainer.epochs=null", "trainer.hours=null", f"trainer.max_steps={steps}"]
    words += [f"trainer.save_every={every}", f"trainer.validate_every={steps}", "logging.every=1", "restart=false"]
    say("training   without interruption")
    wait_for(start_training(words, output / "whole"), "the uninterrupted run")
    say("training   until it is killed")
    reached, saved = train_until_killed(words, output / "cut", every, steps, batch, samples)
    say("training   again, from there, until it is killed between last.pt and its links")
    wait_for(start_training(words, output / "cut", kill_at_link=True), "the resumed run", -signal.SIGKILL)
    say("training   again, to the end")
    wait_for(start_training(words, output / "cut"), "the resumed run")
    uninterrupted, resumed = (checkpoint.load(output / name / "last.pt") for name in ("whole", "cut"))
    differing = [key for key in EXPECTED if digest(uninterrupted.get(key)) != digest(resumed.get(key))]
    for key in EXPECTED:
        if key in uninterrupted:
            differs = "  DIFFERS" if key in differing else ""
            say(f"{key:<10} {digest(uninterrupted[key])[:16]} {digest(resumed.get(key))[:16]}{differs}")
    logs = [metrics(output / name) for name in ("whole", "cut")]
    say(f"{'metrics':<10} {digest(logs[0])[:16]} {digest(logs[1])[:16]}{'  DIFFERS' if logs[0] != logs[1] else ''}")
    differing += ["metrics.jsonl"] if logs[0] != logs[1] else []
    if differing:
        raise NotProven(f"NOT EXACT: {', '.join(differing)} of the resumed run differ from the uninterrupted one")
    say(
        f"EXACT: {steps} steps, killed after {reached}, resumed from {saved}, killed in a save and resumed, equal the "
        "uninterrupted run bit for bit"
    )


def train_until_killed(
    words: list[str], folder: Path, every: int, steps: int, batch: int, samples: int
) -> tuple[int, int]:
    """Train in the folder until it is killed in an epoch and between two saves: (step reached, step saved)."""
    for left in reversed(range(TRIES)):
        reached = kill_between(every, steps, lambda step: step * batch % samples != 0, words, folder)
        state = checkpoint.newest(folder)
        saved = 0 if state is None else int(state["step"])
        say(f"killed     after step {reached}, the newest checkpoint is of step {saved}")
        inside = reached % every and saved * batch % samples and reached * batch % samples
        if 0 < saved < reached < steps and inside:
            return reached, saved
        if left:
            say("training   once more from the start: that was not in an epoch and between two saves")
            shutil.rmtree(folder)
    raise NotProven(f"nothing proven: in {TRIES} trainings no kill came in an epoch and between two saves")


def schedule(batch_size: int, samples: int) -> tuple[int, int]:
    """(save_every, steps), such that the first save, and the second where possible, is inside an epoch."""
    for saves in ((1, 2), (1,)):
        for every in range(4, 50):
            if all(save * every * batch_size % samples for save in saves):
                return every, 3 * every
    raise UsageError(
        f"trainer.batch_size={batch_size} is a multiple of the {samples} images, so that every step ends an epoch: "
        "choose another batch size"
    )


def start_training(words: list[str], run: Path, kill_at_link: bool = False) -> subprocess.Popen[str]:
    program = ["-c", FOLLOWING.format(os.getpid()) + KILLED, str(run), "os.link", "1" if kill_at_link else "0"]
    command = [sys.executable, *program, "train", *words, f"run={run}"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for(process: subprocess.Popen[str], what: str, status: int = 0) -> None:
    """Wait for a training to end; DataError with its last lines if it has another exit status."""
    try:
        lines = list(process.stdout or [])
        process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode != status:
        raise DataError(f"{what} ended with exit status {process.returncode}:\n{''.join(lines[-15:])}")


def kill_between(every: int, steps: int, inside: Callable[[int], bool], words: list[str], run: Path) -> int:
    """Train until the first step inside an epoch and between two saves after a checkpoint is on disk, then kill.

    inside: whether a step is inside an epoch. Returns the last step that the run recorded.
    """
    process = start_training(words, run)
    lines = []
    try:
        for line in process.stdout or []:
            lines.append(line)
            step = re.match(r"step (\d+)/", line)
            number = int(step[1]) if step else 0
            if number % every and inside(number) and number < steps - 1 and any(run.glob("step_*.pt")):
                break
        else:
            raise DataError(
                f"the run ended before it could be killed between two saves. Its last lines:\n{''.join(lines[-15:])}"
            )
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    recorded = read_lines(run / "blackbox" / "rank0.jsonl")
    return int(json.loads(recorded[-1])["step"]) if recorded else 0


def kill_at(folder: str, kind: str, number: int) -> None:
    """Kill this process before its `number`-th operation that changes a file in the folder.

    kind: name of the operation as Python's audit events call it; "": any.
    """
    left = number

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in CHANGES and kind in ("", event) and changes(folder, event, arguments):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


CHANGES = ("open", "os.rename", "os.link", "os.remove", "os.truncate", "os.mkdir", "shutil.copyfile")


def changes(folder: str, event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether an operation changes something in the folder. The audit event comes before the operation."""
    if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
        return False
    target = arguments[1] if event in ("os.rename", "os.link", "shutil.copyfile") else arguments[0]
    return isinstance(target, str) and Path(folder).absolute() in Path(target).absolute().parents


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


def digest(value: Any) -> str:
    """SHA-256 of an entry of a checkpoint: names, shapes, dtypes and bits."""
    sha256 = hashlib.sha256()
    feed(sha256, value)
    return sha256.hexdigest()


def feed(sha256: Any, value: Any) -> None:
    import torch

    if isinstance(value, dict):
        for key in sorted(value, key=str):
            sha256.update(f"{key}:".encode())
            feed(sha256, value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            feed(sha256, item)
    elif isinstance(value, torch.Tensor):
        sha256.update(f"{value.dtype}{tuple(value.shape)}".encode())
        sha256.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    else:
        sha256.update(repr(value).encode())
