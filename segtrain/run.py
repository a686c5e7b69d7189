"""The folder of a run: whose it is, how far it got, and how it is interrupted."""

import json
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import yaml

from segtrain import checkpoint
from segtrain.config import TrainConfig
from segtrain.errors import DataError, SegtrainError
from segtrain.files import write_atomically
from segtrain.log import say

# What may differ when a run goes on: it changes where and how fast it runs and what it tells, not what it computes.
SAFE = ("experiment", "name", "run", "restart", "device", "dataset.root", "dataset.cache", "dataset.cache_dir",
        "loader.", "logging.", "plugins", "trainer.save_every", "trainer.validate_every",
        "trainer.check_data")  # fmt: skip

T = TypeVar("T")


def is_safe(key: str) -> bool:
    if key.startswith("dataset.parts.") and key.endswith(".root"):
        return True
    return key in SAFE or key.startswith(tuple(prefix for prefix in SAFE if prefix.endswith(".")))


class Run:
    """runs/<name>/ of one configuration: last.pt, best.pt, config.yaml, evaluation.json, metrics.jsonl, pictures/."""

    def __init__(self, config: TrainConfig) -> None:
        name = config.name or f"{config.dataset.name}_{config.model.backbone}"
        self.folder = Path(config.run or Path("runs") / name)
        self.last = self.folder / "last.pt"
        self.pictures = self.folder / "pictures"
        self.config = config

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """The scores of the finished run."""
        path = self.folder / "evaluation.json"
        result: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
        return result

    def resume(self) -> dict[str, Any] | None:
        """The content of last.pt if this very run began earlier; DataError if the folder is another run's."""
        if self.config.restart:
            self.move_aside()
        if not self.last.exists():
            return None
        state = checkpoint.load(self.last)
        changes = differences(state["config"], asdict(self.config))
        if changes:
            listed = "\n".join(f"  {key}: {old} in the run, {new} asked for" for key, old, new in changes)
            raise DataError(
                f"{self.folder} belongs to another configuration:\n{listed}\n"
                f"add name=ANOTHER_NAME for a run of its own, or restart=true to move the old one aside"
            )
        before, now = state["config"]["trainer"]["max_steps"], self.config.trainer.max_steps
        if before != now:
            say(f"{now} steps instead of {before}: from here on the learning rate is that of {now} steps")
        return state

    def move_aside(self) -> None:
        if not self.folder.exists():
            return
        number = 1
        while (aside := self.folder.with_name(f"{self.folder.name}.old-{number}")).exists():
            number += 1
        self.folder.rename(aside)
        say(f"moved the old run to {aside}")

    def begin(self) -> None:
        """Make the folder ready to be written; scores of a shorter training go, they are not this run's any more."""
        self.pictures.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "config.yaml", yaml.safe_dump(asdict(self.config), sort_keys=False).encode())
        (self.folder / "evaluation.json").unlink(missing_ok=True)


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"trainer.seed": 0, ...}"""
    result: dict[str, Any] = {}
    for key, value in config.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return result


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of everything that would alter the run. More steps than before are allowed."""
    before, after = flat(old), flat(new)
    found = []
    for key in sorted(before.keys() | after.keys()):
        was, now = before.get(key, "not set"), after.get(key, "not set")
        longer = key == "trainer.max_steps" and isinstance(was, int) and isinstance(now, int) and now > was
        if was != now and not is_safe(key) and not longer:
            found.append((key, was, now))
    return found


class Interrupted(SegtrainError):
    """The run was asked to stop and has saved itself."""

    def __init__(self, text: str, exit_status: int) -> None:
        super().__init__(text)
        self.exit_status = exit_status


class Interruption:
    """Turns Ctrl-C (exit status 130) and SIGTERM (75: requeue me) into a stop at the end of the step.

    `status` is 0 until then. A second signal stops at once. The handlers of before come back at the end.
    """

    def __init__(self) -> None:
        self.status = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.status:
            raise KeyboardInterrupt
        self.status = 130 if number == signal.SIGINT else 75
        os.write(2, b"\nstopping at the end of this step; once more stops at once, without saving\n")

    def error(self, path: Path, step: int) -> Interrupted:
        return Interrupted(f"stopped; {path} holds step {step}, and the same command goes on from there", self.status)

    def watch(self, items: Iterable[T], path: Path, step: int) -> Iterator[T]:
        """The items, until a stop is asked for: then `error` is raised."""
        for item in items:
            if self.status:
                raise self.error(path, step)
            yield item
