"""Batches of classified images, read by worker processes."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from segtrain.config import AugmentationConfig, InferenceConfig
from segtrain.data.classify.samples import ClassImages
from segtrain.data.classify.views import RandomView, crop_views
from segtrain.data.images import read_image
from segtrain.data.loader import TrainingItem, quiet_worker, raised
from segtrain.data.order import shuffling
from segtrain.errors import DataError


class TrainingImages(Dataset["TrainingItem | DataError"]):
    """dataset[position] -> (image float32 (h, w, 3), class int64 (), name, position, window), order as TrainingData."""

    def __init__(self, images: ClassImages, augmentation: AugmentationConfig, seed: int) -> None:
        self.images = images
        self.view = RandomView(augmentation)
        self.seed = seed

    def __getitem__(self, position: int) -> "TrainingItem | DataError":
        epoch, place = divmod(position, len(self.images))
        number = int(shuffling(len(self.images), self.seed, epoch)[place])
        name = self.images.names[number]
        try:
            image = read_image(self.images.folder / name)
        except DataError as error:
            return error
        seen, view = self.view(image, (self.seed, position))
        return seen, self.images.targets[number : number + 1].reshape(()), name, position, [int(n) for n in view]


class Views(NamedTuple):
    """images: uint8 (N, n, 3, crop, crop), n views of each image. targets: int64 (N,). numbers: of the images."""

    images: Tensor
    targets: Tensor
    numbers: list[int]


class EvaluationImages(Dataset["tuple[np.ndarray, int] | DataError"]):
    def __init__(self, images: ClassImages, numbers: list[int], options: InferenceConfig) -> None:
        self.images = images
        self.numbers = numbers
        self.options = options

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> "tuple[np.ndarray, int] | DataError":
        number = self.numbers[place]
        try:
            return crop_views(read_image(self.images.folder / self.images.names[number]), self.options), number
        except DataError as error:
            return error


def batches_of(
    images: ClassImages, numbers: list[int], options: InferenceConfig, batch_size: int, workers: int
) -> Iterator[Views]:
    """The images with these numbers, once each, in order. DataError for one that cannot be read."""

    def collate(items: list[tuple[np.ndarray, int] | DataError]) -> Views | DataError:
        good = [item for item in items if not isinstance(item, DataError)]
        if len(good) < len(items):
            return next(item for item in items if isinstance(item, DataError))
        crops = torch.from_numpy(np.stack([seen for seen, _ in good])).permute(0, 1, 4, 2, 3)
        chosen = [number for _, number in good]
        return Views(crops, torch.from_numpy(images.targets[chosen]), chosen)

    loader: DataLoader[tuple[np.ndarray, int] | DataError] = DataLoader(
        EvaluationImages(images, numbers, options),
        batch_size=batch_size,
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=quiet_worker,
    )
    return raised(loader)
