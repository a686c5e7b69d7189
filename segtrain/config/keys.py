"""The options of a command by their keys, "optimizer.lr"."""

from collections.abc import Iterator, Sequence
from dataclasses import Field, fields, is_dataclass
from typing import Any

from segtrain.config.commands import TrainConfig
from segtrain.config.dataset import DATASET_CONFIGS, DatasetConfig
from segtrain.config.options import Option, is_mapping, option_of


def known_options(schema: type, words: Sequence[str] = ()) -> dict[str, Field[Any]]:
    """Every option of a command, with those of the dataset that the words of the command line choose."""
    chosen = next((word.partition("=")[2] for word in words if word.startswith("dataset=")), "streets")
    result: dict[str, Field[Any]] = {}
    for item in fields(schema):
        kind: Any = item.type
        if kind is DatasetConfig:
            kind = DATASET_CONFIGS.get(chosen, DatasetConfig)
        if is_dataclass(kind):
            result |= {f"{item.name}.{inner.name}": inner for inner in fields(kind)}
        else:
            result[item.name] = item
    return result


def group_names(schema: type) -> list[str]:
    """The groups of a command's options."""
    return [item.name for item in fields(schema) if is_dataclass(item.type)]


def described(schema: type, key: str) -> Iterator[tuple[Field[Any], Option]]:
    """The fields of that key, one for each dataset that has it."""
    group, _, name = key.partition(".")
    for item in fields(schema):
        kind: Any = item.type
        if item.name == key and not is_dataclass(kind):
            yield item, option_of(item)
        elif item.name == group and is_dataclass(kind):
            kinds: list[Any] = [DatasetConfig, *DATASET_CONFIGS.values()] if kind is DatasetConfig else [kind]
            seen = set()
            for inner in (inner for one in kinds for inner in fields(one) if inner.name == name):
                if option_of(inner) not in seen:
                    seen.add(option_of(inner))
                    yield inner, option_of(inner)


def shared_values(options: Any) -> dict[str, Any]:
    """The options that all processes of one command must have in common: {"optimizer.lr": 0.1, ...}.

    A path, the device and the loader may be another on each machine; of a path it counts whether there is one.
    """
    result: dict[str, Any] = {}
    for item in fields(options):
        value = getattr(options, item.name)
        if is_dataclass(value) and item.name != "loader":
            result |= {f"{item.name}.{key}": inner for key, inner in shared_values(value).items()}
        elif item.name not in ("loader", "device"):
            path = option_of(item).path
            result[item.name] = value not in (None, "none") if path is True else sorted(value) if path else value
    return result


def enclosing_mapping(schema: type, key: str) -> tuple[Field[Any], Option] | None:
    """The option of which `key` is an entry, as model.backbone_options.width of model.backbone_options."""
    parts = key.split(".")
    starts = [".".join(parts[:end]) for end in range(1, len(parts))]
    return next((found for start in starts for found in described(schema, start) if is_mapping(found[0])), None)


def resume_rule(key: str) -> bool | str:
    """Whether an option of `segtrain train` may change when a run is resumed: True, False or "longer"."""
    if mapping := enclosing_mapping(TrainConfig, key):
        inside = mapping[1].resume
        return isinstance(inside, tuple) and key.rpartition(".")[2] in inside
    group = next((item for item in fields(TrainConfig) if key.startswith(f"{item.name}.")), None)
    if group is not None and option_of(group).resume is True:
        return True
    found = {option.resume for _, option in described(TrainConfig, key)}
    rule = found.pop() if len(found) == 1 else False
    return rule if isinstance(rule, bool | str) else False


def is_safe(key: str) -> bool:
    """Whether the option changes where and how fast a run computes, or what it records, but not what it computes."""
    return resume_rule(key) is True


def swept_keys(jobs: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The keys whose values are not the same in the words of all jobs."""
    values: dict[str, set[str]] = {}
    for key, _, value in (word.partition("=") for words in jobs for word in words):
        values.setdefault(key, set()).add(value)
    return tuple(key for key, found in values.items() if len(found) > 1)


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"trainer.seed": 0, ...}"""
    result: dict[str, Any] = {}
    for key, value in config.items():
        result |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return result


LENGTHS = tuple(key for key in known_options(TrainConfig) if resume_rule(key) == "longer")
