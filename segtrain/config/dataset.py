"""Options of the datasets: dataset.*"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segtrain.config.options import option, require, require_size

IGNORE_INDEX = 255  # train id of pixels that count nowhere: not in the loss, not in the scores


@dataclass
class DatasetConfig:
    name: str = option("", "")  # set by dataset=...
    root: str | None = option(None, "folder of the data; default $SEGTRAIN_DATA/<name>, else datasets/<name>")
    train_split: str = option("train", "split that training reads")
    val_split: str = option("val", "split that validation and evaluate read")
    cache_dir: str | None = option(
        None, "where results of checks and the cache are kept; default $SEGTRAIN_CACHE, else ~/.cache/segtrain"
    )

    cache: str = option("none", "none | decoded: training pictures as plain pixels in cache_dir, once")

    def folder(self) -> Path:
        if self.root is not None:
            return Path(self.root).expanduser()
        return Path(os.environ.get("SEGTRAIN_DATA", "datasets")).expanduser() / self.name

    def cache_folder(self) -> Path:
        default = os.environ.get("SEGTRAIN_CACHE", "~/.cache/segtrain")
        return Path(self.cache_dir or default).expanduser()

    def check(self) -> None:
        require(self.cache in ("none", "decoded"), "dataset.cache", self.cache, "choose none or decoded")


@dataclass
class StreetsConfig(DatasetConfig):
    scenes: int = option(240, "training scenes to draw")
    val_scenes: int = option(60, "validation scenes to draw")
    night_scenes: int = option(0, "scenes of the night split to draw")
    seed: int = option(0, "which scenes are drawn")
    size: list[int] = option([256, 512], "[height,width] of a scene in pixels; width = 2 x height")

    def check(self) -> None:
        super().check()
        require_size("dataset.size", self.size, 256)
        require(self.size[1] == 2 * self.size[0], "dataset.size", self.size, "the width must be twice the height")
        for key in ("scenes", "val_scenes", "night_scenes", "seed"):
            require(getattr(self, key) >= 0, f"dataset.{key}", getattr(self, key), "give 0 or more")


@dataclass
class CityscapesConfig(DatasetConfig):
    pass


@dataclass
class KittiConfig(DatasetConfig):
    val_list: str = option(
        "mseg_150_50", "published list of validation images: mseg_150_50 | nvidia_sdcnet_cv0 | _cv1 | _cv2"
    )


@dataclass
class VistasConfig(DatasetConfig):
    version: str = option("v1.2", "v1.2 (65 classes) | v2.0 (116 classes)")

    def check(self) -> None:
        super().check()
        require(self.version in ("v1.2", "v2.0"), "dataset.version", self.version, "choose v1.2 or v2.0")


@dataclass
class CocoStuffConfig(DatasetConfig):
    classes: str = option("all171", "all171 (80 things, 91 stuff) | stuff91")
    split: str = option(
        "full", "full | challenge2017: the 40k / 5k pictures of the paper's Table 3 (its classes: stuff91)"
    )
    other: str = option(
        "ignore", "things under stuff91: ignore | class, one more; which of the two the paper did is not known"
    )

    def check(self) -> None:
        super().check()
        for key, known in (
            ("classes", ("all171", "stuff91")), ("split", ("full", "challenge2017")), ("other", ("ignore", "class")),
        ):  # fmt: skip
            require(getattr(self, key) in known, f"dataset.{key}", getattr(self, key), f"choose {' or '.join(known)}")
        require(
            self.other == "ignore" or self.classes == "stuff91", "dataset.other", self.other,
            "things are classes of their own under dataset.classes=all171; choose dataset.classes=stuff91",
        )  # fmt: skip


@dataclass
class FolderConfig(DatasetConfig):
    splits: dict[str, dict[str, str]] = option(
        {},
        "split -> {images: glob, labels: glob}, paired by what * and ** stand for, or {pairs: list file}; below root",
    )
    classes: str | None = option(
        None, "CSV or YAML with id, name, color, ignore; absolute, or below root or the current folder"
    )

    def check(self) -> None:
        super().check()
        for split, entry in self.splits.items():
            keys = set(entry)
            fits = keys == {"pairs"} or {"images"} <= keys <= {"images", "labels"}
            require(fits, f"dataset.splits.{split}", entry, "give {images: ..., labels: ...} or {pairs: ...}")


@dataclass
class MixtureConfig(DatasetConfig):
    target: str = option("cityscapes", "the part whose classes all others are told in, and whose val_split validates")
    parts: dict[str, Any] = option(
        {},
        "part -> {weight, split, taxonomy, column, dataset and options of that data set: root, version, ...}; "
        "taxonomy: vistas_to_cityscapes or a YAML file",
    )

    def check(self) -> None:
        super().check()
        require(
            len(self.parts) >= 1, "dataset.parts", self.parts, "name the data sets to mix: dataset.parts.kitti={...}"
        )


@dataclass
class ImageNetConfig(DatasetConfig):
    """Whole pictures, a folder for each class: root/<split>/<class>/*.JPEG."""

    def check(self) -> None:
        super().check()
        require(
            self.cache == "none", "dataset.cache", self.cache, f"dataset={self.name} has no such cache; leave it out"
        )


def classifies(dataset: DatasetConfig) -> bool:
    """Whether its pictures have a class each, instead of one for every pixel."""
    return isinstance(dataset, ImageNetConfig)


DATASET_CONFIGS: dict[str, type[DatasetConfig]] = {
    "streets": StreetsConfig,
    "cityscapes": CityscapesConfig,
    "kitti": KittiConfig,
    "vistas": VistasConfig,
    "cocostuff": CocoStuffConfig,
    "folder": FolderConfig,
    "imagenet": ImageNetConfig,
    "mixture": MixtureConfig,
}
