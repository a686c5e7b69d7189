"""One binary mask file for each class of an image: CLASS in the pattern of the labels stands for the class's name."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from segtrain.data.folders import matching
from segtrain.data.formats.colors import require_size
from segtrain.data.formats.rasterise import Canvas
from segtrain.data.formats.records import Item, Record, Source, collected, content_key, file_key
from segtrain.data.images import opened
from segtrain.errors import DataError, UsageError

CLASS = "CLASS"


def read_class_masks(source: Source) -> Iterator[Item]:
    """All images; a class without a mask file does not occur. In the order of the table: a later class covers."""
    if CLASS not in source.pattern:
        raise UsageError(
            f"labels={source.pattern}: write {CLASS} where the name of the class stands, as masks/CLASS/*.png"
        )
    stems = {Path(name).with_suffix("").as_posix(): name for name in source.images}
    masks: dict[str, list[tuple[str, Path]]] = {name: [] for name in source.images}
    stray: dict[Path, None] = {}
    used = set()
    for label in source.classes:
        for text, path in matching(source.root, source.pattern.replace(CLASS, label)):
            name = text if text in masks else stems.get(Path(text).with_suffix("").as_posix(), stems.get(text, ""))
            if name:
                masks[name].append((label, path))
                used.add(path)
            else:
                stray[path] = None
    for path in stray:
        if path not in used:
            yield DataError(f"{path}: the mask has no image of its name among the {len(masks)} images")
    if not used:
        raise DataError(f"labels={source.pattern} means no file for any image and class in {source.root}")
    for name, some in masks.items():
        yield collected(partial(masked_image, name, source.images[name], some))


def masked_image(name: str, image: Path, masks: list[tuple[str, Path]]) -> Record:
    first = masks[0][1] if masks else None
    key = content_key([[label for label, _ in masks], file_key(path for _, path in masks)])
    return Record(name, image, str(first or image), key, partial(paint_masks, masks), mask=first)


def paint_masks(masks: list[tuple[str, Path]], canvas: Canvas) -> None:
    for label, path in masks:
        mask = read_binary(path)
        require_size(path, mask, canvas)
        canvas.bitmap(label, mask, str(path))


def read_binary(path: Path) -> np.ndarray:
    """bool (H, W) of an image with 0 and one other value. DataError for anything else."""
    with opened(path) as image:
        if image.format in ("JPEG", "MPO"):
            raise DataError(f"{path} is a JPEG, whose compression blurs masks: export them as PNG")
        values = np.asarray(image.convert("L") if image.mode in ("P", "PA") else image)
        values = values[..., :3].max(axis=2) if values.ndim == 3 and values.shape[2] > 2 else values
        values = values[..., 0] if values.ndim == 3 else values
    found = np.unique(values)
    if len(found) > 2 or (len(found) == 2 and found[0] != 0):
        raise DataError(
            f"{path} has the values {', '.join(map(str, found[:6]))}{', ...' if len(found) > 6 else ''}: a mask of one "
            "class has 0 and one other value"
        )
    return np.asarray(values > 0)
