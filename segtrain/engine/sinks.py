"""Where a run's figures go: metrics.jsonl, TensorBoard, and wandb or mlflow where they are wanted."""

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
from segtrain.files import write_atomically


class Outlet(Protocol):
    """Where a run's figures go."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def picture(self, step: int, name: str, picture: np.ndarray) -> None: ...

    def close(self, final: Mapping[str, float] | None) -> None: ...


class RunLog:
    """metrics.jsonl, TensorBoard events, and what `config` asks for besides, of one run.

    hyperparameters: {"optimizer.lr": 0.01, ...}. Opened at `step`, it forgets what an interrupted run wrote beyond
    that step, so that a resumed run's record is that of an uninterrupted one (wandb and mlflow keep both points).
    """

    def __init__(self, folder: Path, step: int, config: LoggingConfig, hyperparameters: Mapping[str, Any]) -> None:
        self.path = folder / "metrics.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if line_step(line) <= step]
        write_atomically(self.path, "".join(f"{line}\n" for line in kept).encode())
        self.outlets: list[Outlet] = [TensorBoard(folder, step, hyperparameters)]
        if config.wandb:
            self.outlets.append(Wandb(folder, config.project, hyperparameters))
        if config.mlflow:
            self.outlets.append(MLflow(folder, config.project, hyperparameters))

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """One line of metrics.jsonl and one point per value elsewhere; None, no value, is left out there."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for outlet in self.outlets:
            outlet.scalars(step, {name: value for name, value in values.items() if value is not None})

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """RGB uint8 (H, W, 3)."""
        for outlet in self.outlets:
            outlet.picture(step, name, picture)

    def close(self, final: Mapping[str, float] | None = None) -> None:
        """final: the results of a run that has come to its end, which its hyper-parameters are shown with."""
        for outlet in self.outlets:
            outlet.close(final)


class TensorBoard:
    def __init__(self, folder: Path, step: int, hyperparameters: Mapping[str, Any]) -> None:
        # Imported here: it takes longer than everything else in this file.
        from torch.utils.tensorboard import SummaryWriter

        self.hyperparameters = hyperparameters
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        self.writer.add_image(name, picture, step, dataformats="HWC")

    def close(self, final: Mapping[str, float] | None) -> None:
        if final is not None:
            # run_name: else they would be a run of their own, in a folder named by the time.
            plain = {
                k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in self.hyperparameters.items()
            }
            self.writer.add_hparams(plain, {f"final/{name}": value for name, value in final.items()}, run_name=".")
        self.writer.close()


class Wandb:
    """A run on wandb; WANDB_MODE=offline keeps it in the run folder. Steps are ours: wandb's own cannot go back."""

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

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        self.run.log({name: self.wandb.Image(picture), "step": step})

    def close(self, final: Mapping[str, float] | None) -> None:
        if final is not None:
            self.run.summary.update({f"final/{name}": value for name, value in final.items()})
        self.run.finish(exit_code=1 if final is None else 0)


class MLflow:
    """A run of MLflow, where MLFLOW_TRACKING_URI says, else in the folder mlruns: all that mlflow-skinny can alone."""

    def __init__(self, folder: Path, project: str, hyperparameters: Mapping[str, Any]) -> None:
        self.mlflow = importlib.import_module("mlflow")
        if "MLFLOW_TRACKING_URI" not in os.environ:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # which newer versions want to hear
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
        """With the signs that MLflow takes."""
        return re.sub(r"[^\w\-. /:]", "_", text)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.mlflow.log_metrics({self.name(name): value for name, value in values.items()}, step=step)

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        self.mlflow.log_image(picture, f"{self.name(name)}_{step:07d}.png")

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
