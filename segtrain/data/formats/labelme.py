"""LabelMe's JSON files: one a image, with `shapes` of a label, points and a type.

https://github.com/wkentaro/labelme (labelme/_label_file.py and utils/shape.py, read for the format): shape_type is
polygon, rectangle (two corners), mask (a PNG in base64 between its two corners), circle, line, linestrip, point or
points; None stands for polygon.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from segtrain.data.formats.embedded import png_mask
from segtrain.data.formats.rasterise import Canvas, as_points
from segtrain.data.formats.records import (
    Fields,
    ImageIndex,
    Item,
    Record,
    Source,
    collected,
    content_key,
    read_annotation,
)
from segtrain.errors import DataError

WITHOUT_AREA = ("circle", "line", "linestrip", "point", "points")


def read_labelme(source: Source) -> Iterator[Item]:
    """The images that have a JSON file."""
    index = ImageIndex(source.images)
    for path in source.labels.values():
        yield collected(partial(labelme_image, path, index))


def labelme_image(path: Path, index: ImageIndex) -> Record:
    fields = Fields(read_annotation(path), str(path))
    shapes = fields.items("shapes")
    reference = fields.text("imagePath")
    same = index.by_stem.get(path.stem, [])
    beside = [one for one in same if one[1].parent == path.parent] or same
    name, image = beside[0] if len(beside) == 1 else index.find(reference, str(path))
    stated = all(isinstance(fields.content.get(key), int) for key in ("imageHeight", "imageWidth"))
    size = fields.size("imageHeight", "imageWidth") if stated else None
    return Record(name, image, str(path), content_key(shapes), partial(paint_shapes, shapes, path), size)


def paint_shapes(shapes: list[Any], path: Path, canvas: Canvas) -> None:
    for number, one in enumerate(shapes, 1):
        fields = Fields(one, f"{path}, shape {number}")
        label, kind = fields.text("label"), one.get("shape_type") or "polygon"
        canvas.classes.id_of(label, fields.where)
        points = fields.items("points")
        if kind == "polygon":
            canvas.polygon(label, [points], fields.where)
        elif kind == "rectangle":
            canvas.polygon(label, [corners(points, fields.where)], fields.where)
        elif kind == "mask":
            left, top = (round(number) for number in as_points(points, fields.where)[0])
            canvas.bitmap(label, png_mask(fields.text("mask"), fields.where), fields.where, top, left)
        elif kind in WITHOUT_AREA:
            canvas.skip(kind)
        else:
            raise DataError(
                f"{fields.where}: shape_type must be polygon, rectangle, mask or {', '.join(WITHOUT_AREA)}, "
                f"found {str(kind)[:40]!r}"
            )


def corners(points: Any, where: str) -> np.ndarray:
    """Two opposite corners as a polygon."""
    array = as_points(points, where)
    if len(array) != 2:
        raise DataError(f"{where}: a rectangle must have two points, found {len(array)}")
    (x0, y0), (x1, y1) = array
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
