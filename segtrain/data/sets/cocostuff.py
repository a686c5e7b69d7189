"""COCO-Stuff: 164k pixel maps (value = id - 1, 255 unlabeled), 10k v1.1 (.mat), and COCO's own stuff pixel maps."""

import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from segtrain.config import IGNORE_INDEX, CocoStuffConfig
from segtrain.data.images import read_header
from segtrain.data.label_files import read_label
from segtrain.data.labels import LabelTable, read_json_table
from segtrain.data.rules import COCOSTUFF
from segtrain.data.sample import (
    DatasetSpec,
    Sample,
    SplitFiles,
    Submission,
    by_stem,
    expect_folder,
    expect_split,
    label_encodings,
)
from segtrain.data.verify.label_mistakes import Expected
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
    """Ids are the values of the 164k pixel maps, whatever the label images hold."""
    rows: list[dict[str, Any]] = []
    for row in read_json_table("cocostuff"):
        row = row | {"id": row["pixelmap_value"]}
        if config.classes == "stuff91" and row["kind"] != "void":
            thing = row["kind"] == "thing" or not row["in_dataset"]
            row["train_id"] = row["train_id"] - 80 if not thing else 91 if config.other == "class" else IGNORE_INDEX
        rows.append(row)
    if config.classes == "stuff91" and config.other == "class":
        # First of its class, so that predictions get its name.
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
    """COCO's own maps of stuff, if the 164k maps are missing."""
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
    """Names of the 2017 stuff challenge's training and validation images."""
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
    """The image's number: the 10k set's COCO_train2014_000000000009 is train2017's 000000000009."""
    return image_number(sample.name)


def image_number(name: str) -> str:
    return name.rpartition("_")[2]


# ---------------------------------------------------------------------------------------------------- predictions


def encodings(table: LabelTable) -> dict[str, dict[int, int]]:
    """Ids in predictions are COCO's, one more than those of the pixel maps."""
    rows = [int(row["id"]) for row in table.rows]
    known = label_encodings(table)
    return known | {"ids": {(label + 1) & 255: label for label in rows}, "pixelmap": known["ids"]}


ARCHIVED = "stuff_results.json"


def submitted(answers: Mapping[str, Path], to_id: np.ndarray) -> Iterator[tuple[str, bytes]]:
    """The one file that the stuff challenge takes."""
    segments: list[dict[str, Any]] = []
    for name, path in answers.items():
        segments += coco_segments(int(image_number(name)), to_id[read_label(path)])
    yield ARCHIVED, json.dumps(segments).encode()


def verify_submission(archive: zipfile.ZipFile, images: Mapping[str, Path]) -> None:
    verify_coco(json.loads(archive.read(ARCHIVED)), images)


def coco_segments(image_id: int, values: np.ndarray) -> list[dict[str, Any]]:
    """One segment for each class of pixel map values uint8 (H, W): COCO category id 92 to 183, run-length encoded."""
    return [
        {"image_id": image_id, "category_id": int(value) + 1, "segmentation": encode_runs(values == value)}
        for value in np.unique(values)
    ]


def encode_runs(mask: np.ndarray) -> dict[str, Any]:
    """COCO's compressed run-length encoding of a bool (H, W): lengths of runs down the columns, the first one of
    zeros, each less the one but two before it from the fourth on, in groups of 5 bits, lowest first, as characters."""
    flat = mask.ravel(order="F").astype(np.int8)
    edges = np.flatnonzero(np.diff(flat, prepend=0))
    lengths = np.diff(np.concatenate([[0], edges, [flat.size]]))
    text = []
    for index, length in enumerate(lengths.tolist()):
        number = length - int(lengths[index - 2]) if index > 2 else length
        while True:
            group = number & 31
            number >>= 5
            more = number != (-1 if group & 16 else 0)
            text.append(chr((group | 32 if more else group) + 48))
            if not more:
                break
    return {"size": list(mask.shape), "counts": "".join(text)}


def decode_runs(segment: dict[str, Any]) -> np.ndarray:
    """The argument of `encode_runs`, bool (H, W)."""
    lengths: list[int] = []
    number = shift = 0
    for character in segment["counts"]:
        group = ord(character) - 48
        number |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            number -= 1 << shift
        lengths.append(number + (lengths[-2] if len(lengths) > 2 else 0))
        number = shift = 0
    height, width = segment["size"]
    values = np.arange(len(lengths)) % 2 == 1
    return np.repeat(values, lengths).reshape((width, height)).T


def verify_coco(segments: list[dict[str, Any]], images: Mapping[str, Path]) -> None:
    """DataError unless every pixel of every image has exactly one of the categories 92 to 183."""
    covered: dict[int, np.ndarray] = {}
    for segment in segments:
        mask = decode_runs(segment["segmentation"])
        if not 92 <= segment["category_id"] <= 183:
            raise DataError(
                f"category {segment['category_id']} is a thing: the stuff challenge takes 92 to 183; predict with a "
                "network of dataset.classes=stuff91"
            )
        covered[segment["image_id"]] = covered.get(segment["image_id"], np.zeros(mask.shape, np.uint8)) + mask
    for name, path in images.items():
        size = read_header(path)[:2]
        count = covered.pop(int(image_number(name)), None)
        if count is None or count.shape != size or (count != 1).any():
            raise DataError(f"the segments of {name} do not cover its {size[1]}x{size[0]} pixels once each")
    if covered:
        raise DataError(f"segments of images that are not in the split: {sorted(covered)[:3]}")


DATASET = DatasetSpec(
    table, files, COCOSTUFF, PUBLISHED, family="coco", identity=identity, options=CocoStuffConfig,
    tables=("cocostuff",), expected=Expected(("unlabeled",)), encodings=encodings, encoding="pixelmap",
    submission=Submission("the COCO stuff challenge's page", contents=submitted, verify=verify_submission),
    licence="annotations CC BY 4.0, images by Flickr's terms of use", image_size=(640, 640),
)  # fmt: skip
