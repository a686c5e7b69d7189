"""An option: a field of a dataclass with its default, its help text and its checks."""

from collections.abc import Mapping
from dataclasses import MISSING, field, fields
from typing import Any

from segtrain.errors import UsageError


def option(default: Any, text: str) -> Any:
    """A field with its default and the line that `segtrain COMMAND --help` prints."""
    metadata = {"help": text}
    if isinstance(default, list | dict) or callable(default):
        make = default if callable(default) else default.copy
        return field(default_factory=make, metadata=metadata)
    return field(default=default, metadata=metadata)


def require(allowed: bool, key: str, value: Any, text: str) -> None:
    """UsageError naming key, value and what is allowed."""
    if not allowed:
        raise UsageError(f"{key}={value} is not possible: {text}")


def require_size(key: str, size: list[int], least: int) -> None:
    require(len(size) == 2 and min(size) >= least, key, size, f"give [height,width] in pixels, each at least {least}")


def refuse_unread(options: Any, group: str, name: str, read: Mapping[str, tuple[str, ...]]) -> None:
    """UsageError for an option of `group` that was set although the choice `name` does not read it.

    read: choice -> what it reads, of the options that not every choice reads. A name that is not in it may read all.
    """
    if name not in read:
        return
    for item in fields(options):
        value, readers = getattr(options, item.name), [other for other, keys in read.items() if item.name in keys]
        default = item.default if item.default_factory is MISSING else item.default_factory()
        special = readers or item.name == "options"
        if special and name not in readers and value != default:
            shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
            hint = f"it is for {group}={' or '.join(readers)}" if readers else "it is for the parts of plugins"
            raise UsageError(
                f"{group}.{item.name}={value} is not possible: {group}.name={name} does not read it ({hint}); "
                f"leave it at {shown}, or let {group}={name} set them all"
            )
