"""The folder of a run: whose it is, how far it got, and how it is interrupted."""

import json
import os
import platform
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import yaml

import segtrain
from segtrain.config import LENGTHS, TrainConfig, is_safe, run_folder, with_defaults
from segtrain.console import process_count, say
from segtrain.distributed.group import World
from segtrain.errors import DataError, SegtrainError
from segtrain.files import write_atomically
from segtrain.weights import checkpoint

T = TypeVar("T")


class Run:
    """runs/<name>/ of one configuration: last.pt, best.pt, step_*.pt, config.yaml, evaluation.json, metrics.jsonl,
    summary.txt, state.json, environment.json, blackbox/, pictures/, tensorboard/. Only the first process writes."""

    def __init__(self, config: TrainConfig) -> None:
        self.folder = run_folder(config)
        self.last = self.folder / "last.pt"
        self.pictures = self.folder / "pictures"
        self.config = config
        self.lock: Any = None
        self.mine = False  # claimed by this process
        self.changed = modified(self.last)
        self.step = self.max_steps = 0  # how far it is, for state.json
        self.told = 0.0

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """The scores of the finished run."""
        path = self.folder / "evaluation.json"
        result: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
        return result

    def resume(self) -> dict[str, Any] | None:
        """The newest checkpoint if this very run began earlier; DataError if the folder is another run's."""
        self.changed = modified(self.last)
        state = checkpoint.newest(self.folder)
        if state is None:
            return None
        changes = differences(with_defaults(state["config"]), asdict(self.config))
        if changes:
            listed = "\n".join(f"  {key}: {old} in the run, {new} asked for" for key, old, new in changes)
            raise DataError(
                f"{self.folder} belongs to another configuration:\n{listed}\n"
                f"add name=ANOTHER_NAME for a run of its own (model.weights={self.last} begins it with this one's "
                "weights), or restart=true to move the old one aside"
            )
        before, now = flat(state["config"]), flat(asdict(self.config))
        for key in LENGTHS:
            if before.get(key) != now[key]:
                longer = "from here on the learning rate is that of the longer run"
                say(f"{key}={now[key]} instead of {before.get(key)}: {longer}")
        return state

    def move_aside(self) -> None:
        if not self.folder.exists():
            return
        self.claim()  # never under a process that trains in it
        self.release()
        number = 1
        while (aside := self.folder.with_name(f"{self.folder.name}.old-{number}")).exists():
            number += 1
        self.folder.rename(aside)
        say(f"moved the old run to {aside}")

    def claim(self) -> None:
        """DataError if another process trains in this folder at this moment."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.changed != modified(self.last):
            raise DataError(f"{self.folder} has been trained on meanwhile: start again, to go on from there")
        try:
            import fcntl
        except ImportError:  # Windows
            self.mine = True
            return
        lock = (self.folder / ".lock").open("a")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which loader processes would inherit
        except (BlockingIOError, PermissionError) as error:
            lock.close()
            raise DataError(
                f"another process is training in {self.folder}: wait for it, or take another name=... for this run"
            ) from error
        except OSError as error:
            say(f"WARNING    {self.folder} has no file locks ({error.strerror}): never start the same run twice")
        self.lock, self.mine = lock, True

    def release(self) -> None:
        if self.lock is not None:
            self.lock.close()
        self.lock, self.mine = None, False

    def begin(self, environment: dict[str, Any]) -> None:
        """Make the folder ready to be written; scores of a shorter training go, they are not this run's any more."""
        for torn in self.folder.glob(".*.tmp"):  # of a process that was killed while it wrote
            torn.unlink(missing_ok=True)
        self.pictures.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "config.yaml", yaml.safe_dump(asdict(self.config), sort_keys=False).encode())
        for name in ("evaluation.json", "requeue"):
            (self.folder / name).unlink(missing_ok=True)
        path = self.folder / "environment.json"
        sessions = json.loads(path.read_text()) if path.exists() else []
        write_atomically(path, json.dumps([*sessions, environment], indent=2).encode() + b"\n")

    def tell(self, state: str, step: int, max_steps: int, reason: str = "") -> None:
        """state.json, which `segtrain runs` reads: at once for a change, else every ten seconds."""
        now = time.time()
        if state == "running" and now - self.told < 10:
            return
        self.told = now
        content = {"state": state, "step": step, "max_steps": max_steps, "reason": reason, "heartbeat": now}
        write_atomically(self.folder / "state.json", json.dumps(content).encode() + b"\n")


def modified(path: Path) -> int | None:
    """When a file was written, in ns."""
    return path.stat().st_mtime_ns if path.exists() else None


def environment(world: World) -> dict[str, Any]:
    """Where and with what a session of a run is computed; `git`: of the code that is imported, and of the folder."""
    import torch

    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(sys.argv),
        "host": socket.gethostname(),
        "processes": world.size,
        "segtrain": segtrain.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": str(torch.__version__),  # a class of its own, which checkpoints cannot hold
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "cards": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "git": {"segtrain": git_state(Path(__file__).parent), "here": git_state(Path.cwd())},
    }


def git_state(folder: Path) -> str | None:
    """'<commit>' or '<commit>, with changes'; None where there is no git or no repository."""
    try:
        answers = [
            subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True)
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    commit, changes = (answer.stdout.strip() for answer in answers)
    return f"{commit}, with changes" if changes else commit


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"trainer.seed": 0, ...}"""
    result: dict[str, Any] = {}
    for key, value in config.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return result


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of everything that would alter the run. A longer one than before is allowed."""
    before, after = flat(old), flat(new)
    found = []
    for key in sorted(before.keys() | after.keys()):
        was, now = before.get(key, "not set"), after.get(key, "not set")
        numbers = isinstance(was, int | float) and isinstance(now, int | float)
        longer = key in LENGTHS and numbers and now > was
        if was != now and not is_safe(key) and not longer:
            found.append((key, was, now))
    return found


class Preempted(SegtrainError):
    """The run was asked to stop and has saved itself."""

    def __init__(self, text: str, exit_status: int, everywhere: bool = True) -> None:
        super().__init__(text)
        self.exit_status = exit_status
        self.everywhere = everywhere
        self.quiet = not everywhere and os.environ.get("RANK", "0") != "0"


REQUEUE = 75  # exit status: saved, start me again
AGAIN = 2.0  # seconds within which a launcher repeats the Ctrl-C that a terminal has sent to all


class Preemption:
    """Turns Ctrl-C (exit status 130) and SIGTERM or SIGUSR1 (75: requeue me) into a stop at the end of the step.

    `status` is 0 until then. A later Ctrl-C stops at once, and so does any signal while `stepping` is not set: before
    the first step there is nothing to save. The handlers of before come back at the end.
    """

    def __init__(self) -> None:
        self.status = 0
        self.stepping = False
        self.since = 0.0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            if hasattr(signal, "SIGUSR1"):  # not on Windows
                numbers.append(signal.SIGUSR1)
            self.before = {number: signal.signal(number, self.handle) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.status:
            # A scheduler's second signal only hurries; a person's stops at once.
            if number != signal.SIGINT or (process_count() > 1 and time.monotonic() - self.since < AGAIN):
                return
            raise KeyboardInterrupt
        self.since = time.monotonic()
        self.status = 130 if number == signal.SIGINT else REQUEUE
        if not self.stepping:
            raise Preempted("stopped before the first step; what was saved is untouched", self.status, False)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            os.write(2, b"\nstopping at the end of this step; Ctrl-C once more stops at once, without saving\n")

    def agreed(self, world: World) -> int:
        """The status that any process was asked for; the same everywhere, Ctrl-C before requeueing."""
        asked = world.all_reduce(self.status == 130, self.status == REQUEUE)
        return 130 if asked[0] else REQUEUE if asked[1] else 0

    def watch(self, items: Iterable[T], rounds: int, world: World, stop: Callable[[int], Exception]) -> Iterator[T]:
        """The items, until a stop is asked for: then `stop(status)` is raised, by all processes in the same round.

        rounds: at least the number of items, and the same for all processes.
        """
        iterator = iter(items)
        for _ in range(rounds):
            status = self.agreed(world)
            if status:
                raise stop(status)
            item = next(iterator, None)
            if item is not None:
                yield item
