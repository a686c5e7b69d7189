"""What the last steps of a run were, kilobytes on disk: for whoever asks afterwards which picture it was."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segtrain.console import say
from segtrain.data.loader import Batch
from segtrain.engine.learner import StepResult
from segtrain.files import write_atomically

KEPT = 500  # steps
FILES = "blackbox/rank*.jsonl"


class BlackBox:
    """<run>/blackbox/rank<r>.jsonl of one process: a line a step, the last KEPT to 2 x KEPT of them.

    A line: step (counted from 1), loss of the whole batch, the gradient's norm, lr, skipped (or the error that it
    ended in), and of each of this process's pictures its position in the run's endless row, name, window [top, left,
    height, width, mirrored?] and part of the loss. The position and the run's seed give back the rest: `segtrain
    replay`.
    """

    def __init__(self, folder: Path, rank: int, size: int, start: int) -> None:
        """start: steps of the run so far; later lines are of a session that was not saved, and go. size: processes;
        the first one cuts the files of those that are there no more, too."""
        for number in range(size, 1 + max((rank_of(path) for path in folder.glob(FILES)), default=-1)):
            if rank == 0:
                BlackBox(folder, number, number + 1, start)
        self.path = folder / "blackbox" / f"rank{rank}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.told = False
        self.lines = [line for line in read_lines(self.path) if json.loads(line)["step"] <= start]
        self.rewrite()

    def rewrite(self) -> None:
        self.lines = self.lines[-KEPT:]
        write_atomically(self.path, "".join(f"{line}\n" for line in self.lines).encode())

    def add(self, outcome: StepResult, loss: float) -> None:
        """What a step gave."""
        found = {"loss": loss, "gradient_norm": outcome.norm, "lr": outcome.rate, "skipped": outcome.skipped}
        self.write(outcome.step, outcome.batches, found, outcome.losses)

    def crash(self, step: int, batches: Sequence[Batch], error: str) -> None:
        """What a step ended in."""
        self.write(step, batches, {"error": error}, [None] * sum(len(batch.names) for batch in batches))

    def write(self, step: int, batches: Sequence[Batch], found: dict[str, Any], losses: Sequence[float | None]) -> None:
        known = [row for part in batches for row in zip(part.positions, part.names, part.windows, strict=True)]
        samples = [
            {"position": position, "name": name, "window": window, "loss": value}
            for (position, name, window), value in zip(known, losses, strict=True)
        ]
        line = json.dumps({"step": step + 1, **found, "samples": samples})
        self.lines.append(line)
        if len(self.lines) >= 2 * KEPT:
            self.rewrite()
        else:
            try:
                with self.path.open("a") as file:
                    file.write(f"{line}\n")
            except OSError as error:  # a full disk must not end a training
                if not self.told:
                    say(f"WARNING    cannot write {self.path}: {error.strerror}")
                self.told = True


def rank_of(path: Path) -> int:
    return int(path.stem.removeprefix("rank"))


def read_lines(path: Path) -> list[str]:
    """The whole lines; a last one that was cut short is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            json.loads(line)
        except ValueError:
            continue
        found.append(line)
    return found


def recorded(folder: Path, step: int) -> list[tuple[int, dict[str, Any]]]:
    """(rank, line) of that step from every process of the run that has it."""
    found = []
    for path in sorted(folder.glob(FILES)):
        rank = rank_of(path)
        for line in read_lines(path):
            content = json.loads(line)
            if content["step"] == step:
                found.append((rank, content))
    return found
