"""Optimizer and learning rate."""

import torch
from torch import nn

from segtrain.config import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.SGD:
    """SGD over all parameters, weight decay on all of them as in the published recipes."""
    return torch.optim.SGD(
        [{"params": list(model.parameters()), "lr_factor": 1.0}],
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )


def poly(lr: float, step: int, max_steps: int, power: float) -> float:
    """Learning rate of step 0 .. max_steps - 1: lr * (1 - step / max_steps) ** power (paper, section 4.2)."""
    return float(lr * (1 - step / max_steps) ** power)


def learning_rate(optimizer, schedule, step, share):
    return float(optimizer.lr * (1 - share) ** schedule.power)
