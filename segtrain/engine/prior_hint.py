"""What to change where a trained network scores no better than a pixel's position alone."""

from collections.abc import Mapping
from typing import Any

from segtrain.config import TrainConfig

GOOD_RATE = 0.1  # trains small networks from random weights: see configs/README.md, CamVid


def prior_hint(config: TrainConfig, result: Mapping[str, Any]) -> list[str]:
    """A line for the summary of a run, in a list; [] where the network is better. result: of evaluation.json."""
    score, prior = result.get("miou"), result.get("position_prior_miou")
    if score is None or prior is None or score > prior:
        return []
    optimizer, model, changes = config.optimizer, config.model, list[str]()
    if model.weights == "none":
        if optimizer.name == "sgd" and optimizer.lr < GOOD_RATE:
            least = "" if config.loss.name == "cross_entropy" else " loss=cross_entropy"
            changes.append(f"a higher rate (optimizer.lr={optimizer.lr:g}; {GOOD_RATE} optimizer.nesterov=true{least})")
        changes.append("pretrained weights (model.weights=FILE optimizer.lr=0.01; `segtrain weights` lists some)")
    else:
        changes.append(f"another rate (optimizer.lr={optimizer.lr:g})")
    length = next(
        f"trainer.{key}={value:g}"
        for key in ("max_steps", "epochs", "hours")
        if (value := getattr(config.trainer, key)) is not None
    )
    changes.append(f"a longer training ({length})")
    return [f"hint          no better than the position prior: it has learned little. Try {', '.join(changes)}"]
