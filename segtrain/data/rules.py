"""How each benchmark averages, as plain data; segtrain.scoring interprets it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np


class Rules(NamedTuple):
    """How a benchmark averages.

    absent: a class is left out of the mean where "union": nobody labelled it, nor predicted it on an evaluated pixel;
    "ground truth": nobody labelled it. ignored_prediction: an evaluated pixel for which an id outside the classes was
    predicted is a "miss" of its class, or "dropped". divisor: instance value // divisor is the label id, and `single`
    says which values are one object each (None: no instances). categories: a class's row -> the names of the groups
    it counts in, from coarse to fine. merged: whether an object taken for another class of its category is found, by
    the category's instance-weighted score.
    """

    source: str  # whose script this is
    absent: str = "union"
    ignored_prediction: str = "miss"
    divisor: int | None = None
    single: Callable[[np.ndarray], np.ndarray] | None = None
    categories: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda row: ()
    merged: bool = True


PLAIN = Rules("cityscapesScripts, classes only")
CITYSCAPES = Rules(
    "cityscapesScripts evalPixelLevelSemanticLabeling", divisor=1000, single=lambda values: values >= 1000,
    categories=lambda row: (row["category"],),
)  # fmt: skip
KITTI = CITYSCAPES._replace(
    source="KITTI devkit_semantics evalPixelLevelSemanticLabeling", divisor=256, single=lambda values: values % 256 > 0
)
VISTAS = Rules(
    "mapillary_vistas evaluation, with integer division", ignored_prediction="dropped", divisor=256,
    single=lambda values: values >= 0, merged=False,
    categories=lambda row: (row["name"].split("--")[0], "--".join(row["name"].split("--")[:2])),
)  # fmt: skip
COCOSTUFF = Rules("cocostuff evaluate_performance", absent="ground truth", categories=lambda row: (row["category"],))
