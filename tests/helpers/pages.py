"""Code blocks, shell commands, code spans and links of the README pages."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from tests.helpers.checkout import ROOT

NAMES = ("README.md", "configs/README.md", "datasets/README.md", "scripts/README.md", "segtrain/README.md")
PAGES = {name: (ROOT / name).read_text() for name in NAMES}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


class Command(NamedTuple):
    """A shell command of a page: its words as bash splits them, after VARIABLE=value, without a redirection."""

    page: str
    variables: tuple[str, ...]
    words: tuple[str, ...]
    text: str


def blocks(name: str, *languages: str) -> list[str]:
    """Code blocks of a page, in these languages if any are given."""
    return [body for language, body in FENCE.findall(PAGES[name]) if not languages or language in languages]


def languages(name: str) -> list[str]:
    return [language for language, _ in FENCE.findall(PAGES[name])]


def prose(name: str) -> str:
    """The page without its code blocks."""
    return FENCE.sub("", PAGES[name])


def commands(name: str) -> list[Command]:
    """All lines of the shell blocks that are not comments. A backslash at the end of a line continues it."""
    found = []
    for line in "\n".join(blocks(name, "sh")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        count = next(i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word))
        end = words.index(">") if ">" in words else len(words)
        found.append(Command(name, tuple(words[:count]), tuple(words[count:end]), line))
    return found


def spans(name: str) -> list[str]:
    """Code spans of the text, between backquotes."""
    return [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", prose(name))]


def links(name: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose(name))


def anchors(name: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(name), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def paths(text: str) -> list[str]:
    """Files and folders of the checkout that the text names, with NAME and RECIPE as wildcards.

    datasets/ holds data on the reader's machine: only its page belongs to the checkout.
    """
    folders = r"(?:segtrain|tests|scripts|configs|\.ci)/[\w./*-]*"
    found = re.findall(rf"(?<![\w/.<>-])(?:\./)?({folders}|datasets/README\.md)", text)
    return [re.sub(r"\b[A-Z]{4,}\b", "*", path.rstrip(".")) for path in found]


def exists(path: str) -> bool:
    return bool(list(ROOT.glob(path.rstrip("/")))) if path else False


def folder_of(name: str) -> Path:
    return (ROOT / name).parent
