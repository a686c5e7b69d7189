"""Masks inside JSON files, as images in base64."""

import base64
import binascii
import zlib
from pathlib import Path

import numpy as np

from segtrain.data.images import opened
from segtrain.errors import DataError

LARGEST = 1 << 28  # bytes of a PNG


def base64_bytes(text: str, where: str) -> bytes:
    """DataError for what is no base64."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: expected an image in base64, found {text[:20]!r} ({error})") from error


def inflated(content: bytes, where: str) -> bytes:
    """What zlib has compressed. DataError for anything else."""
    reader = zlib.decompressobj()
    try:
        result = reader.decompress(content, LARGEST)
    except zlib.error as error:
        raise DataError(f"{where}: expected a PNG compressed by zlib ({error})") from error
    if not reader.eof:
        raise DataError(
            f"{where}: expected a PNG compressed by zlib, which is cut short or larger than {LARGEST} bytes"
        )
    return result


def png_mask(text: str, where: str) -> np.ndarray:
    """bool (h, w) of a PNG in base64: where it is not 0; of one with transparency, where it is opaque."""
    return image_mask(base64_bytes(text, where), where)


def image_mask(content: bytes, where: str) -> np.ndarray:
    """As `png_mask`, of the bytes of the PNG."""
    with opened(Path(where), content) as image:
        if image.mode in ("RGBA", "LA", "PA"):
            return np.asarray(image.getchannel("A")) > 0
        values = np.asarray(image)
        return np.asarray(values.any(axis=2) if values.ndim == 3 else values > 0)
