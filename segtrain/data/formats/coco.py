"""COCO's JSON: polygons, run lengths as numbers and as text, crowds.

https://cocodataset.org/#format-data: images (id, file_name, height, width), categories (id, name) and annotations
(image_id, category_id, segmentation, iscrowd). The polygons of an annotation are parts of one object: holes are only
possible in run lengths. Crowds are painted below everything else.
"""

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from segtrain.data.formats.rasterise import Canvas
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
from segtrain.data.formats.rle import decode_coco_rle
from segtrain.errors import DataError


def read_coco(source: Source) -> Iterator[Item]:
    """The images that the file lists, also those without objects."""
    path = source.single("one JSON file a split")
    content = Fields(read_annotation(path), str(path))
    names = coco_categories(content, path)
    objects: dict[str, list[Any]] = defaultdict(list)
    listed = ids_of_images(content, path)
    for number, one in enumerate(content.items("annotations"), 1):
        annotation = Fields(one, f"{path}, annotation {number}")
        image = annotation.get("image_id", (int, str), "the id of an image")
        if str(image) not in listed:
            yield DataError(f"{annotation.where}: image_id {image} is not the id of one of the images")
        objects[str(image)].append(one)
    index = ImageIndex(source.images)
    for number, one in enumerate(content.items("images"), 1):
        yield collected(partial(coco_image, one, f"{path}, image {number}", index, names, objects))


def ids_of_images(content: Fields, path: Path) -> set[str]:
    """The ids as texts: some tools write the same one as a number among the images and as a text elsewhere."""
    found: set[str] = set()
    for number, one in enumerate(content.items("images"), 1):
        label = str(one.get("id")) if isinstance(one, dict) and "id" in one else None  # `coco_image` reports the others
        if label in found:
            raise DataError(f"{path}, image {number}: the id {label} occurs twice")
        found |= set() if label is None else {label}
    return found


def coco_categories(content: Fields, path: Path) -> dict[Any, str]:
    """The names of the categories by their ids."""
    names: dict[Any, str] = {}
    for number, one in enumerate(content.items("categories"), 1):
        category = Fields(one, f"{path}, category {number}")
        label = category.get("id", (int, str), "the id of the category")
        if label in names:
            raise DataError(f"{category.where}: the id {label} occurs twice")
        names[label] = category.text("name")
    return names


def coco_image(
    content: Any, where: str, index: ImageIndex, names: dict[Any, str], objects: dict[str, list[Any]]
) -> Record:  # fmt: skip
    fields = Fields(content, where)
    label = fields.get("id", (int, str), "the id of the image")
    where = f"{where} ({fields.text('file_name')})"
    name, path = index.find(fields.text("file_name"), where)
    some = objects.get(str(label), [])
    paint = partial(paint_annotations, some, names, where)
    size = fields.size("height", "width") if "height" in fields.content else None
    return Record(name, path, where, content_key([some, sorted(names.items(), key=str)]), paint, size)


def paint_annotations(annotations: list[Any], names: dict[Any, str], where: str, canvas: Canvas) -> None:
    for one in annotations:
        fields = Fields(one, f"{where}, annotation {one.get('id', '?')}")
        label = fields.get("category_id", (int, str), "the id of a category")
        if label not in names:
            raise DataError(f"{fields.where}: category_id {label} is not the id of one of the categories")
        crowd = bool(one.get("iscrowd", 0))
        shape = one.get("segmentation")
        if shape in (None, []):
            canvas.skip("box without a segmentation")
        elif isinstance(shape, dict):
            rle = Fields(shape, fields.where)
            counts = rle.get("counts", (list, str), "run lengths")
            size = rle.items("size")
            if size != list(canvas.size):
                raise DataError(
                    f"{fields.where}: the size of the mask is {str(size)[:40]}, that of the image {list(canvas.size)} "
                    "[height, width]"
                )
            mask = decode_coco_rle(counts, size, fields.where)
            canvas.bitmap(names[label], mask, fields.where, crowd=crowd)
        elif isinstance(shape, list):
            rings = [pairs_of(ring, fields.where) for ring in shape]
            canvas.polygon(names[label], rings, fields.where, crowd=crowd)
        else:
            raise DataError(f"{fields.where}: 'segmentation' must be polygons or run lengths, found {str(shape)[:60]}")


def pairs_of(numbers: Any, where: str) -> list[tuple[Any, Any]]:
    """[x1, y1, x2, y2, ...] as points. DataError for anything else."""
    if not isinstance(numbers, list) or len(numbers) % 2:
        raise DataError(
            f"{where}: a polygon must be a list x1, y1, x2, y2, ... of even length, found {str(numbers)[:60]}"
        )
    return list(zip(numbers[::2], numbers[1::2], strict=True))
