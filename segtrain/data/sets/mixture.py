"""Several data sets in one training run, each told in the classes of one of them by a taxonomy."""

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple, get_args, get_origin

from segtrain.config import DATASET_CONFIGS, DatasetConfig, MixtureConfig, option_of
from segtrain.console import say
from segtrain.data.labels import LabelTable
from segtrain.data.sample import Sample
from segtrain.data.taxonomy import RECOMMENDED, MappedTable, describe, taxonomy
from segtrain.errors import UsageError

TURNS = 1000  # positions in which the parts of a mixture have exactly their shares
OWN = ("dataset", "weight", "split", "taxonomy", "column")  # options of a part; all others are those of its data set
WHOLE = ("name", "cache", "cache_dir")  # those are the mixture's


class Part(NamedTuple):
    name: str
    config: DatasetConfig
    weight: float | None
    split: str
    taxonomy: str | None
    column: str


def part(config: MixtureConfig, name: str) -> Part:
    """The options of a part. UsageError naming a key that does not exist."""
    key, value = f"dataset.parts.{name}", config.parts[name]
    if value is not None and not isinstance(value, dict):
        raise UsageError(
            f"{key}={value} is not possible: give options, such as {key}={{weight:1}} and {key}.root=FOLDER"
        )
    given = dict(value or {})
    kind = str(given.get("dataset", name))
    if kind not in DATASET_CONFIGS or kind == "mixture":
        kinds = ", ".join(other for other in DATASET_CONFIGS if other != "mixture")
        raise UsageError(f"{key}: {kind} is no data set: name it so, or set {key}.dataset to one of {kinds}")
    schema = DATASET_CONFIGS[kind]
    known = [field.name for field in fields(schema) if field.name not in WHOLE]
    for option in given:
        if option not in (*OWN, *known):
            near = difflib.get_close_matches(option, [*OWN, *known], 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UsageError(f"there is no option {key}.{option}: {hint}There is {', '.join([*OWN, *known])}")
    options = {"cache_dir": config.cache_dir} | {name: value for name, value in given.items() if name not in OWN}
    for field in fields(schema):
        allowed = get_args(field.type) or (field.type,)
        plain = tuple(get_origin(one) or one for one in allowed)
        if field.name in given and not isinstance(given[field.name], plain):
            raise UsageError(f"{key}.{field.name}={given[field.name]} is not possible: {option_of(field).help}")
    made = schema(name=kind, **options)
    made.check()
    weight = given.get("weight")
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if weight is not None and not (number and 0 <= weight < math.inf):
        raise UsageError(f"{key}.weight={weight} is not possible: give 0 (classes and validation only) or more")
    return Part(name, made, None if weight is None else float(weight), str(given.get("split", made.train_split)),
                given.get("taxonomy"), str(given.get("column", RECOMMENDED)))  # fmt: skip


def parts(config: MixtureConfig) -> list[Part]:
    found = [part(config, name) for name in config.parts]
    weighted = [item.name for item in found if item.weight is not None]
    if weighted and len(weighted) < len(found):
        raise UsageError(f"dataset.parts: only {', '.join(weighted)} has a weight: give all parts one, or none")
    total = sum(item.weight or 0 for item in found)
    if weighted and not total:
        raise UsageError("dataset.parts: all weights are 0: there is nothing to train on")
    for item in found:
        if item.weight and item.weight / total < 1 / TURNS:
            raise UsageError(f"dataset.parts.{item.name}.weight={item.weight} is less than 1 of {TURNS}: give more")
    return found


def target_part(config: MixtureConfig) -> Part:
    if config.target not in config.parts:
        raise UsageError(f"dataset.target={config.target} is none of the parts: there is {', '.join(config.parts)}")
    return part(config, config.target)


class Mixture(NamedTuple):
    """samples: of all parts, one part after the other, each with its table. pictures: which they are, whatever the
    split. weights: size and weight of each part, or None: all pictures in one row. groups: what labels above the
    classes stand for."""

    samples: list[Sample]
    pictures: list[str]
    weights: list[tuple[int, float]] | None = None
    groups: Sequence[tuple[int, ...]] = ()


def mixed(
    config: MixtureConfig, label_table: Callable[[Any], LabelTable], split_samples: Callable[[Any, str], list[Sample]],
    identities: Callable[[Any, list[Sample]], list[str]],
) -> Mixture:  # fmt: skip
    """The training split of the mixture."""
    target = label_table(target_part(config).config)
    samples: list[Sample] = []
    pictures: list[str] = []
    sizes: list[tuple[int, float]] = []
    groups: list[tuple[int, ...]] = []
    found = parts(config)
    for item in found:
        if item.weight == 0:
            continue  # it lends its classes only
        source = label_table(item.config)
        mapping = taxonomy(source, target, item.taxonomy, item.column)
        named = f"{item.taxonomy or 'the same names'}{'' if item.column == RECOMMENDED else f', column {item.column}'}"
        table = MappedTable(source, target, mapping, groups, named)
        own = split_samples(item.config, item.split)
        pictures += identities(item.config, own)
        samples += [sample._replace(name=f"{item.name}/{sample.name}", table=table) for sample in own]
        sizes.append((len(own), item.weight or float(len(own))))
        say(f"part       {item.name} {item.split}: {len(own)} pictures, {describe(mapping, target)} ({named})")
    return Mixture(samples, pictures, None if found[0].weight is None else sizes, groups)
