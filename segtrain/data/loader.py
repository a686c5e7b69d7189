"""Batches of samples, read by worker processes."""

import functools
import itertools
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from segtrain.data.augment import Augmentation
from segtrain.data.label_files import read_label
from segtrain.data.labels import LabelTable
from segtrain.data.order import MicroBatches, sample_number
from segtrain.data.sample import Sample, different_sizes, read_labels, read_sample_image
from segtrain.data.sampling import ClassIndex, random_pixel
from segtrain.data.workers import StopAsked, errors_as_values, items_of, never, quiet_worker, to_shared_memory
from segtrain.errors import DataError, SegtrainError


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


TrainingItem = tuple[np.ndarray, np.ndarray, str, int, list[int]]


def read_pixels(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """Image uint8 (H, W, 3) and labels uint8 (H, W), whose values are as stored. DataError for what cannot be read."""
    assert sample.label is not None
    labels = read_label(sample.label, sample.replaced)
    return read_sample_image(sample, labels.shape), labels


class TrainingData(Dataset["TrainingItem | SegtrainError"]):
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

    @errors_as_values
    def __getitem__(self, position: int) -> "TrainingItem | SegtrainError":
        number, shown = self.order(position), None
        rng = np.random.default_rng(np.random.SeedSequence((self.seed, position, 1)))
        if self.index is not None and rng.random() < self.class_uniform:
            number, shown = self.index.draw(rng)
        sample = self.samples[number]
        assert sample.label is not None
        image, labels = self.read(sample)
        if labels.shape != image.shape[:2]:
            return different_sizes(sample, image.shape[:2], labels.shape)
        table = sample.table or self.table
        focus = None if shown is None else random_pixel(table.encode_values(labels), shown, rng)
        encode = functools.partial(table.encode, path=sample.label)
        seed = (self.seed, position)
        augmented = self.augmentation(image, labels, seed, encode, focus)
        return (*augmented, sample.name, position, self.augmentation.window(labels.shape, seed, focus))

    def order(self, position: int) -> int:
        """The number of the sample at a position."""
        return sample_number(position, self.seed, len(self.samples), self.weights)


class EvaluationData(Dataset["EvaluationItem | SegtrainError"]):
    """dataset[index] -> EvaluationItem, the full image unchanged."""

    def __init__(self, samples: list[Sample], table: LabelTable) -> None:
        self.samples = samples
        self.table = table

    @errors_as_values
    def __getitem__(self, index: int) -> "EvaluationItem | SegtrainError":
        sample = self.samples[index]
        target, ids, instances = read_labels(sample, self.table)
        image = read_sample_image(sample, target.shape)
        if target.shape != image.shape[:2]:
            return different_sizes(sample, image.shape[:2], target.shape)
        return EvaluationItem(sample, image, target, ids, instances)

    def __len__(self) -> int:
        return len(self.samples)


def training_batches(
    data: Dataset["TrainingItem | SegtrainError"], parts: MicroBatches, workers: int, pin_memory: bool,
    prefetch: int = 4, stopped: Callable[[], bool] = never,
) -> Generator[list[Batch], None, None]:  # fmt: skip
    """The micro-batches of every step. DataError, naming the step, for a sample that cannot be read.

    prefetch: micro-batches that every loader process reads ahead. stopped: whether the command was asked to stop; if so
    while a batch is waited for, an empty list is the last one. Closing ends the loader processes.
    """
    loader: DataLoader[TrainingItem | SegtrainError] = DataLoader(
        data,
        batch_sampler=parts,
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=quiet_worker,
        pin_memory=pin_memory,
        prefetch_factor=prefetch if workers else None,
    )
    with closing(items_of(loader, stopped)) as items:
        for step in itertools.count(parts.steps[0] + 1):
            try:
                batches = list(itertools.islice(items, len(parts.mine)))
            except StopAsked:
                yield []
                return
            for item in batches:
                if isinstance(item, SegtrainError):
                    raise DataError(f"the batch of step {step}: {item}")
            if not batches:
                return
            yield batches


def evaluation_samples(
    samples: list[Sample], table: LabelTable, workers: int, stopped: Callable[[], bool] = never
) -> Generator[EvaluationItem, None, None]:
    """The labelled samples, once each, in order. DataError as above. It ends early if `stopped` while it waits."""
    loader: DataLoader[EvaluationItem | SegtrainError] = DataLoader(
        EvaluationData(samples, table),
        batch_size=None,
        collate_fn=as_it_is,  # type: ignore[arg-type]
        num_workers=workers,
        worker_init_fn=quiet_worker,
    )
    return raised(loader, stopped)


def raised(loader: "DataLoader[Any]", stopped: Callable[[], bool]) -> Generator[Any, None, None]:
    """The items of a loader, up to one that is an error, which is raised. Closing ends the loader processes."""
    with closing(items_of(loader, stopped)) as items:
        try:
            for item in items:
                if isinstance(item, SegtrainError):
                    raise item
                yield item
        except StopAsked:
            return


def as_it_is(item: EvaluationItem | SegtrainError) -> EvaluationItem | SegtrainError:
    return item


def collate(items: list[TrainingItem | SegtrainError]) -> Batch | SegtrainError:
    good = [item for item in items if not isinstance(item, SegtrainError)]
    if len(good) < len(items):
        return first_error(items)
    crops, labels, names, positions, windows = zip(*good, strict=True)
    images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
    targets = torch.from_numpy(np.stack(labels))
    error = to_shared_memory(images, targets)
    return error or Batch(images, targets, list(names), list(positions), list(windows))


def first_error(items: Iterable[Any]) -> SegtrainError:
    return next(item for item in items if isinstance(item, SegtrainError))
