"""Guess a configuration for `dataset=folder` from the files of a folder, for the user to correct."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from segtrain.console import Progress, say
from segtrain.data.bands import all_bands, lost_bands
from segtrain.data.folders import files_below
from segtrain.data.images import BROKEN, SUFFIXES, header_of, opened, read_bytes
from segtrain.data.label_files import read_label
from segtrain.errors import DataError

SPLITS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
LABELS_READ = 300


class Pattern(NamedTuple):
    """Where images or label images are: the folder, with * for parts that vary, and the ending of their names."""

    folder: str
    ending: str

    def __str__(self) -> str:
        return f"{self.folder}/*{self.ending}" if self.folder else f"*{self.ending}"


Pairs = list[tuple[Path, Path]]  # image, label image


def guess_splits(root: Path, maps: str = "label") -> tuple[dict[str, dict[str, str]], dict[str, Pairs]]:
    """split -> {images, labels} patterns, and split -> pairs of files. DataError if no images have labels.

    maps: what the label images are, by `kind`: label, or other, which are colours."""
    groups = find_groups(root)
    splits: dict[str, dict[str, str]] = {}
    files: dict[str, Pairs] = defaultdict(list)
    for images, labels in pair_groups(root, groups, maps):
        split = split_of(images[0])
        both = sorted(images[2].keys() & labels[2].keys())
        files[split] += [(root / images[0] / images[2][name], root / labels[0] / labels[2][name]) for name in both]
        if len(both) < len(images[2]):
            say(f"note: {len(images[2]) - len(both)} images in {images[0]} have no label image; they are left out")
        patterns = {"images": pattern_of(images), "labels": pattern_of(labels)}
        splits[split] = merge_patterns(splits[split], patterns) if split in splits else patterns
    if "train" not in splits:
        first = next(iter(splits))
        splits, files["train"] = {"train": dict(splits[first]), **splits}, files[first]
    if "val" not in splits:
        other = "test" if "test" in splits else "train"
        say(f"note: no split for validation was found: val is the same images as {other}; give others")
        splits["val"], files["val"] = dict(splits[other]), files[other]
    return splits, files


def find_groups(root: Path) -> "list[Group]":
    """The images below `root` by folder and ending. DataError if there are none."""
    folders: dict[Path, list[str]] = defaultdict(list)
    for path in files_below(root):
        if path.suffix.lower() in SUFFIXES:
            folders[path.parent.relative_to(root)].append(path.name)
    if not folders:
        raise DataError(f"{root} holds no images ({', '.join(SUFFIXES)})")
    return [group for folder, names in folders.items() for group in by_ending(folder, names)]


def pair_groups(root: Path, groups: "list[Group]", wanted: str) -> "list[tuple[Group, Group]]":
    """Photographs with the label images that fit them best. DataError if none do."""
    kinds = {id(group): kind(root, group) for group in groups}
    photographs = [group for group in groups if kinds[id(group)] == "image"]
    maps = [group for group in groups if kinds[id(group)] == wanted]
    pairs = []
    for images in photographs:
        best = max(maps, key=partial(likeness, images), default=None)
        if best is not None and len(images[2].keys() & best[2].keys()) > 0.5 * len(images[2]):
            pairs.append((images, best))
    if not pairs:
        raise no_pairs(root, photographs, maps, [group for group in groups if kinds[id(group)] == "other"])
    return pairs


def no_pairs(root: Path, photographs: "list[Group]", maps: "list[Group]", others: "list[Group]") -> DataError:
    """Why no photograph has a label image."""
    images, labels, colours = (sum(len(group[2]) for group in some) for some in (photographs, maps, others))
    found = f"{root} holds {images} photographs and {labels} images with one of few values per pixel"
    if images and labels:
        why = "but they do not have the same names"
    elif images and colours:
        why = f"but {colours} with few colours, which have to become class ids first"
    else:
        why = "of which both are needed"
    return DataError(
        f"{found}, {why}: label images must be greyscale or palette PNGs, no JPEGs, named as their photographs, with "
        "another ending if need be"
    )


def pattern_of(group: "Group") -> str:
    return str(Pattern(group[0].as_posix().lstrip("."), group[1]))


def likeness(images: "Group", labels: "Group") -> tuple[int, bool, int, bool, int]:
    """How well label images fit photographs: names in common, the same split, folder names in common, `id` in their
    name."""
    names = len(images[2].keys() & labels[2].keys())
    folders = len(set(images[0].parts) & set(labels[0].parts))
    return names, split_of(images[0]) == split_of(labels[0]), folders, "id" in labels[1].lower(), -len(labels[1])


Group = tuple[Path, str, dict[str, str]]  # folder, ending, what stands before the ending -> name


def by_ending(folder: Path, names: list[str]) -> list[Group]:
    """Files of a folder in groups: some datasets have several kinds of label images side by side."""
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
    """The group with what all its names end in before their suffix, such as _mask, as part of the ending."""
    suffix, files = group
    common = os.path.commonprefix([stem[::-1] for stem in files])[::-1]
    match = re.search(r"[_-][A-Za-z].*$", common)
    ending = match[0] if match and len(files) > 1 else ""
    return f"{ending}{suffix}", {stem[: len(stem) - len(ending)]: name for stem, name in files.items()}


def kind(root: Path, group: Group) -> str:
    """image, label or other, by a few of the files."""
    folder, _, files = group
    votes = [looks_like(root / folder / name) for name in list(files.values())[:: max(1, len(files) // 3)][:3]]
    return max(set(votes), key=votes.count)


def looks_like(path: Path) -> str:
    try:
        data = read_bytes(path)
        if lost_bands(data, path) is not None:
            return "image"
        if header_of(data, path).is_deep:
            values = all_bands(data, path)
            return "label" if values.shape[2] == 1 and len(np.unique(values)) <= 64 else "image"
        with opened(path, data) as image:
            if image.format == "JPEG":
                return "image"
            if image.mode == "RGB":
                return "image" if image.getcolors(256) is None else "other"
            if image.mode in ("P", "1", "L"):
                return "label" if len(np.unique(np.asarray(image))) <= 64 else "image"
    except (DataError, *BROKEN):
        pass
    return "other"


def split_of(folder: Path) -> str:
    for part in folder.parts:
        words = re.split(r"[^a-z]+", part.lower())
        for split, names in SPLITS.items():
            if any(word in names for word in words):
                return split
    return "train"


def merge_patterns(first: dict[str, str], second: dict[str, str]) -> dict[str, str]:
    """One pattern for two folders: * for the one part that differs, such as the city."""
    result = {}
    for key, pattern in first.items():
        a, b = pattern.split("/"), second[key].split("/")
        if len(a) != len(b):
            return first
        result[key] = "/".join(x if x == y else "*" for x, y in zip(a, b, strict=True))
    return result


def guess_classes(labels: Iterable[Path]) -> list[tuple[int, str, str, str]]:
    """(id, name, colour, ignore) of every value in the label images; 255 is assumed to be ignored, but in masks of one
    class, where it is that class."""
    paths = list(labels)
    paths = paths[:: max(1, -(-len(paths) // LABELS_READ))]
    present = np.zeros(256, bool)
    palette: Any = None
    progress = Progress("reading labels", len(paths))
    for done, path in enumerate(paths, 1):
        try:
            present[np.unique(read_label(path))] = True
        except DataError as error:
            say(f"note: {error}")
            continue
        if palette is None:
            with opened(path) as image:
                palette = image.getpalette() if image.mode == "P" else None
        progress.show(done)

    def color(label: int) -> str:
        values = (palette or [])[3 * label : 3 * label + 3]
        return "#{:02x}{:02x}{:02x}".format(*values) if len(values) == 3 else ""

    values = np.flatnonzero(present).tolist()
    if values in ([0, 1], [0, 255]):
        return [(0, "background", color(0), ""), (values[1], "foreground", color(values[1]), "")]
    if len(values) < 2 or values in ([i, 255] for i in range(255)):
        say(f"note: the label images hold {values} only: at least two classes are needed, the background among them")
    return [(i, "void" if i == 255 else f"class {i}", color(i), "true" if i == 255 else "") for i in values]
