"""Label tables: which value in a label image means which class, and its colour.

Two numberings, never mixed: `id` is what a dataset's label images hold; `train_id` (0 .. num_classes - 1) is what the
network predicts. IGNORE_INDEX marks pixels that neither train nor score.
"""

import json
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from segtrain.config import IGNORE_INDEX
from segtrain.config.user_files import read_csv, read_yaml
from segtrain.data.formats.colors import read_labelmap, with_colors
from segtrain.errors import DataError

UNKNOWN = 254  # marks ids that are not in the table while encoding; so a table has at most 254 classes


class LabelTable:
    """The classes of a dataset.

    names[train_id], colors[train_id] (uint8 (C, 3) RGB) and ids[train_id] (uint8 (C,)) describe the classes (of a class
    with several ids its first row); ignored_ids are the further ids that a label image may hold.
    rows: one dict for each id, as in the tables: category, has_instances, avg_instance_size and kind where known.
    class_rows: train id -> the first row of the class, in the order of the rows; its name, colour and category are the
    class's.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], source: str, stored: Mapping[int, int] | None = None) -> None:
        """rows: dicts with id, name, color [r,g,b] and train_id (IGNORE_INDEX for ignored ones); source: for messages.

        stored: value in the label images -> id, if that is not the id itself.
        """
        self.rows = [row for row in rows if 0 <= row["id"] <= 255]
        self.class_rows: dict[int, Mapping[str, Any]] = {}
        for row in self.rows:
            if row["train_id"] != IGNORE_INDEX:
                self.class_rows.setdefault(row["train_id"], row)
        classes = [self.class_rows[train_id] for train_id in sorted(self.class_rows)]
        self.source = source
        self.names = [str(row["name"]) for row in classes]
        self.colors = np.array([row["color"] for row in classes], np.uint8).reshape(-1, 3)
        self.ids = np.array([row["id"] for row in classes], np.uint8)
        self.ignored_ids = sorted({int(row["id"]) for row in self.rows if row["train_id"] == IGNORE_INDEX})
        by_id = {row["id"]: row["train_id"] for row in self.rows}
        self.stored = dict(stored) if stored is not None else {label: label for label in by_id}
        self._train_ids = np.full(256, UNKNOWN, np.uint8)
        self._ids = np.zeros(256, np.uint8)
        for value, label in self.stored.items():
            self._train_ids[value] = by_id[label]
            self._ids[value] = label

    @property
    def num_classes(self) -> int:
        return len(self.names)

    @property
    def void_id(self) -> int:
        """The id of a pixel that is none of the classes: the first ignored one, or 255 if there is none."""
        return next(iter(self.ignored_ids), 255)

    def encode(self, stored: np.ndarray, path: Path) -> np.ndarray:
        """A label image uint8 (H, W) -> train ids uint8 (H, W). DataError naming file and unknown ids."""
        train_ids = cv2.LUT(stored, self._train_ids)
        if (train_ids == UNKNOWN).any():
            raise self.unknown_ids(np.bincount(stored.ravel(), minlength=256), path)
        return train_ids

    def unknown_ids(self, counts: np.ndarray, path: Path) -> DataError:
        """The error about a label image with ids that are not in the table. counts: int64 (256,), pixels by value."""
        values = np.flatnonzero((counts > 0) & ~self.known)
        listed = [f"{value} ({counts[value]} pixel{'s' if counts[value] > 1 else ''})" for value in values[:5]]
        listed += ["..."] if len(values) > 5 else []
        which = f"label ids {', '.join(listed)} are" if len(values) > 1 else f"label id {listed[0]} is"
        return DataError(
            f"{path}: {which} not in {self.source}, which has {ranges(np.flatnonzero(self.known))}; "
            "correct the image, or add the id to the table (as ignored if it means nothing)"
        )

    def encode_values(self, stored: np.ndarray) -> np.ndarray:
        """As `encode`, but unknown ids become IGNORE_INDEX."""
        lut = np.where(self._train_ids == UNKNOWN, np.uint8(IGNORE_INDEX), self._train_ids)
        return np.asarray(cv2.LUT(stored, lut)).reshape(stored.shape)

    def stored_value(self, name: str) -> int:
        """The value in label images of a class or an ignored label."""
        wanted = next(int(row["id"]) for row in self.rows if row["name"] == name)
        return next(value for value, label in self.stored.items() if label == wanted)

    def to_ids(self, stored: np.ndarray) -> np.ndarray:
        """A label image uint8 (H, W) -> ids uint8 (H, W)."""
        return np.asarray(cv2.LUT(stored, self._ids))

    def decode(self, train_ids: np.ndarray) -> np.ndarray:
        """train ids uint8 (H, W), below num_classes or IGNORE_INDEX, which becomes `void_id` -> ids uint8 (H, W)."""
        lut = np.full(256, self.void_id, np.uint8)
        lut[: self.num_classes] = self.ids
        return np.asarray(cv2.LUT(train_ids, lut))

    def colorize(self, train_ids: np.ndarray) -> np.ndarray:
        """train ids uint8 (H, W) -> RGB uint8 (H, W, 3); ignored pixels black."""
        lut = np.zeros((256, 3), np.uint8)
        lut[: self.num_classes] = self.colors
        return lut[train_ids]

    @property
    def known(self) -> np.ndarray:
        """bool (256,): the values that a label image may hold."""
        return self._train_ids != UNKNOWN

    def as_dict(self) -> dict[str, Any]:
        """Plain lists, for a checkpoint; `from_dict` reads them."""
        return {
            "names": self.names,
            "ids": self.ids.tolist(),
            "colors": self.colors.tolist(),
            "ignored_ids": self.ignored_ids,
            "source": self.source,
        }

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> "LabelTable":
        columns = zip(table["names"], table["ids"], table["colors"], strict=True)
        rows = [{"name": n, "id": i, "color": c, "train_id": t} for t, (n, i, c) in enumerate(columns)]
        rows += [
            {"name": "ignored", "id": i, "color": [0, 0, 0], "train_id": IGNORE_INDEX} for i in table["ignored_ids"]
        ]
        return cls(rows, table["source"])


def ranges(ids: np.ndarray) -> str:
    """'0 to 5, 7' for [0, 1, 2, 3, 4, 5, 7]."""
    runs = np.split(ids, np.flatnonzero(np.diff(ids) > 1) + 1)
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs if len(run))


def published_table(name: str, sizes: str | None = None) -> LabelTable:
    """A table of the package, by the name of its file in segtrain/data/tables.

    sizes: name of the average object sizes in instance_sizes.json that its rows get.
    """
    rows = read_json_table(name)
    if sizes is not None:
        average = read_json_table("instance_sizes")[sizes]
        rows = [row | {"avg_instance_size": average.get(row["name"])} for row in rows]
    return LabelTable(rows, f"the {name} label table")


def json_tables() -> list[str]:
    """The names of all files in segtrain/data/tables."""
    files = resources.files("segtrain.data").joinpath("tables").iterdir()
    return [file.name.removesuffix(".json") for file in files if file.name.endswith(".json")]


def read_json_table(name: str) -> Any:
    """The content of segtrain/data/tables/<name>.json."""
    return json.loads(resources.files("segtrain.data").joinpath(f"tables/{name}.json").read_text())


def read_user_table(path: Path) -> LabelTable:
    """Classes from a CSV with a header or a YAML list: id, name, and optionally color and ignore; or a labelmap.txt.

    color is `#rrggbb` or three numbers (CSV: `128 64 0`); a CSV may have the columns r, g and b instead, and then no
    ids; labelmap.txt is CVAT's. ignore is true/false. Train ids follow the order of the rows. DataError for anything
    else, naming the row.
    """
    if path.suffix.lower() in (".yaml", ".yml"):
        raw = read_yaml(path, "the class table")
        if isinstance(raw, dict):
            raw = raw.get("classes")
        if not isinstance(raw, list):
            raise DataError(f"{path}: expected a list of classes, each with id and name")
    elif path.suffix.lower() == ".txt":
        raw = read_labelmap(path)
    else:
        raw = with_colors([row for _, row in read_csv(path, "the class table")])
    rows: list[dict[str, Any]] = []
    for number, row in enumerate(raw, 1):
        rows.append(_user_row(row, f"{path}, class {number}", len([r for r in rows if r["train_id"] != IGNORE_INDEX])))
    names = [row["name"] for row in rows if row["train_id"] != IGNORE_INDEX]
    for what, values in (("id", [row["id"] for row in rows]), ("name", names)):
        twice = sorted({str(value) for value in values if values.count(value) > 1})
        if twice:
            raise DataError(f"{path}: {what} {', '.join(twice)} occurs twice; each {what} may occur once only")
    if not 2 <= len(names) < UNKNOWN:
        raise DataError(f"{path}: found {len(names)} classes that are not ignored; between 2 and {UNKNOWN - 1} work"
                        ", as ids have 8 bits"
                        + (", the background among them" if len(names) < 2 else ""))  # fmt: skip
    return LabelTable(rows, str(path))


def _user_row(row: Any, where: str, train_id: int) -> dict[str, Any]:
    known = ("id", "name", "color", "ignore")
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected the columns {', '.join(known)}, found {row}")
    strays = sorted(set(row) - set(known))
    if strays or not {"id", "name"} <= set(row):
        raise DataError(
            f"{where}: expected the columns {', '.join(known)} (id and name at least), found {', '.join(row)}"
        )
    text = str(row["id"]).strip()
    label = int(text) if re.fullmatch(r"\+?[0-9]{1,9}", text) else -1
    if not 0 <= label <= 255:
        raise DataError(f"{where}: id must be a whole number from 0 to 255, found {row['id']!r}")
    ignore = str(row.get("ignore") or "false").strip().lower()
    if ignore not in ("true", "false", "yes", "no", "1", "0"):
        raise DataError(f"{where}: ignore must be true or false, found {row['ignore']!r}")
    if not isinstance(row["name"], str | int | float) or not str(row["name"]).strip():
        raise DataError(f"{where}: the name is empty")
    ignored = ignore in ("true", "yes", "1")
    color = _color(row.get("color"), where) or default_color(label)
    name = str(row["name"]).strip()
    return {"id": label, "name": name, "color": color, "train_id": IGNORE_INDEX if ignored else train_id}


def _color(value: Any, where: str) -> list[int] | None:
    if value is None or value == "":
        return None
    try:
        if isinstance(value, str):
            hexadecimal = value.strip().startswith("#")
            text = value.strip()
            parts = (
                list(bytes.fromhex(text[1:]))
                if hexadecimal
                else [int(v) for v in text.strip("[]").replace(",", " ").split()]
            )
        else:
            parts = [int(v) for v in value]
    except (TypeError, ValueError):
        parts = []
    if len(parts) != 3 or not all(0 <= part <= 255 for part in parts):
        raise DataError(f"{where}: color must be #rrggbb or three numbers from 0 to 255, found {value!r}")
    return parts


def default_color(label: int) -> list[int]:
    """Distinct colours by bit reversal, as VOC's colour map does it; id 0 is not left black."""
    index, color = label + 1, [0, 0, 0]
    for shift in range(7, -1, -1):
        for channel in range(3):
            color[channel] |= (index >> channel & 1) << shift
        index >>= 3
    return color
