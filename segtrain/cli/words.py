"""The words after a command: flags, key=value overrides, bare paths."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path

from segtrain.cli.commands import Command
from segtrain.config.options import is_list
from segtrain.config.overrides import as_override
from segtrain.errors import UsageError


@dataclass
class Arguments:
    """What stands on the command line: overrides in Hydra's grammar, and flags."""

    overrides: list[str] = field(default_factory=list)
    config_dir: str | None = None
    show: bool = False  # --cfg job
    only: str = ""  # --print-run or --print-slurm, instead of training
    sweep: bool = False  # -m: Hydra itself runs each combination


def parse(verb: str, command: Command, words: list[str]) -> Arguments:
    """Split overrides from flags, quote paths, and give a bare path its name."""
    result, bare = Arguments(), list[str]()
    words = list(words)
    while words:
        word = words.pop(0)
        flag, _, value = word.partition("=")
        if flag in ("--config-dir", "-cd"):
            result.config_dir = value or (words.pop(0) if words else "")
            if not Path(result.config_dir).is_dir():
                raise UsageError(f"--config-dir {result.config_dir}: no such folder; give the one that holds your YAML")
        elif flag in ("--cfg", "-c"):
            kind = value or (words.pop(0) if words else "")
            if kind != "job":
                raise UsageError(f"--cfg {kind}: only --cfg job exists, which prints the composed options")
            result.show = True
        elif verb == "train" and word in ("--print-run", "--print-slurm"):
            result.only = word
        elif word in ("-m", "--multirun"):
            result.sweep = True
        elif re.match(r"--?[a-zA-Z]", word):
            raise UsageError(f"there is no flag {word}; options are given as key=value (segtrain {verb} --help)")
        else:
            result.overrides.append(override(verb, command, word))
            if result.overrides[-1].startswith(f"{command.bare}=") and not word.startswith(f"{command.bare}="):
                bare.append(word)
    result.overrides = with_bare(verb, command, result.overrides, bare)
    return result


def with_bare(verb: str, command: Command, overrides: list[str], bare: list[str]) -> list[str]:
    """The overrides, with all bare paths in one list if their option is a list. UsageError for two of any other."""
    if several := bare_list(command, overrides):
        return several
    if bare and sum(word.startswith(f"{command.bare}=") for word in overrides) > 1:
        network = "; the network is checkpoint=FILE or run=FOLDER" if verb == "predict" else ""
        raise UsageError(f"{bare[0]}: a word alone stands for {command.bare}=, which is given twice{network}")
    return overrides


def bare_list(command: Command, overrides: list[str]) -> list[str]:
    """The overrides with all bare paths in one list, where the option that they stand for is a list; else []."""
    item = next((item for item in fields(command.schema) if item.name == command.bare), None)
    if item is None or not is_list(item):
        return []
    start = f"{command.bare}=["
    paths = [word[len(start) : -1] for word in overrides if word.startswith(start)]
    others = [word for word in overrides if not word.startswith(start)]
    return [*others, f"{start}{','.join(paths)}]"] if paths else others


def override(verb: str, command: Command, word: str) -> str:
    """One override in Hydra's grammar. A word without a key, or that is a file, is the command's bare path."""
    key, equals, value = word.partition("=")
    known = {item.name for item in fields(command.schema)}
    if not equals or (key.split(".")[0] not in known and Path(word).exists()):
        if word.startswith("~"):
            raise UsageError(f"{word}: an option cannot be taken away; set it to null instead")
        if command.bare is None:
            raise UsageError(f"{word!r} is not an override: options are given as key=value (segtrain {verb} --help)")
        key, value = command.bare, word
    return as_override(command.schema, key, value)
