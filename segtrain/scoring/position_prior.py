"""The baseline that knows a pixel's position only: what position alone is worth, in mIoU."""

from collections.abc import Sequence

import numpy as np

from segtrain.data.label_files import read_label
from segtrain.data.labels import LabelTable
from segtrain.data.sample import Sample

LABELS = 300  # training labels that it is counted from, at most


class PositionPrior:
    """A predictor that never looks at the image: at each place the class most frequent there in training.

    Places are the cells of a grid that is stretched over every image.
    """

    def __init__(self, num_classes: int, grid: tuple[int, int] = (64, 128)) -> None:
        self.grid = grid
        self.counts = np.zeros((*grid, num_classes), np.int64)

    @classmethod
    def from_labels(cls, samples: Sequence[Sample], table: LabelTable) -> "PositionPrior":
        """Count the labels of at most LABELS samples, evenly spread. DataError for a label that cannot be read."""
        prior = cls(table.num_classes)
        for sample in samples[:: max(1, -(-len(samples) // LABELS))]:
            if sample.label is not None:
                prior.add((sample.table or table).encode(read_label(sample.label, sample.replaced), sample.label))
        return prior

    def cells(self, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Grid row of each image row, grid column of each image column."""
        rows, columns = (np.arange(n) * cells // n for n, cells in zip(shape, self.grid, strict=True))
        return rows[:, None], columns[None, :]

    def add(self, target: np.ndarray) -> None:
        """target: uint8 (H, W) train ids of a training image."""
        classes = self.counts.shape[2]
        rows, columns = self.cells(target.shape)
        known = target < classes
        flat = ((rows * self.grid[1] + columns) * classes + np.where(known, target, 0))[known]
        self.counts += np.bincount(flat, minlength=self.counts.size).reshape(self.counts.shape)

    def predict(self, shape: tuple[int, ...]) -> np.ndarray:
        """Predict train ids uint8 (H, W) for an image of that shape."""
        return self.counts.argmax(2).astype(np.uint8)[self.cells(shape)]
