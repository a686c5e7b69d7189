"""One sentence for what Hydra or OmegaConf refuses: the key, the value, what is allowed."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import Field
from typing import Any

from segtrain.config.locations import GROUP_FOLDERS
from segtrain.config.options import option_of, type_name
from segtrain.config.plugin_files import GROUP_CHOICES

MISSING_CHOICE = re.compile(
    r"Could not find '?([\w]+)/([^'\s]+?)'?\s*\n+\s*Available options in '\w+':\n((?:\t.*\n?)+)"
)
UNKNOWN_OVERRIDE = re.compile(r"Could not override '([^']+)'")
UNKNOWN_KEY = re.compile(r"Key '(\w+)' (?:not in|is not in struct)[\s\S]*?full_key: ([\w.\[\]]+)")
WRONG_TYPE = re.compile(r"full_key: ([\w.\[\]]+)")


def explain(error: Exception, known: Mapping[str, Field[Any]], words: Sequence[str]) -> str:
    """The sentence for an error of composing. known: the command's options. words: those of the command line."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    texts = [str(item) for item in chain]
    text = "\n".join(texts)
    if match := MISSING_CHOICE.search(text):
        choices = [choice.strip() for choice in match[3].split("\n") if choice.strip() not in ("", "from_checkpoint")]
        return unknown_choice(match[1], match[2], choices)
    if match := UNKNOWN_OVERRIDE.search(text):
        return unknown_key(match[1], known)
    if match := UNKNOWN_KEY.search(text):
        return unknown_key(match[2], known) + where_in_yaml(match[2], words)
    if match := WRONG_TYPE.search(text):
        key = re.sub(r"\[\d+\]", "", match[1])
        about = [item for item in texts if "full_key" in item][-1].splitlines()
        first = next(line for line in about if not line.startswith("In '"))
        item = known.get(key)
        wanted = "" if item is None else f"; expected {type_name(item.type)}: {option_of(item).help}"
        return f"{key}: {first[0].lower() + first[1:]}{wanted.removesuffix(': ')}" + where_in_yaml(key, words)
    return re.sub(r"\s+", " ", texts[0]) + f" (given: {' '.join(words) or 'no overrides'})"


def unknown_choice(group: str, choice: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(choice, choices, 1)
    meant = f"did you mean {group}={near[0]}? " if near else ""
    can_add = any(key.startswith(f"{group}.") for key in GROUP_CHOICES)
    own = " (parts of your own: plugins=[FILE])" if can_add else ""
    return f"{group}={choice}: there is none of that name; {meant}There is {', '.join(choices)}{own}"


def unknown_key(key: str, known: Mapping[str, Field[Any]]) -> str:
    near = difflib.get_close_matches(key, known, 1, 0.6)
    prefix = key.rpartition(".")[0]
    siblings = [name for name in known if name.rpartition(".")[0] == prefix]
    listed = ", ".join(siblings or sorted({name.split(".")[0] for name in known}))
    return f"there is no option {key}: {f'did you mean {near[0]}? ' if near else ''}There is {listed}"


def where_in_yaml(key: str, words: Sequence[str]) -> str:
    """The recipe or group that sets the key, where the command line does not."""
    given = [word.lstrip("+").partition("=")[0] for word in words]
    if any(key == name or key.startswith(f"{name}.") for name in given):
        return ""
    files = [word for word in words if word.partition("=")[0] in ("experiment", *GROUP_FOLDERS)]
    return f" (set in the YAML of {', '.join(files)})" if files else " (set in a YAML file)"
