"""A sample is an image and, where there is one, its label image. `SplitFiles` lists the files of a split."""

import glob
import re
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from segtrain.config import DatasetConfig
from segtrain.data.bands import read_channels
from segtrain.data.folders import matching
from segtrain.data.label_files import read_instances, read_label
from segtrain.data.labels import LabelTable
from segtrain.data.orientation import AS_STORED, turned_size
from segtrain.data.rules import Rules
from segtrain.data.verify.label_mistakes import Expected
from segtrain.errors import DataError

T = TypeVar("T")


class Sample(NamedTuple):
    """name is unique within its split and becomes the name of the prediction. instances: values as the rules say.
    table: what its label means, if that differs from the dataset's table. value_range, exif: of `images.read_image`.
    replaced: of `label_files.read_label`. channels: of `bands.read_channels`."""

    name: str
    image: Path
    label: Path | None
    instances: Path | None = None
    table: LabelTable | None = None
    value_range: tuple[float, float] | None = None
    exif: str = "ignore"
    replaced: Mapping[int, int] | None = None
    channels: tuple[int, ...] | None = None


class SplitFiles(NamedTuple):
    """The files of a split by sample name; labels is None for a split that has none.

    value_range, exif: of `images.read_image`. replaced: of `label_files.read_label`. channels: of
    `bands.read_channels`. lost: sentences about what the
    labels have and the label images made of them do not.
    """

    images: Mapping[str, Path]
    labels: Mapping[str, Path] | None
    instances: Mapping[str, Path] = {}
    value_range: tuple[float, float] | None = None
    exif: str = "ignore"
    replaced: Mapping[int, int] | None = None
    lost: tuple[str, ...] = ()
    channels: tuple[int, ...] | None = None

    def samples(self) -> list[Sample]:
        """Sorted by name. DataError unless every image has a label and the reverse."""
        if self.labels is not None:
            refuse_unpaired(self.images, self.labels)
        return self.with_images()

    def with_images(self) -> list[Sample]:
        """The samples that have an image, with their labels where there are any, sorted by name."""
        labels, rest = self.labels or {}, (None, self.value_range, self.exif, self.replaced, self.channels)
        return [Sample(n, self.images[n], labels.get(n), self.instances.get(n), *rest) for n in sorted(self.images)]

    def labelled(self) -> list[Sample]:
        """The labelled samples, which can be scored without images: the label stands in for a missing image."""
        labels, rest = self.labels or {}, (None, self.value_range, self.exif, self.replaced, self.channels)
        return [
            Sample(n, self.images.get(n, labels[n]), labels[n], self.instances.get(n), *rest) for n in sorted(labels)
        ]


class Submission(NamedTuple):
    """What a benchmark's server takes.

    page: where to send it. place: name in the archive of a sample's label PNG, which holds label ids. contents(answers,
    to_id) and verify(archive, images): for an archive of something else: yield (name, content) for the label images
    `answers` by sample name, whose values `to_id` uint8 (256,) maps to label ids; raise DataError unless the archive
    answers for every image.
    """

    page: str
    place: str = "{}.png"
    contents: Callable[[Mapping[str, Path], np.ndarray], Iterator[tuple[str, bytes]]] | None = None
    verify: Callable[[zipfile.ZipFile, Mapping[str, Path]], None] | None = None


def label_encodings(table: LabelTable) -> dict[str, dict[int, int]]:
    """Name of an encoding -> what a pixel of a prediction holds -> label id."""
    train_ids = {number: int(label) for number, label in enumerate(table.ids)}
    return {"ids": {int(row["id"]): int(row["id"]) for row in table.rows}, "train_ids": train_ids}


class DatasetSpec(NamedTuple):
    """Everything about one dataset with a label for every pixel.

    table(config): what its labels mean. files(config, split): where its files are. rules: how its benchmark scores.
    published: number of samples of a split as published. scored: the split that its own script scores. answer: a
    sample's name -> glob of the file with its prediction, as its own script looks for it. family: datasets of one
    family share images, and identity(sample) is the same for the same image. options: dataclass of its options
    `dataset.*`, None: those that every dataset has. splits: names for several splits together. tables: the published
    label tables with its classes, the default version's first. expected: what its label images usually hold.
    encodings: as `label_encodings`; encoding: the default one. submission: of its benchmark. licence: of its images.
    image_size: height and width of a large image, for plans.
    """

    table: Callable[[Any], LabelTable]
    files: Callable[[Any, str], SplitFiles]
    rules: Rules
    published: Mapping[str, int] = {}
    scored: str = "val"
    answer: Callable[[str], str] = lambda name: f"{glob.escape(name)}.png"
    family: str = ""
    identity: Callable[[Sample], str] = lambda sample: sample.name
    options: type[DatasetConfig] | None = None
    splits: Mapping[str, str] = {"trainval": "train+val"}
    tables: tuple[str, ...] = ()
    expected: Expected = Expected()
    encodings: Callable[[LabelTable], Mapping[str, Mapping[int, int]]] = label_encodings
    encoding: str = "ids"
    submission: Submission | None = None
    licence: str = ""
    image_size: tuple[int, int] | None = None


def refuse_unpaired(images: Mapping[str, Path], labels: Mapping[str, Path]) -> None:
    """DataError, listing a few of them, if there are images without labels or the reverse."""
    for what, other, files, others in (("image", "label", images, labels), ("label", "image", labels, images)):
        keys = sorted(files.keys() - others.keys())
        if keys:
            some = ", ".join(str(files[key]) for key in keys[:3])
            raise DataError(
                f"{len(keys)} of {len(files)} {what}s have no {other}: {some}"
                f"{', ...' if len(keys) > 3 else ''}; add the missing files or remove these"
            )


def by_stem(folder: Path, pattern: str, ending: str = "") -> dict[str, Path]:
    """Files of a folder that match, by their names without `ending` (default: their suffix).

    pattern: as of `matching`, or with [...] or ** as of `Path.glob`.
    """
    if not folder.is_dir():
        return {}
    is_plain = not re.search(r"\[|\*\*", pattern)
    paths = (path for _, path in matching(folder, pattern)) if is_plain else folder.glob(pattern)
    return {path.name.removesuffix(ending) if ending else path.stem: path for path in paths}


def expect_folder(root: Path, what: str, tree: str) -> None:
    """DataError with the expected tree, and where to download the data, if there is no such folder."""
    if not root.is_dir():
        expected = tree.format(root=root).replace("\n", "\n  ")
        raise DataError(
            f"no {what} data at {root} (set dataset.root=FOLDER, or SEGTRAIN_DATA to its parent folder). Expected:\n"
            f"  {expected}"
        )


def expect_split(split: str, known: Collection[str], root: Path) -> None:
    """DataError naming the splits that exist, if `split` is not one of them."""
    if split not in known:
        names = ", ".join(sorted(known)) or "none"
        raise DataError(
            f"no split {split!r} in {root}: there is {names} (chosen by dataset.train_split, dataset.val_split, split)"
        )


def read_sample_image(sample: Sample, label: tuple[int, ...] | None) -> np.ndarray:
    """uint8 (H, W, C), its channels or RGB, turned as the sample's `exif` says. label: the shape of its label."""
    size = None if label is None else (label[0], label[1])
    return read_channels(sample.image, sample.channels, sample.value_range, sample.exif, size)


def read_labels(sample: Sample, table: LabelTable) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Train ids and label ids uint8 (H, W), and the instances if there are any. DataError if sizes differ."""
    assert sample.label is not None
    table = sample.table or table
    stored = read_label(sample.label, sample.replaced)
    target, instances = table.encode(stored, sample.label), None
    if sample.instances is not None:
        instances = read_instances(sample.instances)
        if instances.shape != stored.shape:
            raise different_sizes(sample._replace(image=sample.instances), instances.shape, stored.shape)
    return target, table.to_ids(stored), instances


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many of the items, evenly spread, the first and the last among them."""
    count = min(most, len(items))
    return [items[round(i * (len(items) - 1) / max(count - 1, 1))] for i in range(count)]


def different_sizes(
    sample: Sample, image: tuple[int, ...], label: tuple[int, ...], tag: int = AS_STORED
) -> DataError:  # fmt: skip
    """tag: the EXIF orientation of the image, if it is known."""
    remedy = "use the label made for this image"
    if tag != AS_STORED and turned_size((image[0], image[1]), tag) == tuple(label):
        remedy = f"the image has the EXIF orientation {tag}, which dataset.exif={sample.exif} "
        remedy += "has applied: ignore does not" if sample.exif == "apply" else "does not apply: auto does"
    return DataError(
        f"{sample.image} is {image[1]}x{image[0]} but its label {sample.label} is {label[1]}x{label[0]} "
        f"(width x height): they must match pixel by pixel; {remedy}"
    )


# The names that plugins were written with.
DataSet = DatasetSpec
Files = SplitFiles
