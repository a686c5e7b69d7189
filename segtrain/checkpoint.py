"""Checkpoints: everything that a run needs to go on, or a result needs to be used, in one file of plain tensors."""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from segtrain.errors import DataError, UsageError
from segtrain.files import write_atomically
from segtrain.models import Segmenter

FORMAT = 1
KIND = "segtrain checkpoint"


def save(path: Path, content: dict[str, Any]) -> None:
    """Write `content` (tensors, numbers, text, lists and dicts of them) so that the old file survives any failure."""
    buffer = io.BytesIO()
    torch.save({"kind": KIND, "format": FORMAT, **content}, buffer)
    write_atomically(path, buffer.getvalue())


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, on the CPU. Never runs code from the file. DataError for any other file."""
    if not path.is_file():
        raise UsageError(f"no checkpoint file {path}; a run keeps its own as runs/<name>/last.pt and best.pt")
    other = f"{path} is not a checkpoint that segtrain wrote"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(f"{other}: it holds objects that could run code, which are never loaded") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        reason = str(error).partition("\n")[0] or "it ends too early"
        raise DataError(f"{path} is damaged or cut short ({reason}): use another copy") from error
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise DataError(f"{other} (it lacks the mark {KIND!r}); runs write last.pt and best.pt")
    if content["format"] != FORMAT:
        raise DataError(
            f"{path} has checkpoint format {content['format']}, this version reads {FORMAT}: update segtrain"
        )
    return content


def load_weights(model: Segmenter, weights: dict[str, torch.Tensor], path: Path) -> None:
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
