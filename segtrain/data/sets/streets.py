"""The built-in street scenes, in the layout and with the labels of Cityscapes."""

import os
from functools import cache
from pathlib import Path

from segtrain.config import StreetsCommandConfig, StreetsConfig
from segtrain.console import Progress, say
from segtrain.data.labels import LabelTable, published_table
from segtrain.data.rules import CITYSCAPES
from segtrain.data.sample import DatasetSpec, SplitFiles
from segtrain.data.scenes.layouts import scenes_there, write_scenes
from segtrain.data.sets import cityscapes
from segtrain.data.verify.label_mistakes import Expected
from segtrain.errors import DataError

KEYS = {"train": "scenes", "val": "val_scenes", "night": "night_scenes"}  # split -> option with the number of scenes


def table(config: StreetsConfig) -> LabelTable:
    return published_table("cityscapes", "cityscapes")


def files(config: StreetsConfig, split: str) -> SplitFiles:
    """The built-in scenes, drawn if they are missing. The folder may hold more scenes than the options ask for.

    A folder that the user names, or that cannot be written, may also hold fewer: then these are taken, and that is
    printed, unless another number than the default is asked for.
    """
    wanted = {"train": config.scenes, "val": config.val_scenes, "night": config.night_scenes}
    if split not in wanted:
        raise DataError(f"no split {split!r} in the street scenes: there is {', '.join(wanted)}")
    root, there = config.folder(), scenes_there(config.folder(), "cityscapes", config.seed, config.size)
    is_default = wanted[split] == getattr(StreetsConfig, KEYS[split])
    writable = os.access(root, os.W_OK)
    if 0 < there.get(split, 0) < wanted[split] and ((config.root is not None and is_default) or not writable):
        more = f"dataset.{KEYS[split]}={wanted[split]}"
        say_once(f"{root} holds {there[split]} scenes of {split}, which are used; fewer than {more}")
    elif there.get(split, 0) < wanted[split] or writable:
        draw_streets(root, "cityscapes", {split: wanted[split]} if there else wanted, config.seed, config.size, None)
    every = cityscapes.layout_files(config.folder(), split)
    names = sorted(every.images)[: wanted[split]]
    kinds = (every.images, every.labels or {}, every.instances)
    images, labels, instances = ({name: kind[name] for name in names} for kind in kinds)
    return SplitFiles(images, labels, instances)


@cache
def say_once(text: str) -> None:
    say(text)


def streets(config: StreetsCommandConfig) -> Path:
    """`segtrain streets`: write the scenes in the layout of a published dataset. Returns the folder."""
    root = Path(config.output or "segtrain-out/streets")
    scenes = {"train": config.scenes, "val": config.val_scenes}
    if config.layout == "cityscapes":
        scenes["night"] = config.night_scenes
    if not draw_streets(root, config.layout, scenes, config.seed, config.size, config.workers):
        say("all scenes were there already")
    say(str(root))
    return root


def draw_streets(
    root: Path, layout: str, scenes: dict[str, int], seed: int, size: list[int], workers: int | None
) -> int:
    """Draw the missing scenes, with a progress line. Returns their number."""
    progress: Progress | None = None

    def show(done: int, total: int) -> None:
        nonlocal progress
        if progress is None:
            say(f"drawing {total} street scenes into {root}")
            progress = Progress("drawing scenes", total)
        if done:
            progress.show(done)

    return write_scenes(root, layout, scenes, seed, (size[0], size[1]), workers, show)


DATASET = DatasetSpec(
    table, files, CITYSCAPES, answer=cityscapes.prediction_pattern, family="streets", identity=cityscapes.identity,
    options=StreetsConfig, expected=Expected(("road", "vegetation")),
)  # fmt: skip
