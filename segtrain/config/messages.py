"""One sentence for what Hydra or OmegaConf refuses: the key, the value, what is allowed."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import Field
from typing import Any

from segtrain.config.locations import GROUP_FOLDERS
from segtrain.config.options import as_written, default_of, option_of, type_name
from segtrain.config.plugin_files import GROUP_CHOICES
from segtrain.errors import meant, with_available

NOT_CHOSEN = re.compile(r"You must specify '([^']+)', e\.g.*?Available options:\s+(.*)", re.DOTALL)
MISSING_CHOICE = re.compile(
    r"Could not find '?([\w]+)/([^'\s]+?)'?\s*\n+\s*Available options in '\w+':\n((?:\t.*\n?)+)"
)
UNKNOWN_OVERRIDE = re.compile(r"Could not override '([^']+)'")
UNKNOWN_KEY = re.compile(r"Key '(\w+)' (?:not in|is not in struct)[\s\S]*?full_key: ([\w.\[\]]+)")
FULL_KEY = re.compile(r"full_key: ([\w.\[\]]+)")
UNSET_VARIABLE = re.compile(r"Environment variable '([^']*)' not found")
WRONG_TYPE = re.compile(
    r"(?:Value '(.*)' of type .* could not be converted|Value '(.*)' is not a valid bool|Cannot convert '\w+' to string"
    r"|Invalid (?:value|type) assigned|Value '(.*)' of type .* is incompatible with type hint)"
)


# OmegaConf's sentences about a list, a mapping or a plain value in the place of another.
MISMATCH = (
    re.compile(r"Cannot merge (?P<wanted>\w+) with (?P<found>\w+)"),
    re.compile(r"Merge error: (?P<found>\w+) is not a subclass of (?P<wanted>\w+)"),
    re.compile(r"Cannot assign (?P<found>\w+) to (?P<wanted>\w+)\["),
    re.compile(r"(?P<found>\w+) is not a (?P<wanted>ListConfig|DictConfig)"),
    re.compile(r"Cannot convert '(?P<found>\w+)' to (?P<wanted>string)"),
)
KINDS = {
    "ListConfig": "a list", "List": "a list", "list": "a list", "DictConfig": "a mapping", "Dict": "a mapping",
    "dict": "a mapping", "str": "text", "string": "text", "int": "a number", "float": "a number",
    "bool": "true or false", "NoneType": "null",
}  # fmt: skip


def mismatch(text: str, key: str, words: Sequence[str] = ()) -> str | None:
    """ "dataset.splits must be a mapping, got a list"; None if OmegaConf's text says something else.

    key: as OmegaConf names it, "" if it does not; the words of the command line may name it in full.
    """
    match = next((one for pattern in MISMATCH if (one := pattern.search(text))), None)
    if match is None:
        return None
    wanted, found = str(match["wanted"]), str(match["found"])
    if wanted.endswith("Config") and wanted not in KINDS:  # a group of options
        group = wanted.removesuffix("Config").lower()
        key, wanted = group if group in GROUP_FOLDERS else "dataset", "a mapping of options"
    typed = [word.lstrip("+").partition("=")[0] for word in words]
    key = next((name for name in typed if name.endswith(f".{key}")), key) if key else "a value"
    return f"{key} must be {KINDS.get(wanted, wanted)}, got {KINDS.get(found, found)}"


def explain(error: Exception, known: Mapping[str, Field[Any]], words: Sequence[str]) -> str:
    """The sentence for an error of composing. known: the command's options. words: those of the command line."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    texts = [str(item) for item in chain]
    text = "\n".join(texts)
    if (sentence := about_choice(text)) is not None:
        return sentence
    if match := UNKNOWN_OVERRIDE.search(text):
        return unknown_key(match[1], known)
    if match := UNKNOWN_KEY.search(text):
        return unknown_key(match[2], known) + where_in_yaml(match[2], words)
    if isinstance(error, RecursionError):
        return f"the YAML files are nested too deeply, or name each other in a circle (given: {' '.join(words)})"
    if isinstance(error, UnicodeError):
        return f"the YAML files must be UTF-8: {error} (given: {' '.join(words)})"
    if match := FULL_KEY.search(text):
        about = [item for item in texts if "full_key" in item][-1].splitlines()
        first = next(line for line in about if not line.startswith("In '"))
        return wrong_value(re.sub(r"\[\d+\]", "", match[1]), first, known, words)
    if (sentence := mismatch(text, "", words)) is not None:
        return sentence + where_in_yaml(sentence.split()[0], words)
    return re.sub(r"\s+", " ", texts[0]) + f" (given: {' '.join(words) or 'no overrides'})"


def about_choice(text: str) -> str | None:
    """The sentence for a choice of a group that does not exist, or for none; None if Hydra says something else."""
    if match := MISSING_CHOICE.search(text):
        return unknown_choice(match[1], match[2], offered_choices([choice.strip() for choice in match[3].split("\n")]))
    if match := NOT_CHOSEN.search(text):
        name, choices = match[1], ", ".join(offered_choices(match[2].split()))
        return f"{name} is not set: give {name}=NAME or a file of it. Available: {choices}"
    return None


def offered_choices(choices: Sequence[str]) -> list[str]:
    """Those that a user may give."""
    inner = ("", "from_checkpoint", "without_dataset")
    return [choice for choice in choices if choice not in inner and not choice.startswith("file_")]


def wrong_value(key: str, first: str, known: Mapping[str, Field[Any]], words: Sequence[str]) -> str:
    """The sentence for a value of another type. first: OmegaConf's own line about it."""
    item = known.get(key)
    if (sentence := mismatch(first, key, words)) is not None and not (item is not None and WRONG_TYPE.match(first)):
        return sentence + where_in_yaml(sentence.split()[0], words)
    if item is None:
        return f"{key}: {first[0].lower() + first[1:]}" + where_in_yaml(key, words)
    help_text = f" ({option_of(item).help})" if option_of(item).help else ""
    match = WRONG_TYPE.match(first)
    if match is None:
        return without_type(key, first, item) + help_text + where_in_yaml(key, words)
    typed = [word.partition("=")[2] for word in words if word.lstrip("+").partition("=")[0] == key]
    value = next(iter(typed[-1:]), match[1] or match[2] or match[3])
    found = "a value of another type" if value is None else f"'{value}'"
    kind = type_name(item.type)
    if option_of(item).other and kind.endswith(" or text"):
        kind = " or ".join([kind.removesuffix(" or text"), *option_of(item).choices])
    article = "a " if kind.startswith(("number", "whole", "list", "mapping")) else ""
    return f"{key} must be {article}{kind}, got {found}{help_text}" + where_in_yaml(key, words)


def without_type(key: str, first: str, item: Field[Any]) -> str:
    """The sentence for a value that is missing, or null where there must be one."""
    if "missing mandatory value" in first:
        return f"{key} has no value (???): give {key}={type_name(item.type)}"
    if variable := UNSET_VARIABLE.search(first):
        return f"{key}: the environment has no variable {variable[1]}"
    if "is not Optional" in first:
        default = default_of(item)
        such = "" if isinstance(default, list | dict) or default == "" else f", such as {key}={as_written(default)}"
        return f"{key} must not be null: give a value{such}"
    return f"{key}: {first[0].lower() + first[1:]}"


def unknown_choice(group: str, choice: str, choices: Sequence[str]) -> str:
    can_add = any(key.startswith(f"{group}.") for key in GROUP_CHOICES)
    own = " (plugins=[FILE] adds your own)" if can_add else ""
    return f"{group}={choice} does not exist{with_available(choice, choices, f'{group}=')}{own}"


def unknown_key(key: str, known: Mapping[str, Field[Any]]) -> str:
    prefix, _, last = key.rpartition(".")
    siblings = [name for name in known if name.rpartition(".")[0] == prefix]
    if not prefix:  # groups are chosen by their names
        siblings += sorted({name.partition(".")[0] for name in known} - set(siblings))
    same = [name for name in known if name.rpartition(".")[2] == last]  # lr=1 instead of optimizer.lr=1
    # The common prefix says nothing about likeness.
    near = meant(last, [name.rpartition(".")[2] for name in siblings], f"{prefix}." if prefix else "")
    hint = f"; did you mean {same[0]}?" if same else near or ("." if siblings and prefix else meant(key, known) or ".")
    listed = ", ".join(siblings or sorted({name.split(".")[0] for name in known}))
    return f"there is no option {key}{hint} Available: {listed}"


def where_in_yaml(key: str, words: Sequence[str]) -> str:
    """The recipe or group that sets the key, where the command line does not."""
    given = [word.lstrip("+").partition("=")[0] for word in words]
    if any(key == name or key.startswith(f"{name}.") for name in given):
        return ""
    files = [word for word in words if word.partition("=")[0] in ("experiment", *GROUP_FOLDERS)]
    return f" (set in the YAML of {', '.join(files)})" if files else " (set in a YAML file)"
