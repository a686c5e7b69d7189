"""Read images: RGB as stored, whatever the file format."""

import io
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from segtrain.errors import DataError


def read_image(path: Path) -> np.ndarray:
    """RGB uint8 (H, W, 3) as stored: grey and palette images converted, EXIF orientation not applied.

    Label images match the stored pixels, so a rotation would misalign them. DataError names a file that cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    whole = not data.startswith(b"\xff\xd8") or b"\xff\xd9" in data[-1024:]  # OpenCV 4 accepts half a JPEG
    if data and whole:
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        try:
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        except cv2.error:
            pixels = None
        if pixels is not None:
            return np.asarray(pixels)
    try:  # Pillow reads more formats, and reports what is wrong
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> DataError:
    text = "no such file" if isinstance(error, FileNotFoundError) else str(error) or type(error).__name__
    return DataError(f"{path} cannot be read as an image ({text}): copy or download it again")
