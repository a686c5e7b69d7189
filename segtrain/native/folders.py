"""Folders that code is loaded from: no other user may be able to write to them.

    SEGTRAIN_CACHE   the cache (default ~/.cache/segtrain), anywhere that other users cannot write to

If the cache cannot be written, or other users can write to it, this process uses a temporary folder instead. What
belongs to root is trusted like what belongs to this user.
"""

import atexit
import functools
import os
import shutil
import stat
import tempfile
import warnings
from pathlib import Path

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def folder_for(name: str) -> Path:
    """The folder `name` in the cache, created with mode 0700. A temporary one, with a warning, if it cannot be used."""
    cache = Path(os.environ.get("SEGTRAIN_CACHE") or "~/.cache/segtrain").expanduser().absolute()
    folder = cache / name
    try:
        make_private(folder, default=not os.environ.get("SEGTRAIN_CACHE"))
        reason = refusal_of_folder(folder)
        if not reason and not any(folder.iterdir()):  # libraries in it can be loaded without a right to write
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = f"it cannot be written ({error.strerror or error})"
    if not reason:
        return folder
    return temporary_folder(os.getpid(), f"segtrain: {folder} is not used: {reason}") / name


def make_private(folder: Path, default: bool) -> None:
    """Create the folder and its parent, the cache. Takes from others the right to write to the default cache."""
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.parent.lstat()
    if default and found.st_uid == os.getuid() and stat.S_ISDIR(found.st_mode) and found.st_mode & OTHERS_WRITE:
        folder.parent.chmod(0o700)
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    readable = stat.S_ISDIR(found.st_mode) and found.st_mode & 0o077 and not found.st_mode & OTHERS_WRITE
    if readable and found.st_uid == os.getuid() != 0:
        folder.chmod(0o700)


def refusal_of_folder(folder: Path) -> str:
    """'' if only this user and root can write to the folder, else the reason in one sentence.

    The folder itself must not be a symbolic link. The cache may be one, or its path may contain one, that belongs to
    this user or root.
    """
    if not hasattr(os, "getuid"):
        return ""
    reason = refusal_of_entry(folder, folder.lstat(), linked=False)
    for path in dict.fromkeys((*folder.parents, *folder.parent.resolve().parents, folder.parent.resolve())):
        reason = reason or refusal_of_entry(path, path.lstat(), linked=True)
    return reason


def refusal_of_entry(path: Path, found: os.stat_result, linked: bool) -> str:
    if found.st_uid not in (os.getuid(), 0):
        return f"{path} belongs to another user (uid {found.st_uid})"
    if stat.S_ISLNK(found.st_mode):
        return "" if linked else f"{path} is a symbolic link: move it away"
    if not stat.S_ISDIR(found.st_mode):
        return f"{path} is not a folder"
    # In a folder with the sticky bit, such as /tmp, others can add entries but not replace any.
    if found.st_mode & OTHERS_WRITE and not (linked and found.st_mode & stat.S_ISVTX):
        return f"others can write to {path} (mode {stat.S_IMODE(found.st_mode):04o}): chmod go-w {path}"
    return ""


def refusal_of_file(path: Path) -> str:
    """'' if only this user and root can have written the file, else the reason in one sentence."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        return "it is not a regular file"
    if not hasattr(os, "getuid"):
        return ""
    if found.st_uid not in (os.getuid(), 0):
        return f"it belongs to another user (uid {found.st_uid})"
    return f"others can write to it (mode {stat.S_IMODE(found.st_mode):04o})" if found.st_mode & OTHERS_WRITE else ""


@functools.cache
def temporary_folder(process: int, why: str) -> Path:
    """A folder of mode 0700 and unpredictable name, which this process removes at its end. Warns once, with `why`."""
    folder = Path(tempfile.mkdtemp(prefix="segtrain-"))
    atexit.register(remove_own, folder, process)
    for name in ("abn", "cupy"):
        (folder / name).mkdir(mode=0o700)
    warnings.warn(
        f"{why}; compiled code will go to {folder} for this process. SEGTRAIN_CACHE=FOLDER chooses another place.",
        stacklevel=4,
    )
    return folder


def remove_own(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not in its forks
        shutil.rmtree(folder, ignore_errors=True)
