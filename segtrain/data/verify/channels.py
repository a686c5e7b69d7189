"""Mean and standard deviation of the channels of images, for model.mean and model.std."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from segtrain.data.bands import read_channels
from segtrain.data.sample import Sample, spread
from segtrain.errors import DataError
from segtrain.threads import threaded_map

MOST = 200  # images that are measured, evenly spread over a split
LEAST = 1 / 255  # of a standard deviation: that of a channel of one value would be 0


class Measured(NamedTuple):
    """mean, std: of each channel, 0 to 1. images: that were measured. constant: channels of one value."""

    mean: list[float]
    std: list[float]
    images: int
    constant: list[int]

    def __str__(self) -> str:
        """In words, with the options to paste."""
        numbers = (",".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        mean, std = numbers
        return f"model.in_channels={len(self.mean)} model.mean=[{mean}] model.std=[{std}]"


def measure_channels(samples: Sequence[Sample]) -> Measured | None:
    """Over all pixels of at most MOST images, those that cannot be read left out; None if there are no others."""
    sums = [part for part in threaded_map(sums_of, spread(samples, MOST)) if part is not None]
    if not sums:
        return None
    counts, ones, squares = zip(*sums, strict=True)
    pixels, first, second = sum(counts), np.sum(ones, axis=0), np.sum(squares, axis=0)
    mean: np.ndarray = first / pixels / 255
    std = np.sqrt(np.maximum(second / pixels / 255**2 - mean**2, 0))
    constant = np.flatnonzero(std < LEAST / 100).tolist()
    return Measured(mean.tolist(), np.maximum(std, LEAST).tolist(), len(sums), constant)


def sums_of(sample: Sample) -> tuple[int, np.ndarray, np.ndarray] | None:
    """Number of pixels, and float64 (C,) sums of the values and of their squares; None if it cannot be read."""
    try:
        values = read_channels(sample.image, sample.channels, sample.value_range)
    except DataError:
        return None
    rows = values.reshape(-1, values.shape[2]).astype(np.float64)
    return len(rows), rows.sum(0), np.square(rows).sum(0)
