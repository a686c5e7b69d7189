"""The values of a command's options if none is given, from the YAML files that its groups start from, without Hydra."""

from pathlib import Path
from typing import Any

from segtrain.config.locations import CONFIGS
from segtrain.config.user_files import read_yaml


def plain_defaults(command: str) -> dict[str, Any]:
    """Key of an option -> its value, for all options that configs/<command>.yaml and the files it names set.

    A group that comes from a checkpoint has one entry, "group." -> "(checkpoint's)".
    """
    result: dict[str, Any] = {}
    for entry in (read_yaml(CONFIGS / f"{command}.yaml") or {}).get("defaults", []):
        for group, choice in entry.items() if isinstance(entry, dict) else ():
            if choice == "from_checkpoint":
                result[f"{group}."] = "(checkpoint's)"
            path = CONFIGS / group / f"{choice}.yaml"  # none for ??? and null
            if path.is_file():
                result |= {f"{group}.{key}": value for key, value in content_of(path).items()}
    return result


def content_of(path: Path) -> dict[str, Any]:
    """The options in the file of a choice, with those of the other choices of its group that it starts from."""
    content = read_yaml(path) or {}
    before: dict[str, Any] = {}
    for entry in content.pop("defaults", []):
        if (other := path.parent / f"{entry}.yaml").is_file():
            before |= content_of(other)
    return before | content
