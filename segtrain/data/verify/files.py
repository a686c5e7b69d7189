"""Check all files before the first step, so that a bad file stops the training now and not after nine hours.

Every file is read to its end and decoded (of a JPEG the end mark tells enough), image and label sizes are compared, and
the ids in the label images are looked up in the class table. Results are saved by path, size and time of each file, and
by its content, so that a second start only reads what has changed, and decodes what has another content.
"""

import contextlib
import hashlib
import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from segtrain.data.images import header_of, is_cut_short, opened, read_bytes, read_image, unreadable
from segtrain.data.label_files import read_label
from segtrain.data.labels import LabelTable
from segtrain.data.sample import Sample, different_sizes
from segtrain.data.verify.label_mistakes import NOTHING_KNOWN, Expected, find_mistakes
from segtrain.errors import DataError
from segtrain.files import read_side_json, write_atomically
from segtrain.threads import threaded_map

LABELS_READ = 5000  # number of label images whose ids are looked up; the others are checked when they are read
ERRORS_SHOWN = 5


def check_samples(
    samples: list[Sample],
    table: LabelTable,
    cache_folder: Path,
    say: Callable[[str], None],
    expected: Expected = NOTHING_KNOWN,
    training: bool = True,
) -> tuple[int, int]:
    """Largest height and width of the images. DataError lists the faulty files, the first few of them in full, or
    names the mistake if the label images do not hold what the table says. training: as of `find_mistakes`."""
    seen = FileFacts(cache_folder, samples)
    every = max(1, -(-len(samples) // LABELS_READ))
    if every > 1:
        say(f"checking the files of {len(samples)} samples, the label ids of every {every}th")
    errors: list[str] = []
    unknown: list[str] = []
    sizes: list[tuple[int, int]] = []
    histogram = np.zeros(256, np.int64)
    started = shown = time.monotonic()

    def examine(item: tuple[int, Sample]) -> tuple[tuple[int, int], np.ndarray | None] | DataError:
        number, sample = item
        try:
            return seen.sample(sample, read_labels=number % every == 0)
        except DataError as error:
            return error

    for number, result in enumerate(threaded_map(examine, enumerate(samples)), 1):
        if isinstance(result, DataError):
            errors.append(str(result))
        else:
            sizes.append(result[0])
            if result[1] is not None:
                histogram += result[1]
                sample = samples[number - 1]
                if result[1][~table.known].any() and sample.label is not None:
                    unknown.append(str(table.unknown_ids(result[1], sample.label)))
                    errors.append(unknown[-1])
        if time.monotonic() - shown > 5:
            shown = time.monotonic()
            left = (shown - started) * (len(samples) - number) / number
            say(f"checking files: {number} of {len(samples)}, about {left:.0f} s left")
    seen.save()
    findings = find_mistakes(histogram, table, expected, len(samples), unknown, training)
    for finding in findings:
        if (finding.severity, finding.kind) == ("note", "one class"):
            say(f"WARNING    {finding.text}")
    mistakes = [finding for finding in findings if finding.severity == "error"]
    if mistakes and mistakes[0].kind != "unknown ids":
        raise DataError(mistakes[0].text)
    if errors:
        left = len(errors) - ERRORS_SHOWN
        more = f"\n... and {left} more: segtrain check lists them in report.json" if left > 0 else ""
        heading = "" if len(errors) == 1 else f"{len(errors)} of {len(samples)} samples cannot be used:\n"
        raise DataError(heading + "\n".join(errors[:ERRORS_SHOWN]) + more)
    return max(h for h, _ in sizes), max(w for _, w in sizes)


class FileFacts:
    """Size and ids of files, saved between runs."""

    def __init__(self, folder: Path, samples: list[Sample]) -> None:
        key = hashlib.sha256(os.fsencode("\n".join(str(s.image.absolute()) for s in samples))).hexdigest()[:16]
        self.path = folder / f"checked-{key}.json"
        self.facts: dict[str, dict[str, Any]] = {}
        self.has_new = False  # whether a file was read that is not among the saved ones
        with contextlib.suppress(OSError):
            self.facts = read_side_json(self.path, dict) or {}
        every = (facts for facts in self.facts.values() if isinstance(facts, dict))
        self.by_content = {str(facts["content"]): facts for facts in every if "content" in facts}

    def entry(self, path: Path) -> dict[str, Any]:
        """Facts about the file as it is now; empty if it has changed or was never read."""
        try:
            stat = path.stat()
        except OSError as error:
            raise unreadable(path, error) from error
        stamp = [stat.st_size, stat.st_mtime_ns]
        facts = self.facts.get(str(path.absolute()))
        if not isinstance(facts, dict) or facts.get("stamp") != stamp:
            content = hashlib.blake2b(read_bytes(path), digest_size=16).hexdigest()
            before = self.by_content.get(content, {})  # copied, or touched: what is in it is known
            facts = self.facts[str(path.absolute())] = before | {"stamp": stamp, "content": content}
            self.by_content[content] = facts
            self.has_new = True
        return facts

    def fact(self, path: Path, name: str, find: Callable[[Path], Any], sound: Callable[[Any], bool]) -> Any:
        """find(path), a JSON value, computed once as long as the file does not change, and what is saved is `sound`."""
        facts = self.entry(path)
        if name not in facts or not sound(facts[name]):
            facts[name] = find(path)
        return facts[name]

    def size(self, path: Path) -> tuple[int, int]:
        """(height, width) of an undamaged label image or instance map, or of an image of 8 bits."""
        height, width = self.fact(path, "decoded", lambda p: list(examine_file(p)), are_pair)
        return height, width

    def image_size(self, sample: Sample) -> tuple[int, int]:
        """(height, width) of an undamaged image, of whatever depth."""
        name = "image" if sample.value_range is None else "image {:g} {:g}".format(*sample.value_range)
        height, width = self.fact(sample.image, name, partial(examine_image, value_range=sample.value_range), are_pair)
        return height, width

    def histogram(self, path: Path) -> np.ndarray:
        """int64 (256,): the number of pixels of a label image with each value."""
        result = np.zeros(256, np.int64)
        for value, count in self.fact(path, "histogram", value_counts, are_counts):
            result[value] = count
        return result

    def sample(self, sample: Sample, read_labels: bool = True) -> tuple[tuple[int, int], np.ndarray | None]:
        """(height, width) and the histogram of the label; DataError for a damaged file or different sizes."""
        image = self.image_size(sample)
        if sample.label is None:
            return image, None
        label = self.size(sample.label)
        if label != image:
            raise different_sizes(sample, image, label)
        return image, self.histogram(sample.label) if read_labels else None

    def save(self) -> None:
        try:
            write_atomically(self.path, json.dumps(self.facts).encode())
        except OSError as error:
            print(f"the results of the check cannot be saved in {self.path.parent}: {error}", file=sys.stderr)


def content_hashes(samples: Sequence[Sample], folder: Path) -> list[int]:
    """The first 64 bits, as a signed number, of the hash of each image file: the same for a copy under another name.

    What was hashed before, as by `check_samples`, is taken from the cache `folder`. DataError for a file that cannot be
    read.
    """
    seen = FileFacts(folder, list(samples))
    digits = [str(facts["content"]) for facts in threaded_map(seen.entry, (sample.image for sample in samples))]
    if seen.has_new:
        seen.save()
    return [int.from_bytes(bytes.fromhex(one)[:8], "big", signed=True) for one in digits]


def are_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(number) is int and number >= 0 for number in value)


def are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(are_pair(row) and row[0] < 256 for row in value)


def value_counts(path: Path) -> list[list[int]]:
    """[value, number of pixels] of a label image."""
    counts = np.bincount(read_label(path).ravel(), minlength=256)
    return [[int(value), int(counts[value])] for value in np.flatnonzero(counts)]


def examine_file(path: Path) -> tuple[int, int]:
    """(height, width). DataError if it is damaged: what is no JPEG is decoded, a JPEG must have its
    end mark."""
    if path.suffix == ".mat":
        height, width = read_label(path).shape
        return height, width
    data = read_bytes(path)
    header_of(data, path)  # bands that would be lost
    with opened(path, data) as image:
        width, height = image.size
        if image.format == "PNG":
            check_png(data)
        if image.format != "JPEG":
            image.load()
        if is_cut_short(data):
            raise ValueError("the end of the JPEG data is missing")
    return height, width


def examine_image(path: Path, value_range: tuple[float, float] | None) -> list[int]:
    """As `examine_file`, and [height, width]. DataError also for values that do not fill the range of their type."""
    if header_of(read_bytes(path), path).is_deep:
        return list(read_image(path, value_range).shape[:2])
    return list(examine_file(path))


def check_png(data: bytes) -> None:
    """ValueError unless every chunk has its checksum and the last one is the end mark (PNG specification, 5.3)."""
    place = 8
    while True:
        length = int.from_bytes(data[place : place + 4], "big")
        end = place + 12 + length
        if end > len(data):
            raise ValueError("the file is truncated")
        if zlib.crc32(data[place + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise ValueError("the checksum of its data is wrong")
        if data[place + 4 : place + 8] == b"IEND":
            return
        place = end
