"""What training looks at before its first step, so that a bad file stops it now and not at hour nine.

Every file is read to its end (checksums of PNGs, end marks of JPEGs), image and label sizes are compared, and the ids
in the label pictures are looked up in the class table. Results are kept by path, size and time of each file, so that
a second start reads what has changed only.
"""

import contextlib
import hashlib
import json
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from segtrain.data.labels import LabelTable, read_label, unreadable
from segtrain.data.loader import different_sizes
from segtrain.data.sample import Sample
from segtrain.errors import DataError
from segtrain.files import write_atomically

LABELS_READ = 5000  # at most so many label pictures have their ids looked up; the rest are checked when they are read
ERRORS_SHOWN = 5


def check_samples(
    samples: list[Sample], table: LabelTable, cache_folder: Path, say: Callable[[str], None]
) -> tuple[int, int]:
    """Largest (height, width) among the pictures. DataError lists the faulty files, the first few of them in full."""
    seen = Seen(cache_folder, samples)
    every = max(1, -(-len(samples) // LABELS_READ))
    if every > 1:
        say(f"checking the files of {len(samples)} samples, the label ids of every {every}th")
    errors: list[str] = []
    sizes: list[tuple[int, int]] = []
    started = told = time.monotonic()

    def examine(item: tuple[int, Sample]) -> tuple[int, int] | DataError:
        number, sample = item
        try:
            image = seen.size(sample.image)
            if sample.label is not None:
                label = seen.size(sample.label)
                if label != image:
                    return different_sizes(sample, image, label)
                if number % every == 0:
                    unknown = [i for i in seen.ids(sample.label) if not table.known[i]]
                    if unknown:  # read once more, for the message
                        table.encode(read_label(sample.label), sample.label)
            return image
        except DataError as error:
            return error

    with ThreadPoolExecutor() as pool:
        for number, result in enumerate(pool.map(examine, enumerate(samples)), 1):
            if isinstance(result, DataError):
                errors.append(str(result))
            else:
                sizes.append(result)
            if time.monotonic() - told > 5:
                told = time.monotonic()
                left = (told - started) * (len(samples) - number) / number
                say(f"checking files: {number} of {len(samples)}, about {left:.0f} s left")
    seen.save()
    if errors:
        more = f"\n... and {len(errors) - ERRORS_SHOWN} more" if len(errors) > ERRORS_SHOWN else ""
        heading = "" if len(errors) == 1 else f"{len(errors)} of {len(samples)} samples cannot be used:\n"
        raise DataError(heading + "\n".join(errors[:ERRORS_SHOWN]) + more)
    return max(h for h, _ in sizes), max(w for _, w in sizes)


class Seen:
    """Size and ids of files, remembered between runs."""

    def __init__(self, folder: Path, samples: list[Sample]) -> None:
        key = hashlib.sha256("\n".join(str(s.image.absolute()) for s in samples).encode()).hexdigest()[:16]
        self.path = folder / f"checked-{key}.json"
        self.facts: dict[str, dict[str, list[int]]] = {}
        with contextlib.suppress(OSError, ValueError):  # not checked before
            self.facts = json.loads(self.path.read_text())

    def entry(self, path: Path) -> dict[str, list[int]]:
        """Facts about the file as it is now; empty if it has changed or was never read."""
        try:
            stat = path.stat()
        except OSError as error:
            raise unreadable(path, error) from error
        stamp = [stat.st_size, stat.st_mtime_ns]
        facts = self.facts.get(str(path.absolute()))
        if facts is None or facts["stamp"] != stamp:
            facts = self.facts[str(path.absolute())] = {"stamp": stamp}
        return facts

    def size(self, path: Path) -> tuple[int, int]:
        """(height, width) of a picture that is whole."""
        facts = self.entry(path)
        if "size" not in facts:
            facts["size"] = list(examine_file(path))
        return facts["size"][0], facts["size"][1]

    def ids(self, path: Path) -> list[int]:
        facts = self.entry(path)
        if "ids" not in facts:
            facts["ids"] = np.flatnonzero(np.bincount(read_label(path).ravel(), minlength=256)).tolist()
        return facts["ids"]

    def save(self) -> None:
        try:
            write_atomically(self.path, json.dumps(self.facts).encode())
        except OSError as error:
            print(f"the results of the check cannot be kept in {self.path.parent}: {error}", file=sys.stderr)


def examine_file(path: Path) -> tuple[int, int]:
    """(height, width). Reads a PNG or JPEG to its end without decoding it; DataError if it is damaged."""
    try:
        data = path.read_bytes()
        with Image.open(path) as image:
            width, height = image.size
            kind = image.format
        if kind == "PNG":
            check_png(data)
        elif kind == "JPEG":
            if b"\xff\xd9" not in data[-1024:]:
                raise ValueError("the end of the JPEG data is missing")
        else:
            with Image.open(path) as image:
                image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise unreadable(path, error) from error
    return height, width


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
