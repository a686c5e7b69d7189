"""Cityscapes, label ids as downloaded. Layout and numbers: the README of the dataset's own scripts."""

import functools
import glob
from pathlib import Path

from segtrain.config import IGNORE_INDEX, CityscapesConfig
from segtrain.console import say
from segtrain.data.labels import LabelTable, published_table
from segtrain.data.rules import CITYSCAPES
from segtrain.data.sample import DatasetSpec, Sample, SplitFiles, Submission, by_stem, expect_folder, expect_split
from segtrain.data.verify.label_mistakes import Expected

TREE = """{root}/leftImg8bit/{{train,val,test}}/<city>/<city>_000000_000019_leftImg8bit.png
{root}/gtFine/{{train,val}}/<city>/<city>_000000_000019_gtFine_labelIds.png  (and _instanceIds.png)
Get leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from https://www.cityscapes-dataset.com/downloads/
and unpack both there. Coarse labels: gtCoarse.zip, and leftImg8bit_trainextra.zip for the split train_extra."""
COARSE = {"coarse_train": "train", "coarse_val": "val", "train_extra": "train_extra"}
PUBLISHED = {
    "train": 2975, "val": 500, "test": 1525, "coarse_train": 2975, "coarse_val": 500, "train_extra": 19998,
}  # fmt: skip


@functools.cache
def labels_are_train_ids(root: Path) -> bool:
    """Whether there are only converted labels, which are not in the download; printed if so."""
    as_downloaded, converted = (
        next(root.glob(f"gt*/*/*/*_{kind}.png"), None) for kind in ("labelIds", "labelTrainIds")
    )
    if as_downloaded is not None or converted is None:
        return False
    say(f"labels     {root} has *_labelTrainIds.png only, no *_labelIds.png: read as train ids, 255 = ignored")
    return True


def table(config: CityscapesConfig) -> LabelTable:
    published = published_table("cityscapes", "cityscapes")
    if not labels_are_train_ids(config.folder()):
        return published
    stored = {train_id: int(label) for train_id, label in enumerate(published.ids)} | {IGNORE_INDEX: 0}
    return LabelTable(published.rows, "the cityscapes train ids", stored)


def files(config: CityscapesConfig, split: str) -> SplitFiles:
    root = config.folder()
    expect_folder(root, "Cityscapes", TREE)
    known = {path.name for kind in ("leftImg8bit", "gtFine") for path in (root / kind).glob("*") if path.is_dir()}
    known -= {"train_extra"}
    if (root / "gtCoarse").is_dir():
        known |= COARSE.keys()
    expect_split(split, known, root)
    return layout_files(root, split)


def layout_files(root: Path, split: str) -> SplitFiles:
    """Files of any data in Cityscapes' layout, named <city>_<sequence>_<frame>. The test split's labels are void."""
    folder, kind = COARSE.get(split, split), "gtCoarse" if split in COARSE else "gtFine"
    images = by_stem(root / "leftImg8bit" / folder, "*/*_leftImg8bit.png", "_leftImg8bit.png")
    if split == "test":
        return SplitFiles(images, None)
    labels, instances = root / kind / folder, f"_{kind}_instanceIds.png"
    ending = f"_{kind}_{'labelTrainIds' if labels_are_train_ids(root) else 'labelIds'}.png"
    return SplitFiles(images, by_stem(labels, f"*/*{ending}", ending), by_stem(labels, f"*/*{instances}", instances))


def prediction_pattern(name: str) -> str:
    return f"{glob.escape('_'.join(name.split('_')[:3]))}*.png"


def identity(sample: Sample) -> str:
    return f"{sample.image.parts[-3]}/{sample.name}"  # street scenes in this layout count from 0 in every split


DATASET = DatasetSpec(
    table, files, CITYSCAPES, PUBLISHED, answer=prediction_pattern, family="cityscapes", identity=identity,
    options=CityscapesConfig, tables=("cityscapes",), expected=Expected(("road", "vegetation")),
    submission=Submission("https://www.cityscapes-dataset.com/submit"),
    licence="non-commercial (https://www.cityscapes-dataset.com/license)", image_size=(1024, 2048),
)  # fmt: skip
