"""`dataset.cache=decoded`: images and labels as uncompressed pixels on disk, read by memory map.

Decoding is most of the work. One file for each image, named by path, size and time of its source: a changed source is
decoded again, and several processes may build at once.
"""

import contextlib
import hashlib
import io
import os
import shutil
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from segtrain.console import Progress, say
from segtrain.data.label_files import read_label
from segtrain.data.sample import Sample, read_sample_image
from segtrain.data.verify.file_facts import FileFacts
from segtrain.errors import DataError, UsageError
from segtrain.files import side_file, write_atomically
from segtrain.threads import portion, threaded_map

SPARE = 1 << 30  # bytes to leave free on the disk
A_DAY = 24 * 3600  # seconds


class Decoded:
    """reads(sample) -> image uint8 (H, W, C) and labels uint8 (H, W) as stored, as memory maps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        assert sample.label is not None
        labels = self.read(sample.label, partial(read_label, replaced=sample.replaced), 2, label_read_as(sample))
        read = partial(read_sample_image, sample, labels.shape)
        return self.read(sample.image, lambda path: read(), 3, read_as(sample, labels.shape)), labels

    def place(self, path: Path, how: str = "") -> Path:
        """The file in the cache. how: as of `read_as`."""
        stat = path.stat()
        key = f"{path.absolute()}\n{stat.st_size}\n{stat.st_mtime_ns}{how}"
        return self.folder / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}.npy"

    def read(self, path: Path, decode: Callable[[Path], np.ndarray], axes: int, how: str = "") -> np.ndarray:
        """The pixels; decoded and saved if they are missing or damaged. A full disk costs the time only."""
        try:
            place = self.place(path, how)
        except OSError:
            return decode(path)  # reports what is wrong
        if place.is_file():
            kept = decoded_pixels(place, axes)
            if kept is not None:
                return kept
            say(f"damaged    {place} holds no decoded image: {path} is decoded again")
        pixels, buffer = decode(path), io.BytesIO()
        np.save(buffer, pixels)
        with side_file(place):
            write_atomically(place, buffer.getvalue())
        kept = decoded_pixels(place, axes) if place.is_file() else None
        return pixels if kept is None else kept

    def build(self, samples: list[Sample], seen: FileFacts, say: Callable[[str], None]) -> None:
        """Decode what is missing. UsageError if the disk has too little space."""

        def missing(sample: Sample) -> int:
            """Bytes that this sample needs."""
            height, width = seen.image_size(sample)
            label = (height, width) if sample.label is None or sample.exif != "auto" else seen.size(sample.label)
            depth = 3 if sample.channels is None else len(sample.channels)
            parts = ((sample.image, depth, read_as(sample, label)), (sample.label, 1, label_read_as(sample)))
            absent = [bands for path, bands, how in parts if path and not self.place(path, how).is_file()]
            return height * width * sum(absent)

        for torn in self.folder.glob(".*.tmp"):  # of a process that was killed; a younger one may be under way
            with contextlib.suppress(OSError):
                if time.time() - torn.stat().st_mtime > A_DAY:
                    torn.unlink()
        sizes = list(threaded_map(missing, samples, at_once=portion(len(samples))))
        total = sum(sizes)
        if not total:
            say(f"cache      {self.folder}: all images are decoded already")
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        say(f"cache      {self.folder}: {total / 1e9:.2f} GB will be written, {free / 1e9:.1f} GB are free")
        if total > free - SPARE:
            raise UsageError(
                f"dataset.cache=decoded needs {total / 1e9:.2f} GB in {self.folder}, where {free / 1e9:.1f} GB are "
                "free: set dataset.cache_dir to a larger disk, or dataset.cache=none"
            )
        todo = [sample for sample, size in zip(samples, sizes, strict=True) if size]
        progress = Progress("decoding", len(todo))

        def decode(sample: Sample) -> DataError | None:
            try:
                self(sample)
            except DataError as error:
                return error
            return None

        for done, error in enumerate(threaded_map(decode, todo), 1):
            if error is not None:
                raise error
            progress.show(done)


def read_as(sample: Sample, label: tuple[int, ...]) -> str:
    """What the pixels of an image depend on beside its file, as part of a key. label: the shape of its label."""
    levels = "" if sample.value_range is None else f"\n{sample.value_range}"
    shape = f" {label[0]} {label[1]}" if sample.exif == "auto" else ""
    levels += "" if sample.channels is None else f"\nchannels {list(sample.channels)}"
    return levels + ("" if sample.exif == "ignore" else f"\nexif {sample.exif}{shape}")


def label_read_as(sample: Sample) -> str:
    """What the values of a label depend on beside its file, as part of a key."""
    return f"\n{sorted(sample.replaced.items())}" if sample.replaced else ""


def decoded_pixels(place: Path, axes: int) -> np.ndarray | None:
    """The memory map of a file of the cache; None if it is not one that this module writes."""
    try:
        pixels = np.load(place, mmap_mode="r")
    except (OSError, ValueError, EOFError, SyntaxError, zipfile.BadZipFile):
        return None
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != axes:
        return None
    return pixels
