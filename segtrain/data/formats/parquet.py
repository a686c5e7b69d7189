"""Parquet files with a column of images and one of masks, as the Hugging Face hub has them.

https://huggingface.co/docs/datasets/image_load and the feature `Image`: a struct of `bytes` (the file) and `path`.
"""

from collections import Counter
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from segtrain.console import Progress
from segtrain.data.images import opened
from segtrain.errors import DataError, UsageError
from segtrain.files import as_component, write_atomically

IMAGES = ("image", "img", "pixel_values", "images", "input_image")
MASKS = ("mask", "annotation", "label", "labels", "segmentation_mask", "semantic_segmentation", "segmentation", "masks",
         "annotations", "label_image", "label.segmentation_mask", "scene_parsing_label")  # fmt: skip


def open_table(path: Path) -> Any:
    """pyarrow's reader of the file. UsageError without pyarrow, DataError for a damaged file."""
    try:
        parquet, arrow = import_module("pyarrow.parquet"), import_module("pyarrow")
    except ImportError as error:
        raise UsageError(
            f"{path} needs pyarrow, which is not installed: pip install pyarrow (or the extra parquet)"
        ) from error
    try:
        return parquet.ParquetFile(path)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet ({str(error).splitlines()[0]})") from error


def find_columns(path: Path, asked: tuple[str, str] | None) -> tuple[str, str]:
    """The columns of images and masks: those asked for, or by their usual names. DataError naming all columns."""
    known = list(open_table(path).schema_arrow.names)
    if asked is not None:
        missing = [name for name in asked if name not in known]
        if missing:
            raise DataError(f"{path} has no column {missing[0]!r}; it has {', '.join(known)}")
        return asked
    found = [next((name for name in names if name in known), None) for names in (IMAGES, MASKS)]
    if found[0] is None or found[1] is None:
        raise DataError(
            f"{path} has the columns {', '.join(known)}: which are image and mask? Give dataset.columns=[image,mask] "
            "(columns= of segtrain convert-labels)"
        )
    return found[0], found[1]


def extract_parquet(
    files: Mapping[str, Path], columns: tuple[str, str] | None, folder: Path
) -> tuple[dict[str, Path], dict[str, Path], list[str]]:  # fmt: skip
    """Write the images and masks of all rows below `folder`, as they are. Files that hold the same stay.

    Returns images and labels by sample name, and an error for each row that has no image and mask.
    """
    images: dict[str, Path] = {}
    labels: dict[str, Path] = {}
    errors: list[str] = []
    tables = {path: open_table(path) for path in files.values()}
    progress = Progress("reading parquet", sum(table.metadata.num_rows for table in tables.values()))
    names: Counter[str] = Counter()
    row = 0
    for path, table in tables.items():
        chosen = find_columns(path, columns)
        number = 0
        for batch in table.iter_batches(16, columns=list(chosen)):
            for image, mask in zip(*(batch.column(name).to_pylist() for name in chosen), strict=True):
                row, number = row + 1, number + 1
                try:
                    where = f"{path}, row {number}"
                    pair = [cell_bytes(cell, f"{where}, column {name}", path.parent)
                            for cell, name in zip((image, mask), chosen, strict=True)]  # fmt: skip
                except DataError as error:
                    errors.append(str(error))
                    continue
                stem = as_component(Path((image or {}).get("path") or f"{path.stem}_{number:06d}").stem)
                names[stem] += 1
                name = stem if names[stem] == 1 else f"{stem}_{path.stem}_{number:06d}"
                for kind, target, content in zip(("images", "labels"), (images, labels), pair, strict=True):
                    target[name] = place = folder / kind / f"{name}{suffix_of(content)}"
                    if not place.is_file() or place.read_bytes() != content:
                        write_atomically(place, content)
                progress.show(row)
    return images, labels, errors


def cell_bytes(cell: Any, where: str, folder: Path) -> bytes:
    """The bytes of an image in a cell, or of the file that it names. DataError for anything else."""
    if isinstance(cell, bytes):
        cell = {"bytes": cell}
    if not isinstance(cell, dict) or not (cell.get("bytes") or cell.get("path")):
        raise DataError(f"{where}: expected an image (bytes and path), found {str(cell)[:40]}")
    content = cell.get("bytes")
    if content is None:
        try:
            content = (folder / cell["path"]).read_bytes()
        except OSError as error:
            raise DataError(f"{where}: the image {cell['path']!r} is missing: {error.strerror}") from error
    if not suffix_of(content):
        raise DataError(f"{where}: the bytes are no image that can be read")
    return bytes(content)


def suffix_of(content: bytes) -> str:
    """The ending of the file format, '' for what is no image."""
    try:
        with opened(Path("a cell"), content) as image:
            return "." + str(image.format).lower().replace("jpeg", "jpg").replace("tiff", "tif")
    except DataError:
        return ""
