"""Recognise wrong label images: a histogram of their values identifies the mistake and its remedy."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from segtrain.config import IGNORE_INDEX
from segtrain.data.labels import LabelTable

HANDFUL = 4  # images


class Finding(NamedTuple):
    """severity: "error" spoils a training or a score, "note" does not. kind: a word for programs."""

    severity: str
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.text}"


class Expected(NamedTuple):
    """What is known of a dataset's label images.

    common: names of labels that occur in almost any handful of images. mistake(histogram, table): a mistake that only
    this dataset's label images can have.
    """

    common: tuple[str, ...] = ()
    mistake: Callable[[np.ndarray, LabelTable], Finding | None] = lambda histogram, table: None


NOTHING_KNOWN = Expected()


def find_mistakes(
    histogram: np.ndarray, table: LabelTable, expected: Expected, images: int, unknown: Sequence[str] = (),
    training: bool = False,
) -> list[Finding]:  # fmt: skip
    """What is wrong with the label images of a split; a mistake that explains unknown ids is the only finding.

    histogram: int64 (256,), the number of pixels with each value in that many label images. unknown: the message about
    each label image with ids that are not in the table. training: whether a network is to learn from the split.
    """
    if not histogram.any():
        return []
    common = expected.common if images >= HANDFUL else ()
    for finding in (
        binary(histogram, table), train_ids(histogram, table), grey_palette(histogram, table),
        shifted(histogram, table, common), expected.mistake(histogram, table),
    ):  # fmt: skip
        if finding is not None:
            return [finding]
    findings = []
    if unknown:
        findings.append(Finding("error", "unknown ids", first_of(unknown)))
    labelled = counts_by_class(histogram, table)
    if not labelled.any() and not unknown:
        findings.append(Finding(
            "error", "void only",
            "the label images hold ignored ids only, as those of Cityscapes' test split do: nothing can be trained "
            "or scored with them; take another split",
        ))  # fmt: skip
    elif (labelled > 0).sum() == 1:
        findings.append(one_class(table, labelled, training))
    elif labelled.any():
        missing = [name for name, count in zip(table.names, labelled, strict=True) if not count]
        if missing:
            listed = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
            text = f"{len(missing)} of {len(labelled)} classes never occur: {listed}"
            findings.append(Finding("note", "class never occurs", text))
    return findings


def one_class(table: LabelTable, labelled: np.ndarray, training: bool) -> Finding:
    """labelled: int64 (C,), the pixels of each class, of which one alone has any."""
    name = table.names[int(labelled.argmax())]
    text = f"all labelled pixels are of the class {name}: every network that predicts nothing else has a score of 100 %"
    if training and table.num_classes == 2:
        other = next(one for one in table.names if one != name)
        return Finding("error", "one class", f"{text}; add images with {other}, or correct the ids of {table.source}")
    return Finding("note", "one class", text)


def first_of(texts: Sequence[str]) -> str:
    """The first text, and how many more there are."""
    more = f" (and {len(texts) - 1} more like this, see bad_files in report.json)" if len(texts) > 1 else ""
    return texts[0] + more


def counts_by_class(histogram: np.ndarray, table: LabelTable) -> np.ndarray:
    """int64 (C,): pixels of each class."""
    train_ids = table.encode_values(np.arange(256, dtype=np.uint8))
    result = np.zeros(256, np.int64)
    np.add.at(result, train_ids, histogram)
    return result[: table.num_classes]


def binary(histogram: np.ndarray, table: LabelTable) -> Finding | None:
    present = np.flatnonzero(histogram)
    if present.tolist() != [0, 255]:
        return None
    ignored = [value for value in (0, 255) if table.stored.get(value) in table.ignored_ids]
    if ignored and counts_by_class(histogram, table).any():
        return Finding(
            "error", "0/255 masks",
            f"the label images hold 0 and 255 only, as masks of one class do, but {table.source} ignores {ignored[0]}: "
            f"one class is left, and every score is 100 %; give {ignored[0]} a class of its own (ignore=false)",
        )  # fmt: skip
    if table.known[[0, 255]].all() and table.num_classes <= 2:
        return None
    return Finding(
        "error", "0/255 masks",
        f"the label images hold 0 and 255 only, as masks of one class do, but {table.source} has {table.num_classes} "
        "classes: give images with one class id per pixel (a mask: value // 255, with a table of two classes)",
    )  # fmt: skip


def train_ids(histogram: np.ndarray, table: LabelTable) -> Finding | None:
    classes = table.num_classes
    if (
        (table.ids == np.arange(classes)).all()
        or histogram[classes:IGNORE_INDEX].any()
        or (histogram[:classes] > 0).sum() < 3
    ):
        return None
    total = histogram.sum()
    read_as_classes = counts_by_class(histogram, table).sum()
    if read_as_classes > 0.7 * total or histogram[:classes].sum() < 2 * read_as_classes:
        return None
    return Finding(
        "error", "train ids",
        f"the label images hold 0 to {classes - 1} and 255: these are train ids, not label ids ({table.source}). "
        "Give the images as downloaded (Cityscapes: *_labelIds.png), or name converted ones *_labelTrainIds.png",
    )  # fmt: skip


def grey_palette(histogram: np.ndarray, table: LabelTable) -> Finding | None:
    present = set(np.flatnonzero(histogram).tolist())
    colors = np.array([row["color"] for row in table.rows], float)
    luma = np.rint(colors @ [0.299, 0.587, 0.114]).astype(int)
    near = {value + step for value in luma.tolist() for step in (-1, 0, 1)}
    if len(present) < 2 or not present <= near or table.known[sorted(present)].all():
        return None
    return Finding(
        "error", "grey colours",
        "the values of the label images are the colours of the classes converted to grey: the images have lost their "
        "ids when they were converted (palette PNGs must be read as indices); use them as downloaded",
    )  # fmt: skip


def shifted(histogram: np.ndarray, table: LabelTable, names: tuple[str, ...]) -> Finding | None:
    """Values that are all one too high or too low."""
    legal = table.known.copy()
    for value, label in table.stored.items():
        row = next(r for r in table.rows if r["id"] == label)
        legal[value] &= bool(row.get("in_dataset", True))
    common = [table.stored_value(name) for name in names]
    total = histogram.sum()

    def legal_and_common(counts: np.ndarray) -> tuple[bool, list[bool]]:
        """Whether only values occur that are in this data, and which of the common classes are there."""
        return not counts[~legal].any(), [bool(counts[value] > 0.005 * total) for value in common]

    legal_now, common_now = legal_and_common(histogram)
    steps = [(-1, "high"), (1, "low")]
    steps.sort(key=lambda item: -sum(np.roll(histogram, item[0])[value] for value in common))  # the likelier one first
    for step, word in steps:
        moved = np.roll(histogram, step)
        legal_then, common_then = legal_and_common(moved)
        better = not legal_now and all(common_then)
        better |= bool(common) and not any(common_now) and all(common_then)
        if legal_then and better and counts_by_class(moved, table).any():
            return Finding(
                "error", "shifted by one",
                f"every value of the label images is one too {word}: with {step:+d} they are ids of {table.source}. "
                "Somebody subtracted or added 1 (COCO-Stuff: 164k pixel maps are id - 1, the 10k set has ids; "
                "mmsegmentation: reduce_zero_label); use the images as downloaded",
            )  # fmt: skip
    return None
