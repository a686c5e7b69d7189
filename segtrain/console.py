"""Lines and progress bars on the screen."""

import os
import sys
import time
from typing import Any

bars: list[Any] = []  # those that stand on the terminal, and give way to a line


def say(text: str) -> None:
    """A line for the person at the screen, at once; of several processes the first one speaks."""
    if not is_speaker():
        return
    for bar in bars:
        bar.clear()
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError:  # a log on a full disk, a terminal that is gone: no reason to end a training
        pass
    for bar in bars:
        bar.refresh()


def is_speaker() -> bool:
    return os.environ.get("RANK", "0") == "0" or process_count() == 1


def duration(seconds: float) -> str:
    """'41 s', '3:07 min' or '2:05 h'."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d} h"


class Progress:
    """A bar on a terminal; in a log 'what: 12 of 60, 8 s left' every ten seconds, or nothing if `terminal_only`."""

    def __init__(self, what: str, total: int, terminal_only: bool = False) -> None:
        self.what = what
        self.terminal_only = terminal_only
        self.total = total
        self.started = self.told = time.monotonic()
        self.bar: Any = None
        if sys.stderr.isatty() and is_speaker():
            from tqdm import tqdm

            tqdm.monitor_interval = 0  # its thread would be there when loader processes are forked
            self.bar = tqdm(total=total, desc=what, leave=False, dynamic_ncols=True, file=sys.stderr)
            bars.append(self.bar)

    def show(self, done: int) -> None:
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
            if done == self.total:
                self.close()
            return
        now = time.monotonic()
        if now - self.told >= 10 and not self.terminal_only:
            self.told = now
            left = duration((now - self.started) * (self.total - done) / done)
            say(f"{self.what}: {done} of {self.total}, {left} left")

    def close(self) -> None:
        if self.bar is not None:
            bars[:] = [bar for bar in bars if bar is not self.bar]  # by identity: tqdm compares bars by their place
            self.bar.close()


def process_count() -> int:
    """Processes that a launcher such as torchrun has started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))
