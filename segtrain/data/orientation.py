"""EXIF orientation: how an image is turned to stand as a viewer shows it, and when it is to be turned.

Tags as of EXIF 2.32, section 4.6.4: 1 as stored, 2 mirrored, 3 upside down, 4 upside down and mirrored, 6 and 8 on a
side, 5 and 7 on a side and mirrored.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from segtrain.config.dataset import EXIF_RULES
from segtrain.errors import DataError

TAG = 274  # of EXIF and TIFF
AS_STORED = 1
SIDEWAYS = (5, 6, 7, 8)
INVERSE = {6: 8, 8: 6}  # of the others, each undoes itself
WORDS = {
    2: "mirrored", 3: "upside down", 4: "upside down and mirrored", 5: "on its side and mirrored",
    6: "on its left side", 7: "on its side and mirrored", 8: "on its right side",
}  # fmt: skip


class OrientationError(DataError):
    """The size of the label does not tell whether an image is to be turned, or it may not have an orientation."""


def turned(pixels: np.ndarray, tag: int) -> np.ndarray:
    """Pixels (H, W, ...) as stored -> as a viewer shows them, contiguous; (W, H, ...) for the tags 5 to 8."""
    if tag == AS_STORED:
        return pixels
    if tag in SIDEWAYS:
        pixels = pixels.swapaxes(0, 1)
    rows = -1 if tag in (3, 4, 7, 8) else 1
    columns = -1 if tag in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(pixels[::rows, ::columns])


def turned_size(size: tuple[int, int], tag: int) -> tuple[int, int]:
    """(height, width) as stored -> after `turned`."""
    return (size[1], size[0]) if tag in SIDEWAYS else size


def tag_to_apply(
    tag: int, rule: str, size: tuple[int, int], label: tuple[int, int] | None, path: Path
) -> int:  # fmt: skip
    """The tag to turn an image by; 1: it stays as stored.

    tag: of the file. rule: dataset.exif. size, label: (height, width) of the image as stored and of its label. auto
    turns an image that lies on its side if it has the size of its label then. DataError where the size of the label
    does not tell, and by refuse.
    """
    assert rule in EXIF_RULES, rule
    if tag == AS_STORED or rule == "ignore":
        return AS_STORED
    if rule == "apply":
        return tag
    if rule == "auto" and tag in SIDEWAYS and size[0] != size[1] and label is not None:
        return tag if label == turned_size(size, tag) else AS_STORED
    if rule == "refuse":
        why = "which dataset.exif=refuse does not allow: write the image anew, upright and without the tag, or give"
    else:
        why = (
            "and the size of its label does not tell whether the label is drawn upright. Compare one in a viewer: give"
        )
    raise OrientationError(
        f"{path} has the EXIF orientation {tag} ({WORDS[tag]}), {why} dataset.exif=apply for labels that fit the image "
        "as a viewer shows it, dataset.exif=ignore for those that fit the stored pixels"
    )


def describe_tags(tags: Mapping[int, int]) -> str:
    """'5 on its left side (6), 1 upside down (3)' for {6: 5, 3: 1}"""
    return ", ".join(f"{count} {WORDS[tag]} ({tag})" for tag, count in sorted(tags.items(), key=lambda item: -item[1]))
