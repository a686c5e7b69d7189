"""Checkpoints: all that is needed to resume a run or to use its result, in one file of tensors and plain values."""

import errno
import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from segtrain.console import say
from segtrain.errors import DataError, UsageError
from segtrain.files import write_atomically
from segtrain.weights.schema import wrong_content

FORMAT = 2  # no release wrote format 1
KIND = "segtrain checkpoint"


# What torch.load raises for bytes that torch.save did not write; a pickle's own error, Foreign, comes before.
UNREADABLE = (
    RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError,
    ArithmeticError, NotImplementedError, zipfile.BadZipFile, zlib.error, struct.error,
)  # fmt: skip


class Damaged(DataError):
    """A checkpoint that is cut short or has changed since it was written."""


class Foreign(DataError):
    """An intact file that `save` did not write."""


def save(path: Path, content: dict[str, Any]) -> None:
    """Write `content` (tensors, numbers, text, lists and dicts of them) so that the old file survives any failure."""
    buffer = io.BytesIO()
    torch.save({"kind": KIND, "format": FORMAT, **content}, buffer)
    write_atomically(path, buffer.getbuffer())


def load(path: Path) -> dict[str, Any]:
    """Read a file that `save` wrote onto the CPU, without running code from it.

    UsageError if it does not exist; DataError for any other file: Damaged, Foreign, or one of another format.
    """
    if not path.is_file():
        raise UsageError(f"no checkpoint file {path}; a run keeps its own as runs/<name>/last.pt and best.pt")
    other = f"{path} is not a checkpoint that segtrain wrote"
    try:
        if zipfile.is_zipfile(path):  # torch writes check sums but does not verify them
            with zipfile.ZipFile(path) as archive:
                wrong = archive.testzip()
            if wrong is not None:
                raise zipfile.BadZipFile(f"{wrong} is not what was written")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise Foreign(f"{other}: it holds objects that could run code, which are never loaded") from error
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EIO, errno.EINVAL):
            raise  # a fault of the disk, not of the file
        reason = str(error).partition("\n")[0] or "it ends too early"
        raise Damaged(f"{path} is damaged or cut short ({reason}): use another copy") from error
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise Foreign(f"{other} (it lacks the mark {KIND!r}); runs write last.pt and best.pt")
    require_own_content(content, path)
    return content


def require_own_content(content: dict[str, Any], path: Path) -> None:
    """DataError unless a checkpoint has this version's format, and every entry is what segtrain writes there."""
    if type(content.get("format")) is not int:
        raise Damaged(f"{path} does not hold what segtrain writes (format is none): use another copy")
    if content["format"] < FORMAT:
        raise DataError(
            f"{path} has checkpoint format {content['format']}, which no release wrote and this version does not read: "
            "train again"
        )
    if content["format"] > FORMAT:
        raise DataError(
            f"{path} has checkpoint format {content['format']} (written by segtrain "
            f"{version_of(content)}), this version reads up to "
            f"{FORMAT}: update segtrain"
        )
    if faults := list(wrong_content(content)):
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise Damaged(f"{path} does not hold what segtrain writes ({'; '.join(faults[:3])}{more}): use another copy")


def version_of(content: dict[str, Any]) -> str:
    """The version that wrote a checkpoint, as far as it says."""
    environment = content.get("environment")
    return str(environment.get("segtrain")) if isinstance(environment, dict) else "of a later version"


def require_same_tensors(model: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """DataError, naming the checkpoint `path`, unless its weights have the names and shapes of the network's."""
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


def first_not_finite(weights: Mapping[str, torch.Tensor]) -> str | None:
    """The first tensor with a NaN or an infinity and how many, as "cls.weight (3 of 64 values)"; None for none."""
    for name, tensor in weights.items():
        if (tensor.is_floating_point() or tensor.is_complex()) and not bool((finite := tensor.isfinite()).all()):
            return f"{name} ({int((~finite).sum())} of {tensor.numel()} values)"
    return None


def require_finite(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """DataError, naming the file `path`, if the weights hold a NaN or an infinity."""
    first = first_not_finite(weights)
    if first is not None:
        raise DataError(
            f"{path} cannot be used: it holds NaN or infinite weights, first in {first}; use a checkpoint from before, "
            "or another copy"
        )


def load_strict(model: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Copy a checkpoint's weights into the network. DataError if a name or a shape does not match, or a weight is NaN
    or infinite."""
    require_same_tensors(model, weights, path)
    require_finite(weights, path)
    model.load_state_dict(weights)


# ------------------------------------------------------------------------------------------------- those of a run


def numbered(folder: Path) -> list[Path]:
    """The files step_<n>.pt of a run, the newest first."""
    return sorted(folder.glob("step_*.pt"), reverse=True)


def newest(folder: Path) -> dict[str, Any] | None:
    """The newest readable checkpoint of a run; None if there are no checkpoints. Damaged if none is readable."""
    found = newest_file(folder)
    return None if found is None else found[1]


def newest_file(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """As `newest`, with its file."""
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
        return path, content
    if first is not None:
        raise first
    return None


def step_of(path: Path) -> int | None:
    """The step of a checkpoint, without reading its tensors; None if it is missing or damaged."""
    try:
        step = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"]
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, pickle.UnpicklingError):
        return None
    return step if isinstance(step, int) else None
