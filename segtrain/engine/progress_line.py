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


FIRST = 10  # seconds after which a first line is printed
LONG = 2 * 3600  # seconds from which on a training on the CPU is worth a hint


def time_left(seconds: float) -> str:
    """ "12 s left, until 14:05"."""
    end = time.strftime("%H:%M" if seconds < 20 * 3600 else "%d %b %H:%M", time.localtime(time.time() + seconds))
    return f"{duration(seconds)} left, until {end}"


class ProgressLine:
    """A line every `logging.every` steps: mean loss since the last line, learning rate, speed, wait for data, time
    left. Where steps take long, there is one before, after the first step that ends FIRST seconds after the start. On a
    terminal there is a bar too."""

    def __init__(self, config: TrainConfig, state: TrainState, on_cpu: bool = False) -> None:
        """on_cpu: whether to advise where the training will take hours."""
        self.config = config
        self.state = state
        self.on_cpu = on_cpu
        self.is_silent = True  # no line yet in this session
        self.ends: list[float] = []  # when the first steps ended, until the first line
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
        say(
            f"{self.step_text()}  loss {'none' if mean is None else f'{mean:.4f}'}  lr {self.lr:.2g}  "
            f"{speed:.1f} images/s  waiting for data {100 * wait:.0f} %  {memory()}  {time_left(left)}"
        )
        if self.is_silent:
            self.advise(left)
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

    def step_text(self) -> str:
        return f"step {self.state.step}" + ("" if self.state.max_steps is None else f"/{self.state.max_steps}")

    def show_first(self) -> None:
        """After a step without a line: print one, once, if FIRST seconds have gone by. Its loss is not known yet."""
        if not self.is_silent:
            return
        self.ends.append(time.monotonic())
        spent = self.ends[-1] - self.since
        if spent < FIRST:
            return
        # The first step prepares much that the others find ready.
        later = (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1) if len(self.ends) > 1 else spent
        left = max((self.state.seconds or 0) - self.state.elapsed, 0)
        if self.state.max_steps is not None:
            left = later * (self.state.max_steps - self.state.step)
        say(f"{self.step_text()}  {later:.1f} s a step  {memory()}  about {time_left(left)}")
        self.advise(left)

    def advise(self, left: float) -> None:
        """After the first line of a session: what makes a training shorter that will take hours on the CPU."""
        self.is_silent = False
        if self.on_cpu and left > LONG:
            crop, model, trainer = self.config.augmentation.crop_size, self.config.model, self.config.trainer
            coarser = f", model.output_stride=16 (now {model.output_stride})" if model.output_stride < 16 else ""
            say(
                f"hint       {duration(left)} on this CPU: shorter with fewer steps, a smaller augmentation.crop_size "
                f"(now {crop}) or trainer.batch_size (now {trainer.batch_size}){coarser}, or on a GPU"
            )

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
