"""Find files in folders, through linked folders too, however they are linked to each other."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

WILDCARDS = re.compile(r"(\*\*/|\*|\?)")
Above = tuple[tuple[int, int], ...]  # device and inode of the folders that lead to one


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, by name, without the files that macOS puts beside others (._NAME)."""
    with os.scandir(folder) as found:
        return sorted((entry for entry in found if not entry.name.startswith("._")), key=lambda entry: entry.name)


def files_below(root: Path, above: Above = ()) -> Iterator[Path]:
    """All files below a folder, by name. A folder that a link leads back to is not entered again."""
    stat = root.stat()
    here = (*above, (stat.st_dev, stat.st_ino))
    if here[-1] in above:
        return
    for entry in entries(root):
        if entry.is_dir():
            yield from files_below(root / entry.name, here)
        elif entry.is_file():
            yield root / entry.name


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
    yield from matches_below(root, [part for part in parts if part not in ("", ".")], (), ())


def matches_below(folder: Path, parts: list[str], texts: tuple[str, ...], above: Above) -> Iterator[tuple[str, Path]]:
    if parts[0] == "**":
        yield from at_any_depth(folder, parts, texts, above)
        return
    for entry, found in of_one_part(folder, parts[0]):
        if len(parts) > 1 and entry.is_dir():
            yield from matches_below(entry, parts[1:], (*texts, *found), above)
        elif len(parts) == 1 and entry.is_file():
            yield "/".join((*texts, *found)) or entry.stem, entry


def at_any_depth(folder: Path, parts: list[str], texts: tuple[str, ...], above: Above) -> Iterator[tuple[str, Path]]:
    stat = folder.stat()
    here = (*above, (stat.st_dev, stat.st_ino))
    if here[-1] in above:
        return
    yield from matches_below(folder, parts[1:], texts, ())
    for entry in entries(folder):
        if entry.is_dir():
            yield from at_any_depth(folder / entry.name, parts, (*texts, entry.name), here)


def of_one_part(folder: Path, part: str) -> Iterator[tuple[Path, list[str]]]:
    """What a folder holds that fits one part of a pattern, with the text of its wildcards."""
    pieces = WILDCARDS.split(part)
    if len(pieces) == 1:
        yield folder / part, []
        return
    expression = re.compile("".join({"*": "(.*)", "?": "(.)"}.get(piece) or re.escape(piece) for piece in pieces), re.S)
    for entry in entries(folder):
        match = expression.fullmatch(entry.name)
        if match is not None:
            yield folder / entry.name, [text for text in match.groups() if text]
