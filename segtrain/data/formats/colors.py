"""Colour masks: images whose colours mean the classes. CVAT's labelmap.txt and tables with colours are read too."""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from segtrain.config.user_files import read_text
from segtrain.data.formats.rasterise import Canvas
from segtrain.data.formats.records import Item, Record, Source, collected, content_key, file_key
from segtrain.data.images import opened
from segtrain.errors import DataError

LISTED = 5


def read_colors(source: Source) -> Iterator[Item]:
    """The images that have a mask."""
    known = sorted((red << 16 | green << 8 | blue, label) for (red, green, blue), label in source.colors.items())
    lookup = np.array(known, np.int32).reshape(-1, 2)
    for name, path in source.labels.items():
        if name in source.images:
            yield collected(partial(color_image, name, source.images[name], path, lookup))
        else:
            yield DataError(f"{path}: the mask has no image of its name among the {len(source.images)} images")


def color_image(name: str, image: Path, path: Path, lookup: np.ndarray) -> Record:
    key = content_key([file_key([path]), lookup.tolist()])
    return Record(name, image, str(path), key, partial(paint_colors, path, lookup), mask=path)


def paint_colors(path: Path, lookup: np.ndarray, canvas: Canvas) -> None:
    """lookup: int32 (C, 2), 0xrrggbb and id in ascending order."""
    colors = read_color_mask(path)
    places = np.minimum(np.searchsorted(lookup[:, 0], colors), len(lookup) - 1)
    ids = lookup[places, 1]
    unknown = colors[lookup[places, 0] != colors]
    if unknown.size:
        values, counts = np.unique(unknown, return_counts=True)
        most = np.argsort(-counts, kind="stable")[:LISTED]
        listed = ", ".join(f"#{values[i]:06x} ({counts[i]} pixels)" for i in most)
        raise DataError(
            f"{path}: {len(values)} colours are not in {canvas.classes.source}: {listed}; add them to the table, or "
            "export the masks again without smoothing or compression"
        )
    require_size(path, ids, canvas)
    canvas.whole(ids.astype(np.uint8))


def require_size(path: Path, pixels: np.ndarray, canvas: Canvas) -> None:
    """DataError for a mask of another size than its image."""
    if pixels.shape != canvas.size:
        raise DataError(
            f"{path} is {pixels.shape[1]}x{pixels.shape[0]}, its image {canvas.size[1]}x{canvas.size[0]} (width x "
            "height): they must match pixel by pixel"
        )


def read_color_mask(path: Path) -> np.ndarray:
    """int32 (H, W) 0xrrggbb. DataError for a JPEG, whose compression changes colours."""
    with opened(path) as image:
        if image.format in ("JPEG", "MPO"):
            raise DataError(f"{path} is a JPEG, whose compression changes colours: export the masks as PNG")
        rgb = np.asarray(image.convert("RGB")).astype(np.int32)
        return rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]


def colors_of(rows: list[Mapping[str, Any]], source: str) -> dict[tuple[int, int, int], int]:
    """Colour -> id. DataError for two classes of one colour."""
    colors: dict[tuple[int, int, int], int] = {}
    names: dict[int, str] = {}
    for row in rows:
        red, green, blue = row["color"]
        label, color = int(row["id"]), (int(red), int(green), int(blue))
        if color in colors:
            raise DataError(f"{source}: {names[colors[color]]} and {row['name']} have the same colour {list(color)}; "
                            "with dataset.format=colors each class needs its own")  # fmt: skip
        colors[color], names[label] = label, str(row["name"])
    return colors


def read_labelmap(path: Path) -> list[dict[str, Any]]:
    """CVAT's labelmap.txt, `label:color_rgb:parts:actions` a line, as rows of a class table; ids by their order."""
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(read_text(path, "the label map").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = re.fullmatch(r"(.+?):(\d{1,3}),(\d{1,3}),(\d{1,3})(?::.*)?", line.strip())
        if match is None or any(int(part) > 255 for part in match.groups()[1:]):
            raise DataError(f"{path}, line {number}: expected label:red,green,blue:parts:actions, found {line[:60]!r}")
        rows.append({"id": len(rows), "name": match[1], "color": [int(part) for part in match.groups()[1:]]})
    if not rows:
        raise DataError(f"{path}: expected lines of label:red,green,blue:parts:actions, found none")
    return rows


def with_colors(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a CSV as those of a class table: columns r, g and b as color, and ids by order if it has none."""
    result = []
    for number, row in enumerate(rows):
        lower = {key.lower(): value for key, value in row.items()}
        channels = next((names for names in RGB if set(names) <= lower.keys()), None)
        if channels is None:
            return rows
        name = next((lower.pop(key) for key in ("name", "class", "label") if key in lower), "")
        color = " ".join(lower.pop(channel) for channel in channels)
        result.append({"id": str(number), **lower, "name": name, "color": color})
    return result


RGB = (("r", "g", "b"), ("red", "green", "blue"))
