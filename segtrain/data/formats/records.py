"""What the readers of all formats share: a record is an image with a function that paints its labels."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from segtrain.config.user_files import read_json
from segtrain.data.formats.rasterise import Canvas
from segtrain.errors import DataError, meant

LARGEST_JSON = 4 << 30  # bytes


class Record(NamedTuple):
    """name: of the sample. where: file and record, for messages. key: a text that changes with what is painted.
    size: height and width as the labels state them, None if they do not; mask: an image that has this size."""

    name: str
    image: Path
    where: str
    key: str
    paint: Callable[[Canvas], None]
    size: tuple[int, int] | None = None
    mask: Path | None = None


class Source(NamedTuple):
    """What a reader gets. images: those of the split, by sample name. labels: the pattern or file, and by the text of
    its wildcards the files that it means. table_file: of the class table."""

    root: Path
    images: Mapping[str, Path]
    pattern: str
    labels: Mapping[str, Path]
    classes: tuple[str, ...] = ()
    colors: Mapping[tuple[int, int, int], int] = {}
    columns: tuple[str, str] | None = None

    def single(self, what: str) -> Path:
        """The one file that the pattern means. DataError for none or several."""
        if len(self.labels) != 1:
            found = f"{len(self.labels)} files" if self.labels else "no file"
            raise DataError(f"labels={self.pattern} means {found} in {self.root}; give {what}")
        return next(iter(self.labels.values()))


Item = Record | DataError  # DataError: a record that cannot be used
Reader = Callable[[Source], Iterable[Item]]


class ImageIndex:
    """Finds images by what annotations call them: a path, or the end of one."""

    def __init__(self, images: Mapping[str, Path]) -> None:
        self.by_name: dict[str, list[tuple[str, Path]]] = defaultdict(list)
        self.by_stem: dict[str, list[tuple[str, Path]]] = defaultdict(list)
        for name, path in images.items():
            self.by_name[path.name].append((name, path))
            self.by_stem[path.stem].append((name, path))

    def find(self, reference: Any, where: str) -> tuple[str, Path]:
        """Sample name and path. DataError if there is no such image, or if several could be meant."""
        if not isinstance(reference, str) or not reference:
            raise DataError(f"{where}: expected the name of an image, found {str(reference)[:60]!r}")
        parts = [part for part in reference.replace("\\", "/").split("/") if part not in ("", ".", "..")]
        found = self.by_name.get(parts[-1] if parts else "", [])
        for count in range(2, len(parts) + 1):
            if len(found) > 1:
                longer = [one for one in found if list(one[1].parts[-count:]) == parts[-count:]]
                found = longer or found
        if len(found) > 1:
            raise DataError(
                f"{where}: the image {reference!r} could be {found[0][1]} or {found[1][1]}; give each image a name "
                "of its own, or the images of one of the folders"
            )
        if not found:
            hint = meant(parts[-1] if parts else "", self.by_name)
            raise DataError(f"{where}: the image {reference!r} is missing among the {len(self.by_name)} images{hint}")
        return found[0]


class Fields:
    """A mapping out of a JSON file, whose values are taken with a check. DataError names the record."""

    def __init__(self, content: Any, where: str) -> None:
        if not isinstance(content, dict):
            raise DataError(f"{where}: expected a mapping, found {str(content)[:60]}")
        self.content = content
        self.where = where

    def get(self, key: str, kind: type | tuple[type, ...], words: str) -> Any:
        """The value of a key. words: what was expected, for the message."""
        if key not in self.content:
            known = ", ".join(map(str, list(self.content)[:8])) or "nothing"
            raise DataError(f"{self.where}: expected {key!r} ({words}), found only {known}")
        value = self.content[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise DataError(f"{self.where}: {key!r} must be {words}, found {str(value)[:60]}")
        return value

    def text(self, key: str) -> str:
        return str(self.get(key, str, "a text"))

    def items(self, key: str) -> list[Any]:
        return list(self.get(key, list, "a list"))

    def whole(self, key: str) -> int:
        value = self.get(key, (int, float), "a whole number")
        if value != value // 1:
            raise DataError(f"{self.where}: {key!r} must be a whole number, found {value}")
        return int(value)

    def size(self, height: str, width: str) -> tuple[int, int]:
        return self.whole(height), self.whole(width)


def read_annotation(path: Path) -> Any:
    """The content of a JSON file of annotations. DataError for what is none."""
    return read_json(path, "the annotations", LARGEST_JSON)


def content_key(content: Any) -> str:
    """A text that differs where what JSON holds differs."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def file_key(paths: Iterable[Path]) -> str:
    """A text that differs where files are others, or were changed. DataError for a file that is missing."""
    try:
        stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error
    return content_key(stamps)


def collected(make: Callable[[], Record]) -> Item:
    """A record, or the error about it."""
    try:
        return make()
    except DataError as error:
        return error
