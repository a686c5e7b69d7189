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
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import Field, fields, is_dataclass
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

import numpy as np
from PIL import Image

from segtrain import config
from segtrain.cli import entry
from segtrain.cli.commands import COMMANDS, Command
from segtrain.config.keys import group_names, known_options
from segtrain.config.options import option_of
from tests.helpers.checkout import TINY
from tests.helpers.runs import small_run

VALUES = (
    "", " ", "null", "???", "${oc.env:UNSET}", "${x}", "${trainer}", "nan", "inf", "-inf", "1e99", "-1", "0", "7.5",
    "1" + 23 * "0", "1e-300", "true", "[]", "{}", "[1,2]", "[[1]]", "[1e99,1e99]", "[nan,nan]", "{a:1}", "a\nb",
    "\x1b]0;t\x07\x1b[31m", "../..", "/dev/null", ".", "caf\udce9", "x" * 5000, "it's \"q\"", "[x", "日本", "a=b",
    "1,2",
)  # fmt: skip
STATUSES = (0, 1, 2)
LIMIT = 60  # seconds for a case
MEMORY = 6 << 30  # bytes that a case may allocate


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


# ------------------------------------------------------------------------------------------------ what there is


class Files:
    """A folder with data of every layout, a run, published-like weights and predictions, all of them tiny."""

    def __init__(self, root: Path) -> None:
        from segtrain.data.scenes.layouts import write_scenes

        self.root = root
        self.data: dict[str, list[str]] = {}
        counts = {"train": 4, "val": 2, "test": 2}
        for layout in ("cityscapes", "kitti", "vistas", "cocostuff", "imagenet"):
            some = {split: count for split, count in counts.items() if split != "test" or layout != "imagenet"}
            with contextlib.redirect_stdout(open(os.devnull, "w")):  # noqa: PTH123
                write_scenes(root / layout, layout, some, 0, (256, 512), workers=1)
            self.data[layout] = [f"dataset.root={root / layout}"]
        self.data["streets"] = [f"dataset.root={root / 'cityscapes'}", "dataset.scenes=4", "dataset.val_scenes=2"]
        self.data["folder"] = self.folder()
        self.data["mixture"] = [
            f"dataset.parts.cityscapes.root={root / 'cityscapes'}", "dataset.parts.cityscapes.weight=1",
        ]  # fmt: skip
        self.words = self.training("streets")
        Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(root / "photo.png")
        (root / "predictions").mkdir()
        for path in (root / "cityscapes" / "gtFine" / "val").rglob("*_labelIds.png"):
            name = path.name.replace("_gtFine_labelIds", "_leftImg8bit")
            (root / "predictions" / name).write_bytes(path.read_bytes())

    def folder(self) -> list[str]:
        place = self.root / "folder"
        for split, count in (("train", 4), ("val", 2)):
            for kind, shape in (("images", (64, 96, 3)), ("labels", (64, 96))):
                (place / split / kind).mkdir(parents=True)
                for i in range(count):
                    pixels = np.full(shape, 7 * i % 2, np.uint8)
                    Image.fromarray(pixels).save(place / split / kind / f"{i}.png")
        (place / "classes.csv").write_text("id,name,color,ignore\n0,water,#1040a0,\n1,land,200 60 40,false\n")
        splits = [
            f"dataset.splits.{split}={{images:{split}/images/*.png,labels:{split}/labels/*.png}}"
            for split in ("train", "val")
        ]
        return [f"dataset.root={place}", "dataset.classes=classes.csv", *splits]

    def training(self, dataset: str) -> list[str]:
        """Words of a training of one step."""
        own = [word for word in small_run(Path("x")) if not word.startswith("dataset.")]
        words = [f"dataset={dataset}", *self.data[dataset], *own, f"plugins=[{TINY}]", "model.backbone=tiny"]
        words += ["trainer.max_steps=1", "logging.pictures=0"]
        if dataset == "imagenet":
            classify = [
                "model.head=classifier",
                "model.head_channels=256",
                "augmentation=imagenet",
                "loss=cross_entropy",
            ]
            words += [*classify, "augmentation.crop_size=[32,32]", "inference=center224"]
            words = [word for word in words if not word.startswith(("augmentation.scale", "model.head_channels=8"))]
        return words

    def base(self, command: str, dataset: str) -> list[str]:
        """The words that a case of this command adds its own to."""
        run, data = self.root / "run", self.data.get(dataset, [])
        given = [f"dataset={dataset}", *data] if dataset else []
        plain = [f"plugins=[{TINY}]"]
        network = [f"run={run}", "device=cpu", *plain]
        return {
            "streets": ["scenes=1", "val_scenes=1", "night_scenes=0", "workers=1"],
            "check": given,
            "train": self.training(dataset or "streets"),
            "replay": [f"run={run}", *plain],
            "verify-resume": self.training(dataset or "streets"),
            "runs": [f"root={self.root}"],
            "evaluate": [*network, "loader.workers=0", "pictures=1", *given],
            "score": [f"predictions={self.root / 'predictions'}", *(given or self.given("cityscapes"))],
            "submit": [f"predictions={self.root / 'predictions'}", "split=val", *(given or self.given("cityscapes"))],
            "predict": [f"input={self.root / 'photo.png'}", *network],
            "convert": [f"input={self.root / 'weights.pth'}", "output=out.safetensors"],
            "weights": [],
            "info": [],
        }[command]

    def given(self, dataset: str) -> list[str]:
        return [f"dataset={dataset}", *self.data[dataset]]

    def make_network(self) -> None:
        """A finished run, and weights of a backbone, made in a process of its own."""
        forked(
            lambda: entry.run_command("train", COMMANDS["train"], [*self.words, f"run={self.root / 'run'}"]), self.root
        )
        made = self.root / "run" / "last.pt"
        if not made.is_file():
            raise SystemExit("the run that the cases use was not made")
        import torch

        from segtrain.models import from_config

        weights = from_config(config.ModelConfig(backbone="resnet18", head_channels=8), 19).state_dict()
        torch.save(weights, self.root / "weights.pth")


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
        fault = nonsense(accepted.row.schema, accepted.options)
        fault = f"accepted: {fault}" if fault else ""
        status, more = forked(lambda: entry.start(accepted.row, accepted.options), folder)
        text += more
    seconds = time.monotonic() - began
    if seconds >= LIMIT:
        fault = "hangs"
    elif "Traceback (most recent call last)" in text:
        fault = "traceback"
    elif status not in STATUSES:
        fault = f"exit status {status}"
    elif "\x1b" in text or "\x07" in text:
        fault = "prints control characters"
    return Ending(case, status, seconds, text, fault)


def compose(words: list[str]) -> tuple[int, str, Accepted | None]:
    """Exit status, text, and what was accepted if the command would begin."""
    text, status, accepted = io.StringIO(), 0, None
    begin = entry.start

    def stop(row: Command, options: config.CommandConfig) -> None:
        raise Accepted(row, options)

    def too_long(*_: object) -> None:
        raise TimeoutError

    entry.start = stop
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


def forked(run: Callable[[], Any], folder: Path) -> tuple[int, str]:
    """Exit status (negative: ended by that signal) and text of `run`, ended after the limit."""
    printed = folder / "printed.txt"
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        work(run, folder, printed)
    status = None
    while time.monotonic() - began < LIMIT:
        done, ended = os.waitpid(pid, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(ended)
            break
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if status is None:
        os.waitpid(pid, 0)
        status = -signal.SIGKILL
    return status, printed.read_text(errors="replace")


def work(run: Callable[[], Any], folder: Path, printed: Path) -> None:
    """In the child: what entry.main does with what is raised, on the memory that a case may have."""
    status = 70
    try:
        os.setsid()
        os.chdir(folder)
        file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        without_processes()
        entry.run = lambda _: run()
        entry.main([])
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:  # noqa: BLE001  # which is what is looked for
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def without_processes() -> None:
    """verify-resume ends where it would start its trainings."""
    from segtrain.commands import verify_resume

    def start_training(*_: Any) -> Any:
        raise SystemExit(0)

    verify_resume.start_training = start_training


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

    hydra.compose = quick
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
        return type(None) in get_args(item.type)
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, bool | dict):
            continue
        if isinstance(one, int | float):
            if not numeric(item.type):
                return get_origin(item.type) is list  # list[Any]
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


def load_everything() -> None:
    """What every child would import for seconds."""
    import albumentations  # noqa: F401
    import hydra  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401

    import segtrain.commands.evaluate
    import segtrain.engine.train  # noqa: F401

    for row in COMMANDS.values():
        __import__(row.function.partition(":")[0])


def fuzz(chosen: list[Case], quick: bool, show: bool = True) -> list[Ending]:
    """The cases that went wrong. quick: as `composed_once`."""
    load_everything()
    bad = []
    with tempfile.TemporaryDirectory() as temporary, composed_once() if quick else contextlib.nullcontext():
        root = Path(temporary)
        os.environ.update(SEGTRAIN_CACHE=str(root / "cache"), PYTHONWARNINGS="ignore")
        files = Files(root / "files")
        files.make_network()
        for number, case in enumerate(chosen, 1):
            folder = root / f"case{number}"
            folder.mkdir()
            ending = run_case(files, case, folder)
            if ending.fault:
                bad.append(ending)
            if show and ending.fault:
                last = ending.text.strip().splitlines()[-1:] or [""]
                print(f"{number}/{len(chosen)} {case}: {ending.fault}: {last[0][:200]}", flush=True)
            elif show and number % 100 == 0:
                print(f"{number}/{len(chosen)}, {len(bad)} went wrong", flush=True)
            os.chdir(root)
            remove(folder)
    return bad


def remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_symlink() or not path.is_dir() else path.rmdir()
    folder.rmdir()


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
