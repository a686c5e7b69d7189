"""Errors that reach the user as one sentence and an exit status, never as a traceback."""

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
