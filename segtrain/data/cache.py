"""`dataset.cache=decoded`: images and labels as uncompressed pixels on disk, read by memory map.

Decoding is most of the work. One file for each image, named by path, size and time of its source: a changed source is
decoded again, and several processes may build at once.
"""

import hashlib
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from segtrain.console import Progress
from segtrain.data.images import read_image
from segtrain.data.label_files import read_label
from segtrain.data.sample import Sample
from segtrain.data.verify.files import FileFacts
from segtrain.errors import DataError, UsageError
from segtrain.files import write_atomically
from segtrain.threads import threaded_map

SPARE = 1 << 30  # bytes to leave free on the disk


class Decoded:
    """reads(sample) -> image uint8 (H, W, 3) and labels uint8 (H, W) as stored, as memory maps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        assert sample.label is not None
        return self.read(sample.image, read_image), self.read(sample.label, read_label)

    def place(self, path: Path) -> Path:
        stat = path.stat()
        key = f"{path.absolute()}\n{stat.st_size}\n{stat.st_mtime_ns}"
        return self.folder / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}.npy"

    def read(self, path: Path, decode: Callable[[Path], np.ndarray]) -> np.ndarray:
        """The pixels; decoded and saved if they are missing."""
        try:
            place = self.place(path)
        except OSError:
            return decode(path)  # reports what is wrong
        if not place.is_file():
            buffer = io.BytesIO()
            np.save(buffer, decode(path))
            write_atomically(place, buffer.getvalue())
        pixels: np.ndarray = np.load(place, mmap_mode="r")
        return pixels

    def build(self, samples: list[Sample], seen: FileFacts, say: Callable[[str], None]) -> None:
        """Decode what is missing. UsageError if the disk has too little space."""

        def missing(sample: Sample) -> int:
            """Bytes that this sample needs."""
            height, width = seen.size(sample.image)
            parts = ((sample.image, 3), (sample.label, 1))
            return sum(height * width * depth for path, depth in parts if path and not self.place(path).is_file())

        sizes = list(threaded_map(missing, samples))
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
