"""Optimizers, their parameter groups, and the learning rate as a pure function of where training is."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from segtrain.config import OptimizerConfig, ScheduleConfig, require

Groups = list[dict[str, Any]]  # "params", "lr", "lr_factor", "weight_decay"


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer that the options name, over all parameters that are trained. Every group has "lr_factor", which
    learning_rate() is multiplied by for it.

    UsageError for a name that OPTIMIZERS lacks, for a backbone factor where the model has no `body`, and for fused=true
    where there is no such kernel.
    """
    require(config.name in OPTIMIZERS, "optimizer.name", config.name, f"choose {', '.join(OPTIMIZERS)}")
    # Decided here: torch's SGD looks at its first parameter only, and not before its first step.
    possible = all(p.is_floating_point() and p.device.type in FUSED_DEVICES for p in trained_parameters(model))
    require(
        possible or config.fused is not True, "optimizer.fused", config.fused,
        f"it needs floating-point parameters on {' or '.join(FUSED_DEVICES)}; give null or false",
    )  # fmt: skip
    fused = possible if config.fused is None else config.fused
    return OPTIMIZERS[config.name](parameter_groups(model, config), replace(config, fused=fused))


def sgd(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, config.lr, config.momentum, nesterov=config.nesterov, fused=config.fused)


def adamw(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, config.lr, (config.betas[0], config.betas[1]), fused=config.fused)


FUSED_DEVICES = ("cuda", "cpu")
# Name -> the optimizer of parameter groups, by the options, of which `fused` is true or false. Plugins may add to it.
OPTIMIZERS: dict[str, Callable[[Groups, OptimizerConfig], torch.optim.Optimizer]] = {"sgd": sgd, "adamw": adamw}


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those that are not frozen, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> Groups:
    """Every parameter that is trained once, in the model's order; one group if the options treat all alike."""
    body = getattr(model, "body", None)
    require(
        body is not None or config.backbone_lr_factor == 1, "optimizer.backbone_lr_factor", config.backbone_lr_factor,
        "this model has no `body`; give 1",
    )  # fmt: skip
    backbone = set() if body is None else {id(parameter) for parameter in body.parameters()}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for parameter in trained_parameters(model):
        factor = config.backbone_lr_factor if id(parameter) in backbone else 1.0
        vector = parameter.dim() <= 1  # norm weights and all biases
        decay = 0.0 if vector and not config.decay_norm_and_bias else config.weight_decay
        empty = {"params": [], "lr": config.lr * factor, "lr_factor": factor, "weight_decay": decay}
        groups.setdefault((factor, decay), empty)["params"].append(parameter)
    return list(groups.values())


def learning_rate(optimizer: OptimizerConfig, schedule: ScheduleConfig, step: int, progress: float) -> float:
    """Learning rate of a step, before a group's lr_factor.

    step: steps done before this one. progress: fraction of the training done before it, 0 <= progress < 1. During
    warm-up the schedule's rate is multiplied by a factor that rises linearly to 1, so that nothing jumps at its end.
    UsageError for a name that SCHEDULES lacks.
    """
    require(schedule.name in SCHEDULES, "schedule.name", schedule.name, f"choose {', '.join(SCHEDULES)}")
    lr = optimizer.lr * SCHEDULES[schedule.name](schedule, progress)
    if step < schedule.warmup_steps:
        lr *= schedule.warmup_factor + (1 - schedule.warmup_factor) * step / schedule.warmup_steps
    return lr


def poly(config: ScheduleConfig, progress: float) -> float:
    """In-Place ABN paper, section 4.2: (1 - progress) ** 0.9."""
    return float((1 - progress) ** config.power)


def linear(config: ScheduleConfig, progress: float) -> float:
    """In-Place ABN's ImageNet recipe: from 0.1 to 1e-6, end_factor 1e-5."""
    return 1 - (1 - config.end_factor) * progress


def step(config: ScheduleConfig, progress: float) -> float:
    # The tolerance lets a fraction written with ten digits, 0.6666666667, meet its step; a step is longer.
    return float(config.factor ** sum(progress >= milestone - 1e-9 for milestone in config.milestones))


def cosine(config: ScheduleConfig, progress: float) -> float:
    """Half a period, as Loshchilov and Hutter, SGDR, 2017, without restarts."""
    return config.end_factor + (1 - config.end_factor) * (1 + math.cos(math.pi * progress)) / 2


def constant(config: ScheduleConfig, progress: float) -> float:
    return 1.0


# Name -> factor of optimizer.lr, from the fraction of the training that is done. Plugins may add to it.
SCHEDULES: dict[str, Callable[[ScheduleConfig, float], float]] = {
    "poly": poly,
    "linear": linear,
    "step": step,
    "cosine": cosine,
    "constant": constant,
}
