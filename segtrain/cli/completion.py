"""Shell completion: `eval "$(segtrain --completion bash)"`. What is offered follows from the options themselves.

The shell calls `segtrain --complete WORDS...` with the words up to the cursor, the last one perhaps empty, and gets
whole words, one a line; those that end in = or / want more. Imports neither torch nor Hydra.
"""

import os
import re
from collections.abc import Collection, Iterable, Mapping

from segtrain.cli.help import CONFIGS, GROUP_FOLDERS, Command, known_options
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
NOT_FILES = ("name",)  # quoted as paths are, but no paths


def script(shell: str) -> str:
    if shell not in SCRIPTS:
        raise UsageError(f"--completion {shell or 'SHELL'}: choose {', '.join(SCRIPTS)}")
    return SCRIPTS[shell]


def complete(words: list[str], commands: Mapping[str, Command], paths: Collection[str]) -> list[str]:
    """What the last of the words, those after `segtrain`, may become. paths: the options whose values are files."""
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
        return [path for path in files(current) if path.endswith("/")]
    if current.startswith("-"):
        return starting(current, FLAGS)
    options = known_options(command.schema, before)
    key, equals, value = current.partition("=")
    groups = [name for name in GROUP_FOLDERS if any(option.startswith(f"{name}.") for option in options)]
    if "experiment" in options:
        groups.append("experiment")
    if not equals:
        names = starting(current, sorted(f"{name}=" for name in {*options, *groups} if name != "dataset.name"))
        return names + (files(current) if command.bare is not None else [])
    if key in groups:
        return [f"{key}={choice}" for choice in starting(value, choices_of_group(key, before))]
    if key in paths and key not in NOT_FILES or key == "plugins":
        start = max(value.rfind("["), value.rfind(",")) + 1 if key == "plugins" else 0
        return [f"{key}={value[:start]}{path}" for path in files(value[start:])]
    kind, text = options.get(key, ("", ""))
    return [f"{key}={choice}" for choice in starting(value, choices(key, kind, text))]


def starting(current: str, candidates: Iterable[str]) -> list[str]:
    return [candidate for candidate in candidates if candidate.startswith(current)]


def choices_of_group(group: str, before: list[str]) -> list[str]:
    """Names of the YAML files, those in the folder of --config-dir too."""
    own = [word for flag, word in zip(before, before[1:], strict=False) if flag == "--config-dir"]
    own += [word.partition("=")[2] for word in before if word.startswith("--config-dir=")]
    found = set()
    for folder in (str(CONFIGS), *own):
        try:
            names = os.listdir(os.path.join(str(folder), group))  # noqa: PTH118, PTH208
            found |= {name[:-5] for name in names if name.endswith(".yaml")}
        except OSError:
            continue
    return sorted(found)


def choices(key: str, kind: str, text: str) -> list[str]:
    """What an option may be, as its line of help says: 'auto | cuda | cpu'."""
    if kind.startswith("true or false"):
        return ["true", "false"]
    if key == "model.backbone":
        return choices_of_group("model", [])
    plain = re.sub(r"\s*\([^)]*\)", "", text)
    listed = re.search(r"(?:^|: )([\w.]+(?: \| [\w.]+)+)", plain)
    found: list[str] = []
    for choice in listed[1].split(" | ") if listed else []:
        found.append(f"{found[-1].rpartition('_')[0]}{choice}" if choice[0] == "_" and found else choice)
    return found


def files(current: str) -> list[str]:
    """Files and folders whose path begins so; hidden ones only if that is asked for."""
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
