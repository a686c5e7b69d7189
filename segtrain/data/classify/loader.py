"""Batches of classified images, read by worker processes."""

from collections.abc import Callable, Generator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from segtrain.config import AugmentationConfig, InferenceConfig
from segtrain.data.classify.samples import ClassImages
from segtrain.data.classify.views import RandomView, crop_views
from segtrain.data.images import read_image
from segtrain.data.loader import TrainingItem, first_error, raised
from segtrain.data.order import shuffling
from segtrain.data.workers import errors_as_values, never, quiet_worker, to_shared_memory
from segtrain.errors import SegtrainError


class TrainingImages(Dataset["TrainingItem | SegtrainError"]):
    """dataset[position] -> (image float32 (h, w, 3), class int64 (), name, position, window), order as TrainingData."""

    def __init__(self, images: ClassImages, augmentation: AugmentationConfig, seed: int) -> None:
        self.images = images
        self.view = RandomView(augmentation)
        self.seed = seed

    @errors_as_values
    def __getitem__(self, position: int) -> "TrainingItem | SegtrainError":
        epoch, place = divmod(position, len(self.images))
        number = int(shuffling(len(self.images), self.seed, epoch)[place])
        name = self.images.names[number]
        image = read_image(self.images.folder / name)
        seen, view = self.view(image, (self.seed, position))
        return seen, self.images.targets[number : number + 1].reshape(()), name, position, [int(n) for n in view]


class Views(NamedTuple):
    """images: uint8 (N, n, 3, crop, crop), n views of each image. targets: int64 (N,). numbers: of the images."""

    images: Tensor
    targets: Tensor
    numbers: list[int]


class EvaluationImages(Dataset["tuple[np.ndarray, int] | SegtrainError"]):
    def __init__(self, images: ClassImages, numbers: list[int], options: InferenceConfig) -> None:
        self.images = images
        self.numbers = numbers
        self.options = options

    def __len__(self) -> int:
        return len(self.numbers)

    @errors_as_values
    def __getitem__(self, place: int) -> "tuple[np.ndarray, int] | SegtrainError":
        number = self.numbers[place]
        return crop_views(read_image(self.images.folder / self.images.names[number]), self.options), number


def batches_of(
    images: ClassImages, numbers: list[int], options: InferenceConfig, batch_size: int, workers: int,
    stopped: Callable[[], bool] = never,
) -> Generator[Views, None, None]:  # fmt: skip
    """The images with these numbers, once each, in order, as evaluation_samples. DataError for one that is damaged."""

    def collate(items: list[tuple[np.ndarray, int] | SegtrainError]) -> Views | SegtrainError:
        good = [item for item in items if not isinstance(item, SegtrainError)]
        if len(good) < len(items):
            return first_error(items)
        crops = torch.from_numpy(np.stack([seen for seen, _ in good])).permute(0, 1, 4, 2, 3)
        chosen = [number for _, number in good]
        targets = torch.from_numpy(images.targets[chosen])
        return to_shared_memory(crops, targets) or Views(crops, targets, chosen)

    loader: DataLoader[tuple[np.ndarray, int] | SegtrainError] = DataLoader(
        EvaluationImages(images, numbers, options),
        batch_size=batch_size,
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=quiet_worker,
    )
    return raised(loader, stopped)
