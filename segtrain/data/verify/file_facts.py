"""What is known of files: size, orientation, label values. It is saved, and holds as long as a file does not change.

One line a file, so that the second start of a training on many files neither opens them nor keeps an object for each.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from segtrain.data.bands import read_channels
from segtrain.data.images import (
    header_of,
    is_cut_short,
    opened,
    orientation_of,
    read_bytes,
    stored_pixels,
    stored_size,
    unreadable,
)
from segtrain.data.label_files import read_label
from segtrain.data.orientation import AS_STORED, tag_to_apply, turned_size
from segtrain.data.sample import Sample, different_sizes
from segtrain.errors import DataError
from segtrain.files import set_aside, write_atomically
from segtrain.threads import uncollected

HEAD = "segtrain: facts about files, 1\n"
CONTENT = "content"  # name of the hash of a file's bytes, which only `segtrain check` computes


class FileFacts:
    """Facts about the files of samples, by path, size, time and inode of each.

    tags: image -> its orientation, and the one that it is turned by, of those asked for that have any.
    """

    def __init__(self, folder: Path, samples: Sequence[Sample]) -> None:
        """folder: of the cache. The file in it is named by the folder that the images have in common."""
        self.changed = False
        self.tags: dict[Path, tuple[int, int]] = {}
        self.contents: dict[bytes, str] | None = None  # hash -> facts; None: not asked for yet
        with uncollected():
            images = [absolute(sample.image) for sample in samples]
            labels = [absolute(sample.label) for sample in samples if sample.label is not None]
            self.known = dict.fromkeys(images + labels, "")  # absolute path -> "size time inode {facts}", "": none
            ends = (min(images), max(images)) if images else ("", "")
            common = os.path.commonpath([os.path.dirname(end) for end in ends])  # noqa: PTH120  # of texts
            self.path = folder / f"files-{hashlib.sha256(os.fsencode(common)).hexdigest()[:16]}.txt"
            for name, line in self.saved_lines():
                if name in self.known:
                    self.known[name] = line

    def saved_lines(self) -> Iterator[tuple[str, str]]:
        """(absolute path, the rest of its line) of the file in the cache; what is no such file is set aside."""
        with contextlib.suppress(OSError):
            if not self.path.is_file():
                return
            with self.path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as file:
                is_sound = file.readline() == HEAD
                for row in file if is_sound else ():
                    line, _, name = row.partition("\t")
                    yield name.rstrip("\n"), line
            if not is_sound:
                set_aside(self.path, "is not what segtrain writes there")

    def entry(self, path: Path) -> tuple[str, str, dict[str, Any]]:
        """Absolute path, stamp, and the facts about the file as it is now; none if it has changed or was never read."""
        name, stamp, text = self.entry_text(path)
        return name, stamp, parsed(text)

    def entry_text(self, path: Path) -> tuple[str, str, str]:
        """As `entry`, with the facts as JSON."""
        name = absolute(path)
        try:
            stat = os.stat(name)  # noqa: PTH116  # of a text
        except (OSError, ValueError) as error:
            raise unreadable(path, error) from error
        stamp = file_stamp(stat)
        line = self.known.get(name, "")
        if line.startswith(f"{stamp} "):
            return name, stamp, line[len(stamp) + 1 :]
        text = self.facts_by_content(path)
        if parsed(text):  # so that its bytes are hashed once
            self.note(name, stamp, text)
        return name, stamp, text

    def stamp(self, name: str) -> str:
        """The stamp that the facts about a file hold for; "" if nothing is known. name: its absolute path."""
        return " ".join(self.known.get(name, "").split(" ", 3)[:3])

    def note(self, name: str, stamp: str, text: str) -> None:
        self.known[name], self.changed = f"{stamp} {text}", True

    def facts_by_content(self, path: Path) -> str:
        """What is known of a file with the same bytes, copied or touched, if a check has hashed any."""
        if self.contents is None:
            self.contents = {}
            for _, line in self.saved_lines():
                if f'"{CONTENT}"' in line and isinstance(content := parsed(facts_in(line)).get(CONTENT), str):
                    self.contents[content.encode()] = facts_in(line)
        if not self.contents:
            return "{}"
        return self.contents.get(hashed(path).encode(), "{}")

    def fact(self, path: Path, name: str, find: Callable[[Path], Any], sound: Callable[[Any], bool]) -> Any:
        """find(path), a JSON value, computed once as long as the file does not change, and what is saved is `sound`."""
        place, stamp, text = self.entry_text(path)
        value = saved_fact(text, name, sound)
        if value is None:
            value = find(path)
            self.note(place, stamp, json.dumps(parsed(text) | {name: value}, separators=(",", ":")))
        return value

    def content(self, path: Path) -> str:
        """The hash of the file's bytes."""
        return str(self.fact(path, CONTENT, hashed, is_string))

    def size(self, path: Path) -> tuple[int, int]:
        """(height, width) as stored of an undamaged label image or instance map, or of an image of 8 bits."""
        height, width, _ = self.fact(path, "decoded", examined_file, are_three)
        return height, width

    def image_size(self, sample: Sample) -> tuple[int, int]:
        """(height, width) of an undamaged image, of whatever depth, turned as its orientation and `exif` say."""
        name, examine = image_fact(sample.value_range, sample.channels)
        height, width, tag = self.fact(sample.image, name, examine, are_three)
        if tag == AS_STORED:
            return height, width
        label = self.size(sample.label) if sample.label is not None and sample.exif == "auto" else None
        self.tags[sample.image] = tag, AS_STORED
        applied = tag_to_apply(tag, sample.exif, (height, width), label, sample.image)
        self.tags[sample.image] = tag, applied
        return turned_size((height, width), applied)

    def histogram(self, path: Path, replaced: Mapping[int, int] | None = None) -> np.ndarray:
        """int64 (256,): the number of pixels of a label image with each value. replaced: of `read_label`."""
        result = np.zeros(256, np.int64)
        name = f"histogram {sorted(replaced.items())}" if replaced else "histogram"
        for value, count in self.fact(path, name, partial(value_counts, replaced=replaced), are_counts):
            result[value] = count
        return result

    def sample(self, sample: Sample, read_labels: bool = True) -> tuple[tuple[int, int], np.ndarray | None]:
        """(height, width) and the histogram of the label; DataError for a damaged file or different sizes."""
        image = self.image_size(sample)
        if sample.label is None:
            return image, None
        height, width, tag = self.fact(sample.label, "decoded", examined_file, are_three)
        if tag != AS_STORED and sample.exif != "ignore":
            raise DataError(
                f"{sample.label} has an EXIF orientation itself ({tag}), which is not applied to label images: "
                "write it anew, without the tag and as its image is shown"
            )
        if (height, width) != image:
            raise different_sizes(
                sample, image, (height, width), self.tags.get(sample.image, (AS_STORED, AS_STORED))[0]
            )
        return image, self.histogram(sample.label, sample.replaced) if read_labels else None

    def save(self) -> None:
        """Write what was found; lines about files of other samples stay."""
        if not self.changed:
            return
        content = bytearray(HEAD.encode())
        try:
            others = ((name, line) for name, line in self.saved_lines() if not self.known.get(name))
            for name, line in itertools.chain(self.known.items(), others):
                if line and "\n" not in name:
                    content += f"{line}\t{name}\n".encode("utf-8", "surrogateescape")
            write_atomically(self.path, memoryview(content))
            self.changed = False
        except OSError as error:
            print(f"the results of the check cannot be saved in {self.path.parent}: {error}", file=sys.stderr)


def absolute(path: Path) -> str:
    text = str(path)
    return text if text.startswith(os.sep) else str(path.absolute())


def file_stamp(stat: os.stat_result) -> str:
    """What changes with a file."""
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"


def facts_in(line: str) -> str:
    return line.split(" ", 3)[-1]


@functools.lru_cache(4096)  # most images of a dataset have one size
def parsed(text: str) -> dict[str, Any]:
    """The facts about a file from their JSON, not to be changed; none if it is damaged."""
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


@functools.lru_cache(4096)
def saved_fact(text: str, name: str, sound: Callable[[Any], bool]) -> Any:
    """The fact of that name from the JSON of all about a file, not to be changed; None without a sound one."""
    value = parsed(text).get(name)
    return value if value is not None and sound(value) else None


@functools.lru_cache(64)
def image_fact(
    value_range: tuple[float, float] | None, channels: tuple[int, ...] | None
) -> tuple[str, Callable[[Path], list[int]]]:
    """The name of an image's size among its facts, which depends on how it is read, and the function that finds it."""
    name = "image" if value_range is None else "image {:g} {:g}".format(*value_range)
    name += "" if channels is None else f" of {list(channels)}"
    return name, partial(examine_image, value_range=value_range, channels=channels)


def hashed(path: Path) -> str:
    return hashlib.blake2b(read_bytes(path), digest_size=16).hexdigest()


def is_string(value: Any) -> bool:
    return isinstance(value, str)


def are_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(number) is int and number >= 0 for number in value)


def are_three(value: Any) -> bool:
    """Whether it is [height, width, orientation]."""
    if not isinstance(value, list) or [type(number) for number in value] != [int, int, int]:
        return False
    return value[0] >= 0 and value[1] >= 0 and 1 <= value[2] <= 8


def are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(are_pair(row) and row[0] < 256 for row in value)


def value_counts(path: Path, replaced: Mapping[int, int] | None = None) -> list[list[int]]:
    """[value, number of pixels] of a label image."""
    counts = np.bincount(read_label(path, replaced).ravel(), minlength=256)
    return [[int(value), int(counts[value])] for value in np.flatnonzero(counts)]


def examine_file(path: Path) -> tuple[int, int, int]:
    """(height, width, orientation) as stored. DataError if it is damaged: what is no JPEG is decoded, a JPEG must have
    its end mark."""
    if path.suffix == ".mat":
        height, width = read_label(path).shape
        return height, width, AS_STORED
    return examine_bytes(read_bytes(path), path)


def examined_file(path: Path) -> list[int]:
    return list(examine_file(path))


def examine_bytes(data: bytes, path: Path) -> tuple[int, int, int]:
    kind = header_of(data, path)  # refuses bands that would be lost
    with opened(path, data) as image:
        height, width = stored_size(image, kind)
        if image.format == "PNG":
            check_png(data)
        if image.format != "JPEG":
            image.load()
        if is_cut_short(data):
            raise ValueError("the end of the JPEG data is missing")
    return height, width, orientation_of(data, path)


def examine_image(
    path: Path, value_range: tuple[float, float] | None, channels: tuple[int, ...] | None = None
) -> list[int]:
    """As `examine_file`. DataError also for values that do not fill the range of their type."""
    data = read_bytes(path)
    if channels is not None:
        return [*read_channels(path, channels, value_range).shape[:2], orientation_of(data, path)]
    if not header_of(data, path).is_deep:
        return list(examine_bytes(data, path))
    return [*stored_pixels(data, path, value_range).shape[:2], orientation_of(data, path)]


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
