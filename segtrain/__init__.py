"""segtrain: semantic segmentation training with In-Place Activated BatchNorm.

>>> import segtrain
>>> folder = segtrain.train(segtrain.compose("experiment=toy"))   # the words of `segtrain train`
>>> segtrain.evaluate(folder)["miou"]                             # a run folder or a checkpoint
>>> network = segtrain.load(folder)
>>> classes = network.predict("photo.jpg")                        # or a PIL image, an array, a tensor
"""

import importlib
import os
from typing import Any

# albumentations asks the package index for its newest version at import, up to two seconds a process.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

__version__ = "0.1.0"


# What Python users call -> where it is. __init__.pyi has the types.
PLACES = {
    "compose": "segtrain.cli.python:compose_command",
    "train": "segtrain.engine.train:train",
    "evaluate": "segtrain.cli.python:evaluate_checkpoint",
    "load": "segtrain.scoring.predictor:load_predictor",
}
__all__ = ["compose", "evaluate", "load", "train"]


def __getattr__(name: str) -> Any:
    """Imported when first used: torch takes seconds."""
    if name not in PLACES:
        raise AttributeError(f"module 'segtrain' has no attribute {name!r}")
    module, function = PLACES[name].split(":")
    return getattr(importlib.import_module(module), function)


def __dir__() -> list[str]:
    return sorted({*globals(), *PLACES})
