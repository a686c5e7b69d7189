"""Mappings from the labels of one dataset to the classes of another: to one class, to any of several, or to none."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from segtrain.config import IGNORE_INDEX
from segtrain.config.user_files import read_yaml
from segtrain.data.labels import UNKNOWN, LabelTable, json_tables, published_table, read_json_table
from segtrain.errors import DataError, UsageError, meant

PUBLISHED = tuple(sorted(name for name in json_tables() if "_to_" in name))  # each table names its source and target
RECOMMENDED = "recommended"


class MappedTable(LabelTable):
    """The label images of `source`, mapped to the classes of `target`.

    A label that may be any of several classes becomes num_classes + g, where groups[g] are their train ids; its loss is
    that of the sum of their probabilities. Labels without a class in the target are ignored.
    """

    def __init__(
        self, source: LabelTable, target: LabelTable, mapping: Mapping[str, tuple[int, ...]],
        groups: list[tuple[int, ...]], where: str,
    ) -> None:  # fmt: skip
        """mapping: name of a label of the source -> train ids of the target; new groups are appended to `groups`."""
        super().__init__(target.rows, f"{source.source}, mapped by {where}")
        self.stored = source.stored
        names = {int(row["id"]): str(row["name"]) for row in source.rows}
        void = target.void_id
        known = source.known
        self._ids[:] = void
        for value, label in source.stored.items():
            to = mapping.get(names[label], ())
            if len(to) > 1 and to not in groups:
                groups.append(to)
            code = IGNORE_INDEX if not to else to[0] if len(to) == 1 else self.num_classes + groups.index(to)
            self._train_ids[value] = code
            self._ids[value] = target.ids[to[0]] if len(to) == 1 else void
        self._train_ids[~known] = UNKNOWN
        if self.num_classes + len(groups) > UNKNOWN:
            raise UsageError(f"{where}: {self.num_classes} classes and {len(groups)} groups of them are more than 254")


def taxonomy(source: LabelTable, target: LabelTable, name: str | None, column: str) -> dict[str, tuple[int, ...]]:
    """Name of a label of the source -> train ids of the target it may be.

    name: a published one, a YAML file of the user, or None if both have the same classes.
    """
    if name is None:
        return same_names(source, target)
    if name in PUBLISHED:
        return published_mapping(name, column, source, target)
    path = Path(name).expanduser()
    if not path.is_file():
        raise UsageError(
            f"taxonomy {name}: neither published ({', '.join(PUBLISHED)}) nor a file{meant(name, PUBLISHED)}"
        )
    return read_taxonomy(path, source, target)


def same_names(source: LabelTable, target: LabelTable) -> dict[str, tuple[int, ...]]:
    missing = [name for name in source.names if name not in target.names]
    if missing:
        raise UsageError(
            f"the classes {', '.join(missing[:4])} of {source.source} are not in {target.source}: set taxonomy to a "
            f"published one ({', '.join(PUBLISHED)}) or to a YAML file that maps them"
        )
    return {name: (target.names.index(name),) for name in source.names}


def published_mapping(name: str, column: str, source: LabelTable, target: LabelTable) -> dict[str, tuple[int, ...]]:
    """The recommended column, or another one, whose author the table's note names. By names, so that the target may
    have the classes in another order, and more of them."""
    content = read_json_table(name)
    rows = content["mapping"]
    if column not in columns_of(content):
        raise UsageError(f"column={column} is not in {name}: choose {', '.join(columns_of(content))}")
    own = [str(row["name"]) for row in source.rows]
    if set(own) != {row["name"] for row in rows}:
        raise UsageError(
            f"taxonomy {name} maps the {len(rows)} labels of {content['source']}, but {source.source} has {len(own)} "
            f"({own[0]}, ...): it does not fit this dataset or its version"
        )
    classes = published_table(content["target"]).names
    missing = [one for one in classes if one not in target.names]
    if missing:
        raise UsageError(
            f"taxonomy {name} maps to the classes of {content['target']}, but {target.source} has no "
            f"{', '.join(missing[:3])}: choose a dataset with these classes, or give a YAML file that maps to its own"
        )
    found: dict[str, tuple[int, ...]] = {}
    for row in rows:
        train_id = row["train_id"] if column == RECOMMENDED else row["sources"][column]
        found[row["name"]] = () if train_id in (None, IGNORE_INDEX) else (target.names.index(classes[train_id]),)
    return found


def plain_name(name: str) -> str:
    """Last part of a name, lower case, with spaces: `construction--flat--road` and `Road` are the same class."""
    return name.rpartition("--")[2].replace("-", " ").replace("_", " ").lower()


def columns_of(content: Mapping[str, Any]) -> list[str]:
    """The columns of a published taxonomy, the recommended one first."""
    return [RECOMMENDED, *content["mapping"][0].get("sources", {})]


def published_between(source: LabelTable, target: LabelTable) -> str | None:
    """The name of the published taxonomy from the classes of `source` to those of `target`, which may have more."""
    for name in PUBLISHED:
        content = read_json_table(name)
        if (
            published_table(content["source"]).names == source.names
            and set(published_table(content["target"]).names) <= set(target.names)
        ):  # fmt: skip
            return name
    return None


def read_taxonomy(path: Path, source: LabelTable, target: LabelTable) -> dict[str, tuple[int, ...]]:
    """A YAML mapping: name in the source -> name in the target, a list of names (any of them), or null (unknown).

    DataError unless every class of the source is there, once, and every name is known.
    """
    content: Any = read_yaml(path, "the taxonomy")
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path}: expected lines `name in the source: name in the target` (or a list, or null)")
    sources = [str(row["name"]) for row in source.rows]
    found: dict[str, tuple[int, ...]] = {}
    for name, to in content.items():
        expect_name(str(name), sources, path, source.source)
        wanted = [] if to is None else to if isinstance(to, list) else [to]
        for one in wanted:
            expect_name(str(one), target.names, path, target.source)
        found[str(name)] = tuple(sorted({target.names.index(str(one)) for one in wanted}))
    missing = [name for name in source.names if name not in found]
    if missing:
        raise DataError(f"{path} does not map {', '.join(missing[:5])} of {source.source}; null ignores a class")
    return found


def expect_name(name: str, known: list[str], path: Path, where: str) -> None:
    if name not in known:
        raise DataError(f"{path}: {name!r} is not in {where}{meant(name, known)}")


def describe_mapping(mapping: Mapping[str, tuple[int, ...]], target: LabelTable) -> str:
    """How many labels are mapped, and to how many classes."""
    sizes = np.array([len(to) for to in mapping.values()])
    reached = {train_id for to in mapping.values() for train_id in to}
    text = (
        f"{(sizes == 1).sum()} labels to {len(reached)} of {target.num_classes} classes, {(sizes == 0).sum()} ignored"
    )
    several = int((sizes > 1).sum())
    return f"{text}, {several} to several" if several else text
