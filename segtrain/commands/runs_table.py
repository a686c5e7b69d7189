"""What differs between runs: for the columns of `segtrain runs`, on the screen and in a CSV file."""

import csv
import io
import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from segtrain.config import is_safe
from segtrain.config.options import as_written
from segtrain.console import printable
from segtrain.engine.run_reader import RunSummary

OWN = ("name", "run", "restart")  # differ in every run, and are in the first column
ELSEWHERE = ("trainer.max_steps",)  # in the column of steps
MOST_COLUMNS = 8  # of options on the screen
LONGEST = 24  # characters of a value on the screen
MISSING = "-"  # in place of an option that a run does not have


def differing_options(runs: Sequence[RunSummary]) -> list[str]:
    """The keys of all options that are not the same in all runs, in the order of config.yaml."""
    known = [run for run in runs if run.options]
    keys = list(dict.fromkeys(key for run in known for key in run.options if key not in OWN))
    return [key for key in keys if len({frozen(run.options.get(key, MISSING)) for run in known}) > 1]


def frozen(value: Any) -> str:
    """A value as text, the same for 1 and 1.0."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{float(value):.17g}" if is_number else json.dumps(value, default=str)


def matters(key: str) -> bool:
    """Whether an option changes what is computed, and not only where and how fast."""
    return key.startswith("inference.") or not is_safe(key)


def which_group(run: RunSummary, apart: str) -> tuple[Any, ...]:
    """The same for runs whose options are the same but for the option `apart`."""
    keys = sorted(key for key in run.options if key not in (*OWN, apart) and matters(key))
    return tuple((key, frozen(run.options[key])) for key in keys)


def screen_options(runs: Sequence[RunSummary], keys: list[str]) -> tuple[list[str], list[str]]:
    """The options with a column on the screen, and those without.

    Of what a recipe, or a choice of a group, brings along, only the recipe or the choice has a column.
    """
    shown_keys, left_out = list[str](), list[str]()
    names = [key for key in keys if key == "experiment" or key.endswith(".name")]
    for key in keys:
        if key in ELSEWHERE or (key != "experiment" and not matters(key)):
            continue
        group = f"{key.partition('.')[0]}.name"
        leaders = [name for name in names if name in ("experiment", group) and name != key]
        follows = any(is_constant(runs, key, leader) for leader in leaders)
        (left_out if follows else shown_keys).append(key)
    last = [key for key in shown_keys if key.endswith(".seed")]
    shown_keys = [key for key in shown_keys if key not in last] + last
    return shown_keys[:MOST_COLUMNS], left_out + shown_keys[MOST_COLUMNS:]


def is_constant(runs: Sequence[RunSummary], key: str, leader: str) -> bool:
    """Whether all runs with one value of `leader` have one value of `key`."""
    pairs = {(frozen(run.options.get(leader)), frozen(run.options.get(key, MISSING))) for run in runs if run.options}
    return len(pairs) == len({first for first, _ in pairs})


def column_names(keys: list[str]) -> list[str]:
    """The last part of each key, or the whole key where another one ends alike; of dataset.name, dataset."""
    short = [key.removesuffix(".name").rpartition(".")[2] for key in keys]
    return [one if short.count(one) == 1 else key for one, key in zip(short, keys, strict=True)]


def shown(value: Any) -> str:
    """A value on the screen; of a long one the end, which tells paths apart."""
    text = printable(as_written(value), inline=True)
    return text if len(text) <= LONGEST else f"...{text[3 - LONGEST :]}"


def csv_text(runs: Sequence[RunSummary], keys: list[str]) -> str:
    """A line for every run, with all options that differ. Scores are fractions."""
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerow(
        ["run", "state", "step", "max_steps", "miou", "best_miou", "best_step", *keys, "last_written", "note"]
    )
    for run in runs:
        values = [as_written(run.options[key]) if key in run.options else "" for key in keys]
        when = datetime.fromtimestamp(run.written).isoformat(sep=" ", timespec="seconds")
        scores = [run.miou, run.best, run.best_step]
        table.writerow([run.name, run.state, run.step, run.max_steps, *scores, *values, when, run.note])
    return file.getvalue()
