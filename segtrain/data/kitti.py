"""KITTI semantic segmentation (2018 labels): Cityscapes label ids, 200 training pictures of slightly varying size."""

from segtrain.config import KittiConfig
from segtrain.data.labels import LabelTable, published_table, read_json_table
from segtrain.data.sample import Sample, expect_folder, expect_split, pair
from segtrain.errors import UsageError

TREE = """{root}/training/image_2/000000_10.png  (200 pictures; the same names in training/semantic)
{root}/testing/image_2/000000_10.png
Get data_semantics.zip (314 MB) from https://www.cvlibs.net/datasets/kitti/eval_semseg.php?benchmark=semantics2015
and unpack it there."""


def table(config: KittiConfig) -> LabelTable:
    return published_table("cityscapes")


def samples(config: KittiConfig, split: str) -> list[Sample]:
    """train and val by a published list (there is no official validation split), trainval (all 200), or test."""
    root = config.folder()
    expect_folder(root, "KITTI", TREE)
    expect_split(split, ("train", "val", "trainval", "test"), root)
    if split == "test":
        images = sorted((root / "testing" / "image_2").glob("*_10.png"))
        return [Sample(path.stem, path, None) for path in images]
    lists = read_json_table("kitti_splits")
    del lists["note"]
    if config.val_list not in lists:
        raise UsageError(f"dataset.val_list={config.val_list} is not a published list: choose {', '.join(lists)}")
    folders = (root / "training" / "image_2", root / "training" / "semantic")
    pairs = pair(*({path.stem: path for path in folder.glob("*_10.png")} for folder in folders))
    val = {f"{number:06d}_10" for number in lists[config.val_list]}
    return [sample for sample in pairs if split == "trainval" or (sample.name in val) == (split == "val")]
