"""Windows of TIFF files that are larger than memory, BigTIFF included: only the tiles or strips that a window needs.

Each tile or strip becomes the one strip of a TIFF file in memory, which is decoded as whole files are. So a window has
the pixels of the whole image to the last bit, whatever the form of the file.
"""

import io
import math
import struct
from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from segtrain.data import tiff
from segtrain.data.bands import stored_channels
from segtrain.data.images import DENSEST, opened, orientation_of, to_bytes, unreadable, value_extremes
from segtrain.data.orientation import AS_STORED, SIDEWAYS, TAG, turned, turned_size
from segtrain.errors import DataError

# What a tile or strip needs to be decoded.
OF_PIXELS = (tiff.BITS, tiff.COMPRESSION, tiff.PHOTOMETRIC, tiff.FILL_ORDER, tiff.SAMPLES, tiff.PLANAR,
             tiff.PREDICTOR, tiff.COLOURS, tiff.EXTRA, tiff.SAMPLE_FORMAT, tiff.TABLES, *tiff.YCBCR,
             tiff.LERC)  # fmt: skip
FORMS = {1: "B", 2: "B", 3: "H", 4: "I", 6: "b", 7: "B", 8: "h", 9: "i", 11: "f", 12: "d", 13: "I", 16: "Q", 17: "q",
         18: "Q"}  # fmt: skip
SIZES = {**{kind: struct.calcsize(form) for kind, form in FORMS.items()}, 5: 8, 10: 8}  # bytes of a value of each type
MOST_TAGS = 4096
LARGEST_BLOCK = 1 << 28  # bytes, decoded, of a tile or strip that is read at a time
CUT_BLOCK = 1 << 22  # bytes of the parts that a larger strip without compression is read in
HEADER = 1 << 20  # bytes of a file of another format, in which its size is looked for
REWRITE = "gdal_translate -co TILED=YES -co COMPRESS=DEFLATE -co BIGTIFF=IF_SAFER {} tiled.tif"


class Entry(NamedTuple):
    """A tag of a TIFF file: its type, the number of its values, and their bytes in the order of the file."""

    kind: int
    number: int
    raw: bytes

    def numbers(self, order: str) -> list[int]:
        return np.frombuffer(self.raw, np.dtype(FORMS[self.kind]).newbyteorder("<" if order == "<" else ">")).tolist()

    def swapped(self) -> "Entry":
        """The same in the other byte order."""
        return self._replace(raw=np.frombuffer(self.raw, FORMS[self.kind]).byteswap().tobytes())


def read_directory(file: BinaryIO) -> tuple[str, dict[int, Entry]]:
    """Byte order, < or >, and the tags of the first image of a TIFF file; EOFError or ValueError for a damaged one."""
    head = file.read(16)
    order = "<" if head.startswith(b"II") else ">"
    is_big = head[2:4] in (b"+\0", b"\0+")
    start = struct.unpack_from(f"{order}Q" if is_big else f"{order}I", head, 8 if is_big else 4)[0]
    number, row, size = ("Q", "HHQ", 8) if is_big else ("H", "HHI", 4)
    count = struct.unpack(f"{order}{number}", exactly(file, start, struct.calcsize(f"{order}{number}")))[0]
    if count > MOST_TAGS:
        raise ValueError(f"it has {count} tags")
    width = struct.calcsize(f"{order}{row}") + size
    table = exactly(file, file.tell(), count * width)
    found = {}
    for place in range(0, len(table), width):
        tag, kind, number_of = struct.unpack_from(f"{order}{row}", table, place)
        length = SIZES.get(kind, 0) * number_of
        value = table[place + width - size : place + width]
        if length > size:
            if tag in (
                *OF_PIXELS,
                *tiff.GEOGRAPHIC,
                tiff.OFFSETS,
                tiff.COUNTS,
                tiff.TILE_OFFSETS,
                tiff.TILE_COUNTS,
                tiff.XMP,
            ):
                at = struct.unpack(f"{order}{'Q' if is_big else 'I'}", value)[0]
                found[tag] = Entry(kind, number_of, exactly(file, at, length))
        elif length:
            found[tag] = Entry(kind, number_of, value[:length])
    return order, found


def exactly(file: BinaryIO, place: int, length: int) -> bytes:
    file.seek(place)
    found = file.read(length)
    if len(found) < length:
        raise EOFError("the file is truncated")
    return found


class Stored(NamedTuple):
    """The size of an image as its header gives it: pixels as stored, and bytes when decoded."""

    height: int
    width: int
    size: int
    is_tiff: bool

    def __str__(self) -> str:
        return f"{self.width} x {self.height} pixels, {self.size / 1e9:.3g} GB decoded"


def stored_form(path: Path) -> Stored | None:
    """The size of an image of any format by its header, without decoding it; None where the header does not give it."""
    try:
        with path.open("rb") as file:
            head = file.read(4)
            file.seek(0)
            if head in tiff.SIGNS:
                order, tags = read_directory(file)
                height, width, samples = (tags[key].numbers(order)[0] if key in tags else 1
                                          for key in (tiff.LENGTH, tiff.WIDTH, tiff.SAMPLES))  # fmt: skip
                bits = max(tags[tiff.BITS].numbers(order)) if tiff.BITS in tags else 1
                return Stored(height, width, height * width * max(3, samples * bits // 8), True)
            if head == b"\x93NUM":
                return Stored(0, 0, path.stat().st_size, False)
            with opened(path, file.read(HEADER), any_size=True) as image:
                pixels, deep = image.height * image.width, 2 if image.mode.startswith(("I", "F")) else 1
                if image.format == "PNG" and pixels > DENSEST * path.stat().st_size:
                    return None
                return Stored(image.height, image.width, pixels * 3 * deep, False)
    except (OSError, DataError, ValueError, EOFError, KeyError, IndexError, struct.error):
        return None  # reading says what is wrong


class TiffWindows:
    """A TIFF file whose image is read window by window: uint8 (h, w, C), turned as a viewer shows it.

    channels, value_range: as of `read_channels`. The whole file is read once for its least and greatest value, if it
    has more than 8 bits a channel and no value_range. DataError for a file that cannot be read in windows; it names
    the command that writes one that can.
    """

    def __init__(
        self, path: Path, channels: Sequence[int] | None = None, value_range: tuple[float, float] | None = None
    ) -> None:
        self.path, self.channels, self.value_range = path, channels, value_range
        self.extremes: tuple[Any, Any] | None = None
        try:
            self.file = path.open("rb")
        except OSError as error:
            raise unreadable(path, error) from error
        try:
            self.read_header()
        except (OSError, ValueError, EOFError, KeyError, IndexError, struct.error) as error:
            self.file.close()
            raise unreadable(path, error) from error
        except BaseException:
            self.file.close()
            raise

    def read_header(self) -> None:
        self.order, self.tags = read_directory(self.file)
        self.find_blocks()
        self.tag = orientation_of(self.block_file(0, 0, (TAG, tiff.XMP)), self.path)
        if self.tag in SIDEWAYS and not self.is_tiled:
            raise self.refused(f"has the EXIF orientation {self.tag}, on its side, and is stored in strips")
        kinds = ((tiff.BITS, 8), (tiff.SAMPLE_FORMAT, 1))
        self.is_deep = any(max(self.tags[tag].numbers(self.order)) > most for tag, most in kinds if tag in self.tags)

    def __enter__(self) -> "TiffWindows":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.file.close()

    def value(self, tag: int, default: int) -> int:
        return int(self.tags[tag].numbers(self.order)[0]) if tag in self.tags else default

    def find_blocks(self) -> None:
        """Where each tile or strip of the file begins, in pixels and in bytes."""
        self.height, self.width = self.value(tiff.LENGTH, 0), self.value(tiff.WIDTH, 0)
        self.samples, self.is_tiled = self.value(tiff.SAMPLES, 1), tiff.TILE_WIDTH in self.tags
        self.planes = self.samples if self.value(tiff.PLANAR, 1) == tiff.SEPARATE else 1
        bits = max(self.tags[tiff.BITS].numbers(self.order)) if tiff.BITS in self.tags else 1
        if self.is_tiled:
            across, down = self.value(tiff.TILE_WIDTH, 0), self.value(tiff.TILE_LENGTH, 0)
        else:
            across, down = self.width, min(self.value(tiff.ROWS, self.height), self.height)
        if min(self.height, self.width, across, down) < 1:
            raise ValueError(f"{self.width} x {self.height} pixels in parts of {across} x {down}")
        if self.value(tiff.COMPRESSION, tiff.PLAIN) == tiff.OLD_JPEG:
            raise self.refused("is compressed by the old form of JPEG in TIFF")
        self.across, self.lefts = across, list(range(0, self.width, across))
        self.tops = list(range(0, self.height, down))
        self.rows = [down if self.is_tiled else min(down, self.height - top) for top in self.tops]
        keys = (tiff.TILE_OFFSETS, tiff.TILE_COUNTS) if self.is_tiled else (tiff.OFFSETS, tiff.COUNTS)
        shape = self.planes, len(self.tops), len(self.lefts)
        places, sizes = (np.array(self.tags[key].numbers(self.order), np.int64) for key in keys)
        if not places.size == sizes.size == math.prod(shape):
            raise ValueError(f"{math.prod(shape)} strips or tiles are expected, {places.size} are there")
        self.places, self.sizes = places.reshape(shape), sizes.reshape(shape)
        row = -(-across * (self.samples // self.planes) * bits // 8)  # bytes
        if row * down * self.planes > LARGEST_BLOCK or (not self.is_tiled and row * down > CUT_BLOCK):
            self.cut_strips(row, down)

    def cut_strips(self, row: int, down: int) -> None:
        """Read long strips without compression in parts; `row`: bytes of a row of them. DataError for others."""
        is_plain = self.value(tiff.COMPRESSION, tiff.PLAIN) == tiff.PLAIN and not any(
            tag in self.tags for tag in tiff.YCBCR
        )
        if self.is_tiled or not is_plain:
            if row * down * self.planes > LARGEST_BLOCK:
                kind = "tiles" if self.is_tiled else "compressed strips"
                raise self.refused(
                    f"is stored in {kind} of {self.across} x {down} pixels, which cannot be read in part"
                )
            return
        part = max(1, CUT_BLOCK // row)
        cuts = [(number, top, min(part, rows - top)) for number, rows in enumerate(self.rows)
                for top in range(0, rows, part)]  # fmt: skip
        whole = [number for number, _, _ in cuts]
        self.tops, self.rows = [number * down + top for number, top, _ in cuts], [rows for _, _, rows in cuts]
        within = np.array([top * row for _, top, _ in cuts])[None, :, None]
        wanted = np.array([rows * row for _, _, rows in cuts])[None, :, None]
        there = self.sizes[:, whole] - within
        self.places, self.sizes = self.places[:, whole] + within, np.minimum(wanted, there.clip(0))

    def refused(self, why: str) -> DataError:
        return DataError(
            f"{self.path} {why}: it is too large to be read whole, so write it in tiles, as by `"
            f"{REWRITE.format(self.path.name)}`"
        )

    @property
    def size(self) -> tuple[int, int]:
        """(height, width), turned."""
        return turned_size((self.height, self.width), self.tag)

    @property
    def geography(self) -> dict[int, Entry]:
        """The tags that say where the pixels lie on the earth, little-endian; none of an image that is turned."""
        found = {tag: self.tags[tag] for tag in tiff.GEOGRAPHIC if tag in self.tags and self.tag == AS_STORED}
        return {tag: entry if self.order == "<" else entry.swapped() for tag, entry in found.items()}

    def block_file(self, down: int, across: int, more: Sequence[int] = ()) -> bytes:
        """A TIFF file with one tile or strip of every plane, as its only strips. more: further tags to keep."""
        every = zip(self.places[:, down, across].tolist(), self.sizes[:, down, across].tolist(), strict=True)
        try:
            blocks = [exactly(self.file, place, size) for place, size in every]
        except (OSError, ValueError, EOFError) as error:
            raise unreadable(self.path, error) from error
        if not all(blocks):
            raise self.refused("leaves out tiles (a sparse file)")
        counts = [len(block) for block in blocks]
        tags = {tag: self.tags[tag] for tag in (*OF_PIXELS, *more) if tag in self.tags}
        geometry = {tiff.WIDTH: [self.across], tiff.LENGTH: [self.rows[down]], tiff.ROWS: [self.rows[down]],
                    tiff.COUNTS: counts, tiff.OFFSETS: [0] * len(blocks)}  # fmt: skip
        for tag, values in geometry.items():
            tags[tag] = Entry(4, len(values), struct.pack(f"{self.order}{len(values)}I", *values))
        first = 8 + len(directory(self.order, tags, 8))
        offsets = [first + sum(counts[:number]) for number in range(len(counts))]
        tags[tiff.OFFSETS] = Entry(4, len(offsets), struct.pack(f"{self.order}{len(offsets)}I", *offsets))
        sign = tiff.SIGNS[0] if self.order == "<" else tiff.SIGNS[1]
        return b"".join([sign, struct.pack(f"{self.order}I", 8), directory(self.order, tags, 8), *blocks])

    def decoded(self, down: int, across: int) -> np.ndarray:
        """uint8 (h, w, C): the pixels of one tile or strip, without what is beyond the image."""
        rows = min(self.rows[down], self.height - self.tops[down])
        columns = min(self.across, self.width - self.lefts[across])
        convert = partial(to_bytes, value_range=self.value_range, path=self.path, extremes=self.extremes)
        data = self.block_file(down, across)
        # Of more than 8 bits, what is beyond the image must not count as its least or greatest value.
        pixels = stored_channels(data, self.path, self.channels, lambda values: convert(values[:rows, :columns]))
        return pixels[:rows, :columns]

    def look_for_extremes(self) -> None:
        """Read the file once for its least and greatest value, if what they are decides how it is read."""
        if not self.is_deep or self.value_range is not None or self.extremes is not None:
            return
        found = list[tuple[Any, Any]]()
        for down, across in product(range(len(self.tops)), range(len(self.lefts))):
            rows, columns = self.height - self.tops[down], self.width - self.lefts[across]
            part = partial(self.note, found, rows, columns)
            stored_channels(self.block_file(down, across), self.path, self.channels, part)
        if found:  # else they were decoded to 8 bits
            self.extremes = min(low for low, _ in found), max(high for _, high in found)

    def note(self, found: list[tuple[Any, Any]], rows: int, columns: int, values: np.ndarray) -> np.ndarray:
        found.append(value_extremes(values[:rows, :columns], self.path))
        return np.zeros(values.shape, np.uint8)

    def window(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """The pixels of these rows and columns as stored: uint8 (bottom - top, right - left, C)."""
        self.look_for_extremes()
        result: np.ndarray | None = None
        first, last = bisect_right(self.tops, top) - 1, bisect_right(self.tops, bottom - 1)
        for down in range(first, last):
            for across in range(left // self.across, (right - 1) // self.across + 1):
                pixels, y, x = self.decoded(down, across), self.tops[down], self.lefts[across]
                if result is None:
                    result = np.empty((bottom - top, right - left, pixels.shape[2]), np.uint8)
                part = pixels[max(0, top - y) : bottom - y, max(0, left - x) : right - x]
                y, x = max(y, top) - top, max(x, left) - left
                result[y : y + part.shape[0], x : x + part.shape[1]] = part
        assert result is not None
        return result

    def band(self, top: int, bottom: int) -> np.ndarray:
        """The rows top to bottom - 1 of the image as a viewer shows it: uint8 (bottom - top, W, C)."""
        if self.tag in SIDEWAYS:
            span = (self.width - bottom, self.width - top) if self.tag in (7, 8) else (top, bottom)
            return turned(self.window(0, self.height, *span), self.tag)
        span = (self.height - bottom, self.height - top) if self.tag in (3, 4) else (top, bottom)
        return turned(self.window(*span, 0, self.width), self.tag)


def directory(order: str, tags: dict[int, Entry], start: int, is_big: bool = False) -> bytes:
    """The bytes of a directory that begins at byte `start` of a file, with all its values, padded to whole words."""
    number, row, size = ("Q", "HHQ", 8) if is_big else ("H", "HHI", 4)
    table, values = io.BytesIO(), io.BytesIO()
    length = struct.calcsize(f"{order}{number}") + len(tags) * (struct.calcsize(f"{order}{row}") + size) + size
    length += -length % 8
    table.write(struct.pack(f"{order}{number}", len(tags)))
    for tag, entry in sorted(tags.items()):
        table.write(struct.pack(f"{order}{row}", tag, entry.kind, entry.number))
        if len(entry.raw) <= size:
            table.write(entry.raw.ljust(size, b"\0"))
        else:
            table.write(struct.pack(f"{order}{'Q' if is_big else 'I'}", start + length + values.tell()))
            values.write(entry.raw + bytes(-len(entry.raw) % 8))
    return table.getvalue().ljust(length, b"\0") + values.getvalue()
