"""Files that are either the old one or the new one, whole, whatever happens while they are written."""

import contextlib
import errno
import json
import math
import os
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from segtrain.console import say
from segtrain.errors import UsageError

AGAIN = 60.0  # seconds after which the same warning is printed again
warned: dict[str, float] = {}  # folder -> time of the last warning about a file in it


def temporary_beside(path: Path) -> Path:
    """A name in the same folder, which no process has, in whatever container: they count processes from 1 each."""
    return path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex[:16]}.tmp")


def file_to_write(output: str | Path, example: str, kind: str = "file") -> Path:
    """The path of output=FILE. UsageError if that is a folder, with the name that a file in it could have."""
    path = Path(output)
    if path.is_dir():
        raise UsageError(f"output={output} is a folder: give the {kind} to write, as {path / example}")
    return path


def as_component(text: str) -> str:
    """The text as one component of a path: what would separate, climb or command a terminal becomes an underscore."""
    return re.sub(r"[/\\\x00-\x1f\x7f-\x9f\ud800-\udc7f\udd00-\udfff]|^\.+$|^$", "_", text)


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write beside, flush to the disk, rename. OSError leaves the old file as it was and no half file behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        with named(path), temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # the rename itself reaches the disk too
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def append(path: Path, data: bytes) -> None:
    """Add to the end of a file. OSError leaves it as it was."""
    with named(path), path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            written = file.write(data)
            if written < len(data):  # the disk became full in between; the rest gives the reason
                file.write(data[written:])
        except OSError:
            file.truncate(size)
            raise


def flush_to_disk(path: Path) -> None:
    """Wait until the disk holds what was appended to a file, if there is one."""
    if path.exists():
        with named(path), path.open("rb") as file:
            os.fsync(file.fileno())


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """An OSError inside names the file, which the system does only of one that cannot be opened."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def side_file(path: Path) -> Iterator[None]:
    """Warn, but keep training, when what is written beside the checkpoints cannot be: the one guard of all that."""
    try:
        yield
    except OSError as error:
        name = str(error.filename or path)
        folder = os.path.dirname(name)  # noqa: PTH120  # of a text
        if time.monotonic() - warned.get(folder, -math.inf) >= AGAIN:
            warned[folder] = time.monotonic()
            say(f"WARNING    cannot write {name}: {reason_and_remedy(error)}; the training goes on without it")


def reason_and_remedy(error: OSError) -> str:
    """'No space left on device; free some there'"""
    full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None))
    return f"{error.strerror or error}{'; free some there, or choose a folder on another disk' if full else ''}"


def set_aside(path: Path, why: str) -> None:
    """Rename a side file that is not what it should be, so that it blocks nothing and is not lost either."""
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    path.rename(aside)
    say(f"damaged    {path} {why}: set aside as {aside.name}")


def read_side_json(path: Path, kind: type) -> Any:
    """The content of a side file; None if there is none, or if it is damaged or of another kind and is set aside."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        set_aside(path, "is no JSON")
        return None
    if not isinstance(content, kind):
        set_aside(path, "is not what segtrain writes there")
        return None
    return content
