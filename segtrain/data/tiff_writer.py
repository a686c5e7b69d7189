"""Write an image larger than memory as a tiled BigTIFF, a row of tiles at a time, and go on after a kill.

Until the image is complete, it stands in `.NAME.part`, and beside it `.NAME.part.jsonl` lists the rows of tiles that
are on the disk. BigTIFF is the form of libtiff, http://www.simplesystems.org/libtiff/bigtiff.html.
"""

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from segtrain.data import tiff
from segtrain.data.tiff_windows import Entry, directory
from segtrain.errors import DataError
from segtrain.files import append, named

TILE = 512  # pixels of a side; rows are finished in as many
BYTE, SHORT, LONG, LONG8 = 1, 3, 4, 16  # types of values
HEAD = 16  # bytes


class TiledWriter:
    """An image uint8 (H, W) or RGB uint8 (H, W, 3), written from top to bottom; complete only after `finish`.

    made: what the image is made of, for JSON. Rows that a process made of the same are kept, and `rows` says how many
    they are; of anything else it begins anew. palette: RGB uint8 (n, 3), colours of the values of an (H, W) image.
    more: further tags, little-endian as the file, because Pillow reads no other BigTIFF. DataError if another process
    writes the same file.
    """

    def __init__(
        self, path: Path, size: tuple[int, int], samples: int, made: Mapping[str, Any],
        palette: np.ndarray | None = None, more: Mapping[int, Entry] | None = None,
    ) -> None:  # fmt: skip
        self.path, self.size, self.samples = path, size, samples
        self.palette, self.more = palette, dict(more or {})
        name = f".{path.name[:40]}.{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.part"
        self.part, self.log = path.with_name(name), path.with_name(f"{name}.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = os.fdopen(os.open(self.part, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            self.lock()
            self.rows = 0
            self.places, self.sizes, self.ends = list[int](), list[int](), [(0, HEAD, 0)]  # rows, bytes, bytes of log
            first = json.dumps({**made, "size": size, "tile": TILE}, sort_keys=True).encode() + b"\n"
            lines = self.log.read_bytes().splitlines(keepends=True) if self.log.exists() else []
            if not lines or lines[0] != first or not self.resumed(lines):
                self.start(first)
            self.back_to(self.ends[-1][0])
        except BaseException:
            self.file.close()
            raise

    def __enter__(self) -> "TiledWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.file.close()

    def lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise DataError(f"another process writes {self.path}: wait for it, or give another output=") from error
        except OSError:  # a file system without locks
            pass

    def start(self, first: bytes) -> None:
        with named(self.part):
            self.file.truncate(0)
            self.file.write(b"II+\0" + struct.pack("<HHQ", 8, 0, 0))  # the directory's place comes last
        self.log.write_bytes(first)
        self.ends = [(0, HEAD, len(first))]

    def resumed(self, lines: list[bytes]) -> bool:
        """Read what is finished; False if the file has not what the log says. A last line may be cut off."""
        there, read = self.file.seek(0, os.SEEK_END), len(lines[0])
        self.ends = [(0, HEAD, read)]
        for line in lines[1:]:
            if not line.endswith(b"\n"):
                break
            try:
                found = json.loads(line)
                rows, end, places, sizes = found["rows"], found["end"], found["places"], found["sizes"]
            except (ValueError, KeyError, TypeError):
                return False
            if end > there:
                break
            read += len(line)
            self.places += places
            self.sizes += sizes
            self.ends.append((rows, end, read))
        return there >= HEAD

    def back_to(self, rows: int) -> None:
        """Forget what is below the first rows, a number of them that `rows` has been."""
        while self.ends[-1][0] > rows:
            self.ends.pop()
        self.rows, end, read = self.ends[-1]
        count = -(-self.rows // TILE) * -(-self.size[1] // TILE)
        self.places, self.sizes = self.places[:count], self.sizes[:count]
        self.file.truncate(end)
        self.file.seek(end)
        os.truncate(self.log, read)

    def write(self, pixels: np.ndarray) -> None:
        """Add the next rows: TILE of them, or those that are left. They are on the disk when this returns."""
        height, width = self.size
        assert pixels.shape[:2] == (min(TILE, height - self.rows), width), pixels.shape
        places, sizes = [], []
        with named(self.part):
            for left in range(0, width, TILE):
                tile = np.zeros((TILE, TILE, self.samples), np.uint8)
                part = pixels[:, left : left + TILE].reshape(len(pixels), -1, self.samples)
                tile[: part.shape[0], : part.shape[1]] = part
                packed = zlib.compress(tile.tobytes(), 1)
                places.append(self.file.tell())
                sizes.append(self.file.write(packed))
            self.file.flush()
            os.fsync(self.file.fileno())
        self.rows += len(pixels)
        line = {"rows": self.rows, "end": self.file.tell(), "places": places, "sizes": sizes}
        text = json.dumps(line).encode() + b"\n"
        append(self.log, text)
        self.places += places
        self.sizes += sizes
        self.ends.append((self.rows, self.file.tell(), self.ends[-1][2] + len(text)))

    def finish(self) -> None:
        """Write the directory, and give the file its name."""
        assert self.rows == self.size[0]
        with named(self.part):
            start = self.file.seek(0, os.SEEK_END)
            start += self.file.write(bytes(-start % 8))
            self.file.write(directory("<", self.entries(), start, is_big=True))
            self.file.seek(8)
            self.file.write(struct.pack("<Q", start))
            self.file.flush()
            os.fsync(self.file.fileno())
        self.part.replace(self.path)
        self.log.unlink()

    def entries(self) -> dict[int, Entry]:
        def of(kind: int, form: str, *values: int) -> Entry:
            return Entry(kind, len(values), struct.pack(f"<{len(values)}{form}", *values))

        colours = tiff.PALETTE if self.palette is not None else tiff.RGB if self.samples == 3 else tiff.GREY
        tags = {
            tiff.WIDTH: of(LONG, "I", self.size[1]), tiff.LENGTH: of(LONG, "I", self.size[0]),
            tiff.BITS: of(SHORT, "H", *[8] * self.samples), tiff.COMPRESSION: of(SHORT, "H", tiff.DEFLATE[0]),
            tiff.PHOTOMETRIC: of(SHORT, "H", colours), tiff.SAMPLES: of(SHORT, "H", self.samples),
            tiff.PLANAR: of(SHORT, "H", 1),
            tiff.TILE_WIDTH: of(LONG, "I", TILE), tiff.TILE_LENGTH: of(LONG, "I", TILE),
            tiff.TILE_OFFSETS: of(LONG8, "Q", *self.places), tiff.TILE_COUNTS: of(LONG8, "Q", *self.sizes),
            tiff.SAMPLE_FORMAT: of(SHORT, "H", *[1] * self.samples),
        }  # fmt: skip
        if self.palette is not None:
            table = np.zeros((256, 3), np.uint16)
            table[: len(self.palette)] = np.asarray(self.palette, np.uint16) * 257
            tags[tiff.COLOURS] = of(SHORT, "H", *table.T.ravel().tolist())
        return {**self.more, **tags}
