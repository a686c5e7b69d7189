"""What a run says: lines on the screen, metrics.jsonl, TensorBoard."""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from segtrain.files import write_atomically


def say(text: str) -> None:
    """A line for the person at the screen, at once; of several processes the first one speaks."""
    if os.environ.get("RANK", "0") == "0" or process_count() == 1:
        print(text, flush=True)


def duration(seconds: float) -> str:
    """'41 s', '3:07 min' or '2:05 h'."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d} h"


class Progress:
    """'what: 12 of 60, 8 s left', on one line of a terminal, every ten seconds in a log."""

    def __init__(self, what: str, total: int) -> None:
        self.what = what
        self.total = total
        self.terminal = sys.stderr.isatty()
        self.started = self.told = time.monotonic()

    def show(self, done: int) -> None:
        now = time.monotonic()
        if now - self.told < (0.2 if self.terminal else 10) and not (self.terminal and done == self.total):
            return
        self.told = now
        left = duration((now - self.started) * (self.total - done) / done)
        line = f"{self.what}: {done} of {self.total}, {left} left"
        if self.terminal:
            sys.stderr.write(f"\r\x1b[K{line if done < self.total else ''}")
            sys.stderr.flush()
        else:
            say(line)


class RunLog:
    """metrics.jsonl and TensorBoard events of one run.

    Opened at `step`, it forgets what an interrupted run wrote beyond that step, so that a resumed run's record is
    that of an uninterrupted one.
    """

    def __init__(self, folder: Path, step: int, config: object = None, hyperparameters: object = None) -> None:
        # Imported here: it takes longer than everything else in this file.
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if line_step(line) <= step]
        write_atomically(self.path, "".join(f"{line}\n" for line in kept).encode())
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def scalars(self, step: int, values: dict[str, float | None]) -> None:
        """One line of metrics.jsonl and one point per value in TensorBoard; None is left out of the latter."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if value is not None:
                self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """RGB uint8 (H, W, 3)."""
        self.writer.add_image(name, picture, step, dataformats="HWC")

    def close(self, final: object = None) -> None:
        self.writer.close()


def line_step(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite for a line that was cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def memory() -> str:
    """Peak memory of this process so far: of the card where one is in use, else resident."""
    import torch

    if torch.cuda.is_initialized():
        return f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB card"
    try:
        import resource
    except ImportError:  # Windows
        return ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"{peak / 1e9:.1f} GB"


def process_count() -> int:
    """Processes that a launcher such as torchrun has started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))
