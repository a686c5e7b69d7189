"""What `segtrain --help` and `segtrain COMMAND --help` print, from the options themselves."""

import textwrap
from collections.abc import Iterator
from dataclasses import Field, fields
from typing import Any

from segtrain import config
from segtrain.cli.commands import SECTIONS, Command
from segtrain.config.keys import group_names
from segtrain.config.locations import GROUP_FOLDERS, group_choices
from segtrain.config.options import as_written, default_of, option_of
from segtrain.config.plain_defaults import plain_defaults
from segtrain.config.plugin_files import PARTS

WIDTH = 120


def overview(commands: dict[str, Command]) -> str:
    lines = [
        "segtrain: semantic segmentation with In-Place Activated BatchNorm",
        "",
        "usage: segtrain COMMAND key=value ...",
    ]
    width = max(len(verb) for verb in commands)
    for section in SECTIONS:
        lines += ["", section]
        lines += [
            f"  {verb:<{width}} {command.summary}" for verb, command in commands.items() if command.section == section
        ]
    lines += ["", "segtrain COMMAND --help shows a command's options and examples; segtrain --version the version."]
    lines += ['eval "$(segtrain --completion bash)" completes commands, options and their values; zsh and fish too.']
    return "\n".join(lines)


def usage(verb: str, command: Command) -> str:
    """A command's examples, groups, options and flags."""
    lines = [f"segtrain {verb}: {command.summary}", "", "examples", *(f"  {example}" for example in command.examples)]
    groups = [item.name for item in fields(command.schema) if item.name in GROUP_FOLDERS]
    if groups:
        lines += ["", "groups (GROUP=CHOICE sets all options of a group)"]
        lines += [line for name in sorted(groups) for line in wrapped(f"  {name:<13} ", ", ".join(group_choices(name)))]
    lines += ["", "options (key=value)", *option_lines(command.schema, plain_defaults(verb))]
    lines += [
        "",
        "flags: --cfg job (print the composed options), -m (sweep over a,b,c), --config-dir FOLDER (your YAML)",
    ]
    if verb == "train":
        lines.append("       --print-run (print the run folder), --print-slurm (print a job script for SLURM)")
    return "\n".join(lines)


def option_lines(schema: type[config.CommandConfig], defaults: dict[str, Any]) -> Iterator[str]:
    """The plain options, then those of each group, then those that only some datasets have.

    defaults: key -> the value that a plain command uses, where it is not the dataclass's.
    """
    groups = group_names(schema)
    for item in fields(schema):
        if item.name not in groups:
            yield from option_text(item.name, item, defaults)
    for item in fields(schema):
        kind: Any = item.type
        if item.name not in groups:
            continue
        for inner in fields(kind):
            if inner.name != "name" or kind is not config.DatasetConfig:  # dataset=... sets it
                yield from option_text(f"{item.name}.{inner.name}", inner, defaults)
        if kind is config.DatasetConfig:
            shared = {inner.name for inner in fields(kind)}
            for name, own in config.DATASET_CONFIGS.items():
                for inner in (inner for inner in fields(own) if inner.name not in shared):
                    yield from option_text(f"dataset.{inner.name}", inner, defaults, f"[{name}] ")


def option_text(key: str, item: Field[Any], defaults: dict[str, Any], dataset: str = "") -> list[str]:
    """key=default, which choices of the group read it, the help text, the choices."""
    option = option_of(item)
    readers = f"{', '.join(option.only)}: " if option.only else ""
    choices = [as_written(choice) for choice in option.choices]
    choices += [f"{option.prefix}NAME"] if option.prefix else []
    choices += [option.other] if option.other else ["a plugin's"] if key in PARTS else []
    listed = f" {{{' | '.join(choices)}}}" if choices else ""
    value = defaults.get(key, defaults.get(f"{key.partition('.')[0]}.", default_of(item)))
    return wrapped(f"  {f'{key}={as_written(value)}':<44} ", f"{dataset}{readers}{option.help}{listed}")


def wrapped(first: str, text: str) -> list[str]:
    """The text beside what its first line begins with, in lines of at most 120 characters."""
    lines = textwrap.wrap(text, max(WIDTH - len(first), 40), break_long_words=False, break_on_hyphens=False) or [""]
    return [first + lines[0], *(" " * len(first) + line for line in lines[1:])]
