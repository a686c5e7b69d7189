"""Supervisely's projects: meta.json, and for each image a JSON file named as it with .json added.

https://developer.supervisely.com/getting-started/supervisely-annotation-format: size, and objects with classTitle and
geometryType: polygon (points.exterior, points.interior: holes), bitmap (a PNG, compressed by zlib, in base64, whose
upper left pixel is at origin [x, y]), rectangle, and shapes without an area.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from segtrain.data.formats.embedded import base64_bytes, image_mask, inflated
from segtrain.data.formats.labelme import corners
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

WITHOUT_AREA = ("point", "line", "graph", "cuboid", "cuboid_2d", "polyline")


def read_supervisely(source: Source) -> Iterator[Item]:
    """The images that have a JSON file."""
    index = ImageIndex(source.images)
    for path in source.labels.values():
        yield collected(partial(supervisely_image, path, index))


def supervisely_image(path: Path, index: ImageIndex) -> Record:
    fields = Fields(read_annotation(path), str(path))
    size = Fields(fields.get("size", dict, "height and width"), str(path)).size("height", "width")
    objects = fields.items("objects")
    # ds/ann/NAME.json belongs to ds/img/NAME: several datasets of a project may have the same names.
    reference = f"{path.parent.parent.name}/img/{path.name.removesuffix('.json')}"
    name, image = index.find(reference, str(path))
    return Record(name, image, str(path), content_key(objects), partial(paint_objects, objects, path), size)


def paint_objects(objects: list[Any], path: Path, canvas: Canvas) -> None:
    for number, one in enumerate(objects, 1):
        fields = Fields(one, f"{path}, object {number}")
        name, kind = fields.text("classTitle"), fields.text("geometryType")
        canvas.classes.id_of(name, fields.where)
        if kind in ("polygon", "rectangle"):
            points = Fields(fields.get("points", dict, "exterior and interior"), fields.where)
            ring: Any = points.items("exterior")
            if kind == "rectangle":
                ring = inclusive(ring, fields.where)
            holes = points.items("interior") if points.content.get("interior") else []
            canvas.polygon(name, [ring], fields.where, holes)
        elif kind == "bitmap":
            bitmap = Fields(fields.get("bitmap", dict, "data and origin"), fields.where)
            left, top = (round(number) for number in as_points([bitmap.items("origin")], fields.where)[0])
            mask = image_mask(inflated(base64_bytes(bitmap.text("data"), fields.where), fields.where), fields.where)
            canvas.bitmap(name, mask, fields.where, top, left)
        elif kind in WITHOUT_AREA:
            canvas.skip(kind)
        else:
            raise DataError(
                f"{fields.where}: geometryType must be polygon, bitmap, rectangle or {', '.join(WITHOUT_AREA)}, "
                f"found {kind[:40]!r}"
            )


def inclusive(points: Any, where: str) -> np.ndarray:
    """The corners of a rectangle, whose right and lower pixels belong to it."""
    array = corners(points, where)
    return array + (array == array.max(0))
