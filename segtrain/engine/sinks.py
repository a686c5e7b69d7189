"""Logs of a run: metrics.jsonl, TensorBoard, and optionally wandb or MLflow."""

import importlib
import json
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from segtrain.config import LoggingConfig
from segtrain.console import as_utf8, say
from segtrain.files import write_atomically


class Sink(Protocol):
    """One log of scalars and images."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def image(self, step: int, name: str, image: np.ndarray) -> None: ...

    def close(self, final: Mapping[str, float] | None) -> None: ...


class RunLog:
    """metrics.jsonl, TensorBoard events, and the further logs that `config` asks for.

    hyperparameters: {"optimizer.lr": 0.01, ...}. Opened at `step`, it removes what an interrupted run wrote beyond
    that step, so that a resumed run has the log of an uninterrupted one (wandb and MLflow keep both points).
    """

    def __init__(self, folder: Path, step: int, config: LoggingConfig, hyperparameters: Mapping[str, Any]) -> None:
        self.path = folder / "metrics.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if line_step(line) <= step]
        write_atomically(self.path, "".join(f"{line}\n" for line in kept).encode())
        self.sinks: list[Sink] = []
        if as_utf8(str(folder)) == str(folder):
            self.sinks.append(TensorBoard(folder, step, hyperparameters))
        else:
            say("WARNING    TensorBoard cannot write into a folder whose name is not UTF-8; metrics.jsonl has it all")
        if config.wandb:
            self.sinks.append(Wandb(folder, config.project, hyperparameters))
        if config.mlflow:
            self.sinks.append(MLflow(folder, config.project, hyperparameters))

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Add a line to metrics.jsonl, and a point per value to the other logs, which have no point for None."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for sink in self.sinks:
            sink.scalars(step, {name: value for name, value in values.items() if value is not None})

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """RGB uint8 (H, W, 3)."""
        for sink in self.sinks:
            sink.image(step, name, image)

    def close(self, final: Mapping[str, float] | None = None) -> None:
        """final: the scores of a finished run, shown with its hyper-parameters; None for an interrupted one."""
        for sink in self.sinks:
            sink.close(final)


class TensorBoard:
    def __init__(self, folder: Path, step: int, hyperparameters: Mapping[str, Any]) -> None:
        # Imported here because it takes longer than everything else in this file.
        from torch.utils.tensorboard import SummaryWriter

        self.hyperparameters = hyperparameters
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(as_utf8(name), value, step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self.writer.add_image(name, image, step, dataformats="HWC")

    def close(self, final: Mapping[str, float] | None) -> None:
        if final is not None:
            # Without run_name they would be a run of their own, in a folder named by the time.
            plain = {
                k: v if isinstance(v, bool | int | float) else as_utf8(str(v)) for k, v in self.hyperparameters.items()
            }
            self.writer.add_hparams(plain, {f"final/{name}": value for name, value in final.items()}, run_name=".")
        self.writer.close()


class Wandb:
    """A run on wandb; WANDB_MODE=offline writes it to the run folder. It has a metric "step", because wandb's own steps
    cannot go back."""

    def __init__(self, folder: Path, project: str, hyperparameters: Mapping[str, Any]) -> None:
        self.wandb = importlib.import_module("wandb")
        path = folder / "wandb_run"
        if not path.exists():
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
        known = path.read_text() if path.exists() else None
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
    except (ValueError, KeyError, TypeError):
        return float("inf")
