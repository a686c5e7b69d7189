"""Lines and progress bars on the screen."""

import os
import re
import sys
import time
from typing import Any

from segtrain.errors import UsageError

# Control characters (ANSI sequences begin with one), marks that turn the direction of writing, and half a character;
# but not the bytes of a file name that are no UTF-8 (U+DC80 to U+DCFF), which are printed as they are.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udc7f\udd00-\udfff]")
bars: list[Any] = []  # those that stand on the terminal, and give way to a line


def say(text: str) -> None:
    """A line for the person at the screen, at once; of several processes the first one speaks."""
    if not is_speaker():
        return
    for bar in bars:
        bar.clear()
    try:
        print(printable(text), flush=True)
    except BrokenPipeError:
        raise
    except OSError:  # a log on a full disk, a terminal that is gone: no reason to end a training
        pass
    for bar in bars:
        bar.refresh()


def warn(text: str) -> None:
    """A line on stderr, where it is in no program's way; of several processes the first one speaks."""
    if is_speaker():
        print(f"segtrain: {printable(text)}", file=sys.stderr, flush=True)


def launcher_note() -> str:
    """What torchrun, if it has started this process, is about to print about an exit status that is not 0; else ""."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    return "\n(torchrun itself ends with status 1; the traceback that follows is its report of that, no other error)"


def as_utf8(text: str) -> str:
    """The text with everything escaped that UTF-8 lacks: the bytes of a file name that is none."""
    return text.encode("utf-8", "backslashreplace").decode()


def printable(text: str, inline: bool = False) -> str:
    """The text with everything escaped that would command a terminal; inline: line breaks and tabs too."""
    text = UNSAFE.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)
    return text.replace("\n", "\\n").replace("\t", "\\t") if inline else text


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


UNSET = "start several processes with torchrun, or unset it for one process"
LAUNCHER = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets beside WORLD_SIZE
NUMBERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")


def process_count() -> int:
    """Processes that a launcher such as torchrun has started for this run.

    UsageError for an environment that no launcher makes.
    """
    for name in NUMBERS:
        value = os.environ.get(name)
        if value is not None and not re.fullmatch("[0-9]{1,9}", value):
            raise UsageError(f"the environment has {name}={value}, which is no number: {UNSET}")
    count = int(os.environ.get("WORLD_SIZE", "1"))
    missing = [name for name in LAUNCHER if not os.environ.get(name)]
    if count > 1 and missing:
        raise UsageError(f"the environment has WORLD_SIZE={count}, but no {' and no '.join(missing)}: {UNSET}")
    if count > 1 and int(os.environ["RANK"]) >= count:
        raise UsageError(f"the environment has RANK={os.environ['RANK']} and WORLD_SIZE={count}: {UNSET}")
    return count
