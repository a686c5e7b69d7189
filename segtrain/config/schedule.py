"""Options of the learning rate's course over the training: schedule.*"""

from dataclasses import dataclass
from typing import ClassVar

from segtrain.config.options import MOST_STEPS, Group, option, require

SCHEDULES = ("poly", "linear", "step", "cosine", "constant")


@dataclass
class ScheduleConfig(Group):
    PREFIX: ClassVar[str] = "schedule."

    name: str = option(
        "poly", "course of the learning rate over the training, set at every step",
        choices=SCHEDULES,
    )  # fmt: skip
    power: float = option(0.9, "exponent of 1 - progress", low=0, limit=100, only=("poly",))
    end_factor: float = option(
        0.0, "final learning rate as a fraction of optimizer.lr", low=0, high=1, only=("linear", "cosine")
    )
    milestones: list[float] = option(
        [], "fractions of the training after which the rate drops, ascending", above=0, below=1, only=("step",)
    )
    factor: float = option(0.1, "factor of the rate at each milestone", above=0, below=1, only=("step",))
    warmup_steps: int = option(0, "duration of the linear warm-up [steps]; 0: none", low=0, limit=MOST_STEPS)
    warmup_factor: float = option(
        0.1, "fraction of the schedule's rate at the first step of the warm-up", low=0, high=1
    )

    def check(self) -> None:
        super().check()
        ascending = self.milestones == sorted(set(self.milestones))
        require(
            ascending and (self.name != "step" or len(self.milestones) > 0), "schedule.milestones", self.milestones,
            "give fractions of the training in ascending order, such as [0.3333333333,0.6666666667]",
        )  # fmt: skip
        require(
            self.warmup_steps > 0 or self.warmup_factor == ScheduleConfig.warmup_factor, "schedule.warmup_factor",
            self.warmup_factor, "without schedule.warmup_steps nothing reads it; give them, or leave it out",
        )  # fmt: skip
