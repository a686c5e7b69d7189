"""Recognise masks in a folder: those of Pascal VOC and CVAT, colours, one file a class, parquet, lists of pairs."""

import itertools
import json
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from segtrain.config.user_files import read_csv, read_text
from segtrain.console import say
from segtrain.data.formats.class_masks import CLASS, read_binary
from segtrain.data.formats.colors import read_color_mask, read_labelmap, with_colors
from segtrain.data.formats.parquet import IMAGES, MASKS, extract_parquet
from segtrain.data.images import SUFFIXES
from segtrain.data.labels import read_user_table
from segtrain.data.verify.guess import (
    SPLITS,
    Group,
    find_groups,
    guess_classes,
    guess_splits,
    kind,
    pattern_of,
    split_of,
)
from segtrain.data.verify.recognise import ClassRow, Recognised, Tree, by_split, hexadecimal, rows_for, table_rows
from segtrain.errors import DataError

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
MOST_COLORS = 64  # of masks without a table
MASKS_READ = 40
IMAGE_FILES = ("image", "image_path", "image_file", "file_name", "filename", "img")
MASK_FILES = ("mask", "mask_path", "mask_file", "mask_file_name", "label", "label_path", "annotation", "segmentation")


def recognise_voc(tree: Tree) -> Recognised | None:
    """JPEGImages, SegmentationClass and ImageSets/Segmentation: Pascal VOC, and CVAT's `Segmentation mask`."""
    masks = next((path.parent for path in sorted(tree.images) if path.parent.name == "SegmentationClass"), None)
    if masks is None:
        return None
    images = images_of_masks(tree, masks)
    splits = splits_by_lists(tree, {
        "images": (images.relative_to(tree.root) / "*").as_posix(),
        "labels": (masks.relative_to(tree.root) / "*.png").as_posix(),
    })  # fmt: skip
    labelmap = masks.parent / "labelmap.txt"
    if labelmap.is_file():
        say(f"note: the classes are those of {labelmap}")
        rows = [ClassRow(row["id"], row["name"], hexadecimal(row["color"])) for row in read_labelmap(labelmap)]
        return Recognised("colors", splits, rows)
    return Recognised("masks", splits, voc_rows([path for path in sorted(tree.images) if path.parent == masks]))


def images_of_masks(tree: Tree, masks: Path) -> Path:
    """The folder of the images. DataError if there is none with images of the masks' names."""
    names = {path.stem for path in tree.images if path.parent == masks}
    folders = {path.parent for path in tree.images if path.stem in names and path.parent != masks}
    folders = {folder for folder in folders if folder.name != "SegmentationObject"}
    if not folders:
        raise DataError(f"{masks} holds masks, but no other folder in {tree.root} has images of their names")
    return min(folders, key=lambda folder: (folder != masks.parent / "JPEGImages", folder))


def splits_by_lists(tree: Tree, patterns: dict[str, str]) -> dict[str, dict[str, str]]:
    """The splits that have a list in ImageSets/Segmentation; else train, of the list trainval or CVAT's default."""
    lists = {
        path.stem: path.relative_to(tree.root).as_posix()
        for path in tree.others if path.suffix == ".txt" and path.parent.name == "Segmentation"
    }  # fmt: skip
    splits = {split: patterns | {"list": lists[split]} for split in SPLITS if split in lists}
    whole = next((lists[name] for name in ("trainval", "default") if name in lists), None)
    return splits or {"train": patterns | ({"list": whole} if whole else {})}


def voc_rows(paths: list[Path]) -> list[ClassRow]:
    """Rows for the ids in the masks, with the names of Pascal VOC if they can be its."""
    rows = [ClassRow(*row) for row in guess_classes(paths)]
    if not rows or rows[0].id != 0 or any(20 < row.id < 255 for row in rows):
        return rows
    say("note: the names of the classes are those of Pascal VOC, a guess by the layout")
    colors = {row.id: row.color for row in rows}
    named = [ClassRow(number, name, colors.get(number, "")) for number, name in enumerate(VOC_CLASSES)]
    return [*named, ClassRow(255, "void", colors.get(255, ""), "true")]


def recognise_colors(tree: Tree) -> Recognised | None:
    """Photographs with masks of few colours of the same names."""
    if not tree.images:
        return None
    groups = find_groups(tree.root)
    kinds = [kind(tree.root, group) for group in groups]
    if "other" not in kinds or "image" not in kinds or "label" in kinds:
        return None
    table = next((path for path in tree.others if is_color_table(path)), None)
    splits, pairs = guess_splits(tree.root, "other")
    paths = sorted({label for found in pairs.values() for _, label in found})
    if table is not None:
        say(f"note: the classes are those of {table}")
        rows = table_rows(read_user_table(table))
    else:
        rows = rows_of_colors(paths)
    return Recognised("colors", splits, rows, None, dict(pairs))


def is_color_table(path: Path) -> bool:
    """Whether it is a class table with colours: labelmap.txt, or a CSV with r, g, b or color."""
    if path.name == "labelmap.txt":
        return True
    if path.suffix.lower() != ".csv":
        return False
    try:
        rows = with_colors([row for _, row in read_csv(path)])
    except DataError:
        return False
    return bool(rows) and {"id", "name", "color"} <= rows[0].keys() and all(row["color"] for row in rows)


def rows_of_colors(paths: list[Path]) -> list[ClassRow]:
    """A row for every colour in the masks. DataError for too many."""
    found: set[int] = set()
    for path in paths[:: max(1, -(-len(paths) // MASKS_READ))]:
        found |= set(np.unique(read_color_mask(path)).tolist())
        if len(found) > MOST_COLORS:
            raise DataError(
                f"{path} and others have more than {MOST_COLORS} colours: they were smoothed or compressed; export "
                "masks whose colours are exactly those of the classes"
            )
    say(f"note: {len(found)} colours in the masks, and no table that names them: name the classes")
    return [ClassRow(number, f"class {color:06x}", f"#{color:06x}") for number, color in enumerate(sorted(found))]


def recognise_class_masks(tree: Tree) -> Recognised | None:
    """Folders, or endings of names, with binary masks of the same images that hardly overlap."""
    if not tree.images:
        return None
    groups = find_groups(tree.root)
    photographs = [group for group in groups if kind(tree.root, group) == "image"]
    families: dict[tuple[Any, ...], list[Group]] = defaultdict(list)
    for group in groups:
        folder, ending, _ = group
        if kind(tree.root, group) != "label":
            continue
        if split_of(Path(folder.name)) == "train" and folder.name not in SPLITS["train"]:
            families["folders", folder.parent, ending].append(group)
        families["endings", folder, Path(ending).suffix].append(group)
    splits: dict[str, dict[str, str]] = {}
    names: dict[str, None] = {}
    for (form, *_), family in families.items():
        if len(family) < 2 or not are_parts(tree.root, family):
            continue
        covered = set().union(*(group[2].keys() for group in family))
        images = max(photographs, key=lambda group: len(group[2].keys() & covered), default=None)
        if images is None or not images[2].keys() & covered:
            continue
        folder, ending, _ = family[0]
        if form == "folders":
            pattern = (folder.parent / CLASS).as_posix() + f"/*{ending}"
            found = [group[0].name for group in family]
        else:
            found = [Path(group[1]).stem.lstrip("_-") for group in family]
            pattern = (folder / f"*{ending.replace(found[0], CLASS)}").as_posix()
        names |= dict.fromkeys(found)
        splits.setdefault(split_of(images[0]), {"images": pattern_of(images), "labels": pattern})
    return Recognised("class_masks", splits, *rows_for(names)) if splits else None


def are_parts(root: Path, family: list[Group]) -> bool:
    """Whether the masks are binary and those of one image cover different pixels, looking at a few."""
    shared = [name for name, count in count_names(family).items() if count > 1][:5]
    compared = 0
    for name in shared:
        some = [binary_or_none(root / group[0] / group[2][name]) for group in family if name in group[2]]
        for one, other in itertools.combinations([mask for mask in some if mask is not None], 2):
            smaller = min(np.count_nonzero(one), np.count_nonzero(other))
            if one.shape == other.shape and np.count_nonzero(one & other) > 0.5 * smaller:
                return False
            compared += 1
    return compared > 0


def binary_or_none(path: Path) -> np.ndarray | None:
    try:
        return read_binary(path)
    except DataError:  # converting reports it
        return None


def count_names(family: list[Group]) -> dict[str, int]:
    counts: dict[str, int] = defaultdict(int)
    for name in itertools.chain.from_iterable(group[2] for group in family):
        counts[name] += 1
    return counts


def recognise_parquet(tree: Tree) -> Recognised | None:
    files = [path for path in tree.others if path.suffix == ".parquet"]
    if not files:
        return None
    splits: dict[str, dict[str, str]] = {}
    labels: list[Path] = []
    with TemporaryDirectory() as temporary:
        for split, paths in by_split(files, tree.root).items():
            folder = paths[0].parent.relative_to(tree.root).as_posix()
            stems = {path.stem.partition("-")[0] for path in paths}
            name = f"{stems.pop()}*.parquet" if len(stems) == 1 else "*.parquet"
            pattern = name if folder == "." else f"{folder}/{name}"
            splits[split] = {"images": pattern, "labels": pattern}
            _, found, _ = extract_parquet({path.name: path for path in paths}, None, Path(temporary, split))
            labels += found.values()
        rows = [ClassRow(*row) for row in guess_classes(labels)]
    return Recognised("parquet", splits, rows)


def recognise_pairs(tree: Tree) -> Recognised | None:
    """A CSV, or Hugging Face's metadata.jsonl, with a column of images and one of masks."""
    pairs: dict[str, list[tuple[Path, Path]]] = defaultdict(list)
    for path in tree.others:
        rows = listed_rows(path)
        image, mask = (next((name for name in names if rows and name in rows[0]), "") for names in (
            (*IMAGE_FILES, *IMAGES), (*MASK_FILES, *MASKS)
        ))  # fmt: skip
        if not image or not mask or image == mask or Path(str(rows[0][mask])).suffix.lower() not in SUFFIXES:
            continue  # a label may be a word, of an image classification
        for row in rows:
            pair = path.parent / str(row.get(image)), path.parent / str(row.get(mask))
            missing = [str(file) for file in pair if not file.is_file()]
            if missing:
                raise DataError(f"{path}: {missing[0]} is missing")
            named = Path(str(row["split"])) if row.get("split") else path.relative_to(tree.root).with_suffix("")
            pairs[split_of(named)].append(pair)
    if not pairs:
        return None
    labels = sorted({label for some in pairs.values() for _, label in some})
    return Recognised("masks", {split: {} for split in pairs}, [ClassRow(*row) for row in guess_classes(labels)], None,
                      dict(pairs))  # fmt: skip


def listed_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV or a JSON-lines file; none if it is neither."""
    try:
        if path.suffix == ".csv":
            return [dict(row) for _, row in read_csv(path)]
        if path.name == "metadata.jsonl":
            return [json.loads(line) for line in read_text(path).splitlines() if line.strip()]
    except (DataError, ValueError):
        pass
    return []
