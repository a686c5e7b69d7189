"""`segtrain verify-resume`: proof, for one's own configuration, that a killed run goes on as if nothing had been."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from segtrain import checkpoint
from segtrain.blackbox import read_lines
from segtrain.config import VerifyConfig
from segtrain.data.datasets import training_mixture
from segtrain.errors import DataError, SegtrainError, UsageError
from segtrain.log import say

EXPECTED = ("model", "ema", "ema_updates", "optimizer", "scaler", "recent", "best", "validated", "step")


class NotProven(SegtrainError):
    """The two runs differ, or the kill did not come where it proves something."""


def verify_resume(config: VerifyConfig) -> None:
    """Train, kill in the middle of an epoch between two saves, resume, and compare with a run that was left alone.

    Prints what differs, and a verdict as the last line. NotProven (exit status 1) unless all is equal, bit for bit.
    """
    output = Path(config.output or "segtrain-out/verify-resume")
    if any(output.glob("*/last.pt")):
        raise UsageError(f"output={output} holds runs already: give another folder")
    samples = len(training_mixture(config.dataset).samples)
    every, killed, steps = schedule(config.trainer.batch_size, samples)
    say(f"plan       {steps} steps, saved every {every}, killed after step {killed}: "
        f"{killed * config.trainer.batch_size} of {samples} pictures an epoch")  # fmt: skip
    words = [*config.overrides, "trainer.epochs=null", "trainer.hours=null", f"trainer.max_steps={steps}"]
    words += [f"trainer.save_every={every}", f"trainer.validate_every={steps}", "logging.every=1", "restart=false"]
    say("training   without interruption")
    finish(train(words, output / "whole"), "the uninterrupted run")
    say("training   until it is killed")
    reached = kill_after(killed, words, output / "cut")
    state = checkpoint.newest(output / "cut")
    saved = 0 if state is None else int(state["step"])
    say(f"killed     after step {reached}, the newest checkpoint is of step {saved}")
    between = 0 < saved < reached < steps and (saved * config.trainer.batch_size) % samples
    if not between or (reached * config.trainer.batch_size) % samples == 0:
        raise NotProven(f"nothing proven: the kill came at step {reached}, not in an epoch and between two saves")
    say("training   again, from there")
    finish(train(words, output / "cut"), "the resumed run")
    whole, cut = (checkpoint.load(output / name / "last.pt") for name in ("whole", "cut"))
    differing = [key for key in EXPECTED if digest(whole.get(key)) != digest(cut.get(key))]
    for key in EXPECTED:
        if key in whole:
            differs = "  DIFFERS" if key in differing else ""
            say(f"{key:<10} {digest(whole[key])[:16]} {digest(cut.get(key))[:16]}{differs}")
    if differing:
        raise NotProven(f"NOT EXACT: {', '.join(differing)} of the resumed run differ from the uninterrupted one")
    print(
        f"EXACT: {steps} steps, killed after {reached}, resumed from {saved}, equal the uninterrupted run bit for bit"
    )


def schedule(batch_size: int, samples: int) -> tuple[int, int, int]:
    """(save_every, step after which to kill, steps): save and kill inside an epoch, the kill between two saves."""
    for every in range(3, 50):
        for killed in range(every + 1, 2 * every):
            if every * batch_size % samples and killed * batch_size % samples:
                return every, killed, 2 * every + 1
    raise UsageError(
        f"trainer.batch_size={batch_size} takes the {samples} pictures in whole epochs, so that no step lies "
        "inside one: choose another batch size"
    )


def train(words: list[str], run: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "segtrain", "train", *words, f"run={run}"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen[str], what: str) -> None:
    lines = list(process.stdout or [])
    if process.wait() != 0:
        raise DataError(f"{what} ended with exit status {process.returncode}:\n{''.join(lines[-15:])}")


def kill_after(step: int, words: list[str], run: Path) -> int:
    """Kills the whole process group when it says that the step is done. Returns the last step that it recorded."""
    process = train(words, run)
    lines = []
    for line in process.stdout or []:
        lines.append(line)
        if line.startswith(f"step {step}/"):
            os.killpg(process.pid, signal.SIGKILL)
            break
    else:
        process.wait()
        raise DataError(f"the run to be killed ended before step {step}:\n{''.join(lines[-15:])}")
    process.wait()
    recorded = read_lines(run / "blackbox" / "rank0.jsonl")
    return int(json.loads(recorded[-1])["step"]) if recorded else 0


def digest(value: Any) -> str:
    """SHA-256 of a checkpoint's part: names, shapes, types and bits."""
    found = hashlib.sha256()
    feed(found, value)
    return found.hexdigest()


def feed(found: Any, value: Any) -> None:
    import torch

    if isinstance(value, dict):
        for key in sorted(value, key=str):
            found.update(f"{key}:".encode())
            feed(found, value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            feed(found, item)
    elif isinstance(value, torch.Tensor):
        found.update(f"{value.dtype}{tuple(value.shape)}".encode())
        found.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    else:
        found.update(repr(value).encode())
