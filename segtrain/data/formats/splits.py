"""The files of a split whose labels are in another format: label images in the cache, painted at the first use."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segtrain.config import FolderConfig
from segtrain.console import say
from segtrain.data.folders import matching
from segtrain.data.formats.class_masks import CLASS, read_class_masks
from segtrain.data.formats.coco import read_coco
from segtrain.data.formats.colors import colors_of, read_colors
from segtrain.data.formats.label_studio import read_label_studio
from segtrain.data.formats.labelme import read_labelme
from segtrain.data.formats.painted import Painting, PaintReport, paint_all
from segtrain.data.formats.parquet import extract_parquet
from segtrain.data.formats.rasterise import Classes
from segtrain.data.formats.records import Reader, Source, content_key, file_key
from segtrain.data.formats.supervisely import read_supervisely
from segtrain.data.formats.yolo import label_path, read_yolo
from segtrain.data.labels import LabelTable
from segtrain.errors import DataError, UsageError, meant
from segtrain.files import read_side_json, write_atomically

READERS: dict[str, Reader] = {
    "colors": read_colors, "coco": read_coco, "yolo": read_yolo, "labelme": read_labelme,
    "label_studio": read_label_studio, "supervisely": read_supervisely, "class_masks": read_class_masks,
}  # fmt: skip
FILES_OF_LABELS = ("colors",)  # every image must have a label; other formats say which images are labelled
ERRORS_SHOWN = 5


def painting_of(table: LabelTable, order: str, unlabelled: str | None, exif: str = "auto") -> Painting:
    """How images are painted with the classes of a table. UsageError for a name that it does not have."""
    names = [str(row["name"]) for row in table.rows]
    if unlabelled is not None and unlabelled not in names:
        raise UsageError(
            f"dataset.unlabelled={unlabelled} is no name in {table.source}{meant(unlabelled, names)}; it has "
            f"{', '.join(names[:12])}"
        )
    return Painting(Classes(table.rows, table.source), order, unlabelled, exif)


def source_of(
    root: Path, images: Mapping[str, Path], pattern: str, labels: Mapping[str, Path], table: LabelTable, form: str,
    columns: tuple[str, str] | None = None,
) -> Source:  # fmt: skip
    """What a reader gets. The colours are looked at for form=colors only."""
    colors = colors_of(list(table.rows), table.source) if form == "colors" else {}
    return Source(root, images, pattern, labels, tuple(str(row["name"]) for row in table.rows), colors, columns)


def painted_split(
    config: FolderConfig, split: str, source: Source, table: LabelTable
) -> tuple[dict[str, Path], dict[str, Path], tuple[str, ...]]:  # fmt: skip
    """Images and label images by sample name, and sentences about what was not drawn.

    DataError with the first faults if labels cannot be used.
    """
    painting = painting_of(table, config.order, config.unlabelled, config.exif)
    about = [str(source.root.absolute()), config.format, split, source.pattern, *painting[1:]]
    identity = content_key(
        [*about, config.columns, sorted(painting.classes.ids.items()), sorted(source.colors.items())]
    )
    folder = config.cache_folder() / "labels" / identity
    stamp = stamp_of(source, config.format)
    saved = saved_split(folder, stamp)
    if saved is not None:
        announce(folder, saved["lines"])
        return saved["images"], saved["labels"], tuple(saved["lost"])
    what = f"labels of {split}"
    if config.format == "parquet":
        images, labels, errors = extract_parquet(source.labels, source.columns, folder)
        report = PaintReport(images, labels, errors=errors)
        lines = [f"{len(labels)} images with masks"]
    else:
        report = paint_all(READERS[config.format](source), folder, painting, what)
        lines = report.lines()
    refuse_errors(report, split)
    if not report.labels:
        raise DataError(f"{what}: no image of dataset.splits.{split} has labels in {source.pattern}")
    left = len(source.images) - len(report.images)
    if left and config.format not in (*FILES_OF_LABELS, "parquet"):
        lines.append(f"{left} images without labels left out")
    shown = [
        f"{what}: {config.format}, {', '.join(lines)}",
        *(f"WARNING    {what}: {one}" for one in report.warnings()),
    ]
    announce(folder, shown)
    images = dict(source.images) if config.format in FILES_OF_LABELS else report.images
    content = {"stamp": stamp, "lines": shown, "lost": report.warnings()}
    save_split(folder / "split.json", content, images, report.labels)
    return images, report.labels, tuple(report.warnings())


announced: set[Path] = set()  # folders whose lines this process has printed


def announce(folder: Path, lines: list[str]) -> None:
    """Print the lines about a split, once."""
    if folder not in announced:
        announced.add(folder)
        for line in lines:
            say(line)


def refuse_errors(report: PaintReport, split: str) -> None:
    """DataError with the first of the errors."""
    if report.errors:
        count = len(report.errors)
        more = f"\n  ... and {count - ERRORS_SHOWN} more" if count > ERRORS_SHOWN else ""
        raise DataError(
            f"{count} fault{'s' * (count > 1)} in the labels of {split}; segtrain convert-labels lists all:\n  "
            + "\n  ".join(report.errors[:ERRORS_SHOWN]) + more
        )  # fmt: skip


def stamp_of(source: Source, form: str) -> str:
    """A text that changes when a file of the split does."""
    files = [*source.labels.values(), *source.images.values()]
    if form == "yolo":
        files += [path for path in map(label_path, source.images.values()) if path.exists()]
    if form == "class_masks":
        for name in source.classes:
            files += [path for _, path in matching(source.root, source.pattern.replace(CLASS, name))]
    return content_key([file_key(files), [str(path) for path in files]])


def saved_split(folder: Path, stamp: str) -> dict[str, Any] | None:
    """What an earlier start has written, if nothing has changed and every label image is there."""
    found = read_side_json(folder / "split.json", dict)
    if found is None or found.get("stamp") != stamp or found.keys() != {"stamp", "lines", "lost", "images", "labels"}:
        return None
    for key in ("images", "labels"):
        found[key] = {name: Path(path) for name, path in found[key].items()}
    return found if all(path.is_file() for path in (*found["labels"].values(), *found["images"].values())) else None


def save_split(
    place: Path, content: dict[str, Any], images: Mapping[str, Path], labels: Mapping[str, Path]
) -> None:  # fmt: skip
    """Write what `saved_split` reads."""
    files = {"images": images, "labels": labels}
    content |= {key: {name: str(path) for name, path in some.items()} for key, some in files.items()}
    write_atomically(place, json.dumps(content).encode())
