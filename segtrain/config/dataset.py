"""Options of the datasets: dataset.*"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from segtrain.config.options import LARGEST_SEED, LARGEST_SIZE, Group, option, require

IGNORE_INDEX = 255  # train id of pixels that count nowhere: not in the loss, not in the scores
SIZE = ("height", "width")
MANY = 10**6  # scenes, at most
MOST_VALUE = 2.0**31  # of a channel
EXIF_RULES = ("auto", "apply", "ignore", "refuse")
SCENE_SIZE = "height and width of a scene, width = 2 x height [pixels]"


@dataclass
class DatasetConfig(Group):
    """Options that every dataset has. A plugin's dataset derives its own dataclass from this one."""

    PREFIX: ClassVar[str] = "dataset."
    task: ClassVar[Literal["segmentation", "classification"]] = "segmentation"  # classification: one class an image

    name: str = option("", "")  # set by dataset=...
    root: str | None = option(
        None, "folder of the data (default: $SEGTRAIN_DATA/<name>, else datasets/<name>)", path=True, resume=True
    )
    train_split: str = option("train", "split used for training")
    val_split: str = option("val", "split used for validation and by evaluate")
    cache_dir: str | None = option(
        None, "folder of the cache (default: $SEGTRAIN_CACHE, else ~/.cache/segtrain)", path=True, resume=True
    )
    cache: str = option(
        "none", "cache of training images as uncompressed pixels in cache_dir", choices=("none", "decoded"), resume=True
    )

    def folder(self) -> Path:
        if self.root is not None:
            return Path(self.root).expanduser()
        return Path(os.environ.get("SEGTRAIN_DATA", "datasets")).expanduser() / self.name

    def cache_folder(self) -> Path:
        default = os.environ.get("SEGTRAIN_CACHE", "~/.cache/segtrain")
        return Path(self.cache_dir or default).expanduser()


@dataclass
class StreetsConfig(DatasetConfig):
    scenes: int = option(240, "number of training scenes", low=0, limit=MANY)
    val_scenes: int = option(60, "number of validation scenes", low=0, limit=MANY)
    night_scenes: int = option(0, "number of scenes in the night split", low=0, limit=MANY)
    seed: int = option(0, "seed of the scenes", low=0, limit=LARGEST_SEED)
    size: list[int] = option([256, 512], SCENE_SIZE, items=SIZE, low=256, limit=LARGEST_SIZE)

    def check(self) -> None:
        super().check()
        check_scene_size("dataset.size", self.size)


def check_scene_size(key: str, size: list[int]) -> None:
    require(size[1] == 2 * size[0], key, size, f"the width must be twice the height; give [{size[0]},{2 * size[0]}]")


@dataclass
class CityscapesConfig(DatasetConfig):
    pass


@dataclass
class KittiConfig(DatasetConfig):
    val_list: str = option(
        "mseg_150_50", "published list of validation images",
        choices=("mseg_150_50", "nvidia_sdcnet_cv0", "nvidia_sdcnet_cv1", "nvidia_sdcnet_cv2"),
    )  # fmt: skip


@dataclass
class VistasConfig(DatasetConfig):
    version: str = option("v1.2", "version of the labels, with 65 or 116 classes", choices=("v1.2", "v2.0"))


@dataclass
class CocoStuffConfig(DatasetConfig):
    classes: str = option("all171", "classes: 80 things and 91 stuff, or stuff only", choices=("all171", "stuff91"))
    split: str = option(
        "full", "images: all, or the 40k / 5k of the paper's Table 3", choices=("full", "challenge2017")
    )
    other: str = option(
        "ignore", "treatment of things under stuff91: ignored, or one extra class", choices=("ignore", "class")
    )

    def check(self) -> None:
        super().check()
        require(
            self.other == "ignore" or self.classes == "stuff91", "dataset.other", self.other,
            "things are classes of their own under dataset.classes=all171; choose dataset.classes=stuff91",
        )  # fmt: skip


FORMATS = (
    "masks", "colors", "coco", "yolo", "labelme", "label_studio", "supervisely", "class_masks", "parquet",
)  # fmt: skip
WITH_OBJECTS = (
    "coco",
    "yolo",
    "labelme",
    "label_studio",
    "supervisely",
    "class_masks",
)  # which leave pixels without one
ORDERS = ("last", "area")
ORDER = "which object covers another: the later one, or the one with fewer pixels"
COLUMNS = "columns of a parquet file with images and masks (default: by their names)"


@dataclass
class FolderConfig(DatasetConfig):
    splits: dict[str, dict[str, str]] = option(
        {}, "files of each split: {SPLIT: {images: GLOB, labels: GLOB} or {pairs: FILE}}"
    )
    format: str = option("masks", "format of the labels; masks: images of class ids", choices=FORMATS)
    order: str = option("last", ORDER, choices=ORDERS)
    unlabelled: str | None = option(None, "class or ignored label of the pixels that no object covers", quote=True)
    columns: list[str] | None = option(None, COLUMNS, items=("image", "mask"))
    classes: str | None = option(None, "table of the classes, CSV or YAML with id, name, color, ignore", path=True)
    value_range: list[float] | None = option(
        None, "values of black and white in images of more than 8 bits (default: of the type)",
        items=("black", "white"), limit=MOST_VALUE,
    )  # fmt: skip
    channels: list[int] | None = option(
        None, "bands that are the channels, counted from 0, in this order (default: RGB)", low=0, limit=65535
    )
    exif: str = option(
        "auto", "treatment of EXIF orientations; auto: turned where the label's size asks for it",
        choices=EXIF_RULES, before="ignore",
    )  # fmt: skip
    ignore_values: list[int] = option(
        [], "values in the label images that are ignored, negative and large ones too", limit=MOST_VALUE
    )

    def levels(self) -> tuple[float, float] | None:
        """value_range as (black, white)."""
        return None if self.value_range is None else (self.value_range[0], self.value_range[1])

    def check(self) -> None:
        super().check()
        if self.value_range is not None:
            black, white = self.value_range
            require(black < white, "dataset.value_range", self.value_range, "give [black,white], the lower value first")
        require(self.channels != [], "dataset.channels", "[]", "name the bands, as [0,1,2,3], or leave it out")
        require(
            self.channels is None or self.format != "parquet", "dataset.channels", self.channels,
            "dataset.format=parquet reads RGB images; write them to files (dataset.format=masks), or leave it out",
        )  # fmt: skip
        for split, entry in self.splits.items():
            keys = set(entry)
            fits = keys == {"pairs"} or {"images"} <= keys <= {"images", "labels", "list"}
            require(fits, f"dataset.splits.{split}", entry, "give {images: ..., labels: ...} or {pairs: ...}")
            require(
                fits and (self.format == "masks" or "labels" in keys), f"dataset.splits.{split}", entry,
                f"for dataset.format={self.format} give {{images: ..., labels: ...}}",
            )  # fmt: skip
            require(
                "list" not in keys or self.format not in ("coco", "label_studio", "parquet"), f"dataset.splits.{split}",
                entry, f"list: is not for dataset.format={self.format}, whose files list the images themselves",
            )  # fmt: skip
        self.check_format()

    def check_format(self) -> None:
        """Raise UsageError for an option that the format does not read, or needs."""
        objects = self.format in WITH_OBJECTS
        for key, default, reads in (
            ("order", "last", objects), ("unlabelled", None, objects), ("columns", None, self.format == "parquet")
        ):  # fmt: skip
            value = getattr(self, key)
            require(
                reads or value == default, f"dataset.{key}", value,
                f"dataset.format={self.format} does not read it; leave it out",
            )  # fmt: skip
        require(
            not objects or self.unlabelled is not None, "dataset.unlabelled", "null",
            f"dataset.format={self.format} has pixels that no object covers; give the name of their class in the "
            "table, such as background, or of an ignored label, such as void",
        )  # fmt: skip


@dataclass
class MixtureConfig(DatasetConfig):
    target: str = option("cityscapes", "dataset that defines the classes; its val_split is used for validation")
    parts: dict[str, Any] = option(
        {}, "datasets to mix: {NAME: {weight, split, taxonomy, column, options}}",
        path=("root", "taxonomy"), resume=("root",),
    )  # fmt: skip

    def check(self) -> None:
        super().check()
        require(
            len(self.parts) >= 1, "dataset.parts", self.parts, "name the datasets to mix: dataset.parts.kitti={...}"
        )


@dataclass
class ImageNetConfig(DatasetConfig):
    """One class an image, a folder for each class: root/<split>/<class>/*.JPEG."""

    task: ClassVar[Literal["segmentation", "classification"]] = "classification"

    def check(self) -> None:
        super().check()
        require(
            self.cache == "none", "dataset.cache", self.cache, f"dataset={self.name} has no such cache; leave it out"
        )


def channels_of(dataset: DatasetConfig) -> list[int] | None:
    """dataset.channels, None for RGB images."""
    return getattr(dataset, "channels", None)


def classifies(dataset: DatasetConfig | type[DatasetConfig]) -> bool:
    """Whether each image has one class, instead of one for every pixel."""
    return dataset.task == "classification"


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
