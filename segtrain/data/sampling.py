"""Class-uniform sampling, as the authors of the paper describe it (inplace_abn issue 31): a class, uniformly; an image
that contains it; a pixel of that class in it; a crop that contains that pixel."""

import numpy as np

from segtrain.console import Progress
from segtrain.data.labels import LabelTable
from segtrain.data.sample import Sample
from segtrain.data.verify.file_facts import FileFacts
from segtrain.data.verify.label_mistakes import counts_by_class
from segtrain.errors import UsageError
from segtrain.threads import threaded_map


class ClassIndex:
    """Which images contain which class. classes: the train ids that occur at all."""

    def __init__(self, present: np.ndarray) -> None:
        """present: bool (images, classes)."""
        self.images = [np.flatnonzero(column) for column in present.T]
        self.classes = [train_id for train_id, images in enumerate(self.images) if len(images)]
        if not self.classes:
            raise UsageError("sampling.class_uniform: not one labelled pixel in the training images")

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        """(image, class)"""
        train_id = self.classes[rng.integers(len(self.classes))]
        images = self.images[train_id]
        return int(images[rng.integers(len(images))]), train_id


def class_index(samples: list[Sample], table: LabelTable, seen: FileFacts) -> ClassIndex:
    """From the histograms of the labels, which the check before the training has saved; others are read now."""
    progress = Progress("reading labels for class-uniform sampling", len(samples))

    def present(sample: Sample) -> np.ndarray:
        assert sample.label is not None
        return counts_by_class(seen.histogram(sample.label, sample.replaced), sample.table or table) > 0

    rows = []
    for row in threaded_map(present, samples):
        rows.append(row)
        progress.show(len(rows))
    seen.save()
    return ClassIndex(np.stack(rows))


def random_pixel(target: np.ndarray, train_id: int, rng: np.random.Generator) -> tuple[int, int] | None:
    """(row, column) of a pixel of that class in (H, W) train ids, uniformly; None if there is none."""
    places = np.flatnonzero(target == train_id)
    if not len(places):
        return None
    row, column = divmod(int(places[rng.integers(len(places))]), target.shape[1])
    return row, column
