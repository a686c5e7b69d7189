"""Find files in folders, through linked folders too, however they are linked to each other."""

import os
import re
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path, PurePath

OF_SYSTEMS = (".DS_Store", "Thumbs.db", "desktop.ini", ".gitkeep", ".gitignore")  # which nobody means by a pattern
WILDCARDS = re.compile(r"(\*\*/|\*|\?)")
Above = tuple[tuple[int, int], ...]  # device and inode of the folders that lead to one


def entries(folder: str) -> list[os.DirEntry[str]]:
    """What a folder holds, by name, without the files that macOS puts beside others (._NAME)."""
    with os.scandir(folder) as found:
        return sorted((entry for entry in found if not entry.name.startswith("._")), key=attrgetter("name"))


def files_below(root: Path) -> Iterator[Path]:
    """All files below a folder, by name. A folder that a link leads back to is not entered again."""
    yield from map(Path, paths_below(str(root), ()))


def paths_below(folder: str, above: Above) -> Iterator[str]:
    here = with_folder(folder, above)
    for entry in entries(folder) if here else ():
        if entry.is_dir():
            yield from paths_below(entry.path, here)
        elif entry.is_file():
            yield entry.path


def with_folder(folder: str, above: Above) -> Above:
    """The folders that lead to one, and itself; () if it is among them, by a link."""
    stat = os.stat(folder)  # noqa: PTH116  # of a text: an object for each file takes most of the time
    here = (stat.st_dev, stat.st_ino)
    return () if here in above else (*above, here)


def matching(root: Path, pattern: str) -> Iterator[tuple[str, Path]]:
    """Files below root that match, with the text that the wildcards stand for, joined by '/'.

    pattern: parts joined by '/', in which `*` and `?` stand for text within a part, and `**` for any number of folders;
    everything else stands for itself. ValueError for a pattern that leads out of root or has `**` beside other text.
    """
    parts = pattern.split("/")
    if not pattern or pattern.startswith(("/", "\\")) or ".." in parts or "\x00" in pattern:
        raise ValueError("it has to lead down from there")
    if any("**" in part and part != "**" for part in parts):
        raise ValueError("** stands for whole folders: write it between slashes")
    if parts[-1] == "**":
        raise ValueError("end it with the names of files, such as **/*.png")
    return matches_below(str(root), [part for part in parts if part not in ("", ".")], "", ())


def matches_below(folder: str, parts: list[str], text: str, above: Above) -> Iterator[tuple[str, Path]]:
    """text: of the wildcards that lead to the folder, each with a '/' after it."""
    part, is_last = parts[0], len(parts) == 1
    if part == "**":
        yield from at_any_depth(folder, parts, text, above)
        return
    pieces = WILDCARDS.split(part)
    if len(pieces) == 1:
        path = os.path.join(folder, part)  # noqa: PTH118
        if not is_last and os.path.isdir(path):  # noqa: PTH112
            yield from matches_below(path, parts[1:], text, above)
        elif is_last and os.path.isfile(path):  # noqa: PTH113
            yield text[:-1] or PurePath(path).stem, Path(path)
        return
    text_in = wildcard_text(pieces)
    for entry in entries(folder):
        found = text_in(entry.name)
        if found is None or entry.name in OF_SYSTEMS:
            continue
        if is_last:
            if entry.is_file():
                yield text + found if found else text[:-1] or PurePath(entry.name).stem, Path(entry.path)
        elif entry.is_dir():
            yield from matches_below(entry.path, parts[1:], f"{text}{found}/" if found else text, above)


def wildcard_text(pieces: list[str]) -> Callable[[str], str | None]:
    """A function of a name: the text that the wildcards stand for, joined by '/'; None for a name that does not match.

    pieces: of a part of a pattern: plain text and wildcards in turn.
    """
    expression = re.compile("".join({"*": "(.*)", "?": "(.)"}.get(piece) or re.escape(piece) for piece in pieces), re.S)

    def several(name: str) -> str | None:
        match = expression.fullmatch(name)
        return None if match is None else "/".join(filter(None, match.groups()))

    def one_star(name: str) -> str | None:
        if name.startswith(start) and name.endswith(end) and len(name) >= at_least:
            return name[len(start) : len(name) - len(end)]
        return None

    if pieces[1::2] != ["*"]:
        return several
    start, _, end = pieces
    at_least = len(start) + len(end)
    return one_star  # the same for most patterns, in less time than an expression takes


def at_any_depth(folder: str, parts: list[str], text: str, above: Above) -> Iterator[tuple[str, Path]]:
    here = with_folder(folder, above)
    if not here:
        return
    yield from matches_below(folder, parts[1:], text, ())
    for entry in entries(folder):
        if entry.is_dir():
            yield from at_any_depth(entry.path, parts, f"{text}{entry.name}/", here)
