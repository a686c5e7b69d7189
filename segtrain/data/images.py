"""Read images: RGB, whatever the file format, as stored or turned by their EXIF orientation."""

import contextlib
import io
import re
import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from segtrain.data import tiff
from segtrain.data.orientation import AS_STORED, INVERSE, TAG, tag_to_apply, turned, turned_size
from segtrain.errors import DataError

Image.MAX_IMAGE_PIXELS = None  # Pillow's limit, of 179 megapixels, is below an aerial photograph; ours:
MOST_PIXELS = 1 << 31
DENSEST = 8 * 1032  # pixels, of a bit at least, in a byte of a PNG: deflate compresses no further
Convert = Callable[[np.ndarray], np.ndarray]  # values of any type -> uint8 of the same shape
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".ppm", ".pgm", ".jp2")


def read_image(
    path: Path, value_range: tuple[float, float] | None = None, exif: str = "ignore",
    label: tuple[int, int] | None = None,
) -> np.ndarray:  # fmt: skip
    """RGB uint8 (H, W, 3): grey and palette images converted, and turned by the EXIF orientation as `exif` says.

    value_range: which values of an image with more than 8 bits a channel become 0 and 255, values beyond them too;
    None: those of its type, 0 to 65535 or 0 to 1. exif: ignore, which leaves the pixels as stored, apply, refuse, or
    auto, which needs the (height, width) of the label; see `orientation.tag_to_apply`. DataError names a file that
    cannot be read, that does not fill its type's range, or with other bands than grey, RGB and transparency.
    """
    data = read_bytes(path)
    pixels = stored_pixels(data, path, value_range)
    if exif == "ignore":
        return pixels
    height, width = pixels.shape[:2]
    return turned(pixels, tag_to_apply(orientation_of(data, path), exif, (height, width), label, path))


def stored_pixels(
    data: bytes, path: Path, value_range: tuple[float, float] | None, convert: Convert | None = None
) -> np.ndarray:
    """RGB uint8 (H, W, 3) as stored; otherwise as `read_image`. convert: instead of `to_bytes`."""
    convert = convert or partial(to_bytes, value_range=value_range, path=path)
    cut_short = is_cut_short(data)
    kind = header_of(data, path)
    undone = INVERSE.get(tag := valid_tag(kind.tags.get(TAG)), tag)  # of a TIFF file both decoders apply it
    mixed_up = undone != AS_STORED and tiff.TILE_WIDTH in kind.tags and not kind.is_deep  # OpenCV mirrors tile by tile
    if data and not cut_short and not mixed_up and tiff.EXTRA not in kind.tags:  # it multiplies colours by transparency
        pixels = decoded(data, cv2.IMREAD_UNCHANGED if kind.is_deep else cv2.IMREAD_COLOR_RGB)
        if pixels is not None:
            pixels = np.asarray(turned(pixels, undone))
            return three_channels(convert(pixels)) if kind.is_deep else pixels
    with opened(path, data) as image:  # Pillow reads more formats, and reports what is wrong
        if image.mode.startswith(("I", "F")):
            rgb = three_channels(convert(np.asarray(image)))
        else:
            rgb = np.asarray(image.convert("RGB"))
        if cut_short:
            raise ValueError("the end of the JPEG data is missing")
        return turned(rgb, undone)


def orientation_of(data: bytes, path: Path) -> int:
    """The EXIF orientation of an image file, 1 to 8; 1 where it has none or an impossible one."""
    if not any(mark in data for mark in MARKS) and not data.startswith((b"II", b"MM")):
        return AS_STORED
    try:
        with opened(path, data) as image:
            return valid_tag(image.getexif().get(TAG))
    except DataError:  # of a TIFF file that OpenCV reads
        return valid_tag(tiff_tags(data).get(TAG))


MARKS = (b"Exif", b"EXIF", b"eXIf", b"tiff:Orientation", b"Raw profile type")  # of files that may have a tag


def valid_tag(value: Any) -> int:
    return value if isinstance(value, int) and 1 <= value <= 8 else AS_STORED


class Header(NamedTuple):
    """is_deep: whether a channel has more than 8 bits. tags: of a TIFF file."""

    is_deep: bool = False
    tags: dict[int, Any] = {}


# Tags (TIFF 6.0, section 8).


def header_of(data: bytes, path: Path) -> Header:
    """What an image file says of its channels. DataError for bands that would be lost."""
    if data.startswith(b"\x89PNG"):
        return Header(data[24:25] == b"\x10")
    if data.startswith((b"P5", b"P6")):  # largest value, after width and height (netpbm.sourceforge.net)
        match = re.match(rb"P[56](?:\s|#[^\n]*\n)+\d+(?:\s|#[^\n]*\n)+\d+(?:\s|#[^\n]*\n)+(\d+)", data[:1000])
        return Header(match is not None and int(match[1]) > 255)
    tags = tiff_tags(data)
    if not tags:
        return Header()
    samples, extra = tags.get(tiff.SAMPLES, 1), tags.get(tiff.EXTRA, ())
    colours = 4 if tags.get(tiff.PHOTOMETRIC) == tiff.CMYK else 3 if samples >= 3 else 1
    if samples != colours and not (samples == colours + 1 == colours + len(extra) and extra[0] in (1, 2)):
        raise DataError(
            f"{path} has {samples} bands: grey or red, green and blue can be used, with a band that the file marks as "
            "transparency (ExtraSamples), and the others would be lost; write the wanted three bands to a file, or "
            f"name the bands of dataset=folder, as dataset.channels={list(range(samples))[:8]}"
        )
    is_deep = max(tags.get(tiff.BITS, (1,))) > 8 or max(tags.get(tiff.SAMPLE_FORMAT, (1,))) > 1
    if is_deep and samples > 1 and tags.get(tiff.PLANAR) == tiff.SEPARATE:  # OpenCV 5 mixes their pixels up
        raise DataError(
            f"{path} stores its bands one behind the other (PlanarConfiguration 2) in more than 8 bits, which is read "
            "only with dataset.channels=[0,1,2]: give that, or write the file with interleaved bands"
        )
    return Header(is_deep, tags)


def tiff_tags(data: bytes) -> dict[int, Any]:
    """The tags of the first image of a TIFF file; empty for other files and damaged ones."""
    if data[:4] not in tiff.SIGNS:
        return {}
    try:
        big = 43 in data[2:4]  # BigTIFF, whose header has 16 bytes
        folder, file = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if big else 8]), io.BytesIO(data)
        file.seek(folder.next)
        folder.load(file)
        return dict(folder)
    except BROKEN:
        return {}


def decoded(data: bytes, flags: int) -> np.ndarray | None:
    """The pixels by OpenCV, None if it cannot."""
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        return None


def to_bytes(
    values: np.ndarray, value_range: tuple[float, float] | None, path: Path, extremes: tuple[Any, Any] | None = None
) -> np.ndarray:
    """Values of more than 8 bits as uint8; 16 bits keep their upper eight. DataError where that would be a guess.

    extremes: the least and the greatest value of the image that these are a part of; None: they are the image.
    """
    if values.dtype == np.uint8:
        return values
    low, high = value_extremes(values, path) if extremes is None else extremes
    integers = values.dtype.kind in "iu"
    assumed = {"uint16": (0, 65535), "float32": (0, 1), "float64": (0, 1)}.get(values.dtype.name)
    start, end = value_range or assumed or (0, 0)
    if value_range is None and (assumed is None or low < start or high > end or (integers and 4 * high < end)):
        top = (1 << int(high).bit_length()) - 1 if integers and high > 255 else high  # 3999: of 12 bits, up to 4095
        least, most = (f"{number:g}" if not integers else str(number) for number in (min(low, 0), top))
        fit = "is not what" if assumed is None else f"does not fill {start} to {end}, as"
        raise DataError(
            f"{path} holds {values.dtype} values from {low} to {high}, which {fit} a picture of that type is taken to "
            f"do: say which values are black and white, as dataset.value_range=[{least},{most}]"
        )
    moved = values.clip(start, end).astype(np.float64 if values.itemsize > 4 else np.float32) - np.float32(start)
    if integers and (end - start + 1) % 256 == 0:
        return (moved.astype(np.int64) * 256 // int(end - start + 1)).astype(np.uint8)
    return np.rint(moved * np.float32(255 / (end - start))).astype(np.uint8)


def value_extremes(values: np.ndarray, path: Path) -> tuple[Any, Any]:
    """The least and the greatest value. DataError for values that are no numbers."""
    if not np.isfinite(values).all():
        raise DataError(
            f"{path} holds NaN or infinite values: write numbers there, and an ignored label for these pixels"
        )
    return values.min().item(), values.max().item()


def three_channels(pixels: np.ndarray) -> np.ndarray:
    """uint8 (H, W) or (H, W, 1 to 4), blue first and with transparency, as OpenCV has them -> RGB (H, W, 3)."""
    if pixels.ndim == 2 or pixels.shape[2] < 3:
        grey = pixels if pixels.ndim == 2 else pixels[..., 0]
        return np.repeat(grey[..., None], 3, axis=2)
    return np.ascontiguousarray(pixels[..., 2::-1])


@contextlib.contextmanager
def opened(path: Path, data: bytes | None = None, any_size: bool = False) -> Iterator[Image.Image]:
    """An image file by Pillow: the one place that opens them. DataError for what is no image, and what fails inside.

    data: the content of the file, if it has been read. any_size: for the header of an image that is not decoded.
    """
    data = read_bytes(path) if data is None else data
    try:
        with Image.open(io.BytesIO(data)) as image:
            if not any_size:
                require_possible(image, data, path)
            yield image
    except BROKEN as error:
        raise unreadable(path, error) from error


def announced_size(path: Path) -> tuple[int, int] | None:
    """Height and width, in either order, as the first bytes of an image file say; None where Pillow finds none.

    Nothing is decoded or checked: for how long an image will take, not for what is in it.
    """
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file, Image.open(file) as image:
            return image.height, image.width
    except BROKEN:
        return None


def require_possible(image: Image.Image, data: bytes, path: Path) -> None:
    """DataError for a size that no memory holds, or that the file cannot have."""
    pixels, fault = image.width * image.height, ""
    if pixels > MOST_PIXELS:
        fault = f"at most {MOST_PIXELS} work"
    elif image.format == "PNG" and pixels > DENSEST * len(data):
        fault = f"for which its {len(data)} bytes are too few"
    if fault:
        raise DataError(
            f"{path} cannot be read as an image (it says that it has {image.width} x {image.height} pixels, {fault})"
        )


# What Pillow raises for the content of a file; of some formats it is whatever the decoder stumbles over.
BROKEN = (
    OSError, SyntaxError, ValueError, EOFError, ArithmeticError, LookupError, TypeError, AttributeError,
    NotImplementedError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


def read_bytes(path: Path) -> bytes:
    """The content of a regular file. DataError for anything else; a pipe would be waited for."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError("it is no regular file")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        raise unreadable(path, error) from error


def read_header(path: Path) -> tuple[int, int, str]:
    """Height and width as stored, and Pillow's name of the pixel format. DataError for what is no image."""
    data = read_bytes(path)
    kind = header_of(data, path)
    if kind.is_deep and kind.tags:  # also of those that Pillow does not read
        return int(kind.tags[tiff.LENGTH]), int(kind.tags[tiff.WIDTH]), f"{max(kind.tags.get(tiff.BITS, (1,)))} bits"
    with opened(path, data) as image:
        return *stored_size(image, kind), str(image.mode)


def read_extent(path: Path) -> tuple[int, int]:
    """(height, width) as stored, of an image with any bands. DataError for what is no image."""
    tags = tiff_tags(read_bytes(path))
    if tiff.WIDTH in tags and tiff.LENGTH in tags:  # Pillow does not read all of them
        return int(tags[tiff.LENGTH]), int(tags[tiff.WIDTH])
    return read_header(path)[:2]


def stored_size(image: Image.Image, kind: Header) -> tuple[int, int]:
    """(height, width) as stored; of a TIFF file, Pillow has already applied the orientation."""
    return turned_size((image.height, image.width), valid_tag(kind.tags.get(TAG)))


def is_cut_short(data: bytes) -> bool:
    """Whether it is a JPEG without its end mark, which OpenCV 4 and sometimes Pillow accept.

    The mark may be followed by anything, such as the film of a motion photo; then it is looked for.
    """
    return data.startswith(b"\xff\xd8") and b"\xff\xd9" not in data[-1024:] and not has_end(data)


def has_end(data: bytes) -> bool:
    """Whether the segments of a JPEG lead to its end mark (ITU T.81, B.1); a thumbnail has a mark of its own."""
    place = 2
    while place + 4 <= len(data):
        mark = data[place + 1]
        if data[place] != 0xFF or mark < 0xC0:
            return False
        if mark == 0xD9:
            return True
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if mark == 0xDA:  # compressed pixels, up to a mark that is neither a stuffed byte nor a restart
            found = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]").search(data, place)
            if found is None:
                return False
            place = found.end() - 2
    return data[place : place + 2] == b"\xff\xd9"


def unreadable(path: Path, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path} cannot be read as an image (no such file): check the path, or copy the file again")
    text = re.sub(r" ?<_io\.\w+ object at \w+>", "", str(error)) or type(error).__name__
    if isinstance(error, UnidentifiedImageError) and path.suffix.lower() not in SUFFIXES:
        return DataError(f"{path} is no image that can be read: give PNG, JPEG or TIFF files")
    return DataError(f"{path} cannot be read as an image ({text}): copy or download it again")
