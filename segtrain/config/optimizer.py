"""Options of the optimizer and of its learning rate: optimizer.*, schedule.*"""

from dataclasses import dataclass

from segtrain.config.options import option, refuse_unread, require


@dataclass
class OptimizerConfig:
    name: str = option("sgd", "sgd | adamw")
    lr: float = option(0.0025, "learning rate at step 0, or after warm-up")
    momentum: float = option(0.9, "sgd: momentum")
    nesterov: bool = option(False, "sgd: Nesterov's form of momentum")
    betas: list[float] = option([0.9, 0.999], "adamw: decay of the means of gradients and of their squares, per step")
    weight_decay: float = option(1e-4, "sgd: L2 penalty; adamw: decoupled decay, times the learning rate per step")
    decay_norm_and_bias: bool = option(True, "decay weights and biases of norms and all other biases too, as published")
    backbone_lr_factor: float = option(1.0, "learning rate of the backbone as a multiple of the others'")
    fused: bool | None = option(None, "update in one kernel; null: where device and type of the parameters have one")
    clip_norm: float | None = option(None, "largest norm of the gradient over all parameters; longer ones are scaled")

    def check(self) -> None:
        require(self.name in ("sgd", "adamw"), "optimizer.name", self.name, "choose sgd or adamw")
        refuse_unread(self, "optimizer", self.name, {"sgd": ("momentum", "nesterov"), "adamw": ("betas",)})
        require(0 < self.lr < float("inf"), "optimizer.lr", self.lr, "give more than 0")
        require(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "give 0 or more, less than 1")
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "give 0 or more")
        require(
            self.momentum > 0 or not self.nesterov,
            "optimizer.nesterov",
            self.nesterov,
            "it needs optimizer.momentum > 0",
        )
        fits = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(fits, "optimizer.betas", self.betas, "give two numbers of 0 or more, less than 1")
        factor = self.backbone_lr_factor
        require(0 <= factor < float("inf"), "optimizer.backbone_lr_factor", factor, "give 0 or more")
        positive = self.clip_norm is None or self.clip_norm > 0
        require(positive, "optimizer.clip_norm", self.clip_norm, "give more than 0, or null for none")


@dataclass
class ScheduleConfig:
    name: str = option("poly", "poly | linear | step | cosine | constant; every step, over the whole training")
    power: float = option(0.9, "poly: lr x (1 - share of the training done) ** power")
    end_factor: float = option(0.0, "linear, cosine: learning rate at the end, as a share of optimizer.lr")
    milestones: list[float] = option(
        [], "step: shares of the training after which the rate falls, ascending, with ten digits where they do not end"
    )
    factor: float = option(0.1, "step: what the rate is multiplied by at each milestone")
    warmup_steps: int = option(0, "steps in which the rate rises linearly to what the schedule says; 0: none")
    warmup_factor: float = option(0.1, "share of the schedule's rate that the first step of a warm-up has")

    def check(self) -> None:
        read = {
            "poly": ("power",), "linear": ("end_factor",), "step": ("milestones", "factor"), "cosine": ("end_factor",),
            "constant": (),
        }  # fmt: skip
        require(self.name in read, "schedule.name", self.name, f"choose {', '.join(read)}")
        refuse_unread(self, "schedule", self.name, read)
        require(self.power >= 0, "schedule.power", self.power, "give 0 or more")
        require(0 <= self.end_factor <= 1, "schedule.end_factor", self.end_factor, "give a share from 0 to 1")
        ascending = self.milestones == sorted(set(self.milestones)) and all(0 < share < 1 for share in self.milestones)
        require(
            ascending and (self.name != "step" or len(self.milestones) > 0), "schedule.milestones", self.milestones,
            "give shares of the training between 0 and 1, ascending, such as [0.3333333333,0.6666666667]",
        )  # fmt: skip
        require(0 < self.factor < 1, "schedule.factor", self.factor, "give more than 0, less than 1")
        require(self.warmup_steps >= 0, "schedule.warmup_steps", self.warmup_steps, "give 0 or more")
        require(
            self.warmup_steps > 0 or self.warmup_factor == ScheduleConfig.warmup_factor, "schedule.warmup_factor",
            self.warmup_factor, "without schedule.warmup_steps nothing reads it; give them, or leave it out",
        )  # fmt: skip
        require(0 <= self.warmup_factor <= 1, "schedule.warmup_factor", self.warmup_factor, "give a share from 0 to 1")
