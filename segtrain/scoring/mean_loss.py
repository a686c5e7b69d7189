"""The cross-entropy of predictions, beside their scores: it shows overfitting before the scores do."""

import math
from typing import Protocol

import numpy as np

from segtrain.distributed.group import all_reduce_arrays


class MeanLoss:
    """A mean over labelled pixels or images: sums that add up over processes."""

    def __init__(self) -> None:
        self.sums = np.zeros(2)  # float64: of the loss, and of what it is a mean over

    def add(self, total: float, count: int) -> None:
        """total: the sum of the losses of `count` pixels or images."""
        self.sums += (total, count)

    def all_reduce(self) -> None:
        """Add up the sums of all processes of this command. A collective call."""
        all_reduce_arrays(self.sums)

    def result(self) -> float | None:
        """The mean; None if nothing is labelled, or if it is no finite number."""
        total, count = self.sums.tolist()
        mean = total / count if count else math.nan
        return mean if math.isfinite(mean) else None


class WithLoss(Protocol):
    @property
    def loss(self) -> MeanLoss | None: ...


def loss_entry(counts: WithLoss) -> dict[str, float | None]:
    """{"loss": the mean} of counts that have one, else {}."""
    return {} if counts.loss is None else {"loss": counts.loss.result()}
