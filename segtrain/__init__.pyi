"""segtrain: semantic segmentation training with In-Place Activated BatchNorm."""

from typing import Literal, overload

from segtrain.cli.python import evaluate_checkpoint as evaluate
from segtrain.config import EvaluateConfig, PredictConfig, SubmitConfig, TrainConfig
from segtrain.engine.train import train as train
from segtrain.scoring.predictor import load_predictor as load

__all__ = ["compose", "evaluate", "load", "train"]
__version__: str

@overload
def compose(verb: Literal["evaluate"], /, *words: str, config_dir: str | None = None) -> EvaluateConfig: ...  # type: ignore[overload-overlap]
@overload
def compose(verb: Literal["predict"], /, *words: str, config_dir: str | None = None) -> PredictConfig: ...  # type: ignore[overload-overlap]
@overload
def compose(verb: Literal["submit"], /, *words: str, config_dir: str | None = None) -> SubmitConfig: ...  # type: ignore[overload-overlap]
@overload
def compose(*words: str, config_dir: str | None = None) -> TrainConfig: ...
