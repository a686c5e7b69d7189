"""An option is a dataclass field that describes itself.

What `option` is given is the one source of the help text, the completion, the checks, the quoting on the command line,
what may change when a run is resumed, and which choice of a group reads the option.
"""

import os
import re
from dataclasses import MISSING, Field, dataclass, field, fields
from math import inf, isfinite
from typing import Any, ClassVar, get_args, get_origin

from segtrain.config import plugin_files
from segtrain.console import UNSAFE, as_utf8
from segtrain.errors import UsageError, meant

# Limits of options that several groups have.
MOST_STEPS = 10**9
MOST_PICTURES = 10_000
LARGEST_SEED = 2**63 - 1
LARGEST_SIZE = 65536  # pixels
LONGEST_NAME = 200  # bytes of a component of a path; what is added to it must fit too
UNSAFE_NAME = re.compile(f"[/\\\\\n\t]|{UNSAFE.pattern}")
SMALLEST = 1e-12  # a number nearer to 0 is 0 in float32 sooner or later


@dataclass(frozen=True)
class Option:
    """The description of an option; `option` says what the attributes mean."""

    help: str = ""
    choices: tuple[Any, ...] = ()
    other: str = ""
    prefix: str = ""
    low: float | None = None
    above: float | None = None
    high: float | None = None
    below: float | None = None
    limit: float | None = None
    why: str = ""
    component: bool = False
    items: tuple[str, ...] = ()
    ascending: bool = False
    path: bool | tuple[str, ...] = False
    quote: bool = False
    resume: bool | str | tuple[str, ...] = False
    only: tuple[str, ...] | None = None
    before: Any = None


def option(default: Any, help: str, **description: Any) -> Any:
    """A dataclass field with its default and its description.

    help: a noun phrase of at most 80 characters, the unit in brackets. The choices are not part of it.
    choices: the values that are allowed, for a list those of its items. other: what else is allowed, in words, which
    the dataclass checks itself. prefix: values that begin so are allowed too, and checked where they are used. Plugins
    add to the choices of the options in plugin_files.PARTS.
    low, above: the least value, inclusive or exclusive; high, below: the greatest one. For a list they hold for each
    item. below=math.inf: finite. limit: the greatest magnitude that makes sense, named only where it is exceeded;
    math.inf: none, infinity too. Without a bound every number is allowed. why: reason of the bounds, for the message.
    component: the value becomes one component of a path, so it has no separator, control character or "..".
    items: what the items of a list are, which fixes their number, such as ("height", "width"). ascending: no item is
    less than the one before.
    path: the value is a path, taken as typed and completed from the files; for a mapping, the keys inside it whose
    values are. quote: the value is taken as typed but is no path.
    resume: the option may change when a run is resumed; "longer": a number that may grow; for a mapping, the keys
    inside it that may change.
    only: the values of the group's `name` whose parts read the option; (): those of plugins.
    before: what runs that began before the option existed do, if that is not the default.
    """
    metadata = {"option": Option(help, **description)}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def group(kind: type, resume: bool = False) -> Any:
    """A field that holds a group of options. resume: all of them may change when a run is resumed."""
    return field(default_factory=kind, metadata={"option": Option(resume=resume)})


def option_of(item: Field[Any]) -> Option:
    """The description of a field, an empty one where it has none (a plugin's dataclass)."""
    found: Option = item.metadata.get("option", Option())
    return found


def default_of(item: Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def as_written(value: Any) -> str:
    """A value as the command line and YAML write it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


def type_name(kind: Any) -> str:
    """A type in words: 'number or null', 'list of numbers'."""
    words = {int: "whole number", float: "number", bool: "true or false", str: "text", type(None): "null", Any: "value"}
    if kind in words:
        return words[kind]
    if get_origin(kind) is list:
        return f"list of {type_name(get_args(kind)[0])}s"
    if get_origin(kind) is dict:
        return "mapping"
    return " or ".join(type_name(inner) for inner in get_args(kind))


def is_mapping(item: Field[Any]) -> bool:
    return get_origin(item.type) is dict


def is_list(item: Field[Any]) -> bool:
    return any(get_origin(kind) is list for kind in (item.type, *get_args(item.type)))


def can_be_null(item: Field[Any]) -> bool:
    return type(None) in get_args(item.type)


# ---------------------------------------------------------------------------------------------------- checks


@dataclass
class Group:
    """Base of every dataclass of options: `check` refuses what the options do not allow.

    A subclass adds only the rules that involve more than one option.
    """

    PREFIX: ClassVar[str] = ""  # of the keys, such as "optimizer."

    def check(self) -> Any:
        for item in fields(self):
            check_value(f"{self.PREFIX}{item.name}", getattr(self, item.name), item)
        refuse_unread(self, self.PREFIX)


def require(allowed: bool, key: str, value: Any, text: str) -> None:
    """Raise UsageError with the key, its value and `text`, which says why and what to do, unless it is allowed."""
    if not allowed:
        raise UsageError(f"{key}={value} is not possible: {text}")


def check_value(key: str, value: Any, item: Field[Any]) -> None:
    """Raise UsageError unless the choices and bounds of the option allow the value. null is left to the type."""
    option = option_of(item)
    values = value if isinstance(value, list) else [value]
    if value is None:
        return
    check_kind(key, value, item)
    if isinstance(value, dict):
        return
    if option.choices and not option.other:
        wrong = [one for one in values if not (one in known_choices(key, option) or begins_so(one, option))]
        if wrong:
            allowed, meant = choices_text(key, item), hint(key, option, wrong[0])
            raise UsageError(f"{key} must be {allowed}, got {as_written(value)}{meant}")
    fits = not option.items or len(values) == len(option.items)
    valid = fits and all(within(one, option) for one in values)
    if not (valid and (not option.ascending or values == sorted(values))):
        why = f": {option.why}" if option.why else ""
        raise UsageError(f"{key} must be {bounds_text(item, values)}, got {value}{why}")


def check_kind(key: str, value: Any, item: Field[Any]) -> None:
    """Raise UsageError for what the composing lets pass: a group in place of a list, a path in place of a name."""
    if (is_mapping(item) and not isinstance(value, dict)) or (is_list(item) and not isinstance(value, list)):
        raise UsageError(f"{key} must be a {type_name(item.type)}, got {str(value)[:80]}")
    if option_of(item).component and not is_component(value):
        raise UsageError(
            f"{key} must be a name for a file: not empty, no slash, control character or .., got {value!r}"
        )


def is_component(text: str) -> bool:
    """Whether the text can be one component of a path, on every system and on a terminal."""
    return (
        0 < len(os.fsencode(as_utf8(text))) <= LONGEST_NAME and text not in (".", "..") and not UNSAFE_NAME.search(text)
    )


def known_choices(key: str, option: Option) -> list[Any]:
    """The built-in choices, and those that loaded plugins have added."""
    return [*option.choices, *(name for name in plugin_files.loaded_parts(key) if name not in option.choices)]


def begins_so(value: Any, option: Option) -> bool:
    return bool(option.prefix) and isinstance(value, str) and value.startswith(option.prefix)


def choices_text(key: str, item: Field[Any]) -> str:
    """'one of auto, cuda, cpu', 'paper or null'."""
    known = [as_written(choice) for choice in known_choices(key, option_of(item))]
    known += [f"{option_of(item).prefix}NAME"] if option_of(item).prefix else []
    listed = f"one {'or more ' if is_list(item) else ''}of {', '.join(known)}" if len(known) > 1 else known[0]
    return f"{listed}{' or null' if can_be_null(item) else ''}"


def hint(key: str, option: Option, wrong: Any) -> str:
    own = " (plugins=[FILE] adds your own)" if key in plugin_files.PARTS else ""
    return meant(wrong, map(str, known_choices(key, option))) + own


def within(value: Any, option: Option) -> bool:
    """Whether a number is within the bounds; nan is within none, and what is no number neither, but for a choice."""
    if isinstance(value, str) and value in option.choices:
        return True
    bounds = (option.low, option.above, option.high, option.below, option.limit)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return all(bound is None for bound in bounds)
    return (
        (option.low is None or value >= option.low)
        and (option.above is None or value > option.above)
        and (option.high is None or value <= option.high)
        and (option.below is None or value < option.below)
        and (option.limit is None or abs(value) <= option.limit)
        and (option.below != inf or isfinite(value))
        and (value == 0 or not isinstance(value, float) or abs(value) >= SMALLEST)
    )


def bounds_text(item: Field[Any], values: list[Any]) -> str:
    """'greater than 0 and at most 1', '[height,width], each at least 32'."""
    option, null = option_of(item), can_be_null(item)
    choice = "".join(f"{one} or " for one in option.choices if any(isinstance(value, str) for value in values))
    named = (("at least", option.low), ("greater than", option.above), ("at most", option.high))
    parts = [f"{words} {bound}" for words, bound in named if bound is not None]
    if option.below == inf:
        parts += ["finite"] if any(value in (inf, -inf) for value in values) else []
    elif option.below is not None:
        parts.append(f"less than {option.below}")
    text = " and ".join(parts + exceeded(option, values))
    if not (is_list(item) or option.items):
        return choice + text + (" or null" if null else "")
    shape = f"[{','.join(option.items)}]" if option.items else "a list of numbers"
    return (
        shape
        + (f", each {text}" if text else "")
        + (", in ascending order" if option.ascending else "")
        + (", or null" if null else "")
    )


def exceeded(option: Option, values: list[Any]) -> list[str]:
    """The limits that only matter where they are exceeded, in words."""
    numbers = [abs(value) for value in values if isinstance(value, int | float)]
    limit = None if option.limit == inf else option.limit
    parts = [f"at most {limit}"] if limit is not None and any(not value <= limit for value in numbers) else []
    if any(0 < value < SMALLEST for value in numbers):
        parts.append(f"0 or at least {SMALLEST}" if option.above is None else f"at least {SMALLEST}")
    return parts


def refuse_unread(options: Any, prefix: str) -> None:
    """Raise UsageError for an option that was set although the part that `name` chooses does not read it.

    The part of a plugin may read every option.
    """
    described = {item.name: (item, option_of(item)) for item in fields(options)}
    name = getattr(options, "name", None)
    if "name" not in described or name not in described["name"][1].choices:
        return
    for key, (item, about) in described.items():
        value, default = getattr(options, key), default_of(item)
        if about.only is None or name in about.only or value == default:
            continue
        group = prefix.rstrip(".")
        whole = f"{group}={name}"
        readers = f"{group}={' or '.join(about.only)}" if about.only else "the parts of plugins"
        raise UsageError(
            f"{prefix}{key}={as_written(value)} has no effect: {group}.name={name} does not read it, it is for "
            f"{readers}; leave it at {as_written(default)}, or write {whole}, which sets all options of the group"
        )
