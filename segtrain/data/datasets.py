"""The data sets by name: what their labels mean and which files each split has."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from segtrain.config import DatasetConfig, StreetsCommandConfig, StreetsConfig
from segtrain.data import cityscapes, folder, kitti, street_layouts
from segtrain.data.labels import LabelTable, published_table
from segtrain.data.sample import Sample
from segtrain.errors import DataError
from segtrain.log import Progress, say


class DataSet(NamedTuple):
    """table(config) and samples(config, split) of one kind of data set."""

    table: Callable[[Any], LabelTable]
    samples: Callable[[Any, str], list[Sample]]


def street_samples(config: StreetsConfig, split: str) -> list[Sample]:
    """The built-in scenes, drawn where they are missing. Folders may hold more scenes than asked for."""
    wanted = {"train": config.scenes, "val": config.val_scenes, "night": config.night_scenes}
    if split not in wanted:
        raise DataError(f"no split {split!r} in the street scenes: there is {', '.join(wanted)}")
    draw_streets(config.folder(), "cityscapes", wanted, config.seed, config.size, None)
    return cityscapes.layout_samples(config.folder(), split)[: wanted[split]]


def streets(config: StreetsCommandConfig) -> Path:
    """`segtrain streets`: write the scenes in the layout of a published data set. Returns the folder."""
    root = Path(config.output or "segtrain-out/streets")
    scenes = {"train": config.scenes, "val": config.val_scenes}
    if config.layout == "cityscapes":
        scenes["night"] = config.night_scenes
    if not draw_streets(root, config.layout, scenes, config.seed, config.size, config.workers):
        say("all scenes were there already")
    print(root)
    return root


def draw_streets(
    root: Path, layout: str, scenes: dict[str, int], seed: int, size: list[int], workers: int | None
) -> int:
    """Draw what is missing, saying so. Returns how many scenes that were."""
    progress: Progress | None = None

    def show(done: int, total: int) -> None:
        nonlocal progress
        if progress is None:
            say(f"drawing {total} street scenes into {root}")
            progress = Progress("drawing scenes", total)
        if done:
            progress.show(done)

    return street_layouts.write(root, layout, scenes, seed, (size[0], size[1]), workers, show)


DATASETS: dict[str, DataSet] = {
    "streets": DataSet(lambda config: published_table("cityscapes"), street_samples),
    "cityscapes": DataSet(cityscapes.table, cityscapes.samples),
    "kitti": DataSet(kitti.table, kitti.samples),
    "folder": DataSet(folder.table, folder.samples),
}


def label_table(config: DatasetConfig) -> LabelTable:
    return DATASETS[config.name].table(config)


def split_samples(config: DatasetConfig, split: str) -> list[Sample]:
    """The samples of a split, at least one; DataError otherwise."""
    samples = DATASETS[config.name].samples(config, split)
    if not samples:
        raise DataError(
            f"the split {split!r} of dataset={config.name} is empty: no pictures found in {config.folder()}"
        )
    return samples
