"""YOLO's segmentation polygons: data.yaml, and beside each image a text file with a line for each object.

https://docs.ultralytics.com/datasets/segment/: `class x1 y1 x2 y2 ...` with coordinates as fractions of width and
height; the label file of an image has its path with the last /images/ as /labels/ and the ending .txt. An image without
one has no objects. A line with four numbers is a box.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from segtrain.config.user_files import read_text, read_yaml
from segtrain.data.formats.rasterise import Canvas
from segtrain.data.formats.records import Fields, Item, Record, Source, collected, content_key
from segtrain.errors import DataError


def read_yolo(source: Source) -> Iterator[Item]:
    """All images of the split."""
    names = yolo_names(source.single("data.yaml, which has the names of the classes"))
    if not any(label_path(image).exists() for image in source.images.values()):
        first = next(iter(source.images.values()), None)
        raise DataError(f"no image has a label file, which would be {first and label_path(first)} for the first one")
    for name, image in source.images.items():
        yield collected(partial(yolo_image, name, image, names))


def yolo_names(path: Path) -> dict[int, str]:
    """The names of the classes by their numbers, a list or a mapping in data.yaml."""
    content = Fields(read_yaml(path, "data.yaml"), str(path))
    names = content.get("names", (list, dict), "the names of the classes")
    pairs = enumerate(names) if isinstance(names, list) else names.items()
    try:
        return {int(number): str(name) for number, name in pairs}
    except ValueError as error:
        raise DataError(f"{path}: 'names' must be a list, or a mapping from numbers to names") from error


def label_path(image: Path) -> Path:
    """Where the label file of an image is."""
    folders = list(image.parent.parts)
    if "images" in folders:
        folders[len(folders) - 1 - folders[::-1].index("images")] = "labels"
    return Path(*folders, f"{image.stem}.txt")


def yolo_image(name: str, image: Path, names: dict[int, str]) -> Record:
    path = label_path(image)
    text = read_text(path, "the labels") if path.exists() else ""
    paint = partial(paint_lines, text, names, path)
    return Record(name, image, str(path), content_key([text, sorted(names.items())]), paint)


def paint_lines(text: str, names: dict[int, str], path: Path, canvas: Canvas) -> None:
    if not text.strip() and not path.exists():
        canvas.facts["images without a label file"] += 1
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        label, points = polygon_of(line, where)
        if label not in names:
            raise DataError(f"{where}: class {label} is not in 'names' of data.yaml, which has {sorted(names)}")
        if points is None:
            canvas.skip("box")
            continue
        canvas.polygon(names[label], [points * (canvas.size[1], canvas.size[0])], where)


def polygon_of(line: str, where: str) -> tuple[int, Any]:
    """The number of the class and the points, float64 (N, 2) as fractions; None for a box."""
    words = line.split()
    try:
        label, numbers = int(words[0]), np.array([float(word) for word in words[1:]])
    except ValueError as error:
        raise DataError(f"{where}: expected a class and numbers x1 y1 x2 y2 ..., found {line[:60]!r}") from error
    if len(numbers) == 4:
        return label, None
    if len(numbers) % 2 or not len(numbers):
        raise DataError(f"{where}: expected an even number of coordinates, found {len(numbers)}")
    if np.abs(numbers[np.isfinite(numbers)]).max(initial=0) > 2:
        raise DataError(
            f"{where}: coordinates must be fractions of the image from 0 to 1, found {np.abs(numbers).max():g}; "
            "divide pixels by width and height"
        )
    return label, numbers.reshape(-1, 2)
