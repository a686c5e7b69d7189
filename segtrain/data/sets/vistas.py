"""Mapillary Vistas v1.2 (66 labels, 65 of them evaluated) and v2.0 (124, 116 of them)."""

from pathlib import Path
from typing import Any

import numpy as np

from segtrain.config import IGNORE_INDEX, VistasConfig
from segtrain.config.user_files import read_json
from segtrain.data.labels import LabelTable, published_table, read_json_table
from segtrain.data.rules import VISTAS
from segtrain.data.sample import DatasetSpec, SplitFiles, Submission, by_stem, expect_folder, expect_split
from segtrain.data.verify.label_mistakes import Expected, Finding
from segtrain.errors import DataError

TREE = """{root}/config.json, {{training,validation,testing}}/{{images,labels,instances}}/<22 characters>.jpg or .png
or, in the zip of v2.0 (which holds v1.2 too):
{root}/config_v2.0.json, config_v1.2.json, {{training,validation}}/{{images,v1.2/labels,v2.0/labels}}/...
Get the zip from https://www.mapillary.com/dataset/vistas (registration) and unpack it there."""
SPLITS = {"train": "training", "val": "validation", "test": "testing"}
PUBLISHED = {"train": 18000, "val": 2000, "test": 5000}


def table(config: VistasConfig) -> LabelTable:
    """In the order of the folder's own configuration, which is checked against the published one."""
    published = {row["name"]: row for row in published_table(f"vistas_{config.version}", "vistas").rows}
    root = config.folder()
    expect_folder(root, "Vistas", TREE)
    path = next((root / n for n in (f"config_{config.version}.json", "config.json") if (root / n).is_file()), None)
    if path is None:
        raise DataError(f"{root} holds neither config_{config.version}.json nor config.json, which come with the data")
    labels = read_config(path)
    names = [str(label["name"]) for label in labels]
    if set(names) != set(published):
        other = {"v1.2": "v2.0", "v2.0": "v1.2"}[config.version]
        if set(names) == {row["name"] for row in read_json_table(f"vistas_{other}")}:
            raise DataError(
                f"{path} lists the {len(names)} labels of Vistas {other}, but dataset.version={config.version} "
                f"({len(published)} labels): set dataset.version={other}"
            )
        strange = sorted(set(names) ^ set(published))
        raise DataError(
            f"{path} lists {len(names)} labels, Vistas {config.version} has {len(published)}; they differ in "
            f"{', '.join(strange[:4])}: take the configuration that came with the data"
        )
    rows, train_id = [], 0
    for number, label in enumerate(labels):
        evaluated = bool(label["evaluate"])
        facts = {"id": number, "color": label["color"], "has_instances": bool(label["instances"])}
        rows.append(dict(published[label["name"]]) | facts | {"train_id": train_id if evaluated else IGNORE_INDEX})
        train_id += evaluated
    return LabelTable(rows, str(path))


def read_config(path: Path) -> list[dict[str, Any]]:
    try:
        labels: list[dict[str, Any]] = read_json(path)["labels"]
        for label in labels:
            _ = label["name"], label["evaluate"], label["instances"], label["color"]
    except (DataError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not the configuration of Mapillary Vistas ({error}): unpack the zip again"
        ) from error
    return labels


def files(config: VistasConfig, split: str) -> SplitFiles:
    root = config.folder()
    expect_folder(root, "Vistas", TREE)
    expect_split(split, SPLITS, root)
    folder = root / SPLITS[split]
    images = by_stem(folder / "images", "*.jpg")
    if split == "test":
        return SplitFiles(images, None)
    inner = folder / config.version if (folder / config.version).is_dir() else folder
    return SplitFiles(images, by_stem(inner / "labels", "*.png"), by_stem(inner / "instances", "*.png"))


def labels_of_v2(histogram: np.ndarray, table: LabelTable) -> Finding | None:
    """Label images of v2.0 that are read with the table of v1.2."""
    highest = int(np.flatnonzero(histogram).max())
    if len(table.rows) != 66 or not 66 <= highest <= 123:
        return None
    return Finding(
        "error", "Vistas v2.0",
        f"the label images hold ids up to {highest}: these are labels of Vistas v2.0 (0 to 123), read with the table "
        "of v1.2 (0 to 65): set dataset.version=v2.0, or take the images from v1.2/labels",
    )  # fmt: skip


DATASET = DatasetSpec(
    table, files, VISTAS, PUBLISHED, family="vistas", options=VistasConfig, tables=("vistas_v1.2", "vistas_v2.0"),
    expected=Expected(("construction--flat--road", "nature--sky"), labels_of_v2),
    submission=Submission("the Vistas challenge's page on CodaLab"), licence="CC BY-NC-SA 4.0 (v2.0)",
    image_size=(3024, 4032),
)  # fmt: skip
