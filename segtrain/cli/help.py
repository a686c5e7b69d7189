"""What `segtrain --help` and `segtrain COMMAND --help` print, from the dataclasses in config.py."""

from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

from segtrain import config

CONFIGS = next(
    path for path in (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs") if path.is_dir()
)
GROUP_FOLDERS = tuple(sorted(path.name for path in CONFIGS.iterdir() if path.is_dir()))
SECTIONS = ("data", "train", "results", "use")


class Command(NamedTuple):
    section: str
    summary: str
    schema: type[config.CommandConfig]
    function: str  # module:name
    bare: str | None  # the option that a bare path stands for
    examples: tuple[str, ...]


def known_options(schema: type, overrides: list[str]) -> dict[str, tuple[str, str]]:
    """Every option of a command -> (type, help), with the options of the chosen data set."""
    chosen = next((word.partition("=")[2] for word in overrides if word.startswith("dataset=")), "streets")
    result: dict[str, tuple[str, str]] = {}
    for item in fields(schema):
        kind: Any = item.type
        if is_dataclass(kind):
            if kind is config.DatasetConfig:
                kind = config.DATASET_CONFIGS.get(chosen, config.DatasetConfig)
            for inner in fields(kind):
                result[f"{item.name}.{inner.name}"] = (type_name(inner.type), inner.metadata.get("help", ""))
        else:
            result[item.name] = (type_name(kind), item.metadata["help"])
    return result


def type_name(kind: Any) -> str:
    """A type in words: 'number or null', 'list of numbers'."""
    words = {int: "whole number", float: "number", bool: "true or false", str: "text", type(None): "null", Any: "value"}
    if kind in words:
        return words[kind]
    inner = get_args(kind)
    if getattr(kind, "__origin__", None) is list:
        return f"list of {type_name(inner[0])}s"
    if getattr(kind, "__origin__", None) is dict:
        return "mapping"
    return " or ".join(type_name(part) for part in inner)


def overview(commands: dict[str, Command]) -> str:
    lines = [
        "segtrain: semantic segmentation with In-Place Activated BatchNorm",
        "",
        "usage: segtrain COMMAND key=value ...",
    ]
    for section in SECTIONS:
        lines += ["", section]
        lines += [f"  {verb:<10} {command.summary}" for verb, command in commands.items() if command.section == section]
    lines += ["", "segtrain COMMAND --help shows a command's options and examples; segtrain --version the version."]
    lines += ['eval "$(segtrain --completion bash)" completes commands, options and their values; zsh and fish too.']
    return "\n".join(lines)


def usage(verb: str, command: Command) -> str:
    lines = [f"segtrain {verb}: {command.summary}", "", "examples", *(f"  {example}" for example in command.examples)]
    names = {item.name for item in fields(command.schema)}
    groups = [name for name in GROUP_FOLDERS if name in names]
    if groups:
        lines += ["", "groups (GROUP=CHOICE sets all options of a group)"]
        lines += [
            f"  {name:<13} {', '.join(sorted(p.stem for p in (CONFIGS / name).glob('*.yaml')))}" for name in groups
        ]
    lines += ["", "options (key=value)"]
    plain = [item for item in fields(command.schema) if not is_dataclass(item.type)]
    lines += [option_line(item.name, item) for item in plain]
    for item in fields(command.schema):
        kind: Any = item.type
        if not is_dataclass(kind):
            continue
        shared = {inner.name for inner in fields(kind)}
        lines += [option_line(f"{item.name}.{inner.name}", inner) for inner in fields(kind) if inner.metadata["help"]]
        if kind is config.DatasetConfig:
            for name, schema in config.DATASET_CONFIGS.items():
                own = [inner for inner in fields(schema) if inner.name not in shared]
                lines += [option_line(f"dataset.{inner.name}", inner, f"[{name}] ") for inner in own]
    lines += [
        "",
        "flags: --cfg job (print the composed options), -m (sweep over a,b,c), --config-dir FOLDER (your own YAML)",
    ]
    return "\n".join(lines)


def option_line(name: str, item: Any, prefix: str = "") -> str:
    default = item.default if item.default is not MISSING else item.default_factory()
    shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
    return f"  {name + '=' + str(shown):<44} {prefix}{item.metadata['help']}"
