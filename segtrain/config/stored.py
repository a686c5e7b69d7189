"""Options out of a checkpoint or a run folder, which an older version may have written."""

from dataclasses import asdict, fields, is_dataclass
from typing import Any

from segtrain.config.commands import TrainConfig
from segtrain.config.dataset import DATASET_CONFIGS, DatasetConfig


def trained(old: dict[str, Any]) -> TrainConfig:
    """The configuration of a training as the object that it had."""
    given, made = with_defaults(old), TrainConfig()
    made.dataset = dataset_schema(given["dataset"])()
    for item in fields(made):
        value, part = given[item.name], getattr(made, item.name)
        kind: Any = type(part)
        setattr(made, item.name, kind(**value) if is_dataclass(part) else value)
    return made


def dataset_schema(options: dict[str, Any]) -> type[DatasetConfig]:
    return DATASET_CONFIGS.get(options.get("name", ""), DatasetConfig)


def with_defaults(old: dict[str, Any]) -> dict[str, Any]:
    """A training's configuration from a checkpoint, with defaults for options that its version did not have."""
    today = asdict(TrainConfig(dataset=dataset_schema(old.get("dataset", {}))()))
    return {
        name: value | old.get(name, {}) if isinstance(value, dict) else old.get(name, value)
        for name, value in today.items()
    }
