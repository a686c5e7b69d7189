"""Read chosen bands of images: TIFF files with any number of bands, arrays of NumPy (.npy), and grey and colour images.

OpenCV and Pillow lose bands of TIFF files, or mix them up, so their strips and tiles are put together here (TIFF 6.0).
"""

import io
import struct
import zlib
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from segtrain.data import tiff
from segtrain.data.images import (
    BROKEN,
    MOST_PIXELS,
    Convert,
    decoded,
    header_of,
    is_cut_short,
    opened,
    orientation_of,
    read_bytes,
    read_image,
    stored_pixels,
    tiff_tags,
    to_bytes,
    unreadable,
)
from segtrain.data.orientation import tag_to_apply, turned
from segtrain.errors import DataError

# Further tags (TIFF 6.0, sections 8, 14 and 15).
GREY_ALPHA = 4  # colour type of a PNG file
BY_VALUE = (1, 2, 5, 8)  # values of PHOTOMETRIC whose bands are what they say: grey, RGB, CMYK, Lab
KINDS = {1: "u", 2: "i", 3: "f"}  # of SAMPLE_FORMAT, as NumPy's


def read_channels(
    path: Path, channels: Sequence[int] | None, value_range: tuple[float, float] | None = None, exif: str = "ignore",
    label: tuple[int, int] | None = None,
) -> np.ndarray:  # fmt: skip
    """uint8 (H, W, C): these bands of an image, counted from 0, in this order; None: RGB, by `read_image`.

    The values become 0 to 255 as `read_image` says, and so do exif and label. An array of NumPy is (H, W), (H, W, C) or
    (C, H, W): the bands are the shorter one of the first and the last axis. DataError for a band that is not there.
    """
    if channels is None:
        return read_image(path, value_range, exif, label)
    data = read_bytes(path)
    pixels = stored_channels(data, path, channels, partial(to_bytes, value_range=value_range, path=path))
    if exif == "ignore":
        return pixels
    height, width = pixels.shape[:2]
    return turned(pixels, tag_to_apply(orientation_of(data, path), exif, (height, width), label, path))


def stored_channels(data: bytes, path: Path, channels: Sequence[int] | None, convert: Convert) -> np.ndarray:
    """uint8 (H, W, C): these bands of the content of a file as stored, by `convert`; None: RGB. As `read_channels`."""
    if channels is None:
        return stored_pixels(data, path, None, convert)
    try:
        bands = all_bands(data, path)
    except BROKEN as error:
        raise unreadable(path, error) from error
    count = bands.shape[2]
    if max(channels) >= count:
        raise DataError(
            f"{path} has {count} band{'s' * (count > 1)}, numbered from 0 to {count - 1}: dataset.channels="
            f"{list(channels)} asks for {max(channels)}"
        )
    return convert(np.ascontiguousarray(bands[..., list(channels)]))


def all_bands(data: bytes, path: Path) -> np.ndarray:
    """Every band as stored, (H, W, bands), of the file's own type."""
    if data.startswith(b"\x93NUMPY"):
        return array_bands(np.load(io.BytesIO(data), allow_pickle=False), path)
    if tags := tiff_tags(data):
        return tiff_bands(data, tags, path)
    if header_of(data, path).is_deep:
        pixels = decoded(data, cv2.IMREAD_UNCHANGED)
        if pixels is None:
            raise ValueError("OpenCV cannot decode it")
        pixels = with_bands(pixels if pixels.ndim == 2 else rgb_first(pixels))
        return pixels[..., [0, 3]] if data.startswith(b"\x89PNG") and data[25] == GREY_ALPHA else pixels
    with opened(path, data) as image:
        as_it_is = image.mode in ("L", "LA", "RGB", "RGBA") or image.mode.startswith(("I", "F"))
        seen = image if as_it_is else image.convert("RGB")
        pixels = with_bands(np.asarray(seen))
        if is_cut_short(data):
            raise ValueError("the end of the JPEG data is missing")
        return pixels


def lost_bands(data: bytes, path: Path) -> int | None:
    """The number of bands of an image that is read by `dataset.channels` alone; None for one that is read as RGB."""
    try:
        header_of(data, path)
    except DataError:
        return int(tiff_tags(data).get(tiff.SAMPLES, 1))
    return None


def with_bands(pixels: np.ndarray) -> np.ndarray:
    return pixels[..., None] if pixels.ndim == 2 else pixels


def rgb_first(pixels: np.ndarray) -> np.ndarray:
    """From OpenCV's order: blue, green, red, transparency."""
    return pixels[..., [2, 1, 0, 3][: pixels.shape[2]]] if pixels.shape[2] > 2 else pixels


def array_bands(array: np.ndarray, path: Path) -> np.ndarray:
    if array.dtype.kind not in "uif" or array.ndim not in (2, 3) or 0 in array.shape:
        raise DataError(
            f"{path} holds an array {array.dtype} {array.shape}: expected numbers of the shape (H, W), (H, W, C) or "
            "(C, H, W)"
        )
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.ndim == 2:
        return array[..., None]
    if array.shape[0] == array.shape[2]:
        raise DataError(
            f"{path} holds an array {array.shape}, whose bands can be its first or its last axis: they must be fewer "
            "than rows and columns"
        )
    return np.moveaxis(array, 0, 2) if array.shape[0] < array.shape[2] else array


# ---------------------------------------------------------------------------------------------------------- TIFF


def tiff_bands(data: bytes, tags: dict[int, Any], path: Path) -> np.ndarray:
    """The first image of a TIFF file. DataError, naming what it is, for a form that is not read here."""
    width, height, samples = int(tags[tiff.WIDTH]), int(tags[tiff.LENGTH]), int(tags.get(tiff.SAMPLES, 1))
    bits, kinds = set(numbers_in(tags.get(tiff.BITS, 1))), set(numbers_in(tags.get(tiff.SAMPLE_FORMAT, 1)))
    colours = tags.get(tiff.PHOTOMETRIC, 1)
    packing, predictor = tags.get(tiff.COMPRESSION, tiff.PLAIN), tags.get(tiff.PREDICTOR, 1)
    for what, possible in (
        (f"{sorted(bits)} bits", len(bits) == 1 and bits <= {8, 16, 32, 64}),
        (f"the sample format {sorted(kinds)}", len(kinds) == 1 and kinds <= set(KINDS) and (kinds, bits) != ({3}, {8})),
        (f"the compression {packing}", packing in (tiff.PLAIN, tiff.LZW, *tiff.DEFLATE, tiff.PACKED)),
        (f"the colours {colours} (PhotometricInterpretation)", colours in BY_VALUE),
        (f"the fill order {tags.get(tiff.FILL_ORDER, 1)}", tags.get(tiff.FILL_ORDER, 1) == 1),
        (f"the predictor {predictor}", predictor == 1 or (predictor == 2 and kinds <= {1, 2})),
        (f"{width}x{height} pixels of {samples} bands", 0 < width * height * samples <= MOST_PIXELS),
    ):
        if not possible:
            raise DataError(
                f"{path} has {what}, of which bands cannot be read: write grey or RGB bands of 8, 16, 32 or 64 bits, "
                "without compression or by LZW or deflate"
            )
    dtype = np.dtype(f"{'>' if data.startswith(b'MM') else '<'}{KINDS[kinds.pop()]}{bits.pop() // 8}")
    is_tiled, planes = tiff.TILE_WIDTH in tags, samples if tags.get(tiff.PLANAR, 1) == tiff.SEPARATE else 1
    across, down = (
        (tags[tiff.TILE_WIDTH], tags[tiff.TILE_LENGTH])
        if is_tiled
        else (width, min(tags.get(tiff.ROWS, height), height))
    )
    places = list(product(range(planes), range(0, height, down), range(0, width, across)))
    keys = (tiff.TILE_OFFSETS, tiff.TILE_COUNTS) if is_tiled else (tiff.OFFSETS, tiff.COUNTS)
    offsets, counts = (numbers_in(tags[key]) for key in keys)
    if not len(places) == len(offsets) == len(counts):
        raise ValueError(f"{len(places)} strips or tiles are expected, {len(offsets)} are there")
    result, depth = np.empty((height, width, samples), dtype.newbyteorder("=")), samples // planes
    for (plane, top, left), offset, count in zip(places, offsets, counts, strict=True):
        rows = down if is_tiled else min(down, height - top)
        block = unpacked(data[offset : offset + count], packing, rows, across * depth * dtype.itemsize)
        part = np.frombuffer(block, dtype).reshape(rows, across, depth).astype(result.dtype)
        if predictor == 2:  # differences from the pixel on the left, which wrap around
            part = np.cumsum(part, axis=1, dtype=result.dtype)
        bands = slice(plane, plane + 1) if planes > 1 else slice(None)
        result[top : top + rows, left : left + across, bands] = part[: height - top, : width - left]
    return result


def numbers_in(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def unpacked(block: bytes, packing: int, rows: int, row: int) -> bytes:
    """The bytes of a strip or tile of so many rows of `row` bytes. ValueError if there are fewer."""
    if packing in tiff.DEFLATE:
        block = zlib.decompressobj().decompress(block, rows * row)
    elif packing != tiff.PLAIN:  # as a grey image of bytes, for Pillow
        entries = ((tiff.WIDTH, row), (tiff.LENGTH, rows), (tiff.BITS, 8), (tiff.COMPRESSION, packing),
                   (tiff.PHOTOMETRIC, tiff.GREY), (tiff.OFFSETS, 122), (tiff.SAMPLES, 1), (tiff.ROWS, rows),
                   (tiff.COUNTS, len(block)))  # fmt: skip
        head = b"II*\0" + struct.pack("<IH", 8, len(entries))
        table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
        with Image.open(io.BytesIO(head + table + bytes(4) + block)) as image:
            block = image.tobytes()
    if len(block) < rows * row:
        raise ValueError("the file is truncated")
    return block[: rows * row]
