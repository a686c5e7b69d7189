"""Batches of samples, read by worker processes."""

import functools
import itertools
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from segtrain.data.augment import Augmentation
from segtrain.data.images import read_image
from segtrain.data.label_files import read_label
from segtrain.data.labels import LabelTable
from segtrain.data.order import MicroBatches, sample_number
from segtrain.data.sample import Sample, different_sizes, read_labels
from segtrain.data.sampling import ClassIndex, random_pixel
from segtrain.errors import DataError


class Batch(NamedTuple):
    """images: uint8 (N, 3, h, w) RGB; float32 of about 0 to 255 for image classification. targets: uint8 (N, h, w)
    train ids or IGNORE_INDEX; int64 (N,) for image classification. names, positions, windows: of the N samples; their
    positions in the run's order; the window [top, left, height, width, mirrored?] of each."""

    images: Tensor
    targets: Tensor
    names: list[str]
    positions: list[int]
    windows: list[list[int]]


class EvaluationItem(NamedTuple):
    """image uint8 (H, W, 3); target uint8 (H, W) train ids; ids uint8 (H, W) label ids; instances uint16 (H, W)."""

    sample: Sample
    image: np.ndarray
    target: np.ndarray
    ids: np.ndarray
    instances: np.ndarray | None


# An error travels from a loader process as a value: raised there, it would arrive wrapped in a traceback.
TrainingItem = tuple[np.ndarray, np.ndarray, str, int, list[int]]


def read_pixels(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """Image uint8 (H, W, 3) and labels uint8 (H, W) as stored. DataError for what cannot be read."""
    assert sample.label is not None
    return read_image(sample.image), read_label(sample.label)


class TrainingData(Dataset["TrainingItem | DataError"]):
    """dataset[position] -> (image uint8 (h, w, 3), target uint8 (h, w), name, position, window), augmented.

    index, class_uniform: this fraction of the positions shows a class drawn by the index instead of the next image.
    weights: (samples, weight) of each part of a mixture.
    """

    def __init__(
        self, samples: list[Sample], table: LabelTable, augmentation: Augmentation, seed: int,
        read: Callable[[Sample], tuple[np.ndarray, np.ndarray]] = read_pixels,
        index: ClassIndex | None = None, class_uniform: float = 0.0, weights: list[tuple[int, float]] | None = None,
    ) -> None:  # fmt: skip
        self.samples = samples
        self.table = table
        self.augmentation = augmentation
        self.seed = seed
        self.read = read
        self.index = index
        self.class_uniform = class_uniform
        self.weights = weights

    def __getitem__(self, position: int) -> "TrainingItem | DataError":
        number, shown = self.order(position), None
        rng = np.random.default_rng(np.random.SeedSequence((self.seed, position, 1)))
        if self.index is not None and rng.random() < self.class_uniform:
            number, shown = self.index.draw(rng)
        sample = self.samples[number]
        assert sample.label is not None
        try:
            image, labels = self.read(sample)
            if labels.shape != image.shape[:2]:
                return different_sizes(sample, image.shape[:2], labels.shape)
            table = sample.table or self.table
            focus = None if shown is None else random_pixel(table.encode_values(labels), shown, rng)
            encode = functools.partial(table.encode, path=sample.label)
            seed = (self.seed, position)
            augmented = self.augmentation(image, labels, seed, encode, focus)
        except DataError as error:
            return error
        return (*augmented, sample.name, position, self.augmentation.window(labels.shape, seed, focus))

    def order(self, position: int) -> int:
        """The number of the sample at a position."""
        return sample_number(position, self.seed, len(self.samples), self.weights)


class EvaluationData(Dataset["EvaluationItem | DataError"]):
    """dataset[index] -> EvaluationItem, the full image unchanged."""

    def __init__(self, samples: list[Sample], table: LabelTable) -> None:
        self.samples = samples
        self.table = table

    def __getitem__(self, index: int) -> "EvaluationItem | DataError":
        sample = self.samples[index]
        try:
            image = read_image(sample.image)
            target, ids, instances = read_labels(sample, self.table)
            if target.shape != image.shape[:2]:
                return different_sizes(sample, image.shape[:2], target.shape)
            return EvaluationItem(sample, image, target, ids, instances)
        except DataError as error:
            return error

    def __len__(self) -> int:
        return len(self.samples)


def training_batches(
    data: Dataset["TrainingItem | DataError"], parts: MicroBatches, workers: int, pin_memory: bool, prefetch: int = 4
) -> Iterator[list[Batch]]:
    """The micro-batches of every step. DataError, naming the step, for a sample that cannot be read.

    prefetch: micro-batches that every loader process reads ahead.
    """
    loader: DataLoader[TrainingItem | DataError] = DataLoader(
        data,
        batch_sampler=parts,
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=quiet_worker,
        pin_memory=pin_memory,
        prefetch_factor=prefetch if workers else None,
    )
    items = iter(loader)
    for step in itertools.count(parts.steps[0] + 1):
        batches = list(itertools.islice(items, len(parts.mine)))
        for item in batches:
            if isinstance(item, DataError):
                raise DataError(f"the batch of step {step}: {item}")
        if not batches:
            return
        yield batches


def evaluation_samples(samples: list[Sample], table: LabelTable, workers: int) -> Iterator[EvaluationItem]:
    """The labelled samples, once each, in order. DataError as above."""
    loader: DataLoader[EvaluationItem | DataError] = DataLoader(
        EvaluationData(samples, table),
        batch_size=None,
        collate_fn=as_it_is,  # type: ignore[arg-type]
        num_workers=workers,
        worker_init_fn=quiet_worker,
    )
    return raised(loader)


def raised(items: Iterable[Any]) -> Iterator[Any]:
    """The items, up to one that is an error, which is raised."""
    for item in items:
        if isinstance(item, DataError):
            raise item
        yield item


def as_it_is(item: EvaluationItem | DataError) -> EvaluationItem | DataError:
    return item


def collate(items: list[TrainingItem | DataError]) -> Batch | DataError:
    good = [item for item in items if not isinstance(item, DataError)]
    if len(good) < len(items):
        return next(item for item in items if isinstance(item, DataError))
    crops, labels, names, positions, windows = zip(*good, strict=True)
    images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
    return Batch(images, torch.from_numpy(np.stack(labels)), list(names), list(positions), list(windows))


def quiet_worker(worker: int) -> None:
    """Keep to one core, and leave Ctrl-C and termination to the main process, which saves before it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
