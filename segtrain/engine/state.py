"""How far a training is: its step, its clock, its best score, and what is due."""

import time
from typing import Any

from segtrain.config import TrainerConfig


class TrainState:
    """The step, the time and the validations of a run over all its sessions.

    step: steps done. validated: step of the last validation. best: {metric: its highest value (-1 before the first
    validation), "step": of that one, "since": validations that were no better}. max_steps: None where the clock decides
    when the training ends. losses: of the steps since the last printed line, which reports their mean.
    """

    def __init__(self, options: TrainerConfig, samples: int, metric: str, saved: dict[str, Any] | None = None) -> None:
        """samples: in an epoch. saved: the checkpoint to resume from; keys that were added later may be missing."""
        saved = saved or {}
        self.options = options
        self.metric = metric
        self.max_steps = options.steps(samples)
        self.seconds = None if options.hours is None else 3600 * options.hours
        self.step: int = saved.get("step", 0)
        self.validated: int = saved.get("validated", 0)
        self.best: dict[str, Any] = {metric: -1.0, "step": 0, "since": 0} | saved.get("best", {})
        self.elapsed_before: float = saved.get("elapsed", 0.0)  # seconds of earlier sessions
        self.losses: list[float] = list(saved.get("losses", []))
        self.began = time.monotonic()

    def __str__(self) -> str:
        return f"{self.max_steps} steps" if self.seconds is None else f"{self.seconds / 3600:g} hours in steps"

    def state_dict(self) -> dict[str, Any]:
        """The part of a checkpoint that belongs to this object."""
        state = {"step": self.step, "validated": self.validated, "best": self.best, "elapsed": self.elapsed}
        return state | ({"losses": list(self.losses)} if self.losses else {})

    @property
    def elapsed(self) -> float:
        """Seconds of this run, all sessions together."""
        return self.elapsed_before + time.monotonic() - self.began

    @property
    def progress(self) -> float:
        """Fraction of the training that is done; it ends at 1. In hours, that of this process's own clock."""
        return self.step / self.max_steps if self.max_steps is not None else self.elapsed / (self.seconds or 1)

    @property
    def at_last_step(self) -> bool:
        return self.max_steps is not None and self.step >= self.max_steps

    @property
    def stalled(self) -> bool:
        """Whether trainer.patience validations in a row were no better, which ends the training early."""
        return self.options.patience is not None and self.best["since"] >= self.options.patience

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to train. By the clock, that of the earlier sessions decides."""
        timed_out = self.seconds is not None and self.elapsed_before >= self.seconds
        return self.stalled or self.at_last_step or timed_out

    @property
    def validation_due(self) -> bool:
        return self.at_last_step or self.step % self.options.validate_every == 0

    @property
    def save_due(self) -> bool:
        return self.validation_due or self.step % self.options.save_every == 0

    @property
    def validation_missing(self) -> bool:
        """Whether the run was stopped between this step and its validation."""
        return self.step > 0 and self.validated < self.step and self.validation_due

    def best_score(self) -> str:
        """ "46.9 % (step 300)"."""
        if self.best[self.metric] < 0:
            return "not known yet"
        return f"{100 * self.best[self.metric]:.1f} % (step {self.best['step']})"

    def add_validation(self, score: float) -> bool:
        """Note the score of the weights after `step`. Returns whether it is the best one so far."""
        repeated, self.validated = self.validated == self.step, self.step
        if score > self.best[self.metric]:
            self.best = {self.metric: score, "step": self.step, "since": 0}
            return True
        self.best = self.best | {"since": self.best["since"] + (not repeated)}
        return False
