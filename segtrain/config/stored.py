"""Options out of a checkpoint or a run folder, which an older version may have written."""

from collections.abc import Callable, Iterator
from dataclasses import Field, asdict, fields, is_dataclass
from typing import Any, get_args, get_origin

from segtrain.config.commands import TrainConfig
from segtrain.config.dataset import DATASET_CONFIGS, DatasetConfig, MixtureConfig
from segtrain.config.options import default_of, option_of, within


def trained(old: dict[str, Any]) -> TrainConfig:
    """The configuration of a training as the object that it had."""
    given, made = with_defaults(old), TrainConfig()
    made.dataset = dataset_schema(given["dataset"])()
    for item in fields(made):
        value, part = given[item.name], getattr(made, item.name)
        kind: Any = type(part)
        setattr(made, item.name, kind(**value) if is_dataclass(part) else value)
    return made


def wrong_options(old: Any) -> Iterator[str]:
    """What is wrong with a training's configuration from a file, in words. Choices of plugins need not be known."""
    if not isinstance(old, dict) or not all(isinstance(old.get(name), dict) for name in ("dataset", "model")):
        yield "config is none"
        return
    for item in fields(TrainConfig):
        value, kind = old.get(item.name), item.type
        if item.name not in old:
            continue
        if not is_dataclass(kind):
            yield from wrong_option(item.name, value, item)
        elif not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            yield f"config.{item.name} is none"
        else:
            schema: Any = dataset_schema(value) if kind is DatasetConfig else kind
            own = {inner.name: inner for inner in fields(schema)}
            for key, inner in value.items():
                if key in own:
                    yield from wrong_option(f"{item.name}.{key}", inner, own[key])
                elif schema is not DatasetConfig:  # else it may be of a plugin
                    yield f"config.{item.name}.{key} is no option of this version"
    model = old["model"]
    for key in ("mean", "std"):
        if isinstance(model.get(key), list) and len(model[key]) != model.get("in_channels", 3):
            yield f"config.model.{key}={str(model[key])[:40]!r} is not possible"


def wrong_option(key: str, value: Any, item: Field[Any]) -> Iterator[str]:
    about = option_of(item)
    values = value if isinstance(value, list) else [value]
    fits = has_type(value, item.type) and (value is None or all(within(one, about) for one in values))
    if not fits or (about.items and value is not None and len(values) != len(about.items)):
        yield f"config.{key}={str(value)[:40]!r} is not possible"


def has_type(value: Any, kind: Any) -> bool:
    """Whether a value out of a file is of a field's type."""
    if kind is Any:
        return True
    if kind in (int, str, bool, type(None)):
        return type(value) is kind
    if kind is float:
        return type(value) in (int, float)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(has_type(inner, get_args(kind)[0]) for inner in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(isinstance(key, str) for key in value)
    return any(has_type(value, inner) for inner in get_args(kind))


def dataset_schema(options: dict[str, Any]) -> type[DatasetConfig]:
    return DATASET_CONFIGS.get(str(options.get("name", "")), DatasetConfig)


def with_defaults(old: dict[str, Any]) -> dict[str, Any]:
    """A training's configuration from a checkpoint, with the options that its version did not have as it behaved."""
    schema = dataset_schema(old.get("dataset", {}))
    today = asdict(TrainConfig(dataset=schema()))
    dataset = old.get("dataset", {})
    old = old | {"dataset": dataset | earlier_values(schema, dataset)}
    return {
        name: value | old.get(name, {}) if isinstance(value, dict) else old.get(name, value)
        for name, value in today.items()
    }


def earlier_values(schema: type[DatasetConfig], old: dict[str, Any]) -> dict[str, Any]:
    """Of the options that a stored dataset does not have, those whose default does not behave as its version did.

    Of a mixture: `parts`, in which each part has its own.
    """
    if issubclass(schema, MixtureConfig):
        return {"parts": parts_with_rules(old.get("parts", {}), lambda item: option_of(item).before)}
    added = (item for item in fields(schema) if item.name not in old)
    return {item.name: option_of(item).before for item in added if option_of(item).before is not None}


def parts_with_rules(parts: dict[str, Any], value_of: Callable[[Field[Any]], Any]) -> dict[str, Any]:
    """The parts of a mixture, with each option whose default once behaved otherwise: where not given, value_of(option).

    A part is stored as it was given, so that without such a value nobody could tell which version it is of.
    """
    filled = dict(parts)
    for name, options in parts.items():
        if isinstance(options, dict | None):
            schema = dataset_schema({"name": (options or {}).get("dataset", name)})
            rules = {item.name: value_of(item) for item in fields(schema) if option_of(item).before is not None}
            filled[name] = rules | (options or {}) if rules else options
    return filled


def store_rules(dataset: DatasetConfig) -> None:
    """Write into the parts of a mixture what their options without a value mean today."""
    if isinstance(dataset, MixtureConfig):
        dataset.parts = parts_with_rules(dataset.parts, default_of)


def adopt_earlier(dataset: DatasetConfig, old: dict[str, Any]) -> dict[str, Any]:
    """Set options that a run's version did not have, unless they were given, as it behaved. Returns what was set."""
    if isinstance(dataset, MixtureConfig):
        return adopt_earlier_parts(dataset, old.get("parts", {}))
    values = earlier_values(type(dataset), old)
    defaults = {item.name: default_of(item) for item in fields(dataset)}
    taken = {name: value for name, value in values.items() if getattr(dataset, name) == defaults[name]}
    for name, value in taken.items():
        setattr(dataset, name, value)
    return taken


def adopt_earlier_parts(dataset: MixtureConfig, old: dict[str, Any]) -> dict[str, Any]:
    """As `adopt_earlier`. old: the stored parts."""
    taken: dict[str, Any] = {}
    for name, options in parts_with_rules(old, lambda item: option_of(item).before).items():
        given = dataset.parts.get(name)
        if name in dataset.parts and isinstance(options, dict) and isinstance(given, dict | None):
            known = {*(old[name] or {}), *(given or {})}
            rules = {key: value for key, value in options.items() if key not in known}
            dataset.parts = dataset.parts | {name: rules | (given or {})} if rules else dataset.parts
            taken |= {f"parts.{name}.{key}": value for key, value in rules.items()}
    return taken
