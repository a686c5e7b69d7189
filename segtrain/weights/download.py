"""Published weights by name: downloaded once, into the cache, checked by their published hash.

path = weights_file("torchvision:resnet50")  # ~/.cache/segtrain/weights/resnet50-11ad3fa6.pth
"""

import contextlib
import errno
import os
import re
import time
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, build_opener

import torch

from segtrain.console import Progress, say
from segtrain.errors import DataError, UsageError, with_available
from segtrain.files import write_atomically
from segtrain.weights.files import existing, hashes
from segtrain.weights.published import describe_known, known_files

TORCHVISION = "torchvision:"
TRIES = 5  # connections that a download may need after the last one that brought nothing
PAUSE = 2.0  # seconds before another try, doubled each time
TIMEOUT = 30.0  # seconds without an answer
BLOCK = 1 << 20


def weights_file(value: str) -> Path:
    """The file that model.weights names: a path as it is, or for torchvision:NAME that of the cache, fetched if needed.

    UsageError for a file or a name that does not exist; DataError if the file cannot be had.
    """
    if not value.startswith(TORCHVISION):
        return existing(Path(value))
    return fetched(known_by_word(value))


def known_by_word(word: str) -> dict[str, Any]:
    """The published file of a name: as `segtrain weights` lists it, its file name, or torchvision:NAME.

    torchvision:resnet50 is the newest of several files, torchvision's DEFAULT; torchvision:resnet50-0676ba61 is one of
    them. UsageError, with the names, for any other.
    """
    names: dict[str, dict[str, Any]] = {}
    for known in known_files():
        names |= {known["name"]: known, known["file"]: known}
        if known["name"].startswith("torchvision_"):
            stem = known["name"].removeprefix("torchvision_")
            names |= {f"{TORCHVISION}{stem}": known, f"{TORCHVISION}{stem.rpartition('-')[0]}": known}
    if word in names:
        return names[word]
    short = word.startswith(TORCHVISION)
    listed = [name for name in names if name.startswith(TORCHVISION) == short and not name.endswith((".pth", ".tar"))]
    raise UsageError(f"there are no published weights {word!r}{with_available(word, listed)}")


def weights_cache() -> Path:
    """The folder of downloaded weights."""
    return Path(os.environ.get("SEGTRAIN_CACHE") or "~/.cache/segtrain").expanduser() / "weights"


def has_published_hash(path: Path, known: Mapping[str, Any]) -> bool:
    md5, sha256 = hashes(path)
    return md5 == known["md5"] or bool(known.get("sha256") and sha256.startswith(known["sha256"]))


def fetched(known: Mapping[str, Any], target: Path | None = None) -> Path:
    """A published file on this machine: in the cache, in torch's own, or downloaded to `target` or the cache.

    DataError in one sentence, with the link and where to put the file, if it cannot be downloaded; also for files
    behind a page that a program cannot pass.
    """
    wanted, target = target, target or weights_cache() / known["file"]
    places = (target, weights_cache() / known["file"], Path(torch.hub.get_dir()) / "checkpoints" / known["file"])
    for path in dict.fromkeys(places):
        if path.is_file() and has_published_hash(path, known):
            if wanted is None or path == wanted:
                return path
            write_atomically(wanted, path.read_bytes())
            return wanted
    if re.match(r"https?://drive\.google\.com/", known["link"]):
        raise DataError(
            f"{known['name']} is behind a page of Google Drive, which asks before it gives the file: download it by "
            f"hand from {known['link']} and put it at {target}, or give its path"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    with locked(target.with_name(f".{target.name}.lock")):
        if not (target.is_file() and has_published_hash(target, known)):  # else another process was faster
            say(f"download   {known['link']} -> {target}")
            download(known["link"], part, target)
            if not has_published_hash(part, known):
                found = hashes(part)[1]
                part.unlink()
                raise DataError(
                    f"{known['link']} does not give the published file: its sha256 begins with {found[:8]}, not "
                    f"{known.get('sha256') or known['md5']}; the file was changed, or something on the way answers in "
                    f"its place. {by_hand(known['link'], target)}"
                )
            part.replace(target)
    return target


def by_hand(link: str, target: Path) -> str:
    return f"Download {link} on another machine and put it at {target}, or give model.weights=FILE or none"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Inside, no other process of this machine that locks the file is inside too."""
    with path.open("ab") as file:
        with contextlib.suppress(ImportError, OSError):  # Windows; a file system without locks
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def download(link: str, part: Path, target: Path) -> None:
    """Get a file of the web into `part`, going on where an earlier download ended.

    Proxies are those of the environment. A cut connection is tried again, from where it ended. DataError if that does
    not help, and for a file that is gone.
    """
    failures, reason = 0, ""
    part.touch()
    while failures < TRIES:
        if failures:
            time.sleep(PAUSE * 2 ** (failures - 1))
        before = part.stat().st_size
        try:
            if one_connection(link, part):
                return
            reason = "the connection was cut"
        except HTTPError as error:
            if error.code == 416:  # what is there is longer than the file
                part.write_bytes(b"")
            elif error.code < 500 and error.code != 429:
                raise DataError(
                    f"{link} answers {error.code} {error.reason}: the file has moved. {by_hand(link, target)}"
                ) from error
            reason = f"it answers {error.code} {error.reason}"
        except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
            reason = str(getattr(error, "reason", None) or error or type(error).__name__)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
                raise
            reason = str(error)
        failures = 1 if part.stat().st_size > before else failures + 1
    kept = f"; {part.stat().st_size} bytes are kept, and the same command goes on" if part.stat().st_size else ""
    raise DataError(f"cannot download {link} ({reason}){kept}. {by_hand(link, target)}")


def one_connection(link: str, part: Path) -> bool:
    """Append to `part` what the server gives from its end on. Returns whether that is all of the file."""
    have = part.stat().st_size
    headers = {"User-Agent": "segtrain", "Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with build_opener().open(Request(link, headers=headers), timeout=TIMEOUT) as answer:
        span = re.match(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
        goes_on = answer.status == 206 and span is not None and int(span[1]) == have
        if have and not goes_on:
            have = 0  # the server gives the file from its beginning
        length = answer.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        progress = Progress(f"downloading {part.name.removesuffix('.part')} [MB]", max((total or 0) // 10**6, 1))
        try:
            with part.open("r+b") as file:
                file.truncate(have)
                file.seek(have)
                while block := answer.read(BLOCK):
                    file.write(block)
                    have += len(block)
                    progress.show(min(max(have // 10**6, 1), progress.total))
                file.flush()
                os.fsync(file.fileno())
        finally:
            progress.close()
    return total is None or have == total


def describe_download(known: Mapping[str, Any], path: Path) -> str:
    """The row of the table, and the hashes of the file, on several lines."""
    md5, sha256 = hashes(path)
    return f"{describe_known(known)}\n  sha256     {sha256}\n  md5        {md5}"
