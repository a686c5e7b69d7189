"""Scores from one int64 confusion matrix over a whole data set, by the Cityscapes rules."""

from typing import Any

import numpy as np

from segtrain.data.labels import IGNORE


class ConfusionMatrix:
    """Pixel counts, ground truth x prediction.

    counts: int64 (C, C + 1); the last column counts labelled pixels for which something outside the C classes was
    predicted: a miss of the true class, a false alarm of none. Pixels without a label never count.
    """

    def __init__(self, num_classes: int) -> None:
        self.counts = np.zeros((num_classes, num_classes + 1), np.int64)

    def add(self, target: np.ndarray, prediction: np.ndarray) -> None:
        """target, prediction: uint8 train ids of one shape."""
        if target.shape != prediction.shape:
            raise ValueError(f"target {target.shape} and prediction {prediction.shape} differ in shape")
        joint = (target.astype(np.uint16) << 8) | prediction
        table = np.bincount(joint.ravel(), minlength=1 << 16).reshape(256, 256)
        classes = len(self.counts)
        rows = table[:classes]
        self.counts[:, :classes] += rows[:, :classes]
        self.counts[:, classes] += rows[:, classes:].sum(1)
        if table[classes:IGNORE].any():
            raise ValueError(f"target holds values from {classes} to {IGNORE - 1}, which are neither class nor ignored")

    def iou(self) -> np.ndarray:
        """TP / (TP + FP + FN) float64 (C,); NaN for a class neither labelled nor predicted on a labelled pixel."""
        hits = np.diagonal(self.counts)
        union = self.counts.sum(1) + self.counts[:, :-1].sum(0) - hits
        return np.divide(hits, union, out=np.full(len(hits), np.nan), where=union > 0)

    def scores(self, names: list[str]) -> dict[str, Any]:
        """miou, pixel_accuracy and per_class as fractions; None (JSON null) for what is left out, never NaN."""
        iou = self.iou()
        labelled = int(self.counts.sum())
        return {
            "miou": None if np.isnan(iou).all() else float(np.nanmean(iou)),
            "pixel_accuracy": float(np.trace(self.counts) / labelled) if labelled else None,
            "per_class": {name: None if np.isnan(v) else float(v) for name, v in zip(names, iou, strict=True)},
            "classes_averaged": int((~np.isnan(iou)).sum()),
            "classes_in_ground_truth": int((self.counts.sum(1) > 0).sum()),
        }


class PositionPrior:
    """A predictor that never looks at the picture: for each place the class most often found there in training.

    Places are cells of a grid that every picture is stretched onto. Its mIoU is what position alone is worth.
    """

    def __init__(self, num_classes: int, grid: tuple[int, int] = (64, 128)) -> None:
        self.grid = grid
        self.counts = np.zeros((*grid, num_classes), np.int64)

    def cells(self, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Grid row of each picture row, grid column of each picture column."""
        rows, columns = (np.arange(n) * cells // n for n, cells in zip(shape, self.grid, strict=True))
        return rows[:, None], columns[None, :]

    def add(self, target: np.ndarray) -> None:
        """target: uint8 (H, W) train ids of a training picture."""
        classes = self.counts.shape[2]
        rows, columns = self.cells(target.shape)
        known = target < classes
        flat = ((rows * self.grid[1] + columns) * classes + np.where(known, target, 0))[known]
        self.counts += np.bincount(flat, minlength=self.counts.size).reshape(self.counts.shape)

    def predict(self, shape: tuple[int, ...]) -> np.ndarray:
        """uint8 (H, W) train ids for a picture of that shape."""
        return self.counts.argmax(2).astype(np.uint8)[self.cells(shape)]
