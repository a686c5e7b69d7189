"""The line about the training that is printed every few steps."""

import math
import time
from collections.abc import Iterable, Iterator

from segtrain.config import TrainConfig
from segtrain.console import Progress, duration, say
from segtrain.data.loader import Batch
from segtrain.device import memory, peak_memory
from segtrain.engine.state import TrainState
from segtrain.engine.step_result import StepResult

CLOCK = ("train/images_per_s", "train/data_wait", "train/memory_gb")  # figures that no two sessions share


class ProgressLine:
    """A line every `logging.every` steps: mean loss since the last line, learning rate, speed, wait for data, time
    left. On a terminal there is a bar too."""

    def __init__(self, config: TrainConfig, state: TrainState) -> None:
        self.config = config
        self.state = state
        self.norm = self.lr = 0.0
        self.busy = 0.0  # seconds of training so far, and the steps they took: the basis of the time left
        self.steps = 0
        self.starved = 0  # consecutive lines with much waiting for data
        self.bar = None if state.max_steps is None else Progress("training", state.max_steps, terminal_only=True)
        self.restart()

    def restart(self) -> None:
        """Forget the time since the last line: it went into something else, such as a validation."""
        self.since = time.monotonic()
        self.waited = 0.0
        self.steps_since = 0

    def timed(self, batches: Iterable[list[Batch]]) -> Iterator[list[Batch]]:
        """The batches. Measures the time spent waiting for them."""
        iterator = iter(batches)
        while True:
            began = time.monotonic()
            batch = next(iterator, None)
            self.waited += time.monotonic() - began
            if batch is None:
                return
            self.steps_since += 1
            yield batch
            if self.bar is not None:
                self.bar.show(self.state.step)

    def add(self, result: StepResult) -> None:
        if not result.skipped and result.total is not None:
            self.state.losses.append(result.total)
        self.norm, self.lr = result.norm, result.lr

    @property
    def due(self) -> bool:
        return self.state.step % self.config.logging.every == 0 or self.state.at_last_step

    def print(self) -> dict[str, float | None]:
        """Print the line. Returns its figures for the log."""
        spent = max(time.monotonic() - self.since, 1e-9)
        self.busy += spent
        self.steps += self.steps_since
        speed = self.steps_since * self.config.trainer.images / spent
        wait = self.waited / spent
        losses = self.state.losses
        mean = math.fsum(losses) / len(losses) if losses else None
        left = self.seconds_left()
        end = time.strftime("%H:%M" if left < 20 * 3600 else "%d %b %H:%M", time.localtime(time.time() + left))
        of = "" if self.state.max_steps is None else f"/{self.state.max_steps}"
        say(
            f"step {self.state.step}{of}  loss {'none' if mean is None else f'{mean:.4f}'}  lr {self.lr:.2g}  "
            f"{speed:.1f} images/s  waiting for data {100 * wait:.0f} %  {memory()}  {duration(left)} left, until {end}"
        )
        self.hint(wait)
        scalars: dict[str, float | None] = {
            "train/loss": mean, "train/lr": self.lr, "train/images_per_s": speed, "train/data_wait": wait,
            "train/gradient_norm": self.norm if math.isfinite(self.norm) else None,
        }  # fmt: skip
        if (factor := self.config.optimizer.backbone_lr_factor) != 1:
            scalars["train/lr_backbone"] = self.lr * factor
        if (peak := peak_memory()) is not None:
            scalars["train/memory_gb"] = peak / 1e9
        self.state.losses = []
        self.restart()
        return scalars

    def seconds_left(self) -> float:
        if self.state.max_steps is not None:
            return self.busy / self.steps * (self.state.max_steps - self.state.step)
        return max((self.state.seconds or 0) - self.state.elapsed, 0)

    def hint(self, wait: float) -> None:
        """Once, after three lines with more than 30 % waiting for data, say what helps."""
        self.starved = self.starved + 1 if wait > 0.3 else 0
        if self.starved == 3:
            say(
                "hint       the network waits for data: give more loader.workers (now "
                f"{self.config.loader.count()}), dataset.cache=decoded, or images of less than full size"
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
