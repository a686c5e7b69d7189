"""Options of what a training records: logging.*"""

import importlib.util
import sys
from dataclasses import dataclass
from typing import ClassVar

from segtrain.config.options import MOST_PICTURES, MOST_STEPS, Group, option, require


@dataclass
class LoggingConfig(Group):
    PREFIX: ClassVar[str] = "logging."

    every: int = option(20, "steps between progress lines", low=1, limit=MOST_STEPS)
    pictures: int = option(
        6, "number of validation images drawn with target and prediction", low=0, limit=MOST_PICTURES
    )
    train_sample: int = option(
        64, "training images to score at each validation, and the loss of both; 0: neither", low=0, limit=MOST_PICTURES
    )
    wandb: bool = option(False, "Weights & Biases too; WANDB_MODE=offline keeps it in the run folder")
    mlflow: bool = option(False, "MLflow too, at MLFLOW_TRACKING_URI, else in the folder mlruns")
    project: str = option("segtrain", "project of Weights & Biases, experiment of MLflow")

    def check(self) -> None:
        super().check()
        for name, package in (("wandb", "wandb"), ("mlflow", "mlflow-skinny")):
            missing = getattr(self, name) and not installed(name)
            require(not missing, f"logging.{name}", "true", f"the package is not installed: pip install {package}")


def installed(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    if module in sys.modules:
        return sys.modules[module] is not None
    return importlib.util.find_spec(module) is not None
