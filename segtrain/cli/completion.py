"""Shell completion: `eval "$(segtrain --completion bash)"`. What is offered follows from the options themselves.

The shell calls `segtrain --complete WORDS...` with the words up to the cursor, the last one perhaps empty, and gets
whole words, one a line; those that end in = or / want more. Imports neither torch nor Hydra.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field
from typing import Any

from segtrain.cli.commands import Command
from segtrain.config.keys import group_names, known_options
from segtrain.config.locations import group_choices
from segtrain.config.options import as_written, is_list, known_choices, option_of, type_name
from segtrain.errors import UsageError

BASH = """\
_segtrain() {
    local line="${COMP_LINE:0:COMP_POINT}" words current prefix="" found
    read -ra words <<< "$line"
    [[ "$line" == *[[:space:]] ]] && words+=("")
    current="${words[${#words[@]}-1]}"
    # bash replaces what follows the last = only
    [[ "$COMP_WORDBREAKS" == *=* ]] && prefix="${current%"${current##*=}"}"
    COMPREPLY=()
    while IFS= read -r found; do
        found="${found#"$prefix"}"
        COMPREPLY+=("${found// /\\\\ }")
    done < <(segtrain --complete "${words[@]:1}" 2>/dev/null)
    if [[ ${#COMPREPLY[@]} == 1 && "${COMPREPLY[0]}" == *[=/] ]]; then compopt -o nospace 2>/dev/null; fi
}
complete -F _segtrain segtrain
"""
ZSH = """\
_segtrain() {
    local -a found more
    found=("${(@f)$(segtrain --complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    more=("${(@M)found:#*[=/]}")
    found=("${(@)found:#*[=/]}")
    (( ${#more} )) && compadd -S '' -a more
    (( ${#found} )) && compadd -a found
}
compdef _segtrain segtrain
"""
FISH = """\
function __segtrain_complete
    set -l words (commandline -opc) (commandline -ct)
    segtrain --complete $words[2..-1] 2>/dev/null
end
complete -c segtrain -f -a '(__segtrain_complete)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
FLAGS = ("--help", "--cfg", "--config-dir", "-m")


def shell_script(shell: str) -> str:
    """The text that `eval` takes in bash, zsh or fish."""
    if shell not in SCRIPTS:
        raise UsageError(f"--completion {shell or 'SHELL'}: choose {', '.join(SCRIPTS)}")
    return SCRIPTS[shell]


def complete(words: list[str], commands: Mapping[str, Command]) -> list[str]:
    """What the last of the words, those after `segtrain`, may become."""
    current, before = (words[-1] if words else ""), words[:-1]
    if not before:
        return starting(current, [*commands, *(["--help", "--version", "--completion"] if current[:1] == "-" else [])])
    if before == ["--completion"]:
        return starting(current, SCRIPTS)
    if before[0] not in commands:
        return []
    command = commands[before[0]]
    if before[-1] == "--cfg":
        return starting(current, ["job"])
    if before[-1] == "--config-dir":
        return [path for path in matching_files(current) if path.endswith("/")]
    if current.startswith("-"):
        return starting(current, FLAGS)
    key, equals, value = current.partition("=")
    options = known_options(command.schema, before)
    groups = [*group_names(command.schema), *(["experiment"] if "experiment" in options else [])]
    if not equals:
        names = starting(current, sorted(f"{name}=" for name in {*options, *groups} if name != "dataset.name"))
        return names + (matching_files(current) if command.bare is not None else [])
    if key in groups:
        return [f"{key}={choice}" for choice in starting(value, group_choices(key, config_dirs(before)))]
    return [f"{key}={choice}" for choice in values(key, options[key], value)] if key in options else []


def values(key: str, item: Field[Any], current: str) -> list[str]:
    """Values of an option that begin with what is typed so far."""
    option = option_of(item)
    start = max(current.rfind("["), current.rfind(",")) + 1 if is_list(item) else 0
    before, typed = current[:start], current[start:]
    if type_name(item.type).startswith("true or false"):
        choices: Sequence[str] = ("true", "false")
    else:
        choices = [as_written(choice) for choice in known_choices(key, option)]
    found = starting(typed, choices) + (matching_files(typed) if option.path is True else [])
    return [f"{before}{choice}" for choice in found]


def config_dirs(words: list[str]) -> list[str]:
    """The folders given by --config-dir."""
    found = [word for flag, word in zip(words, words[1:], strict=False) if flag == "--config-dir"]
    return found + [word.partition("=")[2] for word in words if word.startswith("--config-dir=")]


def starting(current: str, candidates: Iterable[str]) -> list[str]:
    return [candidate for candidate in candidates if candidate.startswith(current)]


def matching_files(current: str) -> list[str]:
    """Files and folders whose path begins with `current`; hidden ones only if that is asked for."""
    folder, slash, start = current.rpartition("/")
    try:
        entries = sorted(os.scandir(os.path.expanduser(folder + slash) or "."), key=lambda entry: entry.name)  # noqa: PTH111
        return [
            f"{folder}{slash}{entry.name}{'/' if entry.is_dir() else ''}"
            for entry in entries
            if entry.name.startswith(start) and (start.startswith(".") or not entry.name.startswith("."))
        ]
    except OSError:
        return []
