"""Validate the network while it trains, and keep the best score."""

from collections.abc import Iterator
from typing import TypeVar

from segtrain.console import say
from segtrain.engine.checkpoint_writer import CheckpointWriter
from segtrain.engine.learner import Learner
from segtrain.engine.monitor import Monitor
from segtrain.engine.parallel import Network
from segtrain.engine.planning.automatic import advising
from segtrain.engine.preemption import Preempted, Preemption
from segtrain.engine.run import Run
from segtrain.engine.state import TrainState
from segtrain.scoring.report import Evaluation
from segtrain.tasks.base import NetworkFacts, Task

T = TypeVar("T")


class Validator:
    """Score the weights of the current step on the validation split.

    evaluation: of the last validation; None if a step came after it.
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
        self.evaluator = task.evaluator()
        most = run.config.logging.train_sample
        self.training = task.training_sample(most) if most else None
        for evaluator in (self.evaluator, self.training):
            if evaluator is not None:
                evaluator.with_loss = most > 0
        self.evaluation: Evaluation | None = None

    def validate(self) -> None:
        """Score, save again with the score, report. Preempted, after saving, if a signal asks to stop meanwhile."""
        self.writer.wait_or_warn()  # loader processes start, which must not inherit a half-written file
        model = self.learner.evaluation_model()
        evaluation, trained = self.evaluate(model), self.score_training(model)
        step, metric = self.state.step, self.task.metric
        # The log and the pictures come before the checkpoint that claims them.
        of_training = {f"train_sample/{name}": value for name, value in trained.items()}
        self.monitor.log_validation(evaluation.scalars | of_training, evaluation.figures)
        self.monitor.draw(f"val_{step:07d}.png", evaluation.examples)
        is_best = self.state.add_validation(evaluation.result[metric])
        self.writer.save(self.learner, self.state, self.run, best=is_best)
        described = self.task.describe(evaluation.result)
        beside = self.overfitting(evaluation.scalars.get("val/loss"), trained)
        say(f"validation at step {step}: {described}, best {self.state.best_score()}{beside}")
        self.evaluation = evaluation
        self.monitor.line.restart()

    def score_training(self, model: Network) -> dict[str, float | None]:
        """The scores of a fixed sample of training images, or {}. A collective call."""
        if self.training is None:
            return {}
        config, device = self.run.config, self.learner.device
        with advising(config.model, self.task.num_classes, config.inference, device):
            return self.training.brief(
                model, device, self.dist, config.loader.count(), self.interruptible, self.preemption.asked
            )

    def overfitting(self, loss: float | None, trained: dict[str, float | None]) -> str:
        """What shows whether the network learns the training images by heart, for the line of a validation."""
        texts = [] if loss is None else [f", loss {loss:.4f}"]
        if self.training is not None and trained[self.task.metric] is not None:
            own = trained["loss"]
            of_sample = "" if own is None else f", loss {own:.4f}"
            texts.append(f"; {self.training.images} training images: {self.task.describe(trained)}{of_sample}")
        return "".join(texts)

    def evaluate(self, model: Network) -> Evaluation:
        """Score by the task's own evaluator. A collective call."""
        config, step = self.run.config, self.state.step
        card = {"step": step, "weights": "raw" if self.learner.average is None else "averaged"}
        device, classes = self.learner.device, self.task.num_classes
        with advising(config.model, classes, config.inference, device):
            return self.evaluator.run(
                model, device, self.dist, config.loader.count(), self.interruptible,
                config.logging.pictures if self.dist.main else 0,
                facts=NetworkFacts(str(self.run.last), step, self.run.trained_on, card), stopped=self.preemption.asked,
            )  # fmt: skip

    def interruptible(self, items: Iterator[T], rounds: int) -> Iterator[T]:
        """The items of a validation, between which a signal may stop it. Keeps state.json up to date."""
        for item in self.preemption.interruptible(items, rounds, self.dist, self.stop):
            self.monitor.report()
            yield item

    def stop(self, status: int) -> Preempted:
        """The error that ends the session, after everything is saved."""
        self.writer.close()
        text = f"stopped; {self.run.last} holds step {self.state.step}, and the same command goes on from there"
        return Preempted(text, status)

    def finish(self) -> None:
        """Write the last validation's scores as those of the finished run, whose checkpoint is on the disk by then."""
        self.writer.close()
        if self.state.stalled:
            best = self.state.best
            say(f"ending early: {best['since']} validations no better than that of step {best['step']}")
        if self.dist.main and self.evaluation is not None:
            final = {key: self.evaluation.result[key] for key in self.task.final_scores}
            self.monitor.close_log(final | {f"best_{self.task.metric}": self.state.best[self.task.metric]})
            self.evaluation.write(self.run.folder)  # from here on the run is finished: see Run.report_finished
            self.run.finish(self.state, self.evaluation.lines())
