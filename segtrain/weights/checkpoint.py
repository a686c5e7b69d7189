"""Checkpoints: everything that a run needs to go on, or a result needs to be used, in one file of plain tensors."""

import contextlib
import errno
import io
import os
import pickle
import shutil
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from segtrain.console import say
from segtrain.errors import DataError, SegtrainError, UsageError
from segtrain.files import write_atomically

FORMAT = 2  # 2: averaged weights, scaler, history of the loss, environment. 1 is read too.
KIND = "segtrain checkpoint"


class Damaged(DataError):
    """A file that was a checkpoint, or was about to become one: cut short, or with blocks that are not what was
    written."""


class Foreign(DataError):
    """A whole file, but none that `save` wrote."""


def save(path: Path, content: dict[str, Any]) -> None:
    """Write `content` (tensors, numbers, text, lists and dicts of them) so that the old file survives any failure."""
    buffer = io.BytesIO()
    torch.save({"kind": KIND, "format": FORMAT, **content}, buffer)
    write_atomically(path, buffer.getbuffer())


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, on the CPU. Never runs code from the file. DataError for any other file:
    Damaged, Foreign, or of a later format."""
    if not path.is_file():
        raise UsageError(f"no checkpoint file {path}; a run keeps its own as runs/<name>/last.pt and best.pt")
    other = f"{path} is not a checkpoint that segtrain wrote"
    try:
        if zipfile.is_zipfile(path):  # torch itself does not look at the sums that it writes
            with zipfile.ZipFile(path) as archive:
                wrong = archive.testzip()
            if wrong is not None:
                raise zipfile.BadZipFile(f"{wrong} is not what was written")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise Foreign(f"{other}: it holds objects that could run code, which are never loaded") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EIO, errno.EINVAL):
            raise  # the disk's trouble of the moment, not the file's
        reason = str(error).partition("\n")[0] or "it ends too early"
        raise Damaged(f"{path} is damaged or cut short ({reason}): use another copy") from error
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise Foreign(f"{other} (it lacks the mark {KIND!r}); runs write last.pt and best.pt")
    if content["format"] > FORMAT:
        raise DataError(
            f"{path} has checkpoint format {content['format']} (written by segtrain "
            f"{content.get('environment', {}).get('segtrain', 'of a later version')}), this version reads up to "
            f"{FORMAT}: update segtrain"
        )
    return content


def load_strict(model: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Copy a checkpoint's weights into the network. DataError if a name or a shape does not match."""
    own = model.state_dict()
    missing = sorted(set(own) - set(weights))
    strange = sorted(set(weights) - set(own))
    other = sorted(key for key in set(own) & set(weights) if own[key].shape != weights[key].shape)
    if missing or strange or other:
        examples = [f"{key} is missing" for key in missing[:2]] + [f"{key} has no place" for key in strange[:2]]
        examples += [f"{key} is {tuple(weights[key].shape)}, expected {tuple(own[key].shape)}" for key in other[:2]]
        raise DataError(
            f"{path} belongs to another model: {len(missing)} tensors missing, {len(strange)} too many, "
            f"{len(other)} of another shape (of {len(own)}); {'; '.join(examples)}"
        )
    model.load_state_dict(weights)


# ------------------------------------------------------------------------------------------------- those of a run


def numbered(folder: Path) -> list[Path]:
    """step_<n>.pt of a run, the newest first."""
    return sorted(folder.glob("step_*.pt"), reverse=True)


def newest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint of a run that can be read, None where there is none. Damaged if none can be read."""
    first: Damaged | None = None
    for path in (folder / "last.pt", *numbered(folder)):
        if not path.exists():
            continue
        try:
            content = load(path)
        except Damaged as error:
            first = first or error
            continue
        if first is not None:
            say(f"damaged    {first}; going on from {path.name} instead")
        return content
    if first is not None:
        raise first
    return None


def copied(value: Any) -> Any:
    """The value with every tensor in it copied to the CPU, so that training may go on while it is written."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [copied(item) for item in value]
    return value


class CheckpointWriter:
    """last.pt, best.pt and the `keep` newest step_<n>.pt of a run, written beside the training.

    A save costs the training a copy in memory, and a wait for the save before it where that is still being written.
    A full disk leaves the files of before, is told, and ends the training only where it would end anyway.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future[None] | None = None
        self.told = False

    def save(self, content: dict[str, Any], best: bool = False) -> None:
        """content["step"] names the file. best: it is the best one too."""
        began = time.monotonic()
        self.wait_or_warn()
        waited = time.monotonic() - began
        content = copied(content)
        if not self.told:
            spent = 1000 * (time.monotonic() - began - waited)
            say(f"saving     step {content['step']}: copied in {spent:.0f} ms, written beside the training")
            self.told = True
        self.writing = self.thread.submit(self.write, content, best)

    def write(self, content: dict[str, Any], best: bool) -> None:
        last = self.folder / "last.pt"
        save(last, content)
        own = self.folder / f"step_{content['step']:07d}.pt"
        link(last, own)
        if best:
            link(last, self.folder / "best.pt")
        older = [path for path in numbered(self.folder) if path.name < own.name]
        for old in older[self.keep - 1 :]:
            old.unlink(missing_ok=True)

    def wait(self) -> None:
        """Until what was saved is on the disk. OSError if it could not be written."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def wait_or_warn(self) -> None:
        """As `wait`, where training goes on and will save again: what could not be written is told."""
        try:
            self.wait()
        except OSError as error:
            say(f"WARNING    {unwritten(self.folder, error)} It is tried again with the next one.")

    def close(self) -> None:
        """As `wait`, where nothing is saved afterwards: what could not be written is an error."""
        try:
            self.wait()
        except OSError as error:
            raise SegtrainError(unwritten(self.folder, error)) from error

    @contextlib.contextmanager
    def open(self) -> Iterator["CheckpointWriter"]:
        """Nothing is left unwritten behind it, whatever ends the training."""
        try:
            yield self
            self.close()
        except BaseException:
            with contextlib.suppress(OSError):
                self.wait()
            raise
        finally:
            self.thread.shutdown()


def unwritten(folder: Path, error: OSError) -> str:
    return f"cannot write the checkpoint in {folder}: {error.strerror or error}. What was saved before is untouched."


def link(source: Path, target: Path) -> None:
    """A second name for the file, or a copy where the file system has no such thing; `target` is replaced whole."""
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    beside.unlink(missing_ok=True)
    try:
        os.link(source, beside)
    except OSError:
        shutil.copyfile(source, beside)
    beside.replace(target)
