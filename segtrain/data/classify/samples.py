"""Images with one class each, a folder for each class, and what describes a dataset of them."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from segtrain.config import DatasetConfig, ImageNetConfig
from segtrain.errors import DataError

SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp")


class ClassImages:
    """The images of a split, sorted: folder / names[i] is of class classes[targets[i]]. targets: int64 (n,).

    Names are strings and not paths: ImageNet has 1.28 million of them.
    """

    def __init__(self, folder: Path, classes: list[str], names: list[str], targets: list[int]) -> None:
        self.folder = folder
        self.classes = classes
        self.names = names
        self.targets = np.array(targets, np.int64)

    def __len__(self) -> int:
        return len(self.names)

    def first(self, count: int) -> "ClassImages":
        """At most `count` of them, evenly spread, so that several classes occur."""
        chosen = np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int)
        names, targets = [self.names[i] for i in chosen], self.targets[chosen].tolist()
        return ClassImages(self.folder, self.classes, names, targets)


def class_folders(folder: Path, loose_files: str = "Sort them into a folder for each class") -> ClassImages:
    """The images below `folder`, which has a folder for each class. loose_files: what to do about images outside them.

    DataError for images outside the folders, for classes without images, and if there is no image at all.
    """
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
        raise DataError(f"{folder} holds {loose} images outside the folders of the classes. {loose_files}")
    if not names:
        raise DataError(f"{folder} holds no images ({', '.join(SUFFIXES)} in a folder for each class)")
    filled = set(targets)
    empty = [name for number, name in enumerate(classes) if number not in filled]
    if empty:
        raise DataError(
            f"{len(empty)} of the {len(classes)} classes in {folder} have no images ({', '.join(empty[:3])}"
            f"{', ...' if len(empty) > 3 else ''}), as after an interrupted unpacking: unpack them again"
        )
    return ClassImages(folder, classes, names, targets)


def split_folder(config: DatasetConfig, split: str) -> ClassImages:
    """The images below root/<split>/<class>/. DataError if there is no such folder."""
    folder = config.folder() / split
    if not folder.is_dir():
        raise DataError(f"no {folder} (set dataset.root=FOLDER, or SEGTRAIN_DATA to its parent folder)")
    return class_folders(folder)


def names_in_split(images: ClassImages) -> list[str]:
    return [f"{images.folder.name}/{name}" for name in images.names]


class ClassificationSpec(NamedTuple):
    """A dataset of images with one class each.

    images(config, split): the images of a split. published: number of images of a split as published; complete(images):
    whether the classes are the published ones, so that `segtrain check` compares the numbers. identity(images): which
    images these are, the same for the same image in any folder. options: dataclass of the options `dataset.*`. licence:
    of the images.
    """

    images: Callable[[Any, str], ClassImages] = split_folder
    published: Mapping[str, int] = {}
    complete: Callable[[ClassImages], bool] = lambda images: True
    identity: Callable[[ClassImages], list[str]] = names_in_split
    options: type[DatasetConfig] = ImageNetConfig
    licence: str = ""
