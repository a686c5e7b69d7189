"""Flight recorder: the last 500 steps of a run, in kilobytes on disk."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segtrain.data.loader import Batch
from segtrain.engine.step_result import StepResult
from segtrain.files import append, side_file, write_atomically

MIN_STEPS = 500  # that a file keeps; it is cut to them when it has twice as many
FILES = "blackbox/rank*.jsonl"


class BlackBox:
    """<run>/blackbox/rank<r>.jsonl of one process: a line a step, the last MIN_STEPS to 2 x MIN_STEPS of them.

    A line: step (counted from 1), loss of the whole batch, norm of the gradient, lr, skipped (or the error that ended
    the step), and for each image of this process its position in the run's endless sequence of samples, name, window
    [top, left, height, width, mirrored?] and part of the loss. `segtrain replay` rebuilds the batch from the position
    and the run's seed.
    """

    def __init__(self, folder: Path, rank: int, size: int, start: int) -> None:
        """start: steps of the run so far; later lines belong to steps that were not saved, and are removed. size:
        processes; the first one also cuts the files of processes that no longer exist."""
        if rank == 0:
            for number in (rank_of(path) for path in recorders(folder)):
                if number >= size:
                    BlackBox(folder, number, number + 1, start)
        self.path = folder / "blackbox" / f"rank{rank}.jsonl"
        self.lines = [line for line in read_lines(self.path) if json.loads(line)["step"] <= start]
        self.rewrite()

    def rewrite(self) -> None:
        self.lines = self.lines[-MIN_STEPS:]
        self.is_behind = True
        with side_file(self.path):
            write_atomically(self.path, "".join(f"{line}\n" for line in self.lines).encode())
            self.is_behind = False

    def add(self, result: StepResult) -> None:
        """Record the result of a step; its total is known."""
        values = {"loss": result.total, "gradient_norm": result.norm, "lr": result.lr, "skipped": result.skipped}
        self.write(result.step, result.batches, values, result.losses)

    def crash(self, step: int, batches: Sequence[Batch], error: str) -> None:
        """Record the error that ended a step."""
        self.write(step, batches, {"error": error}, [None] * sum(len(batch.names) for batch in batches))

    def write(
        self, step: int, batches: Sequence[Batch], values: dict[str, Any], losses: Sequence[float | None]
    ) -> None:
        rows = [row for part in batches for row in zip(part.positions, part.names, part.windows, strict=True)]
        samples = [
            {"position": position, "name": name, "window": window, "loss": value}
            for (position, name, window), value in zip(rows, losses, strict=True)
        ]
        line = json.dumps({"step": step + 1, **values, "samples": samples})
        self.lines.append(line)
        if self.is_behind or len(self.lines) >= 2 * MIN_STEPS:
            self.rewrite()
            return
        self.is_behind = True  # unless the next line succeeds
        with side_file(self.path):
            append(self.path, f"{line}\n".encode())
            self.is_behind = False


def recorders(folder: Path) -> list[Path]:
    """The files of all processes of a run; others in that folder are no concern of ours."""
    return sorted(path for path in folder.glob(FILES) if path.stem.removeprefix("rank").isdigit())


def rank_of(path: Path) -> int:
    return int(path.stem.removeprefix("rank"))


def read_lines(path: Path) -> list[str]:
    """The lines that are records of steps; a last one that was cut short, or damage, is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_bytes().decode(errors="replace").splitlines():
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(content, dict) and isinstance(content.get("step"), int):
            lines.append(line)
    return lines


def recorded(folder: Path, step: int) -> list[tuple[int, dict[str, Any]]]:
    """(rank, line) of a step from every process that has recorded it."""
    lines = []
    for path in recorders(folder):
        rank = rank_of(path)
        for line in read_lines(path):
            content = json.loads(line)
            if content["step"] == step:
                lines.append((rank, content))
    return lines
