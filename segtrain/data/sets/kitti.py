"""KITTI semantic segmentation (2018 labels): Cityscapes label ids, 200 training images of slightly varying size."""

from pathlib import Path

from segtrain.config import KittiConfig
from segtrain.data.labels import LabelTable, published_table, read_json_table
from segtrain.data.rules import KITTI
from segtrain.data.sample import DatasetSpec, SplitFiles, Submission, by_stem, expect_folder, expect_split
from segtrain.data.verify.label_mistakes import Expected
from segtrain.errors import UsageError

TREE = """{root}/training/image_2/000000_10.png  (200 images; the same names in training/semantic and instance)
{root}/testing/image_2/000000_10.png
Get data_semantics.zip (314 MB) from https://www.cvlibs.net/datasets/kitti/eval_semseg.php?benchmark=semantics2015
and unpack it there."""


def table(config: KittiConfig) -> LabelTable:
    return published_table("cityscapes", "kitti")


def files(config: KittiConfig, split: str) -> SplitFiles:
    """train and val by a published list (there is no official validation split), trainval (all 200), or test."""
    root = config.folder()
    expect_folder(root, "KITTI", TREE)
    expect_split(split, ("train", "val", "trainval", "test"), root)
    if split == "test":
        return SplitFiles(by_stem(root / "testing" / "image_2", "*_10.png"), None)
    lists = read_json_table("kitti_splits")
    del lists["note"]
    if config.val_list not in lists:
        raise UsageError(f"dataset.val_list={config.val_list} is not a published list: choose {', '.join(lists)}")
    val = {f"{number:06d}_10" for number in lists[config.val_list]}

    def chosen(folder: str) -> dict[str, Path]:
        found = by_stem(root / "training" / folder, "*_10.png")
        return {name: path for name, path in found.items() if split == "trainval" or (name in val) == (split == "val")}

    return SplitFiles(chosen("image_2"), chosen("semantic"), chosen("instance"))


DATASET = DatasetSpec(
    table, files, KITTI, {"trainval": 200, "test": 200}, scored="trainval", family="kitti", options=KittiConfig,
    splits={}, expected=Expected(("road", "vegetation")),
    submission=Submission("https://www.cvlibs.net/datasets/kitti/user_submit.php", "semantic/{}.png"),
    licence="CC BY-NC-SA 3.0", image_size=(376, 1242),
)  # fmt: skip
