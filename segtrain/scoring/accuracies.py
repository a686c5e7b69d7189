"""Top-1 and top-5 accuracies of image classification, from counts that add up over processes."""

from typing import Any

import numpy as np

from segtrain.distributed.group import all_reduce_arrays
from segtrain.scoring.extra_metrics import METRICS, apply_metrics


class Accuracies:
    """Counts by class: int64 (C,) images seen, with the right class first, and with the right class among the best."""

    def __init__(self, classes: list[str]) -> None:
        count = len(classes)
        self.classes = classes
        self.seen, self.first, self.among = (np.zeros(count, np.int64) for _ in range(3))
        # Only plugins read it, and it is large where there are many classes.
        self.confusion = np.zeros((count, count + 1), np.int64) if METRICS else None

    def add(self, targets: np.ndarray, best: np.ndarray) -> None:
        """Count N images. targets: int64 (N,), their classes; best: int64 (N, k), the predicted ones, best first."""
        hits = best == targets[:, None]
        np.add.at(self.seen, targets, 1)
        np.add.at(self.first, targets, hits[:, 0])
        np.add.at(self.among, targets, hits.any(1))
        if self.confusion is not None:
            np.add.at(self.confusion, (targets, best[:, 0]), 1)

    def all_reduce(self) -> None:
        """Add up the counts of all processes of this command. A collective call."""
        all_reduce_arrays(self.first, self.among, self.seen, *([] if self.confusion is None else [self.confusion]))

    def result(self) -> dict[str, Any]:
        """Accuracies as fractions, ready for JSON; None for a class without images."""
        images = int(self.seen.sum())
        per_class = {
            name: float(first / seen) if seen else None
            for name, first, seen in zip(self.classes, self.first, self.seen, strict=True)
        }
        result = {"top1": int(self.first.sum()) / images, "top5": int(self.among.sum()) / images, "images": images}
        more = {} if self.confusion is None else apply_metrics(self.confusion)
        return result | {"per_class_top1": per_class} | more
