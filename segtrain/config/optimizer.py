"""Options of the optimizer: optimizer.*"""

from dataclasses import dataclass
from math import inf
from typing import ClassVar

from segtrain.config.options import Group, option, require

OPTIMIZERS = ("sgd", "adamw")


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
