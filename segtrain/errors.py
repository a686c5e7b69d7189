"""Errors that reach the user as one sentence and an exit status, never as a traceback."""

import difflib
from collections.abc import Iterable

INTERRUPTED = 130  # exit status: stopped by Ctrl-C
REQUEUE = 75  # exit status: saved, start the same command again


class SegtrainError(Exception):
    """Something the user can mend. The message says what was expected, what was found, where, and the remedy."""

    exit_status = 1
    everywhere = False  # of several processes all raise it, and the first one says it


class DataError(SegtrainError):
    """Data, a checkpoint or a run was examined and refused (exit status 1)."""


class UsageError(SegtrainError, ValueError):
    """A command, an option or a path is wrong (exit status 2)."""

    exit_status = 2


class ImageTooLarge(SegtrainError):
    """Too little memory to predict an image of that size [height, width], or so many of them together."""

    def __init__(self, name: str, size: tuple[int, int], together: int = 1) -> None:
        others = f", with {together - 1} more in its batch" if together > 1 else ""
        super().__init__(f"out of memory while predicting {name}, {size[1]}x{size[0]} (width x height){others}")
        self.size = size


def meant(wrong: object, known: Iterable[str], prefix: str = "", likeness: float = 0.6) -> str:
    """The end of a sentence about an unknown name: "; did you mean prefix + nearest?", or "" if none is near."""
    near = difflib.get_close_matches(str(wrong), list(known), 1, likeness)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def with_available(wrong: object, known: Iterable[str], prefix: str = "", likeness: float = 0.6) -> str:
    """As `meant`, followed by all known names: "; did you mean b? Available: a, b" or ". Available: a, b"."""
    return f"{meant(wrong, known, prefix, likeness) or '.'} Available: {', '.join(known) or 'none'}"
