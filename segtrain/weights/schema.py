"""What a checkpoint of a run must hold, whoever wrote the file: every entry has its type before anything is used."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, int64, strided

from segtrain.config.stored import wrong_options

MOST_CLASSES = 100_000  # of image classification; label images have at most 254


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_list_of(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(map(kind, value))


def is_mapping_of(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Mapping) and all(map(is_text, value)) and all(map(kind, value.values()))


def is_byte(value: Any) -> bool:
    return is_count(value) and value <= 255


def is_color(value: Any) -> bool:
    return is_list_of(is_byte)(value) and len(value) == 3


def is_weight(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == strided and value.device.type == "cpu"


def is_elapsed(value: Any) -> bool:
    return is_number(value) and 0 <= value < math.inf


def is_plain(value: Any, depth: int = 0) -> bool:
    """Numbers, text, and containers of them, as JSON has them."""
    if depth > 20:
        return False
    if isinstance(value, Mapping):
        return all(is_text(key) and is_plain(inner, depth + 1) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return all(is_plain(inner, depth + 1) for inner in value)
    return value is None or isinstance(value, str | int | float)


def is_environment(value: Any) -> bool:
    if not isinstance(value, Mapping) or not is_plain(value):
        return False
    return all(is_count(count) and count > 0 for count in (value.get(key, 1) for key in ("processes", "accumulation")))


def is_best(value: Any) -> bool:
    return is_mapping_of(is_number)(value) and all(is_count(value.get(key, 0)) for key in ("step", "since"))


def is_provenance(value: Any) -> bool:
    """As weights.provenance describes it."""
    if not isinstance(value, Mapping) or not is_plain(value):
        return False
    entries = value.get("weights")
    known = isinstance(entries, list) and all(
        isinstance(entry, Mapping) and {"file", "licence", "noncommercial"} <= entry.keys() for entry in entries
    )
    lines = value.get("noncommercial")
    return known and isinstance(value.get("data"), Mapping) and is_list_of(is_text)(lines)


def is_classes(value: Any) -> bool:
    """Names, and for labels of pixels the rest of a label table."""
    if not isinstance(value, Mapping) or not is_list_of(is_text)(value.get("names")):
        return False
    count = len(value["names"])
    if value.get("of") == "pictures":
        return 0 < count <= MOST_CLASSES
    lists = (value.get("ids"), is_byte), (value.get("colors"), is_color), (value.get("ignored_ids"), is_byte)
    if not all(is_list_of(kind)(some) for some, kind in lists) or not is_text(value.get("source")):
        return False
    ids = [*value["ids"], *value["ignored_ids"]]
    return 0 < count == len(value["ids"]) == len(value["colors"]) and len(set(ids)) == len(ids)


def is_trained_on(value: Any) -> bool:
    return value is None or (is_weight(value) and value.dtype == int64 and value.dim() == 1)


# Entry -> what it must be, and whether each checkpoint has it: some came later.
ENTRIES: dict[str, tuple[Callable[[Any], bool], bool]] = {
    "classes": (is_classes, True), "model": (is_mapping_of(is_weight), True), "step": (is_count, True),
    "ema": (is_mapping_of(is_weight), False), "ema_updates": (is_count, False), "validated": (is_count, False),
    "elapsed": (is_elapsed, False), "best": (is_best, False), "trained_on": (is_trained_on, False),
    "contents": (is_trained_on, False),
    "environment": (is_environment, False), "provenance": (lambda v: not v or is_provenance(v), False),
    "optimizer": (lambda value: isinstance(value, Mapping), False), "recent": (is_list_of(is_number), False),
    "scaler": (lambda value: isinstance(value, Mapping), False),
}  # fmt: skip


def wrong_content(content: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the entries of a checkpoint, in words."""
    for key, (fits, needed) in ENTRIES.items():
        if key not in content:
            if needed:
                yield f"there is no {key}"
        elif not fits(content[key]):
            yield f"{key} is none"
    if "config" not in content:
        yield "there is no config"
    else:
        yield from wrong_options(content["config"])
