"""segtrain: semantic segmentation training with In-Place Activated BatchNorm."""

import importlib
import os
from typing import Any

# albumentations asks the package index for its newest version at import, up to two seconds a process.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """train, evaluate and load, imported when they are first used: torch takes seconds."""
    places = {"train": "segtrain.training", "evaluate": "segtrain.evaluation", "load": "segtrain.evaluation"}
    if name not in places:
        raise AttributeError(f"module 'segtrain' has no attribute {name!r}")
    return getattr(importlib.import_module(places[name]), name)
