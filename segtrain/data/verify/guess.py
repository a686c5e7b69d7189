"""An own data set in minutes: a configuration for `dataset=folder`, guessed from the files, to be corrected."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import Image, UnidentifiedImageError

from segtrain.console import Progress, say
from segtrain.data.label_files import read_label
from segtrain.data.sets.folder import match_patterns
from segtrain.errors import DataError, UsageError
from segtrain.files import write_atomically

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
SPLITS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
LABELS_READ = 300


class Pattern(NamedTuple):
    """Where pictures or label pictures lie: folder parts with * where they vary, and what their names end in."""

    folder: str
    ending: str

    def __str__(self) -> str:
        return f"{self.folder}/*{self.ending}" if self.folder else f"*{self.ending}"


def write_guess(root: Path, given: str | None, path: Path) -> None:
    """The configuration into `path` and the classes beside it; says what was guessed and how to use it."""
    if given is None:
        raise UsageError("dataset.root is not set: give the folder of your pictures")
    if not root.is_dir():
        raise UsageError(f"dataset.root={root}: no such folder")
    if path.suffix not in (".yaml", ".yml"):
        raise UsageError(f"write_config={path}: give the name of a .yaml file to write")
    if path.resolve().is_relative_to(root.resolve()):
        raise UsageError(f"write_config={path} is inside the data: nothing is written there, choose another folder")
    splits, pairs = guess_splits(root)
    for split, entry in splits.items():
        if not reads_back(root, entry, pairs[split]):
            place = path.with_name(f"{path.stem}_{split}.txt")
            lines = [
                f"{image.relative_to(root).as_posix()},{label.relative_to(root).as_posix()}"
                for image, label in pairs[split]
            ]
            write_atomically(place, ("\n".join(lines) + "\n").encode())
            splits[split] = {"pairs": str(place.resolve())}
    labels = sorted({label for found in pairs.values() for _, label in found})
    classes = guess_classes(labels)
    table = path.with_name(f"{path.stem}_classes.csv")
    rows = "".join(f"{label},{name},{color},{ignore}\n" for label, name, color, ignore in classes)
    write_atomically(table, f"id,name,color,ignore\n{rows}".encode())
    content = {"name": "folder", "root": str(root.resolve()), "classes": str(table.resolve()), "splits": splits}
    head = (
        "# Guessed by segtrain check. Correct the patterns here, and names, colours and ignored ids in the CSV file.\n"
    )
    write_atomically(path, (head + yaml.safe_dump(content, sort_keys=False)).encode())
    for split, entry in splits.items():
        say(f"{split:<11} " + (f"{entry['images']}  with  {entry['labels']}" if "images" in entry else entry["pairs"]))
    say(f"classes     {len(classes)} ids found in {min(len(labels), LABELS_READ)} label pictures: name them in {table}")
    say(f"then        segtrain check dataset={path}")
    say(f"and         segtrain train dataset={path} augmentation.crop_size=[256,256] trainer.epochs=60")
    print(path, flush=True)


def reads_back(root: Path, entry: dict[str, str], pairs: list[tuple[Path, Path]]) -> bool:
    """Whether the patterns find exactly these pairs."""
    try:
        found = match_patterns(root, entry["images"], entry["labels"], "the guess").samples()
    except (DataError, UsageError):
        return False
    return {(sample.image, sample.label) for sample in found} == set(pairs)


def guess_splits(root: Path) -> tuple[dict[str, dict[str, str]], dict[str, list[tuple[Path, Path]]]]:
    """split -> {images, labels} patterns, and split -> pairs of files. DataError if no pictures have labels."""
    folders: dict[Path, list[str]] = defaultdict(list)
    for place, inner, names in os.walk(root):
        inner.sort()
        for name in sorted(names):
            if name.lower().endswith(SUFFIXES) and not name.startswith("._"):
                folders[Path(place).relative_to(root)].append(name)
    if not folders:
        raise DataError(f"{root} holds no pictures ({', '.join(SUFFIXES)})")
    groups = [group for folder, names in folders.items() for group in by_ending(folder, names)]
    kinds = {id(group): kind(root, group) for group in groups}
    photographs = [group for group in groups if kinds[id(group)] == "image"]
    maps = [group for group in groups if kinds[id(group)] == "label"]
    pairs = []
    for images in photographs:
        best = max(maps, key=partial(likeness, images), default=None)
        if best is not None and len(images[2].keys() & best[2].keys()) > 0.5 * len(images[2]):
            pairs.append((images, best))
    if not pairs:
        counts = [sum(len(group[2]) for group in groups) for groups in (photographs, maps)]
        raise DataError(
            f"{root} holds {counts[0]} photographs and {counts[1]} pictures with few values, but they "
            "do not have the same names: label pictures must be greyscale or "
            "palette PNGs named as their photographs, with another ending perhaps"
        )
    splits: dict[str, dict[str, str]] = {}
    files: dict[str, list[tuple[Path, Path]]] = defaultdict(list)
    for images, best in pairs:
        split = split_of(images[0])
        both = sorted(images[2].keys() & best[2].keys())
        files[split] += [(root / images[0] / images[2][name], root / best[0] / best[2][name]) for name in both]
        if len(both) < len(images[2]):
            say(f"note: {len(images[2]) - len(both)} pictures in {images[0]} have no label picture; they are left out")
        patterns = {"images": str(Pattern(images[0].as_posix().lstrip("."), images[1])),
                    "labels": str(Pattern(best[0].as_posix().lstrip("."), best[1]))}  # fmt: skip
        splits[split] = merged(splits[split], patterns) if split in splits else patterns
    if "train" not in splits:
        first = next(iter(splits))
        splits, files["train"] = {"train": splits[first], **splits}, files[first]
    if "val" not in splits:
        say("note: only one split was found; val is the same pictures as train, give others")
        other = "test" if "test" in splits else "train"
        splits["val"], files["val"] = splits[other], files[other]
    return splits, files


def likeness(images: "Group", labels: "Group") -> tuple[int, bool, int, bool, int]:
    """How well label pictures go with photographs: names in common, the same split, folder names in common, ids in
    their own name."""
    names = len(images[2].keys() & labels[2].keys())
    folders = len(set(images[0].parts) & set(labels[0].parts))
    return names, split_of(images[0]) == split_of(labels[0]), folders, "id" in labels[1].lower(), -len(labels[1])


Group = tuple[Path, str, dict[str, str]]  # folder, ending, what stands before the ending -> name


def by_ending(folder: Path, names: list[str]) -> list[Group]:
    """Files of a folder in groups: Cityscapes has three kinds of label pictures side by side."""
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        stem, dot, suffix = name.rpartition(".")
        words = re.search(r"(?:[_-][A-Za-z][A-Za-z0-9]*)+$", stem)
        ending = words[0] if words and words.start() > 0 else ""
        groups[f"{ending}{dot}{suffix}"][stem[: len(stem) - len(ending)]] = name
    if len(groups) > 4 or sum(len(group) for group in groups.values()) < 2 * len(groups):
        groups = defaultdict(dict)  # the words differ from file to file: they belong to the names
        for name in names:
            stem, dot, suffix = name.rpartition(".")
            groups[f"{dot}{suffix}"][stem] = name
        groups = dict(map(with_common_ending, groups.items()))
    return [(folder, ending, group) for ending, group in groups.items()]


def with_common_ending(group: tuple[str, dict[str, str]]) -> tuple[str, dict[str, str]]:
    """What all names of a group have before their suffix, such as _mask, becomes part of the ending."""
    suffix, files = group
    common = os.path.commonprefix([stem[::-1] for stem in files])[::-1]
    found = re.search(r"[_-][A-Za-z].*$", common)
    ending = found[0] if found and len(files) > 1 else ""
    return f"{ending}{suffix}", {stem[: len(stem) - len(ending)]: name for stem, name in files.items()}


def kind(root: Path, group: Group) -> str:
    """image, label or other, by a few of the files."""
    folder, _, files = group
    votes = [looks_like(root / folder / name) for name in list(files.values())[:: max(1, len(files) // 3)][:3]]
    return max(set(votes), key=votes.count)


def looks_like(path: Path) -> str:
    try:
        with Image.open(path) as picture:
            if picture.format == "JPEG":
                return "image"
            if picture.mode == "RGB":
                return "image" if len(picture.getcolors(1 << 24) or []) > 256 else "other"
            if picture.mode in ("P", "1", "L"):
                return "label" if len(np.unique(np.asarray(picture))) <= 64 else "image"
    except (OSError, UnidentifiedImageError):
        pass
    return "other"


def split_of(folder: Path) -> str:
    for part in folder.parts:
        words = re.split(r"[^a-z]+", part.lower())
        for split, names in SPLITS.items():
            if any(word in names for word in words):
                return split
    return "train"


def merged(first: dict[str, str], second: dict[str, str]) -> dict[str, str]:
    """One pattern for two folders: * for the one part that differs, as the city in Cityscapes."""
    result = {}
    for key, pattern in first.items():
        a, b = pattern.split("/"), second[key].split("/")
        if len(a) != len(b):
            return first
        result[key] = "/".join(x if x == y else "*" for x, y in zip(a, b, strict=True))
    return result


def guess_classes(labels: Iterable[Path]) -> list[tuple[int, str, str, str]]:
    """(id, name, colour, ignore) of every value in the label pictures; 255 is taken for ignored."""
    paths = list(labels)
    paths = paths[:: max(1, -(-len(paths) // LABELS_READ))]
    found = np.zeros(256, bool)
    palette: Any = None
    progress = Progress("reading labels", len(paths))
    for done, path in enumerate(paths, 1):
        try:
            found[np.unique(read_label(path))] = True
        except DataError as error:
            say(f"note: {error}")
            continue
        if palette is None:
            with Image.open(path) as picture:
                palette = picture.getpalette() if picture.mode == "P" else None
        progress.show(done)

    def color(label: int) -> str:
        values = (palette or [])[3 * label : 3 * label + 3]
        return "#{:02x}{:02x}{:02x}".format(*values) if len(values) == 3 else ""

    return [
        (int(i), "void" if i == 255 else f"class {i}", color(int(i)), "true" if i == 255 else "")
        for i in np.flatnonzero(found)
    ]
