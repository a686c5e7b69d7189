"""Files that are either the old one or the new one, whole, whatever happens while they are written."""

import os
import re
from pathlib import Path


def as_component(text: str) -> str:
    """The text as one component of a path: what would separate, climb or command a terminal becomes an underscore."""
    return re.sub(r"[/\\\x00-\x1f\x7f-\x9f\ud800-\udc7f\udd00-\udfff]|^\.+$|^$", "_", text)


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write beside, flush to the disk, rename. OSError leaves the old file as it was and no half file behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
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
