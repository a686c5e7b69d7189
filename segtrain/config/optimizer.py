"""Options of the optimizer and of its learning rate: optimizer.*, schedule.*"""

from dataclasses import dataclass
from math import inf
from typing import ClassVar

from segtrain.config.options import MOST_STEPS, Group, option, require

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("poly", "linear", "step", "cosine", "constant")


@dataclass
class OptimizerConfig(Group):
    PREFIX: ClassVar[str] = "optimizer."

    name: str = option("sgd", "optimizer", choices=OPTIMIZERS)
    lr: float = option(0.0025, "learning rate at step 0, or after warm-up", above=0, below=inf)
    momentum: float = option(0.9, "momentum", low=0, below=1, only=("sgd",))
    nesterov: bool = option(False, "Nesterov momentum", only=("sgd",))
    betas: list[float] = option(
        [0.9, 0.999], "decay per step of the averages of gradients and squared gradients", low=0, below=1,
        items=("beta1", "beta2"), only=("adamw",),
    )  # fmt: skip
    weight_decay: float = option(1e-4, "L2 penalty (sgd), or decoupled decay times the rate (adamw)", low=0, limit=1e6)
    decay_norm_and_bias: bool = option(True, "weight decay of norm layers and biases too, as published")
    backbone_lr_factor: float = option(
        1.0, "learning rate of the backbone relative to the rest", low=0, below=inf, limit=1e6
    )
    fused: bool | None = option(None, "fused update kernel; null: where device and parameters have one")
    clip_norm: float | None = option(None, "maximum norm of the whole gradient; null: no clipping", above=0, limit=1e6)

    def check(self) -> None:
        super().check()
        require(self.momentum > 0 or not self.nesterov, "optimizer.nesterov", "true", "it needs optimizer.momentum > 0")


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
