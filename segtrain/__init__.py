"""segtrain: semantic segmentation training with In-Place Activated BatchNorm."""

import importlib
import os
from typing import Any

# albumentations asks the package index for its newest version at import, up to two seconds a process.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

__version__ = "0.1.0"


# What Python users call -> where it is.
PLACES = {
    "compose": "segtrain.config.compose:compose_training",
    "train": "segtrain.engine.train:train",
    "evaluate": "segtrain.commands.evaluate:evaluate",
    "load": "segtrain.scoring.predictor:load_predictor",
}


def __getattr__(name: str) -> Any:
    """Imported when first used: torch takes seconds."""
    if name not in PLACES:
        raise AttributeError(f"module 'segtrain' has no attribute {name!r}")
    module, function = PLACES[name].split(":")
    return getattr(importlib.import_module(module), function)
