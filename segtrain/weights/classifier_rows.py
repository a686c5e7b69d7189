"""Rows of a classifier for other classes than the file's: mapped by a taxonomy or by equal names."""

from collections.abc import Mapping

import torch
from torch import Tensor

from segtrain.data.labels import LabelTable
from segtrain.data.registry import as_published
from segtrain.data.taxonomy import plain_name, published_between, taxonomy
from segtrain.weights.files import WeightsFile


def same_classes(source: WeightsFile, theirs: Tensor, own: Tensor, table: LabelTable | None) -> bool:
    """Whether the file's classifier can be copied as it is; without a table, whether its shape is the same."""
    if theirs.shape != own.shape:
        return False
    if table is None:
        return True
    return source.classes is not None and source.classes.names == table.names


def copy_mapped_rows(
    rows: Mapping[str, Tensor], own: Mapping[str, Tensor], classes: LabelTable | None, table: LabelTable | None,
    classifier: str, mapping: str | None, column: str,
) -> list[str]:  # fmt: skip
    """Copy into each class of `table` the rows of the file's classes that map to it. Returns a line for the report.

    If several map to it, the one of the same name is taken, else their mean.
    """
    count, theirs = len(own[f"{classifier}weight"]), len(rows[f"{classifier}weight"])
    if classes is None or table is None:
        return [
            f"the classifier's {count} rows start anew: the classes of the file's {theirs} rows are not known "
            "(`segtrain convert classes=` writes them into a file)"
        ]
    train_ids = map_classes(classes, table, mapping, column)
    taken: list[str] = []
    means: list[str] = []
    anew: list[str] = []
    with torch.no_grad():
        for train_id, name in enumerate(table.names):
            sources = [i for i, own_name in enumerate(classes.names) if train_ids.get(own_name) == (train_id,)]
            equal = [i for i in sources if plain_name(classes.names[i]) == plain_name(name)]
            chosen = equal[:1] or sources
            for key, value in rows.items():
                if chosen and key in own:
                    own[key][train_id] = value[chosen].mean(0)
            (taken if len(chosen) == 1 else means if chosen else anew).append(name)
    line = f"{theirs} classes in the file, {count} here: {len(taken)} rows of the classifier taken"
    if means:
        line += f", {len(means)} the mean of several ({', '.join(means)})"
    if anew:
        line += f", {len(anew)} start anew ({', '.join(anew[:8])}{', ...' if len(anew) > 8 else ''})"
    return [line]


def map_classes(
    classes: LabelTable, table: LabelTable, mapping: str | None, column: str
) -> Mapping[str, tuple[int, ...]]:
    """Name of a class of the file -> train ids in `table`."""
    source = as_published(classes)
    mapping = mapping or published_between(source, table)
    if mapping is not None:
        return taxonomy(source, table, mapping, column)
    ours = {plain_name(name): train_id for train_id, name in enumerate(table.names)}
    return {name: (ours[plain_name(name)],) for name in source.names if plain_name(name) in ours}
