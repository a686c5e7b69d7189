"""Overrides as they are typed, and as Hydra's grammar reads them."""

import hashlib
import os
import re
from pathlib import Path
from typing import Any, get_args

from segtrain.config.commands import TrainConfig
from segtrain.config.keys import LENGTHS, described, enclosing_mapping, is_safe
from segtrain.config.options import LONGEST_NAME, is_list, is_mapping
from segtrain.config.schedule import ScheduleConfig
from segtrain.console import warn
from segtrain.errors import UsageError

LONG_NAME = 100  # characters
PATTERNS = ("images", "labels", "list", "pairs")  # of a split, taken as typed
BOOLEANS = ("true", "false", "yes", "no", "on", "off", "1", "0")  # as YAML; other numbers are no answer


def as_override(schema: type, key: str, value: str) -> str:
    """One override of a command's options. Values of paths and names are quoted, so that they arrive as typed."""
    if mapping := enclosing_mapping(schema, key):
        if key.startswith("dataset.splits."):
            return mapping_override(key, with_quoted_patterns(value), PATTERNS)
        return mapping_override(key, value, mapping[1].path)
    found = list(described(schema, key)) or list(described(TrainConfig, key))
    if any(is_mapping(item) for item, _ in found):
        return f"++{key}={value}"
    is_path = any(option.path is True or option.quote for _, option in found)
    if any(is_list(item) for item, _ in found):
        if is_path:
            return f"{key}=[{listed(value)}]"
        is_choice = any(option.choices for _, option in found) and re.fullmatch(r"\w+", value)
        return f"{key}=[{value}]" if is_choice else f"{key}={value}"  # a list of one needs no brackets
    is_sweep = value.startswith("[") and value.endswith("]")
    as_typed = (is_path and not is_sweep and value != "null") or is_odd_file(key, value)
    return f"{key}={quoted(value) if as_typed else value}"


def is_odd_file(key: str, value: str) -> bool:
    """Whether it is dataset=FILE.yaml with a name that Hydra's grammar does not read."""
    return key == "dataset" and value.endswith((".yaml", ".yml")) and bool(re.search(r"[^\w./,~@%+:-]", value))


def mapping_override(key: str, value: str, paths: bool | tuple[str, ...]) -> str:
    """An override inside a mapping. paths: the keys whose values are paths."""
    is_path = isinstance(paths, tuple) and key.rpartition(".")[2] in paths
    return f"++{key}={quoted(value) if is_path and value != 'null' else value}"


def with_quoted_patterns(value: str) -> str:
    """{images:PATTERN,labels:PATTERN} with quotes around what Hydra's grammar does not read, such as umlauts."""
    starts = f"(?:{'|'.join(PATTERNS)}):"
    entries = re.split(rf",(?= *{starts})", value[1:-1]) if re.fullmatch(rf"\{{{starts}.*\}}", value, re.S) else []
    if not re.search(r"[^\w./*?~@%+:\n -]", "\n".join(entries), re.ASCII) or re.search("['\"]", value):
        return value
    pairs = (entry.partition(":") for entry in entries)
    return "{" + ",".join(f"{key}:{quoted(text)}" for key, _, text in pairs) + "}"


def listed(value: str) -> str:
    """The items of a list of paths, or a single path, quoted unless they are."""
    inner = value[1:-1] if value.startswith("[") and value.endswith("]") else None
    if inner is None:
        return quoted(value)
    if "'" in inner or '"' in inner:
        return inner
    return ",".join(quoted(item.strip()) for item in inner.split(",") if item.strip())


def quoted(value: str) -> str:
    """A string that Hydra's grammar reads back as exactly `value`."""
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
        return value
    escaped = re.sub(r"(\\*)'", lambda match: match[1] * 2 + r"\'", literal(value))
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return f"'{escaped}{chr(92) * trailing}'"


def literal(value: Any) -> Any:
    """A value of plain types, which OmegaConf returns as it is: in its strings ${...} is no interpolation."""
    if isinstance(value, dict):
        return {key: literal(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [literal(inner) for inner in value]
    if not isinstance(value, str):
        return value
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)


def one_length(words: list[str]) -> list[str]:
    """A length given on the command line replaces the recipe's, which may have another unit."""
    keys = {word.partition("=")[0] for word in words}
    given = [key for key in LENGTHS if key in keys]
    return words if len(given) != 1 else [*(f"{key}=null" for key in LENGTHS if key not in given), *words]


def refuse_additions(schema: type, words: list[str]) -> None:
    """Raise UsageError for Hydra's +key and ~key, except for keys that a mapping lets the user name."""
    for word in words:
        key = word.lstrip("+~").partition("=")[0]
        named = list(described(schema, key)) if enclosing_mapping(schema, key) is None else []
        own = enclosing_mapping(schema, key) is not None or any(is_mapping(item) for item, _ in named)
        if word[0] in "+~" and not (word.startswith("++") and own):
            raise UsageError(f"{word}: write {key}=... ; options cannot be added or taken away")
        value = word.partition("=")[2].strip("'\"").lower()
        asks = any(item.type is bool or bool in get_args(item.type) for item, _ in named)
        if asks and value not in (*BOOLEANS, "null") and not value.startswith("${"):
            raise UsageError(f"{key} must be true or false, got '{word.partition('=')[2]}' ({named[0][1].help})")
        if key == "dataset.name":
            raise UsageError(f"{word}: write {word.replace('.name', '', 1)}, which sets all options of the dataset")


def shorten_warm_up(options: TrainConfig, words: list[str]) -> None:
    """Halve the training into warm-up and rest where trainer.max_steps on the command line is no longer than the
    warm-up of the recipe, and print that. Two lengths on the command line that do not fit are left to the check."""
    steps, schedule = options.trainer.max_steps, options.schedule
    typed = {word.partition("=")[0] for word in words}
    if "trainer.max_steps" not in typed or "schedule.warmup_steps" in typed or steps is None:
        return
    if not 0 < steps <= schedule.warmup_steps:
        return
    warn(f"schedule.warmup_steps={schedule.warmup_steps} becomes {steps // 2}: trainer.max_steps={steps} is no longer")
    schedule.warmup_steps = steps // 2
    if schedule.warmup_steps == 0:
        schedule.warmup_factor = ScheduleConfig.warmup_factor


def name_run(options: TrainConfig, words: list[str], swept: tuple[str, ...]) -> None:
    """Note what is varied, and give the run its name unless it has one."""
    typed = (word.lstrip("+").partition("=")[0] for word in words)
    options.varied = swept or tuple(key for key in typed if not is_safe(key))
    options.name = options.name or run_name(options, words, swept)


def run_name(options: TrainConfig, words: list[str], swept: tuple[str, ...] = ()) -> str:
    """The recipe and the overrides that change the run, so that the same command finds its run again.

    swept: the keys that a sweep varies. Where the name becomes long, they stay in it, and the others are cut.
    """
    base = options.experiment or f"{options.dataset.name}_{options.model.backbone}"
    keys = [word.lstrip("+").partition("=")[0] for word in words]
    chosen = [
        word for key, word in zip(keys, words, strict=True) if not is_safe(key) or key.startswith("inference.")
    ]  # by inference.* runs were named when it could not change
    if options.experiment is None:
        named = (f"dataset={options.dataset.name}", f"model={options.model.backbone}")
        chosen = [word for word in chosen if word not in named]
    slug = "-".join([base, *(as_part(word) for word in sorted(chosen))])
    if len(slug) <= LONG_NAME:
        return slug
    digits = hashlib.sha256(os.fsencode(slug)).hexdigest()[:8]
    varied = [as_part(word) for word in sorted(chosen) if word.lstrip("+").partition("=")[0] in swept]
    earlier = f"{slug[: LONG_NAME - 10]}-{digits}"
    if not varied or Path("runs", earlier).is_dir():  # a sweep that began when names were cut there
        return earlier
    # Of optimizer.lr=0.1, lr=0.1 is enough: the digits are of the whole name.
    slug = "-".join([base, *(re.sub(r"^[\w.]*\.(?=\w+=)", "", part) for part in varied)])
    return f"{slug[: LONGEST_NAME - 60]}-{digits}"


def as_part(word: str) -> str:
    """A word as a part of a name."""
    return re.sub(r"[^\w.=+-]+", "_", word).strip("_")
