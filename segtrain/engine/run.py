"""The folder of a run: which configuration it belongs to, and its files other than the checkpoints."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from segtrain.config import (
    LENGTHS,
    TrainConfig,
    adopt_earlier,
    flatten,
    is_safe,
    run_folder,
    store_rules,
    with_defaults,
)
from segtrain.config.options import as_written
from segtrain.console import duration, say
from segtrain.distributed.group import World
from segtrain.engine.normalisation import keep_normalisation
from segtrain.engine.preemption import Preempted
from segtrain.engine.prior_hint import prior_hint
from segtrain.engine.run_folder import repair, require_own
from segtrain.engine.run_reader import OTHER_INFERENCE
from segtrain.engine.state import TrainState
from segtrain.errors import REQUEUE, DataError
from segtrain.files import read_side_json, side_file, write_atomically
from segtrain.scoring.report import fingerprints, print_table, table_lines
from segtrain.weights import checkpoint

RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")  # set by a launcher that starts a job again


class Run:
    """runs/<name>/ of one configuration: last.pt, best.pt, step_*.pt, config.yaml, evaluation.json, metrics.jsonl,
    summary.txt, state.json, environment.json, blackbox/, pictures/, tensorboard/.

    Only the first process writes. For the checkpoints it knows the classes, the fingerprints of the training images
    (trained_on) and of what is in their files (contents), the host and versions of this session, and what the weights
    come from (provenance).
    """

    def __init__(self, config: TrainConfig, dist: World) -> None:
        self.folder = run_folder(config)
        self.last = self.folder / "last.pt"
        self.pictures = self.folder / "pictures"
        self.config = config
        self.dist = dist
        self.lock: Any = None
        self.claimed = False  # by this process
        self.changed = modified(self.last)
        self.source = self.last  # the checkpoint that the run goes on from
        self.state: TrainState | None = None  # how far it is, for state.json
        self.heartbeat = 0.0
        self.validated_before: int | None = None  # last step that was validated with another inference
        self.classes: dict[str, Any] = {}
        self.trained_on = torch.empty(0, dtype=torch.int64)
        self.contents: torch.Tensor | None = None
        self.session: dict[str, Any] = {}
        self.provenance: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """The part of a checkpoint that does not change while the run trains."""
        return {
            "config": asdict(self.config),
            "classes": self.classes,
            "trained_on": self.trained_on,
            "environment": self.session,
            "provenance": self.provenance,
        } | ({} if self.contents is None else {"contents": self.contents})

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """The scores of the finished run."""
        result: dict[str, Any] | None = read_side_json(self.folder / "evaluation.json", dict)
        return result

    # ------------------------------------------------------------------------------------ whether the run can continue

    def restore(self) -> dict[str, Any] | None:
        """The newest checkpoint if this run began earlier, else None. restart=true moves the earlier run aside.

        DataError if the folder belongs to another configuration, or to no run at all.
        """
        if self.dist.main:
            require_own(self.folder)
        if self.dist.main and self.config.restart:
            if any(int(os.environ.get(count) or 0) for count in RESTARTS):
                say("restart=true applies to the first start of this job; a requeued one goes on")
            else:
                self.move_aside()
        self.changed = modified(self.last)
        found = checkpoint.newest_file(self.folder)
        if found is None:
            store_rules(self.config.dataset)
            return None
        self.source, saved = found
        adopt_chosen(self.config, saved["config"])
        for key, value in adopt_earlier(self.config.dataset, saved["config"].get("dataset", {})).items():
            say(f"dataset.{key}={value}, as the run began before there was this option")
        store_rules(self.config.dataset)
        keep_normalisation(self.config, saved["config"])
        changes = config_changes(with_defaults(saved["config"]), asdict(self.config))
        if changes:
            listed = "\n".join(f"  {key}: {old} in the run, {new} asked for" for key, old, new in changes)
            raise DataError(
                f"{self.folder} belongs to another configuration:\n{listed}\n"
                f"add name=ANOTHER_NAME for a run of its own (model.weights={self.last} begins it with this one's "
                "weights), or restart=true to move the old one aside"
            )
        before, now = flatten(saved["config"]), flatten(asdict(self.config))
        self.note_inference(saved, flatten(with_defaults(saved["config"])), now)
        for key in LENGTHS:
            if before.get(key) != now[key]:
                patience, best = self.config.trainer.patience, saved.get("best", {})
                if patience is not None and best.get("since", 0) >= patience:  # it has ended early, and goes on now
                    saved["best"] = best | {"since": 0}
                longer = "from here on the learning rate is that of the longer run"
                say(f"{key}={now[key]} instead of {before.get(key)}: {longer}")
        return saved

    def note_inference(self, saved: dict[str, Any], before: dict[str, Any], now: dict[str, Any]) -> None:
        """Where inference.* is another than before, begin the best score anew: best.pt must not mix two of them."""
        changed = [key for key in now if key.startswith("inference.") and now[key] != before.get(key)]
        if not changed:
            return
        listed = ", ".join(f"{key}={as_written(now[key])} instead of {as_written(before.get(key))}" for key in changed)
        best, patience = saved.get("best", {}), self.config.trainer.patience
        since = best.get("since", 0)
        ended = patience is not None and since >= patience  # then there is no further validation
        saved["best"] = {"since": since if ended else 0}
        self.validated_before = saved.get("validated", 0)
        say(f"{listed}: scores differ from those before; best.pt is chosen among the validations from here on")

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

    def require_same_step(self, step: int) -> None:
        """DataError if the processes have restored different checkpoints. A collective call."""
        steps = self.dist.all_gather(step)
        if len(set(steps)) > 1:
            raise DataError(
                f"the processes find different checkpoints in {self.folder} (steps {steps}): give run=FOLDER on a disk "
                "that all machines share"
            )

    def set_images(self, image_ids: list[str], saved: dict[str, Any] | None) -> None:
        """Note the training images. DataError if the saved run began with others: order and crops would change."""
        self.trained_on = trained_on = fingerprints(image_ids)
        before = None if saved is None else saved.get("trained_on")
        self.contents = (saved or {}).get("contents")
        if before is not None and not torch.equal(before, trained_on):
            raise DataError(
                f"{self.folder} was trained on {len(before)} images, and these are {len(trained_on)} others: the run "
                "cannot go on with them. Give dataset.root of the same data, or name=ANOTHER_NAME for a run of its own"
            )

    # ------------------------------------------------------------------------------------ while it trains

    def begin(
        self, state: TrainState, classes: dict[str, Any], session: dict[str, Any], contents: list[int] | None = None
    ) -> None:
        """Claim the folder and make it ready. Scores of a shorter training are removed: they are outdated.

        contents: hashes of the files of the training images, which are added to those of earlier sessions.
        """
        if self.validated_before is not None:
            session = session | {OTHER_INFERENCE: self.validated_before}
        self.state, self.classes, self.session = state, classes, session
        if contents is not None:
            before = [] if self.contents is None else self.contents.tolist()
            self.contents = torch.tensor(sorted({*contents, *before}), dtype=torch.int64)
        if not self.dist.main:
            return
        self.claim()
        self.write_config()
        self.report("running")  # from here on the folder is known as a run's
        self.tidy(state)
        for name in ("evaluation.json", "images.npz", "summary.txt", "confusion.png", "requeue"):
            (self.folder / name).unlink(missing_ok=True)
        path = self.folder / "environment.json"
        sessions = [item for item in read_side_json(path, list) or [] if isinstance(item, dict)]
        write_atomically(path, json.dumps([*sessions, session], indent=2).encode() + b"\n")

    def write_config(self) -> None:
        if self.dist.main:
            write_atomically(self.folder / "config.yaml", yaml.safe_dump(asdict(self.config), sort_keys=False).encode())

    def tidy(self, state: TrainState) -> None:
        """Mend what a killed session has left undone or half written. The folder is claimed."""
        for place in (self.folder, self.folder / "blackbox", self.pictures):  # evaluations/ may be written just now
            for torn in place.glob(".*.tmp"):
                torn.unlink(missing_ok=True)
        self.pictures.mkdir(parents=True, exist_ok=True)
        if self.source.exists():
            repair(self.folder, self.source, state)

    def claim(self) -> None:
        """Lock the folder. DataError if another process trains in it at this moment."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.changed != modified(self.last):
            raise DataError(f"{self.folder} has been trained on meanwhile: start again, to go on from there")
        try:
            import fcntl
        except ImportError:  # Windows
            self.claimed = True
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
        self.lock, self.claimed = lock, True

    def release(self) -> None:
        if self.lock is not None:
            self.lock.close()
        self.lock, self.claimed = None, False

    def report(self, status: str, reason: str = "") -> None:
        """Write state.json, which `segtrain runs` reads: at once for a change, else every ten seconds.

        status: running, stopped, failed or finished.
        """
        now = time.time()
        if status == "running" and now - self.heartbeat < 10:
            return
        self.heartbeat = now
        step, max_steps = (0, 0) if self.state is None else (self.state.step, self.state.max_steps or 0)
        if status == "finished":
            max_steps = max_steps or step
        content = {"state": status, "step": step, "max_steps": max_steps, "reason": reason, "heartbeat": now}
        write_atomically(self.folder / "state.json", json.dumps(content).encode() + b"\n")

    # ------------------------------------------------------------------------------------ how it ends

    def report_finished(self, state: TrainState) -> Path:
        """Print the scores of a run that has nothing left to train. Returns the folder.

        A run that was killed after it wrote its scores is finished now.
        """
        longer = " More steps (trainer.max_steps= or epochs=) or patience go on." if state.stalled else ""
        say(f"{self.folder} is finished ({state.step} steps): nothing to do. restart=true trains it anew.{longer}")
        scores = self.evaluation or {}
        status = read_side_json(self.folder / "state.json", dict) or {}
        if self.dist.main and (status.get("state") != "finished" or not (self.folder / "summary.txt").exists()):
            self.state = state
            self.claim()
            self.tidy(state)
            self.finish(state, table_lines(scores))
        else:
            print_table(scores)
        return self.folder

    def finish(self, state: TrainState, lines: list[str]) -> None:
        """Print and write the summary. lines: the table of the last validation."""
        split = self.config.dataset.val_split
        lines = [
            *lines,
            *prior_hint(self.config, self.evaluation or {}),
            f"training      {state.step} steps in {duration(state.elapsed)}, seed {self.config.trainer.seed}",
            f"checkpoints   {self.last} and best.pt (selected on {split}, {state.best_score()})",
            *(
                ["evaluation    run= takes best.pt, as trainer.patience is set; checkpoint=last the table's last.pt"]
                if self.config.trainer.patience is not None
                else []
            ),
            *([f"pictures      {self.pictures}"] if any(self.pictures.glob("*")) else []),
            f"TensorBoard   tensorboard --logdir {self.folder}",
        ]
        for line in lines:
            say(line)
        write_atomically(self.folder / "summary.txt", os.fsencode("\n".join([*lines, ""])))
        self.report("finished")

    def report_error(self, error: Exception) -> None:
        """Note the error in state.json, and ask to be requeued if that is its exit status."""
        step = 0 if self.state is None else self.state.step
        with side_file(self.folder / "state.json"):  # a full disk must not hide the error
            if self.dist.main and self.claimed:
                self.report("stopped" if isinstance(error, Preempted) else "failed", str(error) or type(error).__name__)
            if self.dist.main and getattr(error, "exit_status", 1) == REQUEUE and self.folder.is_dir():
                write_atomically(self.folder / "requeue", f"step {step}\n".encode())


@contextlib.contextmanager
def open_run(config: TrainConfig, dist: World) -> Iterator[Run]:
    """The run of a configuration. On leaving, its lock is released and an error is noted in its folder."""
    run = Run(config, dist)
    try:
        yield run
    except Exception as error:
        run.report_error(error)
        if getattr(error, "everywhere", False):
            dist.all_reduce(0.0)  # a launcher ends all processes as soon as one has left
        raise
    finally:
        run.release()


def modified(path: Path) -> int | None:
    """When a file was written, in ns."""
    return path.stat().st_mtime_ns if path.exists() else None


# ------------------------------------------------------------------------------------------------ configurations


def adopt_chosen(config: TrainConfig, stored: dict[str, Any]) -> None:
    """Take over what the run has chosen by the memory of its device, or counted: a resume never chooses again."""
    if config.trainer.batch_size == "auto":
        config.trainer.batch_size = stored["trainer"]["batch_size"]
    if config.loss.class_weights == "auto" and isinstance(stored["loss"].get("class_weights"), list):
        config.loss.class_weights = stored["loss"]["class_weights"]
    if config.trainer.auto_fit and stored["trainer"].get("auto_fit"):
        config.model.recompute, config.model.keep = stored["model"]["recompute"], stored["model"]["keep"]
        config.trainer.accumulation = stored["trainer"]["accumulation"]


def config_changes(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of everything that would alter the run. A longer one than before is allowed."""
    before, after = flatten(old), flatten(new)
    changes = []
    for key in sorted(before.keys() | after.keys()):
        was, now = before.get(key, "not set"), after.get(key, "not set")
        numbers = isinstance(was, int | float) and isinstance(now, int | float)
        longer = key in LENGTHS and numbers and now > was
        if was != now and not is_safe(key) and not longer:
            changes.append((key, was, now))
    return changes
