"""Absurd values in every option of every command: no traceback, no hang, nothing accepted that is nonsense.

    python -m tests.fuzz_options                                # every option of every command, about half an hour
    python -m tests.fuzz_options --command train --option optimizer.lr
    python -m tests.fuzz_options --sample 100 --seed 3

Each case is a command of its own, forked from a process that has imported everything, on data and a network of a few
kilobytes. A case fails if it prints a traceback, ends with an exit status that is not in the contract, or by a signal,
takes longer than the limit, or succeeds with a value that the option's own description does not allow. Commands that
start processes of their own end where they would start them.
"""

import argparse
import contextlib
import copy
import io
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

from segtrain import config
from segtrain.cli import entry
from segtrain.cli.commands import COMMANDS, Command
from segtrain.config.keys import group_names, known_options
from segtrain.config.options import option_of
from tests.helpers.forked import LIMIT, fault_of, forked, load_everything
from tests.helpers.fuzz_data import Files, remove

VALUES = (
    "", " ", "null", "???", "${oc.env:UNSET}", "${x}", "${trainer}", "nan", "inf", "-inf", "1e99", "-1", "0", "7.5",
    "1" + 23 * "0", "1e-300", "true", "[]", "{}", "[1,2]", "[[1]]", "[1e99,1e99]", "[nan,nan]", "{a:1}", "a\nb",
    "\x1b]0;t\x07\x1b[31m", "../..", "/dev/null", ".", "caf\udce9", "x" * 5000, "it's \"q\"", "[x", "日本", "a=b",
    "1,2",
)  # fmt: skip


class Case(NamedTuple):
    command: str
    dataset: str  # '' for options that are of no dataset
    key: str
    value: str

    def __str__(self) -> str:
        chosen = f"dataset={self.dataset} " if self.dataset else ""
        return f"{self.command} {chosen}{self.key}={self.value[:40]!r}"


class Ending(NamedTuple):
    """How a case ended. fault: '' or what is wrong with that."""

    case: Case
    status: int
    seconds: float
    text: str
    fault: str


# ------------------------------------------------------------------------------------------------ the cases


def cases(commands: list[str], keys: list[str]) -> Iterator[Case]:
    """Every value in every option, those of a dataset with that dataset, and every group."""
    for command in commands:
        schema = COMMANDS[command].schema
        with_data = "dataset" in group_names(schema)
        places = {(key, "") for key in known_options(schema)} | {(group, "") for group in group_names(schema)}
        if with_data:
            shared = set(known_options(schema, ["dataset="]))
            for name in config.DATASET_CONFIGS:
                own = set(known_options(schema, [f"dataset={name}"])) - shared
                places = {place for place in places if place[0] not in own} | {(key, name) for key in own}
        for key, dataset in sorted(places):
            if keys and key not in keys:
                continue
            for value in VALUES:
                yield Case(command, dataset, key, value)


# ------------------------------------------------------------------------------------------------ one case


class Accepted(BaseException):
    """The options were composed, and the command would begin."""

    def __init__(self, row: Command, options: config.CommandConfig) -> None:
        super().__init__()
        self.row = row
        self.options = options


def run_case(files: Files, case: Case, folder: Path) -> Ending:
    """Compose the options here; where they are accepted, run the command with them in a process of its own."""
    base = files.base(case.command, case.dataset)
    words = [word for word in base if word.partition("=")[0] != case.key] + [f"{case.key}={case.value}"]
    began = time.monotonic()
    os.chdir(folder)
    status, text, accepted = compose([case.command, *words])
    fault = ""
    if accepted is not None:
        strange = nonsense(accepted.row.schema, accepted.options)
        fault = f"accepted: {strange}" if strange else ""
        status, more = forked(lambda: begin(accepted), folder)
        text += more
    seconds = time.monotonic() - began
    fault = fault_of(status, seconds, text) or fault
    return Ending(case, status, seconds, text, fault)


def compose(words: list[str]) -> tuple[int, str, Accepted | None]:
    """Exit status, text, and what was accepted if the command would begin."""
    text, status, accepted = io.StringIO(), 0, None
    begin = entry.start

    def stop(row: Command, options: config.CommandConfig) -> None:
        raise Accepted(row, options)

    def too_long(*_: object) -> None:
        raise TimeoutError

    entry.start = stop  # type: ignore[assignment]
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LIMIT)
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            try:
                entry.main(words)
            except SystemExit as left:
                status = int(left.code or 0)
            except Accepted as answer:
                accepted = answer
            except BaseException:  # noqa: BLE001  # which is what is looked for
                traceback.print_exc()
    finally:
        signal.alarm(0)
        entry.start = begin
    return status, text.getvalue(), accepted


def begin(accepted: Accepted) -> None:
    """The command, but verify-resume ends where it would start its trainings, and plan where it would trace steps."""
    from segtrain.commands import plan, verify_resume

    def end(*_: Any) -> Any:
        raise SystemExit(0)

    verify_resume.start_training = end  # type: ignore[assignment]
    plan.solve_all = end  # type: ignore[attr-defined, assignment]
    if isinstance(accepted.options, config.TrainConfig):
        accepted.options.trainer.compile = False  # it takes minutes, and is torch's
    entry.start(accepted.row, accepted.options)


@contextlib.contextmanager
def composed_once() -> Iterator[None]:
    """Inside, the last of Hydra's words is applied to what the others give, which is composed once: it takes most of
    the time. A group is always composed anew."""
    import hydra
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.override_parser.overrides_parser import OverridesParser

    whole, known = hydra.compose, dict[tuple[str, ...], Any]()

    def quick(verb: str, words: list[str]) -> Any:
        *others, last = words
        if not last or "." not in last.partition("=")[0]:
            return whole(verb, words)
        key = (verb, *others)
        if key not in known:
            known[key] = whole(verb, others)
        result = copy.deepcopy(known[key])
        ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides([last]), result)
        return result

    hydra.compose = quick  # type: ignore[assignment]
    try:
        yield
    finally:
        hydra.compose = whole


# ------------------------------------------------------------------------------------------------ nonsense


def nonsense(schema: type, options: Any) -> str:
    """Values that the options' own descriptions do not allow, judged from the descriptions alone."""
    wrong = []
    for item in fields(schema):
        value = getattr(options, item.name)
        inner = [(f"{item.name}.{one.name}", one, getattr(value, one.name)) for one in fields(value)] if (
            is_dataclass(value)
        ) else [(item.name, item, value)]  # fmt: skip
        wrong += [f"{key}={str(found)[:60]}" for key, one, found in inner if not sensible(one, found)]
    return ", ".join(wrong)


def sensible(item: Field[Any], value: Any) -> bool:
    about = option_of(item)
    if value is None:
        return item.type is Any or type(None) in get_args(item.type)
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, bool | dict):
            continue
        if isinstance(one, int | float):
            if not numeric(item.type):
                return item.type is Any or get_origin(item.type) is list  # list[Any]
            low = about.low is None or one >= about.low
            high = about.high is None or one <= about.high
            inside = (about.above is None or one > about.above) and (about.below is None or one < about.below)
            limited = about.limit is None or abs(one) <= about.limit
            bounded = about.high is not None or about.below is not None or about.limit is not None or about.choices
            if not (low and high and inside and limited and bounded and (isfinite(one) or about.limit == float("inf"))):
                return False
        if isinstance(one, str) and about.choices and not about.other and one not in about.choices:
            return about.path is not False or one == "tiny"
    return True


def numeric(kind: Any) -> bool:
    return kind in (int, float) or any(numeric(inner) for inner in get_args(kind))


# ------------------------------------------------------------------------------------------------ all of them


def fuzz(chosen: list[Case], quick: bool) -> list[Ending]:
    """The cases that went wrong. quick: as `composed_once`."""
    load_everything()
    bad = []
    with tempfile.TemporaryDirectory() as temporary, composed_once() if quick else contextlib.nullcontext():
        root = Path(temporary)
        os.environ.update(SEGTRAIN_CACHE=str(root / "cache"), PYTHONWARNINGS="ignore")
        files = Files(root / "files")
        for number, case in enumerate(chosen, 1):
            folder = root / "cases" / str(number) / "here"  # ../.. holds nothing else
            folder.mkdir(parents=True)
            ending = run_case(files, case, folder)
            if ending.fault:
                bad.append(ending)
                last = ending.text.strip().splitlines()[-1:] or [""]
                print(f"{number}/{len(chosen)} {case}: {ending.fault}: {last[0][:200]}", flush=True)
            elif number % 100 == 0:
                print(f"{number}/{len(chosen)}, {len(bad)} went wrong", flush=True)
            os.chdir(root)
            remove(folder.parent)
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command", action="append", choices=list(COMMANDS))
    parser.add_argument("--option", action="append", default=[])
    parser.add_argument("--sample", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="compose what all cases share once")
    asked = parser.parse_args()
    chosen = list(cases(asked.command or list(COMMANDS), asked.option))
    if asked.sample is not None:
        chosen = random.Random(asked.seed).sample(chosen, min(asked.sample, len(chosen)))
    began = time.monotonic()
    bad = fuzz(chosen, asked.quick)
    print(f"{len(chosen)} cases in {time.monotonic() - began:.0f} s: {len(bad)} went wrong")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
