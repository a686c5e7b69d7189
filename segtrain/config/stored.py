"""Options out of a checkpoint or a run folder, which an older version may have written."""

from dataclasses import asdict, fields, is_dataclass
from typing import Any

from segtrain.config.commands import TrainConfig
from segtrain.config.dataset import DATASET_CONFIGS, DatasetConfig


def trained(old: dict[str, Any]) -> TrainConfig:
    """The same as the object that the training had."""
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
    """A training's configuration out of a checkpoint, with the options that its version did not have yet."""
    result = dict(old)
    loss = result.get("loss", {})
    if "hardest" in loss and "name" not in loss:  # format 1 had the share only
        result["loss"] = loss | {"name": "bootstrapped" if loss["hardest"] < 1 else "cross_entropy"}
    today = asdict(TrainConfig(dataset=dataset_schema(result.get("dataset", {}))()))
    return {
        name: value | result.get(name, {}) if isinstance(value, dict) else result.get(name, value)
        for name, value in today.items()
    }
