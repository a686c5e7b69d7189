"""Write a configuration of `dataset=folder` for what a folder holds, for the user to correct."""

import contextlib
import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from segtrain.config import DatasetConfig, FolderConfig
from segtrain.console import say
from segtrain.data.bands import lost_bands
from segtrain.data.folders import matching
from segtrain.data.images import SUFFIXES, read_bytes
from segtrain.data.sample import Sample, spread
from segtrain.data.sets.folder import match_patterns
from segtrain.data.verify.channels import measure_channels
from segtrain.data.verify.guess import LABELS_READ, Pairs, guess_classes, guess_splits
from segtrain.data.verify.recognise import (
    ClassRow,
    Recognised,
    Tree,
    read_tree,
    recognise_coco,
    recognise_label_studio,
    recognise_labelme,
    recognise_supervisely,
    recognise_yolo,
)
from segtrain.data.verify.recognise_masks import (
    recognise_class_masks,
    recognise_colors,
    recognise_pairs,
    recognise_parquet,
    recognise_voc,
)
from segtrain.data.verify.suggest import suggestion
from segtrain.errors import DataError, UsageError
from segtrain.files import write_atomically

RECOGNISERS: dict[str, Callable[[Tree], Recognised | None]] = {  # the first that fits counts
    "coco": recognise_coco, "label_studio": recognise_label_studio, "supervisely": recognise_supervisely,
    "labelme": recognise_labelme, "yolo": recognise_yolo, "parquet": recognise_parquet, "voc": recognise_voc,
    "pairs": recognise_pairs, "class_masks": recognise_class_masks, "colors": recognise_colors,
}  # fmt: skip
BANDS_READ = 50  # images whose bands are counted
GUESSED = (
    "# Guessed by segtrain check. Correct the patterns here, and names, colours and ignored ids in the CSV file.\n"
)


def write_guess(data: DatasetConfig, path: Path) -> None:
    """Write the configuration to `path` and the classes beside it; print what was guessed and how to use it."""
    if not isinstance(data, FolderConfig):
        raise UsageError(f"write_config is for dataset=folder; dataset={data.name} has its own layout")
    root = data.folder()
    if data.root is None:
        raise UsageError("dataset.root is not set: give the folder of your images")
    if not root.is_dir():
        raise UsageError(f"dataset.root={root}: no such folder; give the one that holds your images and labels")
    if path.suffix not in (".yaml", ".yml"):
        raise UsageError(f"write_config={path}: give the name of a .yaml file to write")
    if path.resolve().is_relative_to(root.resolve()):
        raise UsageError(f"write_config={path} is inside the data, where nothing is written: choose another folder")
    found = recognise(root)
    splits = written_splits(found, root, path)
    table = path.with_name(f"{path.stem}_classes.csv")
    write_atomically(table, table_csv(found.rows))
    content: dict[str, Any] = {"name": "folder", "root": str(root.resolve()), "classes": str(table.resolve())}
    if found.format != "masks":
        content["format"] = found.format
    if found.unlabelled is not None:
        content |= {"order": data.order, "unlabelled": found.unlabelled}
    images = training_images(found, root, splits["train"])
    content |= (channels := bands_to_name(images))
    content["splits"] = splits
    write_atomically(path, (GUESSED + yaml.safe_dump(content, sort_keys=False)).encode())
    for split, entry in splits.items():
        say(f"{split:<11} " + (f"{entry['images']}  with  {entry['labels']}" if "images" in entry else entry["pairs"]))
    say_guesses(found)
    labels = {label for some in found.pairs.values() for _, label in some}
    if found.format == "masks" and labels:
        read = min(len(labels), LABELS_READ)
        say(f"classes     {len(found.rows)} ids found in {read} label images: name them in {table}")
    else:
        names = ", ".join(row.name for row in found.rows[:8])
        say(f"classes     {names}{', ...' if len(found.rows) > 8 else ''} in {table}")
    say(f"then        segtrain check dataset={path}")
    words = channel_words(images, channels["channels"]) if channels else []
    for line in suggestion(path, images, words):
        say(line)
    say(str(path))


def training_images(found: Recognised, root: Path, entry: dict[str, str]) -> list[Path]:
    """Those that the suggestion for a training looks at; none of a parquet file."""
    if found.pairs.get("train") or "images" not in entry:
        return [image for image, _ in found.pairs.get("train", [])]
    return [file for _, file in matching(root, entry["images"]) if file.suffix.lower() in SUFFIXES]


def bands_to_name(images: list[Path]) -> dict[str, list[int]]:
    """`channels` where images have bands that would be lost otherwise; nothing where they are read as RGB."""
    found = set()
    for path in spread(images, BANDS_READ):
        with contextlib.suppress(DataError):  # `segtrain check` names it
            found.add(lost_bands(read_bytes(path), path))
    counts = sorted(count for count in found if count is not None)
    if not counts:
        return {}
    if len(found) > 1:
        say(f"note: some images have {counts[0]} bands and others not: add channels, such as [0,1,2], that all have")
        return {}
    return {"channels": list(range(counts[0]))}


def channel_words(images: list[Path], channels: list[int]) -> list[str]:
    """Options of a network for these bands, of whose values it prints mean and standard deviation."""
    measured = measure_channels([Sample(str(path), path, None, channels=tuple(channels)) for path in images])
    say(f"channels    {channels}, all bands of the images; remove or reorder them in the file")
    if measured is None:
        say("            their values cannot be used as they are: `segtrain check` says why, then prints mean and std")
        return [f"model.in_channels={len(channels)}"]
    say(f"            of {measured.images} images: {measured}")
    return str(measured).split()


def say_guesses(found: Recognised) -> None:
    """Print the format, and what pixels without an object were taken for."""
    if found.format != "masks":
        say(f"format      {found.format}")
    if found.unlabelled is not None:
        text = "pixels without an object are"
        say(f"unlabelled  {text} {found.unlabelled!r}, a guess; choose void where they may be anything")


def recognise(root: Path, form: str = "auto") -> Recognised:
    """What a folder holds, with train and val. form: a name in RECOGNISERS, masks or auto. DataError for nothing."""
    found = None
    if form != "masks":
        tree = read_tree(root)
        for name, look in RECOGNISERS.items():
            if found is None and form in ("auto", name):
                found = look(tree)
    if found is None and form not in ("auto", "masks"):
        raise DataError(f"{root} holds no labels of the format {form}")
    return found or guess_masks(root)


def guess_masks(root: Path) -> Recognised:
    """Label images of class ids."""
    splits, pairs = guess_splits(root)
    labels = sorted({label for found in pairs.values() for _, label in found})
    rows = [ClassRow(*row) for row in guess_classes(labels)]
    return Recognised("masks", splits, rows, None, pairs)


def written_splits(found: Recognised, root: Path, path: Path) -> dict[str, dict[str, str]]:
    """The splits as dataset.splits, with val; pairs that no pattern finds are written to a file beside `path`."""
    splits = {split: dict(entry) for split, entry in found.splits.items()}
    for split, some in found.pairs.items():
        if not reads_back(root, splits[split], some):
            place = path.with_name(f"{path.stem}_{split}.txt")
            if found.format != "masks":
                raise DataError(f"no pattern pairs the images of {split} with their masks; give dataset.splits.{split}")
            write_atomically(place, pair_lines(root, some))
            splits[split] = {"pairs": str(place.resolve())}
    if "train" not in splits:
        splits = {"train": next(iter(splits.values())), **splits}
    if "val" not in splits:
        other = "test" if "test" in splits else "train"
        say(f"note: no split for validation was found: val is the same images as {other}; give others")
        splits["val"] = dict(splits[other])
    return splits


def pair_lines(root: Path, pairs: Pairs) -> bytes:
    """A list of pairs, one `image,label` a line, below the root where they are."""
    lines = [",".join(str(path.relative_to(root).as_posix()) for path in pair) for pair in pairs]
    return ("\n".join(lines) + "\n").encode()


def reads_back(root: Path, entry: dict[str, str], pairs: Pairs) -> bool:
    """Whether the patterns find exactly these pairs."""
    try:
        samples = match_patterns(root, entry["images"], entry["labels"], "the guess").samples()
    except (DataError, UsageError, LookupError):
        return False
    return {(sample.image, sample.label) for sample in samples} == set(pairs)


def table_csv(rows: list[ClassRow]) -> bytes:
    """The class table as `read_user_table` reads it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([ClassRow._fields, *rows])
    return text.getvalue().encode()
