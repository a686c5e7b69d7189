"""Label Studio's JSON export: tasks with polygons in percent of the image, and brush strokes as run lengths.

https://labelstud.io/guide/export: a list of tasks with data (the image), and annotations, whose result is a list of
regions with type, value, original_width and original_height. Of an image with several annotations the one that is
marked as ground truth counts, else the first that was not cancelled.
"""

import re
from collections.abc import Iterator
from functools import partial
from math import cos, radians, sin
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

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
from segtrain.data.formats.rle import decode_brush
from segtrain.errors import DataError

WITHOUT_AREA = ("ellipse", "keypoint", "vector")
ABOUT_IMAGES = ("choices", "textarea", "rating", "relation", "number", "taxonomy", "pairwise", "ranker", "datetime")


def read_label_studio(source: Source) -> Iterator[Item]:
    """The tasks that have an annotation."""
    path = source.single("the JSON file that Label Studio exports")
    tasks = read_annotation(path)
    if not isinstance(tasks, list):
        raise DataError(f"{path}: expected a list of tasks, as Label Studio exports as JSON, found {str(tasks)[:60]}")
    index = ImageIndex(source.images)
    for number, task in enumerate(tasks, 1):
        yield collected(partial(task_image, task, f"{path}, task {number}", index))


def task_image(task: Any, where: str, index: ImageIndex) -> Record:
    fields = Fields(task, where)
    if "annotations" not in fields.content and "image" in fields.content:
        raise DataError(f"{where}: this is the export JSON-MIN, without types of regions; export as JSON")
    name, image = find_image(Fields(fields.get("data", dict, "the data of the task"), where), where, index)
    every = [Fields(one, where) for one in fields.items("annotations")]
    valid = [one for one in every if not one.content.get("was_cancelled")]
    truth = [one for one in valid if one.content.get("ground_truth")] or valid
    regions = (
        [Fields(one, f"{where}, region {n}") for n, one in enumerate(truth[0].items("result"), 1)] if truth else []
    )
    drawn = [one for one in regions if "original_width" in one.content]
    sizes = {one.size("original_height", "original_width") for one in drawn}
    if len(sizes) > 1:
        raise DataError(f"{where}: its regions state different sizes of the image: {sorted(sizes)}")
    paint = partial(paint_regions, regions, len(valid) - 1, not valid)
    return Record(name, image, where, content_key(task), paint, next(iter(sizes), None))


def image_reference(data: Fields, where: str) -> list[str]:
    """What a task may mean by its image, `image` or the only text among its data: of a URL the path, of an upload also
    the name without its prefix."""
    texts = [value for value in data.content.values() if isinstance(value, str)]
    reference = data.content.get("image", texts[0] if len(texts) == 1 else None)
    if not isinstance(reference, str):
        raise DataError(f"{where}: expected the image as data.image, found {', '.join(map(str, data.content))}")
    parts = urlsplit(reference)
    path = unquote(parse_qs(parts.query).get("d", [parts.path])[0])
    return list(dict.fromkeys([path, re.sub(r"^[0-9a-f]{8}-", "", path.rpartition("/")[2])]))


def find_image(data: Fields, where: str, index: ImageIndex) -> tuple[str, Path]:
    """Sample name and path of a task's image. DataError if it is not there."""
    named = image_reference(data, where)
    known = next((name for name in named if name.rpartition("/")[2] in index.by_name), named[0])
    return index.find(known, where)


def paint_regions(regions: list[Fields], further: int, cancelled: bool, canvas: Canvas) -> None:
    canvas.facts["further annotations of an image, not used"] += max(further, 0)
    canvas.facts["images whose annotations were cancelled, or that have none"] += cancelled
    names: dict[Any, list[str]] = {}  # with the tag <Labels> they are a result of their own, with the region's id
    for one in regions:
        value = one.content.get("value") or {}
        for kind, found in value.items() if isinstance(value, dict) else ():
            if kind.endswith("labels") and isinstance(found, list):
                names[region_id(one)] = [str(name) for name in found]
    for one in regions:
        kind = str(one.content.get("type", "")).lower()
        value = one.content.get("value")
        if kind == "labels" and isinstance(value, dict) and not {"points", "rle", "width"} & value.keys():
            continue
        paint_region(one, kind.removesuffix("labels"), names.get(region_id(one), []), canvas)


def region_id(region: Fields) -> str:
    return str(region.content.get("id", region.where))


def paint_region(region: Fields, kind: str, names: list[str], canvas: Canvas) -> None:
    if kind in WITHOUT_AREA:
        canvas.skip(kind)
        return
    if kind in ABOUT_IMAGES:
        canvas.facts["answers about whole images, not used"] += 1
        return
    if kind not in ("polygon", "brush", "rectangle"):
        raise DataError(f"{region.where}: the type must be polygonlabels, brushlabels, rectanglelabels or one of "
                        f"{', '.join(WITHOUT_AREA)}, found {kind!r}")  # fmt: skip
    if len(names) != 1:
        raise DataError(f"{region.where}: expected one label, found {', '.join(names) or 'none'}")
    if region.content.get("image_rotation"):
        raise DataError(f"{region.where}: the image was rotated by {region.content['image_rotation']} degrees in Label "
                        "Studio; rotate the image file, and label it unrotated")  # fmt: skip
    value = Fields(region.get("value", dict, "the region"), region.where)
    height, width = canvas.size
    if kind == "brush":
        canvas.bitmap(names[0], decode_brush(value.items("rle"), height, width, region.where), region.where)
        return
    points = as_points(value.items("points"), region.where) if kind == "polygon" else rectangle(value, height / width)
    canvas.polygon(names[0], [points / 100 * (width, height)], region.where)


def rectangle(value: Fields, aspect: float) -> np.ndarray:
    """The corners in percent; the angle is about the upper left one, clockwise in degrees. aspect: height / width."""
    number = (int, float)
    x, y, w, h = (float(value.get(key, number, "a number")) for key in ("x", "y", "width", "height"))
    angle = radians(float(value.content.get("rotation") or 0))
    along = np.array([cos(angle), sin(angle) / aspect])
    across = np.array([-sin(angle) * aspect, cos(angle)])
    corner = np.array([x, y])
    return np.array([corner, corner + w * along, corner + w * along + h * across, corner + h * across])
