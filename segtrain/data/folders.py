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
    yield from below(root, [part for part in parts if part not in ("", ".")], (), ())


def below(folder: Path, parts: list[str], texts: tuple[str, ...], above: Above) -> Iterator[tuple[str, Path]]:
    part, rest = parts[0], parts[1:]
    if part == "**":
        stat = folder.stat()
        here = (*above, (stat.st_dev, stat.st_ino))
        if here[-1] in above:
            return
        yield from below(folder, rest, texts, ())
        for entry in entries(folder):
            if entry.is_dir():
                yield from below(folder / entry.name, parts, (*texts, entry.name), here)
        return
    if not WILDCARDS.search(part):
        path = folder / part
        if rest and path.is_dir():
            yield from below(path, rest, texts, above)
        elif not rest and path.is_file():
            yield "/".join(texts) or path.stem, path
        return
    pieces = WILDCARDS.split(part)
    expression = re.compile("".join({"*": "(.*)", "?": "(.)"}.get(piece) or re.escape(piece) for piece in pieces), re.S)
    for entry in entries(folder):
        match = expression.fullmatch(entry.name)
        if match is None:
            continue
        found = (*texts, *(text for text in match.groups() if text))
        if rest and entry.is_dir():
            yield from below(folder / entry.name, rest, found, above)
        elif not rest and entry.is_file():
            yield "/".join(found) or Path(entry.name).stem, folder / entry.name
