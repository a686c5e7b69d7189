"""The classes of a network, mapped to those of a dataset: `evaluate taxonomy=vistas_to_cityscapes dataset=kitti`.

taxonomy.py maps labels for training; here the probabilities of a network's classes are added up.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from segtrain.config.user_files import read_yaml
from segtrain.data.labels import LabelTable, default_color, published_table, read_json_table
from segtrain.data.registry import as_published, published_tables
from segtrain.data.taxonomy import PUBLISHED, RECOMMENDED, columns_of, plain_name, taxonomy
from segtrain.errors import DataError, UsageError


class ClassMapping(NamedTuple):
    """Which classes of a network make up each class of `target`.

    sources: for each train id of the target the train ids of the network, whose probabilities are added up; none for a
    class that is never predicted. rest: the train ids of the network without a class in the target. drop: these are
    left out of the arg-max; else they compete as one class, whose pixels are void. names: the network's classes.
    title: the taxonomy as typed. sha256: of the user's file, "" for a published taxonomy.
    """

    target: LabelTable
    names: list[str]
    sources: tuple[tuple[int, ...], ...]
    rest: tuple[int, ...]
    drop: bool
    title: str
    sha256: str = ""

    @property
    def has_void(self) -> bool:
        """Whether pixels can be predicted as void."""
        return bool(self.rest) and not self.drop

    @property
    def never(self) -> list[str]:
        """The classes of the target that are never predicted."""
        return [name for name, some in zip(self.target.names, self.sources, strict=True) if not some]

    def lines(self) -> list[str]:
        """What is printed before the first prediction."""
        reached = sum(bool(some) for some in self.sources)
        lines = [
            f"taxonomy    {self.title}: {len(self.names) - len(self.rest)} of the network's {len(self.names)} classes "
            f"added up to {reached} of the {len(self.sources)} classes of {self.target.source}"
        ]
        if self.rest:
            fate = "left out of the arg-max" if self.drop else "predicted as void, which counts as a miss"
            listed = shortened([plain_name(self.names[train_id]) for train_id in self.rest])
            choice = "drop" if self.drop else "void"
            lines.append(f"taxonomy    {len(self.rest)} have no counterpart: {fate} (taxonomy_rest={choice}): {listed}")
        if self.never:
            lines.append(f"taxonomy    never predicted, as no class leads to them: {', '.join(self.never)}")
        return lines

    def card(self) -> dict[str, Any]:
        """The entry of the protocol in evaluation.json."""
        return {
            "name": self.title,
            "sha256": self.sha256 or None,
            "rest": "drop" if self.drop else "void",
            "how": "the probabilities of the network's classes are added up before the arg-max",
            "sources": {
                name: [self.names[train_id] for train_id in some]
                for name, some in zip(self.target.names, self.sources, strict=True)
            },
            "without_counterpart": [self.names[train_id] for train_id in self.rest],
        }


def shortened(names: list[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def class_mapping(network: LabelTable, target: LabelTable | None, name: str, rest: str) -> ClassMapping | None:
    """The mapping that the options taxonomy and taxonomy_rest ask for; None for taxonomy=none.

    name: a published taxonomy, also as NAME:COLUMN, or a YAML file. target: None for the classes that the taxonomy
    itself leads to. rest: void or drop. UsageError or DataError if it does not fit, or maps a class to several.
    """
    if name == "none":
        return None
    source = as_published(network)
    published, _, column = name.partition(":")
    sha256 = ""
    if published in PUBLISHED:
        target = target or published_table(read_json_table(published)["target"])
        found = taxonomy(source, target, published, column or RECOMMENDED)
    else:
        path = Path(name).expanduser()
        if target is None and path.is_file():
            target = table_named_by(path)
        found = taxonomy(source, target or source, name, RECOMMENDED)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert target is not None
    several = [one for one in source.names if len(found.get(one, ())) > 1]
    if several:
        raise DataError(
            f"{name} maps {shortened(several)} to several classes, which is for training only: a prediction needs one "
            "class, or null"
        )
    goals = [found.get(one, ()) for one in source.names]
    sources = tuple(
        tuple(index for index, goal in enumerate(goals) if goal == (train_id,))
        for train_id in range(target.num_classes)
    )
    if not any(sources):
        raise DataError(f"{name} maps no class of {source.source} to a class of {target.source}: nothing is predicted")
    without = tuple(index for index, goal in enumerate(goals) if not goal)
    return ClassMapping(target, source.names, sources, without, rest == "drop", name, sha256)


def table_named_by(path: Path) -> LabelTable:
    """The classes that a user's taxonomy leads to: those of the first published table with all of these names, else
    the names themselves in the order of the file, with the ids 0, 1, 2, ..."""
    content: Any = read_yaml(path, "the taxonomy")
    values = list(content.values()) if isinstance(content, dict) else []
    listed = [one for value in values for one in (value if isinstance(value, list) else [value])]
    names = list(dict.fromkeys(str(one) for one in listed if one is not None))
    for table in map(published_table, published_tables()):
        if names and set(names) <= set(table.names):
            return table
    rows = [{"id": i, "name": one, "color": default_color(i), "train_id": i} for i, one in enumerate(names)]
    return LabelTable(rows, f"the names in {path}")


def fitting(network: LabelTable, target: LabelTable) -> list[str]:
    """The published taxonomies from a network's classes to the target's, as values of taxonomy=."""
    found = []
    for name in PUBLISHED:
        content = read_json_table(name)
        names = published_table(content["target"]).names
        if published_table(content["source"]).names == network.names and set(names) <= set(target.names):
            first, *others = columns_of(content)
            found += [name, *(f"{name}:{column}" for column in others)]
    return found


def require_same_labels(
    network: LabelTable, data: LabelTable, path: Path, dataset: str, has_taxonomy: bool = True
) -> None:
    """UsageError unless the network in the file `path` has the classes of the dataset. It lists the taxonomies that
    fit, if the command takes one."""
    if network.names == data.names:
        return
    theirs, ours = (
        ", ".join([*names[:4], *(["..."] if len(names) > 4 else [])]) for names in (network.names, data.names)
    )
    found = (
        f"{path} predicts {network.num_classes} classes ({theirs}), dataset={dataset} has {data.num_classes} ({ours}): "
        "take a dataset with the same classes"
    )
    if sorted(network.names) == sorted(data.names):
        number = next(i for i, (one, other) in enumerate(zip(network.names, data.names, strict=True)) if one != other)
        found = (
            f"{path} predicts the classes of dataset={dataset} in another order (the first that differs, counted from "
            f"0, is {number}: {network.names[number]} there, {data.names[number]} here): take a class table in the "
            "network's order"
        )
    if not has_taxonomy:
        raise UsageError(f"{found}, or score the checkpoint itself, with taxonomy=")
    choices = fitting(network, data)
    remedy = "\nadd one of these, which add up the probabilities of its classes:" if choices else ""
    remedy += "".join(f"\n  taxonomy={choice}" for choice in choices)
    own = "taxonomy=FILE, a YAML file with a line `class of the network: class of the dataset` (or null) for each class"
    raise UsageError(f"{found}, or a taxonomy{remedy or ' (none of the published ones fits)'}\n  {own}")
