"""loss.class_weights=auto: the weight of each class from its pixels in the training labels."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from segtrain.config import require
from segtrain.console import Progress
from segtrain.data.labels import LabelTable
from segtrain.data.sets.mixture import Mixture
from segtrain.data.verify.file_facts import FileFacts
from segtrain.data.verify.label_mistakes import counts_by_class
from segtrain.errors import DataError
from segtrain.threads import threaded_map

NAMED = 24  # classes that are printed one by one


def inverse_frequency(pixels: np.ndarray) -> list[float]:
    """Weight of each class, total / (K * pixels), K the number of classes that occur: 1 if all are equally frequent.

    pixels: (C,). A class without pixels has the weight 0. The mean weight of the pixels is 1, so that the loss keeps
    its size. Six significant digits.
    """
    occurring = pixels > 0
    weights = np.zeros(len(pixels))
    weights[occurring] = pixels.sum() / (occurring.sum() * pixels[occurring])
    return [float(f"{weight:.6g}") for weight in weights]


def pixels_of_classes(mixture: Mixture, table: LabelTable, folder: Path) -> np.ndarray:
    """float64 (C,): pixels of each class in the training labels, each part of a mixture as often as it is sampled.

    Counts of files that have not changed come from the cache in `folder`, where the check before the training looks
    too. DataError if no pixel is labelled.
    """
    facts = FileFacts(folder, mixture.samples)
    progress = Progress("counting the pixels of the classes", len(mixture.samples))
    sizes = mixture.weights or [(len(mixture.samples), float(len(mixture.samples)))]
    often = [weight / size for size, weight in sizes for _ in range(size)]
    total = np.zeros(table.num_classes)

    def count(item: tuple[int, float]) -> np.ndarray:
        sample, factor = mixture.samples[item[0]], item[1]
        if sample.label is None:
            raise DataError(f"loss.class_weights=auto: {sample.image} has no label to count")
        histogram = facts.histogram(sample.label, sample.replaced)
        return factor * counts_by_class(histogram, sample.table or table)[: len(total)]

    for done, pixels in enumerate(threaded_map(count, enumerate(often)), 1):
        total += pixels
        progress.show(done)
    facts.save()
    if not total.any():
        raise DataError("loss.class_weights=auto: not one labelled pixel in the training images")
    return total


def automatic_weights(mixture: Mixture, table: LabelTable, folder: Path) -> list[float]:
    """The weights of the classes, and UsageError for labels that leave open which of several classes a pixel is."""
    require(not mixture.groups, "loss.class_weights", "auto", "a label that leaves several classes open has no weight")
    return inverse_frequency(pixels_of_classes(mixture, table, folder))


def describe_weights(weights: Sequence[float], names: Sequence[str]) -> str:
    """'road 0.2, rider 31'; of many classes the lightest and the heaviest."""
    order = sorted(range(len(weights)), key=lambda i: weights[i])
    listed = [f"{names[i]} {weights[i]:.3g}" for i in (range(len(weights)) if len(weights) <= NAMED else order)]
    return ", ".join(listed if len(weights) <= NAMED else [*listed[:5], "...", *listed[-5:]])
