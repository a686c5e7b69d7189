"""Losses and gradient norm of one step."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from segtrain.data.loader import Batch


class StepResult:
    """The result of one step in this process: each image's loss and the gradient's norm, on their way to the CPU.

    step: how many were done before it. batches: this process's micro-batches. divisor: what the sum of the losses of
    all processes is divided by. lr: learning rate, before a group's factor. skipped: whether the weights were left as
    they were. total: the loss over all processes, None until these have exchanged it.
    """

    def __init__(
        self, step: int, batches: Sequence[Batch], sums: list[Tensor], norm: Tensor, divisor: float, lr: float
    ) -> None:
        self.step = step
        self.lr = lr
        self.batches = batches
        self.divisor = divisor
        self.skipped = False
        self.total: float | None = None
        values = torch.cat([*(s.detach().double() for s in sums), norm.detach().double().reshape(1)])
        self.event: Any = None
        if values.is_cuda:  # read later, when it has arrived and nobody has to wait
            self.buffer = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.buffer.copy_(values, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.buffer = values

    def values(self) -> list[float]:
        if self.event is not None:
            self.event.synchronize()
        result: list[float] = self.buffer.tolist()
        return result

    @property
    def losses(self) -> list[float]:
        """Each image's part of the batch's loss."""
        return [value / self.divisor for value in self.values()[:-1]]

    @property
    def loss(self) -> float:
        """This process's part of the batch's loss."""
        return math.fsum(self.losses)

    @property
    def norm(self) -> float:
        """Euclidean norm of the whole gradient, before it is clipped."""
        return self.values()[-1]
