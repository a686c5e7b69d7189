"""Label images of class ids, as they are: for converting them with the ids of a table checked."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from segtrain.data.formats.colors import require_size
from segtrain.data.formats.rasterise import Canvas
from segtrain.data.formats.records import Item, Record, Source, collected, file_key
from segtrain.data.label_files import read_label
from segtrain.errors import DataError


def read_masks(source: Source) -> Iterator[Item]:
    """The images that have a label image."""
    for name, path in source.labels.items():
        if name in source.images:
            yield collected(partial(masked, name, source.images[name], path))
        else:
            yield DataError(f"{path}: the label image has no image of its name among the {len(source.images)} images")


def masked(name: str, image: Path, path: Path) -> Record:
    return Record(name, image, str(path), file_key([path]), partial(paint_values, path), mask=path)


def paint_values(path: Path, canvas: Canvas) -> None:
    values = read_label(path)
    require_size(path, values, canvas)
    unknown = sorted(set(np.unique(values).tolist()) - set(canvas.classes.ids.values()))
    if unknown:
        raise DataError(f"{path}: the ids {', '.join(map(str, unknown[:6]))} are not in {canvas.classes.source}; add "
                        "them to the table (as ignored if they mean nothing)")  # fmt: skip
    canvas.whole(values)
