"""Whole pictures with one class each, a folder a class: ImageNet-1k, or any such tree."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from segtrain.config import AugmentationConfig, DatasetConfig, InferenceConfig
from segtrain.data.images import read_image
from segtrain.data.loader import TrainingItem, quiet_worker, raised
from segtrain.data.order import shuffling
from segtrain.errors import DataError

SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp")
TREE = """{root}/train/n01440764/n01440764_10026.JPEG   (a folder for each class)
{root}/val/n01440764/ILSVRC2012_val_00000293.JPEG"""
# Whoever has the validation archive only has to sort it; the script is the one that everybody uses.
SORTING = "https://raw.githubusercontent.com/soumith/imagenetloader.torch/master/valprep.sh"
PUBLISHED = {"train": 1281167, "val": 50000}  # pictures of ImageNet-1k
GREY = np.array([0.299, 0.587, 0.114], np.float32)
# Principal components of ImageNet's colours, on a scale of 0 to 1: Krizhevsky et al. 2012 as fb.resnet.torch has them.
DEVIATIONS = np.array([0.2175, 0.0188, 0.0045])
COMPONENTS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])


class Pictures:
    """The pictures of a split, sorted: folder / names[i] is of class classes[targets[i]]. targets: int64 (n,).

    Names are text and no paths: there are 1.28 million of them.
    """

    def __init__(self, folder: Path, classes: list[str], names: list[str], targets: list[int]) -> None:
        self.folder = folder
        self.classes = classes
        self.names = names
        self.targets = np.array(targets, np.int64)

    def __len__(self) -> int:
        return len(self.names)

    def first(self, count: int) -> "Pictures":
        """As many of them, evenly spread, so that several classes are there."""
        chosen = np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int)
        names, targets = [self.names[i] for i in chosen], self.targets[chosen].tolist()
        return Pictures(self.folder, self.classes, names, targets)


def list_pictures(config: DatasetConfig, split: str) -> Pictures:
    """The pictures of a split. DataError with the expected tree, or with what to do about a folder without classes."""
    root = config.folder()
    folder = root / split
    if not folder.is_dir():
        tree = TREE.format(root=root).replace("\n", "\n  ")
        raise DataError(
            f"no {folder} (set dataset.root=FOLDER, or SEGTRAIN_DATA to its parent folder). Expected:\n  {tree}\n"
            "ImageNet-1k is to be had, after registration, from https://image-net.org/download.php"
        )
    classes: list[str] = []
    names: list[str] = []
    targets: list[int] = []
    loose = 0
    for entry in sorted(folder.iterdir()):
        if not entry.is_dir():
            loose += entry.name.lower().endswith(SUFFIXES)
            continue
        with os.scandir(entry) as files:
            found = sorted(file.name for file in files if file.name.lower().endswith(SUFFIXES))
        names += [f"{entry.name}/{name}" for name in found]
        targets += [len(classes)] * len(found)
        classes.append(entry.name)
    if loose:
        raise DataError(
            f"{folder} holds {loose} pictures that are in no folder of a class, as the validation archive of ImageNet "
            f"is packed. Sort them into folders named as those in {root / 'train'}; for ImageNet-1k:\n"
            f"  cd {folder} && curl -fsSL {SORTING} | bash"
        )
    if not names:
        raise DataError(f"{folder} holds no pictures ({', '.join(SUFFIXES)} in a folder for each class)")
    held = set(targets)
    empty = [name for number, name in enumerate(classes) if number not in held]
    if empty:
        raise DataError(
            f"{len(empty)} of the {len(classes)} classes in {folder} have no pictures ({', '.join(empty[:3])}"
            f"{', ...' if len(empty) > 3 else ''}), as after an interrupted unpacking: unpack them again"
        )
    return Pictures(folder, classes, names, targets)


# ---------------------------------------------------------------------------------------------------- for training


class View(NamedTuple):
    """What is shown of a picture, in its pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool


class RandomView:
    """A random window at crop_size, mirrored or not, its colours changed: uint8 (H, W, 3) -> float32 (h, w, 3).

    Values are on a scale of 0 to 255 and, as published, neither rounded nor clipped after their colours were changed
    (inplace_abn v0.1.1, imagenet/: RandomResizedCrop with torchvision's defaults, ColorJitter of 0.4, Lighting of 0.1).
    A pure function of the picture and `seed`.
    """

    def __init__(self, config: AugmentationConfig) -> None:
        self.config = config

    def __call__(self, image: np.ndarray, seed: tuple[int, ...]) -> tuple[np.ndarray, View]:
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        view = self.draw(image.shape[0], image.shape[1], rng)
        height, width = self.config.crop_size
        window = image[view.top : view.top + view.height, view.left : view.left + view.width]
        seen = resized(window, height, width)
        if view.mirrored:
            seen = seen[:, ::-1]
        return self.lit(self.recolored(seen.astype(np.float32), rng), rng), view

    def draw(self, height: int, width: int, rng: np.random.Generator) -> View:
        """Area and aspect ratio uniform, the latter on a logarithmic scale; the middle where ten trials do not fit."""
        config = self.config
        low, high = config.aspect
        mirrored = bool(rng.random() < config.flip)
        for _ in range(10):
            area = height * width * rng.uniform(config.area[0], config.area[1])
            aspect = math.exp(rng.uniform(math.log(low), math.log(high)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
                return View(top, left, h, w, mirrored)
        h, w = min(height, max(1, round(width / low))), min(width, max(1, round(height * high)))
        return View((height - h) // 2, (width - w) // 2, h, w, mirrored)

    def recolored(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Saturation, brightness and contrast, in random order, each by a factor within 1 - color .. 1 + color."""
        color = self.config.color
        if color == 0:
            return image
        for change in rng.permutation(3):
            factor = np.float32(rng.uniform(1 - color, 1 + color))
            other: np.ndarray = np.zeros((), np.float32)  # brightness
            if change == 1:  # saturation
                other = (image @ GREY)[..., None]
            elif change == 2:  # contrast
                other = (image @ GREY).mean()
            image = factor * image + (1 - factor) * other
        return image

    def lit(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Along the principal components of ImageNet's colours, by normal deviates of deviation `lighting`."""
        shift = COMPONENTS @ (DEVIATIONS * rng.normal(0, 1, 3) * self.config.lighting) * 255
        return np.ascontiguousarray(image + shift.astype(np.float32))


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """By Pillow, bilinear, which looks at all pixels where it shrinks."""
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((width, height), Image.Resampling.BILINEAR))


class TrainingPictures(Dataset["TrainingItem | DataError"]):
    """dataset[position] -> (image float32 (h, w, 3), class int64 (), name, position, window), order as TrainingData."""

    def __init__(self, pictures: Pictures, augmentation: AugmentationConfig, seed: int) -> None:
        self.pictures = pictures
        self.view = RandomView(augmentation)
        self.seed = seed

    def __getitem__(self, position: int) -> "TrainingItem | DataError":
        epoch, place = divmod(position, len(self.pictures))
        number = int(shuffling(len(self.pictures), self.seed, epoch)[place])
        name = self.pictures.names[number]
        try:
            image = read_image(self.pictures.folder / name)
        except DataError as error:
            return error
        seen, view = self.view(image, (self.seed, position))
        return seen, self.pictures.targets[number : number + 1].reshape(()), name, position, [int(n) for n in view]


# ---------------------------------------------------------------------------------------------------- for testing


def views(image: np.ndarray, options: InferenceConfig) -> np.ndarray:
    """uint8 (H, W, 3) -> (n, crop, crop, 3): the centre, or the centre and the four corners, each mirrored too.

    The shorter side is made `resize` long before, by Pillow; sizes are truncated and the centre rounded as torchvision
    does. A picture that is smaller than the crop then is refused by `InferenceConfig`: crop <= resize.
    """
    assert options.crop is not None and options.resize is not None
    height, width = image.shape[:2]
    short = min(height, width)
    image = resized(image, int(options.resize * height / short), int(options.resize * width / short))
    room = image.shape[0] - options.crop, image.shape[1] - options.crop
    corners = [(round(room[0] / 2), round(room[1] / 2))]
    if options.crops == "ten":
        corners += [(0, 0), (0, room[1]), (room[0], 0), room]
    sides = [image, image[:, ::-1]] if options.crops == "ten" else [image]  # as torchvision: mirrored, then cut
    return np.stack([s[top : top + options.crop, left : left + options.crop] for s in sides for top, left in corners])


class Views(NamedTuple):
    """images: uint8 (N, n, 3, crop, crop), n views of each picture. targets: int64 (N,). numbers: of the pictures."""

    images: Tensor
    targets: Tensor
    numbers: list[int]


class EvaluationPictures(Dataset["tuple[np.ndarray, int] | DataError"]):
    def __init__(self, pictures: Pictures, numbers: list[int], options: InferenceConfig) -> None:
        self.pictures = pictures
        self.numbers = numbers
        self.options = options

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> "tuple[np.ndarray, int] | DataError":
        number = self.numbers[place]
        try:
            return views(read_image(self.pictures.folder / self.pictures.names[number]), self.options), number
        except DataError as error:
            return error


def batches_of(
    pictures: Pictures, numbers: list[int], options: InferenceConfig, batch_size: int, workers: int
) -> Iterator[Views]:
    """The pictures of these numbers, once each, in order. DataError for one that cannot be read."""

    def collate(items: list[tuple[np.ndarray, int] | DataError]) -> Views | DataError:
        good = [item for item in items if not isinstance(item, DataError)]
        if len(good) < len(items):
            return next(item for item in items if isinstance(item, DataError))
        images = torch.from_numpy(np.stack([seen for seen, _ in good])).permute(0, 1, 4, 2, 3)
        chosen = [number for _, number in good]
        return Views(images, torch.from_numpy(pictures.targets[chosen]), chosen)

    loader: DataLoader[tuple[np.ndarray, int] | DataError] = DataLoader(
        EvaluationPictures(pictures, numbers, options),
        batch_size=batch_size,
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=quiet_worker,
    )
    return raised(loader)
