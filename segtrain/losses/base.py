"""What every loss is to a training step: a sum for each image and a count."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from segtrain.config import IGNORE_INDEX

Groups = Sequence[Sequence[int]]


class Loss(ABC):
    """Base class of every loss.

    A step minimises sum(loss(logits, target)) / sum(loss.count(target)), both sums over the global batch: all
    micro-batches of all processes.
    """

    per_batch = False  # depends on the whole batch at once: several processes or gradient accumulation would change it
    host_counts: list[int] | None = None  # labelled pixels of each image of the batch at hand, inside `counted`
    marginal = False  # accepts targets C + g, which mean that the pixel is one of the classes groups[g]

    def count(self, target: Tensor) -> float:
        """What this batch adds to the divisor: by default its labelled pixels. Depends on the target only.

        target: uint8 or int64 (N, H, W), IGNORE_INDEX where there is no label.
        """
        return int((target != IGNORE_INDEX).sum())

    @contextmanager
    def counted(self, target: Tensor) -> Iterator[None]:
        """Inside, the loss is called with this target, which is here on the host; the call's may be on a device.

        So a loss need not wait for the device to count pixels.
        """
        yield

    @abstractmethod
    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """Sum of the loss over each image: (N,), float32 or float64, differentiable.

        logits: float (N, C, h, w), at any stride. target: int64 (N, H, W), IGNORE_INDEX where there is no label. An
        image without labels has the sum 0, with gradient 0.
        """
