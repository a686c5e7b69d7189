"""Validate the network while it trains, and keep the best score."""

from collections.abc import Iterator
from typing import Any, TypeVar

from segtrain.console import say
from segtrain.engine.checkpoint_writer import CheckpointWriter
from segtrain.engine.learner import Learner
from segtrain.engine.monitor import Monitor
from segtrain.engine.preemption import Preempted, Preemption
from segtrain.engine.run import Run
from segtrain.engine.start import Task
from segtrain.engine.state import TrainState
from segtrain.scoring import figures as drawing
from segtrain.scoring.report import table_lines
from segtrain.tasks.evaluation import Found, describe

T = TypeVar("T")


class Validator:
    """Score the weights of the current step on the validation split.

    evaluation: the content of evaluation.json for the last validation; None if a step came after it.
    """

    def __init__(
        self, task: Task, learner: Learner, state: TrainState, run: Run, monitor: Monitor, writer: CheckpointWriter,
        preemption: Preemption,
    ) -> None:  # fmt: skip
        self.task = task
        self.learner = learner
        self.state = state
        self.run = run
        self.monitor = monitor
        self.writer = writer
        self.preemption = preemption
        self.dist = learner.dist
        self.evaluation: dict[str, Any] | None = None
        self.confusion: Any = None

    def validate(self) -> None:
        """Score, save again with the score, report. Preempted, after saving, if a signal asks to stop meanwhile."""
        self.writer.wait_or_warn()  # loader processes start, which must not inherit a half-written file
        found = self.evaluate()
        step, metric = self.state.step, self.task.measure
        is_best = self.state.add_validation(found.result[metric])
        self.writer.save(self.learner, self.state, self.run, best=is_best)
        self.monitor.log_validation(found.scalars, found.drawings)
        if self.dist.main and (panels := found.drawings.get(self.task.panels)) is not None:
            drawing.write(self.run.pictures / f"val_{step:07d}.png", panels)
        best = self.state.best
        score = f"best {100 * best[metric]:.1f} % (step {best['step']})"
        say(f"validation at step {step}: {self.task.told(found.result)}, {score}")
        self.evaluation, self.confusion = self.described(found), found.confusion
        self.monitor.line.restart()

    def evaluate(self) -> Found:
        """Score by the task's own code. A collective call."""
        config, main = self.run.config, self.dist.main
        return self.task.validate(
            self.learner.evaluation_model(), self.learner.device, self.dist, config.loader.count(), self.interruptible,
            config.logging.pictures if main else 0,
        )  # fmt: skip

    def described(self, found: Found) -> dict[str, Any]:
        """The scores with what was evaluated and how, for evaluation.json."""
        config, step = self.run.config, self.state.step
        split = "train" if config.trainer.overfit is not None else config.dataset.val_split
        result = found.result | describe(config.dataset.name, split, config.inference, str(self.run.last), step)
        weights = "raw" if self.learner.average is None else "averaged"
        how = {"inference": result["inference"], "precision": "float32", "step": step, "weights": weights}
        return result | {"protocol": found.card(self.run.trained_on, how)}

    def interruptible(self, items: Iterator[T], rounds: int) -> Iterator[T]:
        """The items of a validation, between which a signal may stop it. Keeps state.json up to date."""
        for item in self.preemption.interruptible(items, rounds, self.dist, self.stop):
            if self.dist.main:
                self.run.report("running")
            yield item

    def stop(self, status: int) -> Preempted:
        """The error that ends the session, after everything is saved."""
        self.writer.close()
        text = f"stopped; {self.run.last} holds step {self.state.step}, and the same command goes on from there"
        return Preempted(text, status)

    def finish(self) -> None:
        """Write the last validation's scores as those of the finished run."""
        if self.state.stalled:
            best = self.state.best
            say(f"ending early: {best['since']} validations no better than that of step {best['step']}")
        if self.dist.main and self.evaluation is not None:
            self.task.write(self.run.folder, self.evaluation, self.confusion)
            self.run.finish(self.state, table_lines(self.evaluation))
            final = {key: self.evaluation[key] for key in self.task.finals}
            self.monitor.final = final | {f"best_{self.task.measure}": self.state.best[self.task.measure]}
