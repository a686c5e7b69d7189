"""Logs of a run: metrics.jsonl, TensorBoard, and optionally wandb or MLflow."""

import importlib
import io
import json
import math
import os
import re
import socket
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from segtrain.config import LoggingConfig
from segtrain.console import as_utf8, say
from segtrain.files import append, side_file, write_atomically

MAX_WAITING = 1 << 26  # bytes of TensorBoard events that wait for room on the disk


class Sink(Protocol):
    """One log of scalars and images."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def image(self, step: int, name: str, image: np.ndarray) -> None: ...

    def close(self, final: Mapping[str, float] | None) -> None: ...


class RunLog:
    """metrics.jsonl, TensorBoard events, and the further logs that `config` asks for.

    hyperparameters: {"optimizer.lr": 0.01, ...}. Opened at `step`, it removes what an interrupted run wrote beyond
    that step, so that a resumed run has the log of an uninterrupted one (wandb and MLflow keep both points). again:
    the validation of `step` is going to be logged, whether or not it was before. A full disk is a warning; lines that
    find no room are written with a later one.
    """

    def __init__(
        self, folder: Path, step: int, config: LoggingConfig, hyperparameters: Mapping[str, Any], again: bool = False
    ) -> None:
        self.path = folder / "metrics.jsonl"
        kept = kept_lines(self.path, step, again)
        self.waiting = b""
        with side_file(self.path):
            write_atomically(self.path, "".join(f"{line}\n" for line in kept).encode())
        self.sinks: list[tuple[Path, Sink]] = []
        if as_utf8(str(folder)) == str(folder):
            tensorboard = TensorBoard(folder, step if again else step + 1, hyperparameters)
            self.sinks.append((folder / "tensorboard", tensorboard))
        else:
            say("WARNING    TensorBoard cannot write into a folder whose name is not UTF-8; metrics.jsonl has it all")
        if again:  # TensorBoard drops all of a step
            for values in (json.loads(line) for line in kept if line_step(line) == step):
                self.to_sinks(step, {name: value for name, value in values.items() if name != "step"})
        if config.wandb:
            self.sinks.append((folder / "wandb", Wandb(folder, config.project, hyperparameters)))
        if config.mlflow:
            self.sinks.append((folder / "mlflow", MLflow(folder, config.project, hyperparameters)))

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Add a line to metrics.jsonl, and a point per value to the other logs, which have no point for None."""
        self.waiting += json.dumps({"step": step, **values}).encode() + b"\n"
        with side_file(self.path):
            append(self.path, self.waiting)
            self.waiting = b""
        self.to_sinks(step, values)

    def to_sinks(self, step: int, values: Mapping[str, float | None]) -> None:
        for path, sink in self.sinks:
            with side_file(path):
                sink.scalars(step, {name: value for name, value in values.items() if value is not None})

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """RGB uint8 (H, W, 3)."""
        for path, sink in self.sinks:
            with side_file(path):
                sink.image(step, name, image)

    def close(self, final: Mapping[str, float] | None = None) -> None:
        """final: the scores of a finished run, shown with its hyper-parameters; None for an interrupted one."""
        for path, sink in self.sinks:
            with side_file(path):
                sink.close(final)


def kept_lines(path: Path, step: int, again: bool) -> list[str]:
    """The lines of metrics.jsonl up to a step, without its validation if that comes again."""
    lines = path.read_bytes().decode(errors="replace").splitlines() if path.exists() else []
    damaged = [line for line in lines[:-1] if line_step(line) == math.inf]  # the last may be cut short: a kill
    if damaged:
        say(f"damaged    {path}: {len(damaged)} of {len(lines)} lines are no metrics and are removed")
    kept = [line for line in lines if line_step(line) <= step]
    return [line for line in kept if not (again and line_step(line) == step and '"val/' in line)]


class TensorBoard:
    """One event file a session. A reader drops what earlier files have from `purge_step` on.

    Events are on the disk when a call returns: torch's own writer keeps them in a thread for two minutes, where a kill
    loses them and a full disk is a traceback.
    """

    def __init__(self, folder: Path, purge_step: int, hyperparameters: Mapping[str, Any]) -> None:
        # Imported here because they take longer than everything else in this file.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from torch.utils.tensorboard import summary

        self.event: Any = Event
        self.summary: Any = summary
        self.hyperparameters = hyperparameters
        self.step = purge_step - 1
        place = folder / "tensorboard"
        earlier = [path.name.split(".")[3] for path in place.glob("events.out.tfevents.*")]
        newest = max((int(stamp) for stamp in earlier if stamp.isdigit()), default=0)  # readers go by the names
        stamp = max(int(time.time()), newest + 1)
        self.path = place / f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}.0"
        self.waiting = b""
        with side_file(self.path):
            place.mkdir(parents=True, exist_ok=True)
            self.add(Event(wall_time=time.time(), file_version="brain.Event:2"))
            self.add(Event(wall_time=time.time(), step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, event: Any) -> None:
        """Write an event, with those that found no room before."""
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        if len(self.waiting) > MAX_WAITING:  # of pictures, on a disk that stays full
            self.waiting = b""
        self.waiting += record.getvalue()
        append(self.path, self.waiting)
        self.waiting = b""

    def add_summary(self, step: int, content: Any) -> None:
        self.add(self.event(wall_time=time.time(), step=step, summary=content))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.step = step
        for name, value in values.items():
            self.add_summary(step, self.summary.scalar(as_utf8(name), value))

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self.add_summary(step, self.summary.image(name, image, dataformats="HWC"))

    def close(self, final: Mapping[str, float] | None) -> None:
        if final is None:
            return
        plain = {
            k: v if isinstance(v, bool | int | float) else as_utf8(str(v)) for k, v in self.hyperparameters.items()
        }
        scores = {f"final/{name}": value for name, value in final.items()}
        # At the last step, so that a session that does it again replaces them.
        for content in self.summary.hparams(plain, scores):
            self.add_summary(self.step, content)
        self.scalars(self.step, scores)


class Wandb:
    """A run on wandb; WANDB_MODE=offline writes it to the run folder. It has a metric "step", because wandb's own steps
    cannot go back."""

    def __init__(self, folder: Path, project: str, hyperparameters: Mapping[str, Any]) -> None:
        self.wandb = importlib.import_module("wandb")
        path = folder / "wandb_run"
        if not path.exists() or not path.read_bytes().strip():
            write_atomically(path, uuid.uuid4().hex[:12].encode())
        self.run = self.wandb.init(
            project=project, id=path.read_text(), name=folder.name, dir=str(folder), resume="allow",
            config=dict(hyperparameters),
        )  # fmt: skip
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({**values, "step": step})

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self.run.log({name: self.wandb.Image(image), "step": step})

    def close(self, final: Mapping[str, float] | None) -> None:
        if final is not None:
            self.run.summary.update({f"final/{name}": value for name, value in final.items()})
        self.run.finish(exit_code=1 if final is None else 0)


class MLflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI, else in the folder mlruns, which mlflow-skinny supports alone."""

    def __init__(self, folder: Path, project: str, hyperparameters: Mapping[str, Any]) -> None:
        self.mlflow = importlib.import_module("mlflow")
        if "MLFLOW_TRACKING_URI" not in os.environ:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # required by newer versions
            self.mlflow.set_tracking_uri(Path("mlruns").absolute().as_uri())
        self.mlflow.set_experiment(project)
        path = folder / "mlflow_run"
        known = (path.read_text() if path.exists() else "") or None
        run = self.mlflow.start_run(run_id=known, run_name=None if known else folder.name)
        if known is None:  # parameters cannot be written twice
            write_atomically(path, str(run.info.run_id).encode())
            self.mlflow.log_params({self.name(key): value for key, value in hyperparameters.items()})

    @staticmethod
    def name(text: str) -> str:
        """The text with only the characters that MLflow allows."""
        return re.sub(r"[^\w\-. /:]", "_", text)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.mlflow.log_metrics({self.name(name): value for name, value in values.items()}, step=step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self.mlflow.log_image(image, f"{self.name(name)}_{step:07d}.png")

    def close(self, final: Mapping[str, float] | None) -> None:
        if final is not None:
            self.mlflow.log_metrics({self.name(f"final/{name}"): value for name, value in final.items()})
        self.mlflow.end_run("KILLED" if final is None else "FINISHED")


def line_step(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite for a line that was cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")
