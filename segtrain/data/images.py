"""Read images: RGB as stored, whatever the file format."""

import io
import re
import stat
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from segtrain.errors import DataError


def read_image(path: Path) -> np.ndarray:
    """RGB uint8 (H, W, 3) as stored: grey and palette images converted, EXIF orientation not applied.

    Label images match the stored pixels, so a rotation would misalign them. DataError names a file that cannot be read.
    """
    data = read_bytes(path)
    cut_short = is_cut_short(data)
    if data and not cut_short:
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        try:
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        except cv2.error:
            pixels = None
        if pixels is not None:
            return np.asarray(pixels)
    try:  # Pillow reads more formats, and reports what is wrong
        with Image.open(io.BytesIO(data)) as image:
            rgb = np.asarray(image.convert("RGB"))
        if cut_short:
            raise ValueError("the end of the JPEG data is missing")
        return rgb
    except BROKEN as error:
        raise unreadable(path, error) from error


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
    """Height, width and Pillow's name of the pixel format. DataError for what is no image."""
    data = read_bytes(path)
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.height, image.width, str(image.mode)
    except BROKEN as error:
        raise unreadable(path, error) from error


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
    text = "no such file" if isinstance(error, FileNotFoundError) else str(error) or type(error).__name__
    return DataError(f"{path} cannot be read as an image ({text}): copy or download it again")
