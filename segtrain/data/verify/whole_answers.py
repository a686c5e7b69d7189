"""What a check of all files of a split has found, saved as one answer that holds as long as none of them changes.

The second start of a training then asks the disk for the state of each file, and looks up nothing else.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from segtrain.data.sample import Sample
from segtrain.data.verify.file_facts import HEAD, absolute, are_counts, file_stamp
from segtrain.files import read_side_json, side_file, write_atomically
from segtrain.threads import uncollected

FILE, SAVED = "checked.json", 32  # name in the cache, and how many answers it holds
RULES = Sample._fields.index("value_range")  # from here on, the fields of a sample say how its files are read


class Answer(NamedTuple):
    """Of samples without a fault. largest: height and width. histogram: int64 (256,), the pixels of each value in the
    labels that were read. turns: what is done with orientations, in words; empty where there are none."""

    largest: tuple[int, int]
    histogram: np.ndarray
    turns: str


def stamp_on_disk(name: str) -> str:
    return file_stamp(os.stat(name))  # noqa: PTH116  # of a text


def state_of_files(samples: Sequence[Sample], every: int, stamp: Callable[[str], str] = stamp_on_disk) -> str:
    """A hash of what an answer depends on: names, order and stamps of all files, and how they are read; "" for a file
    that cannot be found. every: of how many labels one is read. stamp(absolute path): size, time and inode."""
    digest, rules = hashlib.sha256(f"{HEAD}{every}".encode()), None
    try:
        with uncollected():
            for sample in samples:
                image, text = absolute(sample.image), ""
                if sample[RULES:] != rules:
                    rules = sample[RULES:]
                    text = f"\0read as {rules}"
                text += f"\0image {image}\0{stamp(image)}"
                if sample.label is not None:
                    label = absolute(sample.label)
                    text += f"\0label {label}\0{stamp(label)}"
                digest.update(text.encode("utf-8", "surrogateescape"))
    except (OSError, ValueError):
        return ""
    return digest.hexdigest()


def saved_answer(folder: Path, samples: Sequence[Sample], every: int) -> Answer | None:
    """The answer for the files as they are now, from the cache `folder`; None if there is none, or a damaged one."""
    try:
        answers = read_side_json(folder / FILE, dict)
    except OSError:
        return None
    found = answers.get(state_of_files(samples, every)) if answers else None
    if not isinstance(found, dict) or not is_answer(found):
        return None
    histogram = np.zeros(256, np.int64)
    for value, count in found["histogram"]:
        histogram[value] = count
    height, width = found["largest"]
    return Answer((height, width), histogram, found["turns"])


def is_answer(found: dict[str, Any]) -> bool:
    if found.keys() != set(Answer._fields):
        return False
    largest = found["largest"]
    is_size = isinstance(largest, list) and [type(side) for side in largest] == [int, int] and min(largest) > 0
    return is_size and are_counts(found["histogram"]) and isinstance(found["turns"], str)


def save_answer(folder: Path, state: str, answer: Answer) -> None:
    """Add it to those in the cache `folder`, the latest of which are kept."""
    with side_file(folder / FILE):
        others = read_side_json(folder / FILE, dict) or {}
        counts = [[int(value), int(answer.histogram[value])] for value in np.flatnonzero(answer.histogram)]
        others.pop(state, None)
        others[state] = {"largest": list(answer.largest), "histogram": counts, "turns": answer.turns}
        latest = dict(list(others.items())[-SAVED:])
        write_atomically(folder / FILE, json.dumps(latest).encode())
