"""The files of a run folder: whether they are a run's, and what a kill between two of them has left undone."""

import filecmp
import os
import re
import shutil
from pathlib import Path

import yaml

from segtrain.console import say
from segtrain.engine.state import TrainState
from segtrain.errors import DataError
from segtrain.files import temporary_beside
from segtrain.weights import checkpoint

CHECKPOINT = re.compile(r"last\.pt|step_\d+\.pt")
# What is in the folder of a run that was killed before it was marked by config.yaml and state.json.
BEGUN = {".lock", "config.yaml", "environment.json", "metrics.jsonl", "blackbox", "pictures", "tensorboard", "best.pt",
         "wandb_run", "mlflow_run", "wandb", "evaluation.json", "images.npz", "summary.txt",
         "confusion.png"}  # fmt: skip
IN_PASSING = re.compile(r"requeue|\..*\.tmp")


def require_own(folder: Path) -> None:
    """DataError for a folder that exists, is not empty, and holds no run: nothing in it is touched."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise DataError(f"{folder} is a file, not the folder of a run: give another run=FOLDER or name=NAME")
    names = {path.name for path in folder.iterdir() if not IN_PASSING.fullmatch(path.name)}
    checkpoints = set(filter(CHECKPOINT.fullmatch, names))
    is_marked = is_config(folder / "config.yaml") and (checkpoints or "state.json" in names)
    is_begun = names - BEGUN <= checkpoints and (checkpoints or ".lock" in names)
    if names and not is_marked and not is_begun:
        example = min(names - BEGUN - checkpoints or names)
        raise DataError(
            f"{folder} is not empty and holds no run (there is {example}, but no config.yaml with a checkpoint or "
            "state.json of one), so it is left alone: give another run=FOLDER or name=NAME, or an empty folder"
        )


def is_config(path: Path) -> bool:
    """Whether it is the config.yaml of a run, not one of another program."""
    try:
        content = yaml.load(path.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return False
    return isinstance(content, dict) and isinstance(content.get("trainer"), dict)


def link(source: Path, target: Path) -> None:
    """Replace `target` atomically by a hard link to `source`, or by a copy where the file system has no hard links."""
    temporary = temporary_beside(target)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def same_content(source: Path, target: Path) -> bool:
    return target.exists() and (target.samefile(source) or filecmp.cmp(source, target, shallow=False))


def repair(folder: Path, source: Path, state: TrainState) -> None:
    """Make the folder consistent with the checkpoint that the run goes on from, which is the file `source`.

    A checkpoint is written in this order: log and pictures, last.pt, step_<n>.pt, best.pt, removal of older ones.
    """
    own = folder / f"step_{state.step:07d}.pt"
    for target in (folder / "last.pt", own):
        if target != source and not same_content(source, target):
            link(source, target)
    validated = state.validated
    for picture in (folder / "pictures").glob("val_*.png"):
        number = picture.stem.removeprefix("val_")
        if number.isdigit() and int(number) > validated:
            picture.unlink()
    best, step = folder / "best.pt", state.best["step"]
    if step == 0:
        return
    if step == state.step:
        if not same_content(own, best):
            link(own, best)
    elif checkpoint.step_of(best) != step:
        earlier = folder / f"step_{step:07d}.pt"
        if checkpoint.step_of(earlier) == step:
            link(earlier, best)
        else:
            say(f"WARNING    {best} of step {step} is lost; it is written again at the first better validation")
