"""Whether a step was good: losses, gradients and weights that are no number, losses far above the usual ones."""

import math
from collections import deque
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from segtrain.config import TrainConfig, run_folder
from segtrain.console import say
from segtrain.distributed.group import World
from segtrain.engine.step_result import StepResult
from segtrain.errors import DataError
from segtrain.weights import checkpoint

RECENT = 100  # losses whose median a spike is measured by
MAX_SKIPPED = 100  # bad steps in a row after which the training ends: it does not learn any more


class Guard:
    """Tell bad steps from good ones, and end a training that has diverged.

    recent: the last RECENT losses of the whole batch. skipped: bad steps in a row that were skipped. scaled: whether
    gradients are scaled (fp16), so that an infinite gradient only means that the scale is too large.
    """

    def __init__(self, config: TrainConfig, dist: World, scaled: bool = False) -> None:
        self.config = config
        self.dist = dist
        self.scaled = scaled
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.skipped = 0

    def why_bad(self, loss: float, norm: float) -> str:
        """What is wrong with a step of that loss and gradient norm; empty for a good one."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm) and not self.scaled:
            return f"the gradient is {norm}"
        factor = self.config.trainer.spike_factor
        if factor and len(self.recent) >= RECENT // 5:
            median = float(np.median(self.recent))
            if 0 < factor * median < loss:
                return f"the loss is {loss:.4g}, {loss / median:.0f} times the median of the last {len(self.recent)}"
        return ""

    def check_step(self, result: StepResult) -> None:
        """Warn of a bad step, or raise DataError if the training has diverged. All processes call it together."""
        assert result.total is not None
        loss = result.total
        reason = self.why_bad(loss, result.norm)
        if reason:
            self.report(result, reason, math.isfinite(loss) and (self.scaled or math.isfinite(result.norm)))
        self.skipped = self.skipped + 1 if result.skipped else 0
        if self.skipped >= MAX_SKIPPED:
            raise self.diverged(f"{self.skipped} steps in a row were skipped")
        if not result.skipped:
            self.recent.append(loss)

    def report(self, result: StepResult, reason: str, harmless: bool) -> None:
        """Name step and images; DataError for weights that were changed by something that is no number."""
        names = [name for batch in result.batches for name in batch.names]
        where = worst_images(self.dist.all_gather((result.losses, names)))
        number = result.step + 1
        text = (
            f"{reason} at step {number} ({where}); `segtrain replay run={run_folder(self.config)} step={number}` "
            "shows the batch"
        )
        if not result.skipped and not harmless:
            raise self.diverged(text)
        say(f"WARNING    {text}{'. The step is skipped.' if result.skipped else ''}")

    def check_weights(self, *parts: Mapping[str, Tensor]) -> None:
        """DataError if the first process would save a weight that is NaN or infinite. A collective call.

        A step can make one whose own loss and gradient are finite, and the last step has no next one to show it.
        """
        found = [checkpoint.first_not_finite(part) for part in parts] if self.dist.main else []
        first = self.dist.all_gather(next((text for text in found if text), None))[0]
        if first is not None:
            raise self.diverged(f"the weights are NaN or infinite, first in {first}; they are not saved", "Begin")

    def diverged(self, text: str, how: str = "Go on with trainer.on_bad_step=skip, or begin") -> DataError:
        """The error that ends a run before its checkpoint is overwritten."""
        error = DataError(
            f"{text}. Training has diverged; the last checkpoint is from before. {how} again with a lower optimizer.lr "
            f"(now {self.config.optimizer.lr}) and restart=true"
        )
        error.everywhere = True
        return error


def worst_images(gathered: list[tuple[list[float], list[str]]]) -> str:
    """'rank 1: a.png nan, b.png nan': the images whose loss is no number, else those of the highest loss.

    gathered: losses and names of the images of each rank.
    """
    rows = [
        (rank, name, value)
        for rank, (losses, names) in enumerate(gathered)
        for name, value in zip(names, losses, strict=True)
    ]
    wrong = [row for row in rows if not math.isfinite(row[2])] or sorted(rows, key=lambda row: -row[2])
    listed = ", ".join(f"rank {rank}: {name} {value:.4g}" for rank, name, value in wrong[:3])
    more = len(wrong) > 3 and not math.isfinite(wrong[3][2])
    return f"{listed} and {len(wrong) - 3} more" if more else listed
