"""What to change where a trained network scores no better than a pixel's position alone."""

from collections.abc import Mapping
from typing import Any

from segtrain.config import TrainConfig
from segtrain.data.verify.suggest import RATE, TUNING_RATE


def prior_hint(config: TrainConfig, result: Mapping[str, Any]) -> list[str]:
    """A line for the summary of a run, in a list; [] where the network is better. result: of evaluation.json."""
    score, prior = result.get("miou"), result.get("position_prior_miou")
    if score is None or prior is None or score > prior:
        return []
    optimizer, model, changes = config.optimizer, config.model, list[str]()
    rate = RATE if model.weights == "none" else TUNING_RATE
    if optimizer.name == "sgd" and optimizer.lr < rate:
        least = "" if config.loss.name == "cross_entropy" else " loss=cross_entropy"
        changes.append(f"a higher rate (optimizer.lr={rate} optimizer.nesterov=true{least}, not {optimizer.lr:g})")
    elif model.weights != "none":
        changes.append(f"another rate than optimizer.lr={optimizer.lr:g}")
    if model.weights == "none":
        words = f"model.weights=FILE optimizer.lr={TUNING_RATE}"
        changes.append(f"pretrained weights ({words}; `segtrain weights` lists some)")
    length = next(
        f"trainer.{key}={value:g}"
        for key in ("max_steps", "epochs", "hours")
        if (value := getattr(config.trainer, key)) is not None
    )
    changes.append(f"a longer training than {length}")
    return [f"hint          no better than the position prior: it has learned little. Try {', '.join(changes)}"]
