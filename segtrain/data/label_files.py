"""Read label images and instance maps: one number per pixel, never a colour."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from segtrain.data.images import BROKEN, read_bytes, unreadable
from segtrain.errors import DataError


def read_label(path: Path) -> np.ndarray:
    """The values of a label image, uint8 (H, W): of a greyscale or palette image (palette: the index), or the matrix S
    of a MATLAB file. DataError for anything else."""
    if path.suffix == ".mat":
        return read_matlab_label(path)
    values, mode = read_values(path)
    if mode in ("I;16", "I") and not 0 <= values.min() <= values.max() <= 255:
        raise DataError(
            f"{path} is a 16-bit image with values up to {values.max()}: this looks like an instance map; "
            "give images with one class id (0 to 255) per pixel"
        )
    return values.astype(np.uint8)


def read_instances(path: Path) -> np.ndarray:
    """An instance map: uint16 (H, W). DataError for a colour image, and for one with 8 bits."""
    values, mode = read_values(path)
    if mode in ("L", "P", "1"):
        raise DataError(f"{path} is an 8-bit image, but instance maps have 16 bits: use it as downloaded")
    return values.astype(np.uint16)


def read_values(path: Path) -> tuple[np.ndarray, str]:
    """The values of an image with one value per pixel, and Pillow's name of its mode."""
    data = read_bytes(path)
    try:
        with Image.open(io.BytesIO(data)) as image:
            mode = image.mode
            if mode not in ("L", "P", "1", "I;16", "I"):
                raise DataError(
                    f"{path} is a {mode} colour image, but a label image holds one class id per pixel: give 8-bit "
                    "greyscale or palette PNGs (Cityscapes: *_labelIds.png, KITTI: semantic/, not the colour images)"
                )
            return np.asarray(image), mode
    except BROKEN as error:
        raise unreadable(path, error) from error


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
