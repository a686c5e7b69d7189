"""Stop a training between two steps, or between two images of a validation, when a signal asks for it."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

from segtrain.console import process_count
from segtrain.distributed.group import World
from segtrain.errors import INTERRUPTED, REQUEUE, SegtrainError

T = TypeVar("T")
REPEATED = 2.0  # seconds within which a launcher repeats the Ctrl-C that a terminal has sent to all


def is_ignored(number: int) -> bool:
    """Whether a hang-up is ignored, as nohup asks for; the other signals never are."""
    return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) == signal.SIG_IGN


class Preempted(SegtrainError):
    """The run was asked to stop and has saved itself."""

    def __init__(self, text: str, exit_status: int, everywhere: bool = True) -> None:
        super().__init__(text)
        self.exit_status = exit_status
        self.everywhere = everywhere
        self.quiet = not everywhere and os.environ.get("RANK", "0") != "0"


class Preemption:
    """Turn Ctrl-C (exit status 130) and SIGTERM, SIGHUP or SIGUSR1 (75: requeue me) into a stop after the step.

    `signal` is the exit status that was asked for, 0 until then. A later Ctrl-C stops at once, and so does any signal
    while `stepping` is not set: before the first step there is nothing to save. The previous handlers come back at the
    end.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.stepping = False
        self.since = 0.0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            numbers += [getattr(signal, name) for name in ("SIGUSR1", "SIGHUP") if hasattr(signal, name)]  # on Unix
            numbers = [number for number in numbers if not is_ignored(number)]
            self.before = {number: signal.signal(number, self.handle) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            # A scheduler's second signal does not hurry the run; a person's stops it at once.
            if number != signal.SIGINT or (process_count() > 1 and time.monotonic() - self.since < REPEATED):
                return
            raise KeyboardInterrupt
        self.since = time.monotonic()
        self.signal = INTERRUPTED if number == signal.SIGINT else REQUEUE
        if not self.stepping:
            raise Preempted("stopped before the first step; what was saved is untouched", self.signal, False)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            with contextlib.suppress(OSError):  # SIGHUP: the terminal is gone
                os.write(2, b"\nstopping at the end of this step; Ctrl-C once more stops at once, without saving\n")

    def asked(self) -> bool:
        """Whether a signal has asked this process to stop."""
        return self.signal != 0

    def agreed(self, dist: World) -> int:
        """The exit status that any process was asked for, the same in all; Ctrl-C comes before requeueing."""
        return dist.agree(0.0, 0.0, self.signal).signal

    def interruptible(
        self, items: Iterable[T], rounds: int, dist: World, stop: Callable[[int], Exception]
    ) -> Iterator[T]:
        """The items, until a stop is asked for: then all processes raise `stop(exit status)` in the same round.

        rounds: at least the number of items, and the same for all processes.
        """
        iterator = iter(items)
        for _ in range(rounds):
            if status := self.agreed(dist):
                raise stop(status)
            item = next(iterator, None)
            if item is not None:
                yield item
        if status := self.agreed(dist):  # the last round's item was not waited for
            raise stop(status)
