"""Part of a command in a process of its own, with a limit of time and memory, forked from one that has imported all."""

import contextlib
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from segtrain.cli import entry

LIMIT = 60  # seconds
MEMORY = 6 << 30  # bytes
STATUSES = (0, 1, 2)


def forked(run: Callable[[], Any], folder: Path, limit: float = LIMIT) -> tuple[int, str]:
    """Exit status (negative: ended by that signal) and text of `run`, ended after the limit."""
    printed = folder / "printed.txt"
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        work(run, folder, printed)
    status = None
    while time.monotonic() - began < limit:
        done, ended = os.waitpid(pid, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(ended)
            break
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if status is None:
        os.waitpid(pid, 0)
        status = -signal.SIGKILL
    return status, printed.read_text(errors="replace")


def work(run: Callable[[], Any], folder: Path, printed: Path) -> None:
    """In the child: what entry.main does with what is raised, on the memory that a case may have."""
    status = 70
    try:
        os.setsid()
        os.chdir(folder)
        file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        entry.run = lambda _: run()  # type: ignore[assignment]
        entry.main([])
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:  # noqa: BLE001  # which is what is looked for
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def fault_of(status: int, seconds: float, text: str) -> str:
    """What no command may do, '' if it did nothing of that."""
    if seconds >= LIMIT:
        return "hangs"
    if "Traceback (most recent call last)" in text:
        return "traceback"
    if status not in STATUSES:
        return f"exit status {status}"
    return "prints control characters" if "\x1b" in text or "\x07" in text else ""


def load_everything() -> None:
    """What every child would import for seconds."""
    import albumentations  # noqa: F401
    import hydra  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401

    import segtrain.engine.train  # noqa: F401
    from segtrain.cli.commands import COMMANDS

    for row in COMMANDS.values():
        __import__(row.function.partition(":")[0])
