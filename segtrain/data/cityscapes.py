"""Cityscapes fine annotations, label ids as downloaded. Layout and numbers: the data set's own scripts' README."""

from pathlib import Path

from segtrain.config import CityscapesConfig
from segtrain.data.labels import LabelTable, published_table
from segtrain.data.sample import Sample, expect_folder, expect_split, pair

TREE = """{root}/leftImg8bit/{{train,val,test}}/<city>/<city>_000000_000019_leftImg8bit.png
{root}/gtFine/{{train,val}}/<city>/<city>_000000_000019_gtFine_labelIds.png
Get leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from https://www.cityscapes-dataset.com/downloads/
and unpack both there."""


def table(config: CityscapesConfig) -> LabelTable:
    return published_table("cityscapes")


def samples(config: CityscapesConfig, split: str) -> list[Sample]:
    root = config.folder()
    expect_folder(root, "Cityscapes", TREE)
    expect_split(split, {path.name for path in (root / "leftImg8bit").glob("*") if path.is_dir()}, root)
    return layout_samples(root, split)


def layout_samples(root: Path, split: str) -> list[Sample]:
    """Samples of any data in Cityscapes' layout, named <city>_<sequence>_<frame>. The test split has no labels."""
    ending = "_leftImg8bit.png"
    images = {p.name.removesuffix(ending): p for p in (root / "leftImg8bit" / split).glob(f"*/*{ending}")}
    if split == "test":  # its label pictures are void only
        return [Sample(name, images[name], None) for name in sorted(images)]
    ending = "_gtFine_labelIds.png"
    labels = {p.name.removesuffix(ending): p for p in (root / "gtFine" / split).glob(f"*/*{ending}")}
    return pair(images, labels)
