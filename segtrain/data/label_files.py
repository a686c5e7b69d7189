"""Read label images and instance maps: one number per pixel, never a colour."""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from segtrain.data import tiff
from segtrain.data.images import BROKEN, opened, read_bytes, tiff_tags, unreadable, valid_tag
from segtrain.data.orientation import INVERSE, TAG, turned
from segtrain.errors import DataError

EIGHT_BITS = "ids have 8 bits, from 0 to 255, for at most 253 classes: number them anew"


def read_label(path: Path, replaced: Mapping[int, int] | None = None) -> np.ndarray:
    """The values of a label image, uint8 (H, W): of a greyscale or palette image (palette: the index), or the matrix S
    of a MATLAB file. DataError for anything else.

    replaced: values of the file, of any size, that become others.
    """
    if path.suffix == ".mat":
        return read_matlab_label(path)
    values, _ = read_values(path)
    for value, other in (replaced or {}).items():
        values = np.where(values == value, other, values)
    low, high = (values.min(), values.max()) if values.size else (0, 0)
    if low < 0 or high > 255:
        if low >= 0 and values.dtype.itemsize > 1 and high <= 65535:
            raise DataError(
                f"{path} is a 16-bit image with values up to {high}: this looks like an instance map; give images with "
                f"one class id per pixel ({EIGHT_BITS}; dataset=folder: dataset.ignore_values=[{high}] for no class)"
            )
        odd = low if low < 0 else high
        raise DataError(
            f"{path} holds values from {low} to {high}: give images with one class id per pixel ({EIGHT_BITS}), and "
            f"dataset.ignore_values=[{odd}] of dataset=folder if that means no class"
        )
    return values.astype(np.uint8)


def read_instances(path: Path) -> np.ndarray:
    """An instance map: uint16 (H, W). DataError for a colour image, and for one with 8 bits."""
    values, mode = read_values(path)
    if mode in ("L", "P", "1"):
        raise DataError(f"{path} is an 8-bit image, but instance maps have 16 bits: use it as downloaded")
    if values.size and not 0 <= values.min() <= values.max() <= 65535:
        raise DataError(f"{path} holds values from {values.min()} to {values.max()}: instance maps have 16 bits")
    return values.astype(np.uint16)


def read_values(path: Path) -> tuple[np.ndarray, str]:
    """The values of an image with one value per pixel as they are stored, and Pillow's name of its mode."""
    data = read_bytes(path)
    with opened(path, data) as image:
        mode = image.mode
        if image.format in ("JPEG", "MPO"):
            raise DataError(
                f"{path} is a JPEG, whose compression changes the class of many pixels: give label images as PNG, "
                "made from the original labels"
            )
        if mode not in ("L", "P", "1", "I") and not mode.startswith("I;16"):
            raise DataError(f"{path} {OTHER_MODES.get(mode, f'is a {mode} colour image')}, but a label image {WANTED}")
        values = np.asarray(image)
        tags = tiff_tags(data)
        bits = max(tags.get(tiff.BITS, (8,))) if tags else data[24] if mode == "L" and image.format == "PNG" else 8
        if mode == "L" and bits in (2, 4):  # Pillow spreads them over 0 to 255
            values = values // (255 // (2**bits - 1))
        if mode == "L" and tags.get(tiff.SAMPLE_FORMAT) == (2,):
            values = values.view(np.int8)
        elif mode in ("1", "L") and tags.get(tiff.PHOTOMETRIC) == tiff.WHITE_IS_ZERO:  # which Pillow turns round
            values = ~values if mode == "1" else 2**bits - 1 - values
        tag = valid_tag(tags.get(TAG))
        return turned(values, INVERSE.get(tag, tag)), mode  # as stored: of a TIFF file Pillow applies it


OTHER_MODES = {
    "F": "holds floating-point numbers", "LA": "has transparency beside its values",
    "PA": "has transparency beside its values",
}  # fmt: skip
WANTED = (
    "holds one class id per pixel: give 8-bit greyscale or palette PNGs (Cityscapes: *_labelIds.png, KITTI: semantic/, "
    "not the colour images)"
)


def read_matlab_label(path: Path) -> np.ndarray:
    from scipy.io import loadmat, matlab

    data = read_bytes(path)
    try:
        values = np.asarray(loadmat(io.BytesIO(data), variable_names=["S"])["S"])
    except (*BROKEN, matlab.MatReadError) as error:
        raise unreadable(path, error) from error
    if values.ndim != 2 or values.size == 0 or values.dtype.kind not in "iufb":
        raise DataError(f"{path}: S is no label map (shape {values.shape}, {values.dtype})")
    if not (values.min() >= 0 and values.max() <= 255):
        raise DataError(f"{path}: S is no label map (shape {values.shape}, values to {values.max()})")
    return np.asarray(values, np.uint8)
