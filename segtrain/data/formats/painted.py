"""Labels of other formats as label images in a folder, written once, and the report on them."""

import io
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin

from segtrain.console import Progress
from segtrain.data.formats.rasterise import Canvas, Classes
from segtrain.data.formats.records import Item, Record, content_key, file_key
from segtrain.data.images import opened, orientation_of, read_bytes, read_extent, read_header
from segtrain.data.orientation import AS_STORED, tag_to_apply, turned_size
from segtrain.errors import DataError
from segtrain.files import write_atomically
from segtrain.threads import threaded_map

VERSION = 1  # of the rasteriser; another number paints all images again
CONTESTED = "pixels of objects of different classes"
TEXT = "segtrain"  # name of the text in a PNG that says what it was painted from
LISTED = 3


class Painting(NamedTuple):
    """How images are painted. unlabelled: the name in the table for pixels without an object, None: there are none.
    exif: as dataset.exif, whether coordinates are those of the image as stored or as a viewer shows it."""

    classes: Classes
    order: str
    unlabelled: str | None
    exif: str = "auto"


@dataclass
class PaintReport:
    """images, labels: the files by sample name. facts: what was counted. pixels: of each id. errors: a sentence each,
    for what could not be used."""

    images: dict[str, Path] = field(default_factory=dict)
    labels: dict[str, Path] = field(default_factory=dict)
    facts: Counter[str] = field(default_factory=Counter)
    pixels: Counter[int] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The facts in words, the most important first."""
        facts = self.facts
        total = max(facts["pixels"], 1)
        found = [f"{len(self.labels)} images, {facts['objects']} objects"]
        shares = {"unlabelled pixels": "unlabelled", CONTESTED: "in objects of different classes"}
        found += [
            f"{100 * facts[name] / total:.3g} % of the pixels {text}" for name, text in shares.items() if facts[name]
        ]
        hidden = {"pixels", "objects", *shares}
        found += [f"{count} {name}" for name, count in sorted(facts.items()) if count and name not in hidden]
        return found

    def warnings(self) -> list[str]:
        """What is in the labels but not in the label images."""
        return [
            f"{count} annotations are {name}, which says nothing about pixels; draw them as polygons or remove them"
            for name, count in sorted(self.facts.items())
            if name.startswith("not drawn")
        ]

    def as_json(self, classes: Classes) -> dict[str, Any]:
        names = {label: name for name, label in classes.ids.items()}
        return {
            "images": len(self.labels), "facts": {name: count for name, count in sorted(self.facts.items()) if count},
            "class_pixels": {names.get(label, str(label)): count for label, count in sorted(self.pixels.items())},
            "errors": self.errors,
        }  # fmt: skip


def paint_all(items: Iterable[Item], folder: Path, painting: Painting, what: str) -> PaintReport:
    """Write `folder`/NAME.png for every record. A file that was painted from the same is left as it is."""
    report, records = PaintReport(), list[Record]()
    seen: dict[str, str] = {}
    for item in items:
        if isinstance(item, DataError):
            report.errors.append(str(item))
        elif item.name in seen:
            report.errors.append(f"{item.where}: the image {item.image} has labels already, in {seen[item.name]}")
        else:
            seen[item.name] = item.where
            records.append(item)
    progress = Progress(what, len(records))
    work = partial(paint_one, folder=folder, painting=painting)
    for done, (record, outcome) in enumerate(zip(records, threaded_map(work, records), strict=True), 1):
        if isinstance(outcome, DataError):
            report.errors.append(str(outcome))
        else:
            report.images[record.name], report.labels[record.name] = record.image, label_file(folder, record.name)
            report.facts.update(outcome["facts"])
            report.pixels.update({int(label): count for label, count in outcome["pixels"]})
        progress.show(done)
    return report


def label_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.png"


def paint_one(record: Record, folder: Path, painting: Painting) -> dict[str, Any] | DataError:
    """The facts about one image, whose label image exists afterwards; the error if it cannot be painted."""
    path = label_file(folder, record.name)
    try:
        ids = sorted(painting.classes.ids.items())
        image = file_key([record.image])
        key = content_key([VERSION, record.key, record.size, image, *painting[1:], ids])
        before = saved_facts(path)
        if before is not None and before["key"] == key:
            return before
        size = size_of_labels(record, painting.exif)
        canvas = Canvas(size, painting.classes, painting.order)
        record.paint(canvas)
        unlabelled = None if painting.unlabelled is None else painting.classes.id_of(painting.unlabelled, "unlabelled")
        values = canvas.finish(unlabelled)
        counts = np.bincount(values.ravel(), minlength=256)
        pixels = [[int(value), int(counts[value])] for value in np.flatnonzero(counts)]
        facts = {"key": key, "facts": dict(canvas.facts), "pixels": pixels}
        write_atomically(path, label_png(values, facts))
        return facts
    except DataError as error:
        return error


def size_of_labels(record: Record, exif: str) -> tuple[int, int]:
    """(height, width) of the image, turned if its labels are. DataError if theirs differs, or if that is not known."""
    stated = record.size if record.mask is None else read_header(record.mask)[:2]
    stored = read_extent(record.image)
    tag = AS_STORED if exif == "ignore" else orientation_of(read_bytes(record.image), record.image)
    height, width = turned_size(stored, tag_to_apply(tag, exif, stored, stated, record.image))
    if stated not in (None, (height, width)):
        assert stated is not None
        swapped = (
            "; height and width are swapped, as if one of the two was rotated" if stated == (width, height) else ""
        )
        raise DataError(f"{record.where}: the labels are for {stated[1]}x{stated[0]}, but {record.image} is {width}x"
                        f"{height} (width x height){swapped}")  # fmt: skip
    return height, width


def label_png(values: np.ndarray, facts: dict[str, Any]) -> bytes:
    """An 8-bit greyscale PNG of ids, with a text that says what it was painted from."""
    text, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    text.add_text(TEXT, json.dumps(facts))
    Image.fromarray(values).save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()


def saved_facts(path: Path) -> dict[str, Any] | None:
    """What `label_png` has saved in a file; None if there is none, or if it is another's or damaged."""
    if not path.is_file():
        return None
    try:
        with opened(path) as image:
            facts = json.loads(image.text[TEXT]) if isinstance(image, PngImagePlugin.PngImageFile) else None
            image.load()
    except (DataError, ValueError):
        return None
    if not isinstance(facts, dict) or facts.keys() != {"key", "facts", "pixels"}:
        return None
    return facts
