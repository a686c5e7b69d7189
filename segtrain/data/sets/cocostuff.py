"""COCO-Stuff: 164k pixel maps (value = id - 1, 255 unlabeled), 10k v1.1 (.mat), and COCO's own stuff pixel maps."""

import re
from pathlib import Path
from typing import Any

from segtrain.config import IGNORE_INDEX, CocoStuffConfig
from segtrain.data.labels import LabelTable, read_json_table
from segtrain.data.rules import COCOSTUFF
from segtrain.data.sample import DatasetSpec, Sample, SplitFiles, by_stem, expect_folder, expect_split
from segtrain.errors import DataError, UsageError

TREE = """{root}/images/{{train2017,val2017}}/000000000139.jpg
{root}/annotations/{{train2017,val2017}}/000000000139.png
Get train2017.zip and val2017.zip from https://cocodataset.org and stuffthingmaps_trainval2017.zip (659 MB) from
https://github.com/nightrome/cocostuff. COCO-Stuff 10k v1.1 as unpacked (imageLists/) is recognised."""
SPLITS = {"train": "train2017", "val": "val2017"}
PUBLISHED = {"train": 118287, "val": 5000, "test": 40670}
UNLABELED, OTHER = 255, 182  # pixel map values; the second one is COCO's 183, "other", which the maps do not hold


def is_10k(root: Path) -> bool:
    return (root / "imageLists").is_dir()


def table(config: CocoStuffConfig) -> LabelTable:
    """Ids are the values of the 164k pixel maps, whatever the pictures hold."""
    rows: list[dict[str, Any]] = []
    for row in read_json_table("cocostuff"):
        row = row | {"id": row["pixelmap_value"]}
        if config.classes == "stuff91" and row["kind"] != "void":
            thing = row["kind"] == "thing" or not row["in_dataset"]
            row["train_id"] = row["train_id"] - 80 if not thing else 91 if config.other == "class" else IGNORE_INDEX
        rows.append(row)
    if config.classes == "stuff91" and config.other == "class":
        # First of its class, so that this is what a prediction is called.
        rows.insert(0, {"id": OTHER, "name": "other", "train_id": 91, "category": "other", "kind": "stuff",
                        "has_instances": False, "color": [255, 255, 255]})  # fmt: skip
    source = f"the COCO-Stuff label table ({config.classes})"
    root = config.folder()
    if is_10k(root):
        return LabelTable(
            rows, f"{source} of the 10k set", {0: UNLABELED} | {value: value - 1 for value in range(1, 183)}
        )
    if not stuff_pixelmaps(root, "val2017") and not stuff_pixelmaps(root, "train2017"):
        return LabelTable(rows, source)
    if config.classes == "all171":
        raise UsageError(
            f"{root} holds COCO's own stuff pixel maps, in which all things are one class: dataset.classes=all171 "
            "needs stuffthingmaps_trainval2017.zip; dataset.classes=stuff91 can read these"
        )
    stored = {0: UNLABELED, 183: OTHER if config.other == "class" else UNLABELED}
    return LabelTable(rows, f"{source}, as COCO's stuff pixel maps", stored | {v: v - 1 for v in range(92, 183)})


def stuff_pixelmaps(root: Path, folder: str) -> Path | None:
    """COCO's own maps of stuff, where the 164k maps are not there."""
    if label_folder(root, folder) is not None:
        return None
    return next((root / f"{place}stuff_{folder}_pixelmaps" for place in ("annotations/", "")
                 if (root / f"{place}stuff_{folder}_pixelmaps").is_dir()), None)  # fmt: skip


def label_folder(root: Path, folder: str) -> Path | None:
    places = ("annotations", "stuffthingmaps_trainval2017", "stuffthingmaps", "")
    found = (root / place / folder for place in places)
    return next((path for path in found if next(path.glob("*.png"), None) is not None), None)


def folder_files(root: Path, folder: str) -> SplitFiles:
    """All files of train2017 or val2017."""
    images = by_stem(root / "images" / folder, "*.jpg") or by_stem(root / folder, "*.jpg")
    labels = label_folder(root, folder) or stuff_pixelmaps(root, folder)
    return SplitFiles(images, by_stem(labels, "*.png") if labels else {})


def files(config: CocoStuffConfig, split: str) -> SplitFiles:
    root = config.folder()
    expect_folder(root, "COCO-Stuff", TREE)
    if is_10k(root):
        if config.split != "full":
            raise UsageError(f"dataset.split={config.split}: the 10k set has only its own lists; leave it out")
        return listed_10k(root, split)
    expect_split(split, (*SPLITS, "test"), root)
    if split == "test":
        return SplitFiles(folder_files(root, "test2017").images, None)
    if config.split == "full":
        return folder_files(root, SPLITS[split])
    wanted = challenge_ids(root, split)
    images: dict[str, Path] = {}
    labels: dict[str, Path] = {}
    for folder in SPLITS.values():
        found = folder_files(root, folder)
        images |= {name: path for name, path in found.images.items() if name in wanted}
        labels |= {name: path for name, path in (found.labels or {}).items() if name in wanted}
    return SplitFiles(images, labels)


def challenge_ids(root: Path, split: str) -> set[str]:
    """Names of the 2017 stuff challenge's training and validation pictures."""
    name = f"{split}-ids.txt"
    path = next(iter(sorted(root.rglob(f"deprecated-challenge2017/{name}"))), None)
    if path is None:
        raise DataError(
            f"dataset.split=challenge2017 needs deprecated-challenge2017/{name} below {root}: it is in "
            "stuff_annotations_trainval2017.zip from https://cocodataset.org/#download"
        )
    return {f"{int(number):012d}" for number in re.findall(r"\d+", path.read_text())}


def listed_10k(root: Path, split: str) -> SplitFiles:
    lists = {"train": "train", "val": "test", "test": "test"}
    expect_split(split, lists, root)
    path = root / "imageLists" / f"{lists[split]}.txt"
    if not path.is_file():
        raise DataError(f"{path} is missing: unpack cocostuff-10k-v1.1.zip again")
    names = path.read_text().split()

    def there(kind: str, suffix: str) -> dict[str, Path]:
        paths = {name: root / kind / f"{name}{suffix}" for name in names}
        return {name: path for name, path in paths.items() if path.is_file()}

    return SplitFiles(there("images", ".jpg"), there("annotations", ".mat"))


def identity(sample: Sample) -> str:
    """The picture's number: the 10k set's COCO_train2014_000000000009 is train2017's 000000000009."""
    return sample.name.rpartition("_")[2]


DATASET = DatasetSpec(table, files, COCOSTUFF, PUBLISHED, family="coco", identity=identity)
