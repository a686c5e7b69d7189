"""Several datasets in one training run, each mapped to the classes of one of them by a taxonomy."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple, get_args, get_origin

from segtrain.config import DATASET_CONFIGS, DatasetConfig, MixtureConfig, channels_of, option_of, require
from segtrain.console import say
from segtrain.data.labels import LabelTable
from segtrain.data.order import TURNS
from segtrain.data.sample import Sample
from segtrain.data.taxonomy import RECOMMENDED, MappedTable, describe_mapping, taxonomy
from segtrain.errors import UsageError, with_available

OWN = ("dataset", "weight", "split", "taxonomy", "column")  # options of a part; all others are those of its dataset
WHOLE = ("name", "cache", "cache_dir")  # these are the mixture's


class Part(NamedTuple):
    name: str
    config: DatasetConfig
    weight: float | None
    split: str
    taxonomy: str | None
    column: str
    is_target: bool  # its val_split is used for validation


def part(config: MixtureConfig, name: str) -> Part:
    """The options of a part. UsageError naming a key that does not exist."""
    key, value = f"dataset.parts.{name}", config.parts[name]
    if value is not None and not isinstance(value, dict):
        raise UsageError(
            f"{key}={value} is not possible: give options, such as {key}={{weight:1}} and {key}.root=FOLDER"
        )
    options = dict(value or {})
    kind = str(options.get("dataset", name))
    if kind not in DATASET_CONFIGS or issubclass(DATASET_CONFIGS[kind], MixtureConfig):
        kinds = ", ".join(other for other in DATASET_CONFIGS if other != config.name)
        raise UsageError(f"{key}: {kind} is not a dataset: name it so, or set {key}.dataset to one of {kinds}")
    dataset = part_dataset(key, kind, {"cache_dir": config.cache_dir}, options)
    weight = options.get("weight")
    check_weight(key, weight)
    return Part(
        name, dataset, None if weight is None else float(weight), str(options.get("split", dataset.train_split)),
        options.get("taxonomy"), str(options.get("column", RECOMMENDED)), name == config.target,
    )  # fmt: skip


def part_dataset(key: str, kind: str, defaults: dict[str, Any], options: dict[str, Any]) -> DatasetConfig:
    """The options of a part's dataset, checked as those of dataset=<kind>."""
    schema = DATASET_CONFIGS[kind]
    known = [field.name for field in fields(schema) if field.name not in WHOLE]
    for option in options:
        if option not in (*OWN, *known):
            raise UsageError(f"there is no option {key}.{option}{with_available(option, [*OWN, *known])}")
    for field in fields(schema):
        allowed = get_args(field.type) or (field.type,)
        plain = tuple(get_origin(one) or one for one in allowed)
        if field.name in options and not isinstance(options[field.name], plain):
            raise UsageError(f"{key}.{field.name}={options[field.name]} is not possible: {option_of(field).help}")
    dataset = schema(name=kind, **defaults | {name: value for name, value in options.items() if name not in OWN})
    dataset.check()
    return dataset


def check_weight(key: str, weight: Any) -> None:
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if weight is not None and not (number and 0 <= weight < math.inf):
        raise UsageError(f"{key}.weight={weight} is not possible: give 0 (classes and validation only) or more")


def parts(config: MixtureConfig) -> list[Part]:
    every = [part(config, name) for name in config.parts]
    for item in every:
        require(
            len(channels_of(item.config) or "rgb") == 3, f"dataset.parts.{item.name}.channels",
            channels_of(item.config), "the parts of a mixture have 3 channels; name three bands, or leave it out",
        )  # fmt: skip
    weighted = [item.name for item in every if item.weight is not None]
    if weighted and len(weighted) < len(every):
        raise UsageError(f"dataset.parts: only {', '.join(weighted)} has a weight: give all parts one, or none")
    total = sum(item.weight or 0 for item in every)
    if weighted and not total:
        raise UsageError("dataset.parts: all weights are 0: there is nothing to train on")
    for item in every:
        if item.weight and item.weight / total < 1 / TURNS:
            raise UsageError(f"dataset.parts.{item.name}.weight={item.weight} is less than 1 of {TURNS}: give more")
    return every


def target_part(config: MixtureConfig) -> Part:
    if config.target not in config.parts:
        raise UsageError(f"dataset.target={config.target} is none of the parts: there is {', '.join(config.parts)}")
    return part(config, config.target)


class Mixture(NamedTuple):
    """samples: of all parts, one part after the other, each with its table. identities: which images these are, the
    same in any split. weights: size and weight of each part, or None: all samples are shuffled together. groups: the
    train ids that labels above the classes stand for. parts: dataset and samples of each part, without the mapping.
    """

    samples: list[Sample]
    identities: list[str]
    weights: list[tuple[int, float]] | None = None
    groups: Sequence[tuple[int, ...]] = ()
    parts: Sequence[tuple[DatasetConfig, list[Sample]]] = ()

    def first(self, count: int) -> "Mixture":
        """Its first samples, in one row."""
        return self._replace(samples=self.samples[:count], identities=self.identities[:count], weights=None)


def mixed(
    config: MixtureConfig, label_table: Callable[[Any], LabelTable], split_samples: Callable[[Any, str], list[Sample]],
    identities: Callable[[Any, list[Sample]], list[str]],
) -> Mixture:  # fmt: skip
    """The training split of the mixture."""
    target = label_table(target_part(config).config)
    samples: list[Sample] = []
    names: list[str] = []
    sizes: list[tuple[int, float]] = []
    groups: list[tuple[int, ...]] = []
    every = parts(config)
    apart: list[tuple[DatasetConfig, list[Sample]]] = []
    for item in every:
        if item.weight == 0:
            continue  # it only defines the classes
        source = label_table(item.config)
        mapping = taxonomy(source, target, item.taxonomy, item.column)
        named = f"{item.taxonomy or 'the same names'}{'' if item.column == RECOMMENDED else f', column {item.column}'}"
        table = MappedTable(source, target, mapping, groups, named)
        own = split_samples(item.config, item.split)
        names += identities(item.config, own)
        apart.append((item.config, own))
        samples += [sample._replace(name=f"{item.name}/{sample.name}", table=table) for sample in own]
        sizes.append((len(own), item.weight or float(len(own))))
        say(f"part       {item.name} {item.split}: {len(own)} images, {describe_mapping(mapping, target)} ({named})")
    return Mixture(samples, names, None if every[0].weight is None else sizes, groups, apart)


def dataset_names(stored: Mapping[str, Any]) -> list[str]:
    """The names of the datasets behind stored options: one, or those of a mixture's parts."""
    if stored["name"] != "mixture":
        return [stored["name"]]
    return [options.get("dataset", name) for name, options in stored["parts"].items() if options.get("weight") != 0]
