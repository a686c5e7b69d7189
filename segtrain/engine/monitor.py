"""Watch the steps of a training: check each one, and report it on the screen and on disk."""

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any

import numpy as np

from segtrain.config import TrainConfig, flatten
from segtrain.data.loader import Batch
from segtrain.device import is_out_of_memory
from segtrain.distributed.watchdog import PeerDied
from segtrain.engine.blackbox import BlackBox
from segtrain.engine.learner import Learner
from segtrain.engine.planning.automatic import training_advice
from segtrain.engine.progress_line import ProgressLine
from segtrain.engine.run import Run
from segtrain.engine.sinks import RunLog
from segtrain.engine.state import TrainState
from segtrain.engine.step_result import StepResult
from segtrain.errors import SegtrainError
from segtrain.files import side_file
from segtrain.scoring.figures import write_png


class Monitor:
    """Owns the flight recorder, the check of a step, the progress line and the logs of a run.

    A step is checked late, when its numbers have arrived, so that the GPU never waits: `check` takes the step before
    the last one, whose loss travels with the control collective of the current step; `flush` takes all.
    """

    def __init__(self, run: Run, learner: Learner, state: TrainState) -> None:
        self.run = run
        self.learner = learner
        self.state = state
        self.dist = learner.dist
        self.guard = learner.guard
        self.check_at_once = run.config.trainer.on_bad_step == "skip"
        hyperparameters = varied_first(run.config)
        main = self.dist.main
        self.log: RunLog | None = None
        if main:
            again = state.validation_missing or state.finished
            self.log = RunLog(run.folder, state.step, run.config.logging, hyperparameters, again)
        self.box = BlackBox(run.folder, self.dist.rank, self.dist.size, state.step)
        self.line = ProgressLine(run.config, state, learner.device.type == "cpu")
        self.unchecked: list[StepResult] = []

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.line.close()
        self.close_log(None)

    def close_log(self, final: Mapping[str, float] | None) -> None:
        """final: the scores of a finished run; None for an interrupted one."""
        log, self.log = self.log, None
        if log is not None:
            log.close(final)

    def timed(self, batches: Iterable[list[Batch]]) -> Iterator[list[Batch]]:
        """The batches. The time spent waiting for them is measured."""
        return self.line.timed(batches)

    @contextlib.contextmanager
    def naming(self, batch: Sequence[Batch]) -> Iterator[None]:
        """Any error inside is reported with the step and the images of this process."""
        step = self.state.step
        try:
            yield
        except PeerDied:
            raise
        except Exception as error:
            self.dist.raise_if_peer_died(error)
            names = ", ".join(name for part in batch for name in part.names)
            where = f"step {step + 1}, rank {self.dist.rank}, images {names}"
            self.box.crash(step, batch, f"{type(error).__name__}: {error}")
            if is_out_of_memory(error):
                kept = f"{self.run.last} is untouched" if self.run.last.exists() else "nothing was saved yet"
                learner = self.learner
                advice = training_advice(self.run.config, learner.network.num_classes, self.dist.size, learner.device)
                raise SegtrainError(f"out of memory at {where}; {kept}. By the plan, {advice}") from error
            print(f"segtrain: at {where}:", file=sys.stderr, flush=True)
            raise

    # ------------------------------------------------------------------------------------------------ steps

    def record(self, result: StepResult) -> None:
        """Count a step, and print and log the line that is due."""
        self.unchecked.append(result)
        self.state.step += 1
        due = self.line.due
        if due or self.check_at_once:
            self.flush()
        if self.log is not None:
            if due:
                self.log.scalars(self.state.step, self.line.print())
            else:
                self.line.show_first()
            self.report()

    def report(self) -> None:
        """Keep state.json up to date, from the first process."""
        if self.dist.main:
            with side_file(self.run.folder / "state.json"):
                self.run.report("running")

    @property
    def late_loss(self) -> float:
        """This process's loss of the step before the last one, to be summed for `check`; 0 if that was checked."""
        return self.unchecked[0].loss if len(self.unchecked) > 1 else 0.0

    def check(self, total: float) -> None:
        """Check the step of `late_loss`. total: its sum over the processes. DataError if the training diverged."""
        if len(self.unchecked) > 1:
            self.unchecked[0].total = total
            self.check_step(self.unchecked.pop(0))

    def flush(self) -> None:
        """Check all steps so far: nothing unchecked is saved. A collective call, for steps that have no total yet."""
        results, self.unchecked = self.unchecked, []
        waiting = [result for result in results if result.total is None]
        totals = self.dist.all_reduce(*(result.loss for result in waiting)) if waiting else []
        for result, total in zip(waiting, totals, strict=True):
            result.total = total
        for result in results:
            self.check_step(result)

    def check_step(self, result: StepResult) -> None:
        self.box.add(result)
        self.guard.check_step(result)
        if self.dist.main:
            self.line.add(result)

    # ------------------------------------------------------------------------------------------------ validations

    def log_validation(self, scalars: Mapping[str, float | None], figures: Mapping[str, np.ndarray]) -> None:
        """Log the scores and figures (RGB uint8 (H, W, 3)) of a validation of the current step."""
        if self.log is not None:
            self.log.scalars(self.state.step, scalars)
            for name, figure in figures.items():
                self.log.image(self.state.step, name, figure)

    def draw(self, name: str, pixels: np.ndarray | None) -> None:
        """Write a picture of the run, RGB uint8 (H, W, 3), from the first process."""
        if self.dist.main and pixels is not None:
            path = self.run.pictures / name
            with side_file(path):
                write_png(path, pixels)


def varied_first(config: TrainConfig) -> dict[str, Any]:
    """The options by their keys: first what a sweep has varied, or what was typed beside the recipe."""
    options = flatten(asdict(config))
    first = [key for word in config.varied for key in options if key == word or key.startswith(f"{word}.")]
    return {key: options[key] for key in first} | options
