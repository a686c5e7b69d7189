"""The published weights that this package knows: where each file is, its hash, its licence and its published scores.

They are the rows of segtrain/data/tables/weights.json.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from segtrain.data.labels import read_json_table


@cache
def known_files() -> list[dict[str, Any]]:
    """All rows of the table, one dict per file."""
    files: list[dict[str, Any]] = read_json_table("weights")["files"]
    return files


def known_by_name(path: Path) -> dict[str, Any] | None:
    return next((known for known in known_files() if path.name in (known["file"], known["name"])), None)


def known_by_hash(md5: str, sha256: str) -> dict[str, Any] | None:
    for known in known_files():
        if md5 in (known["md5"], known["md5_old"]) or (known.get("sha256") and sha256.startswith(known["sha256"])):
            return known
    return None


def has_hash(known: Mapping[str, Any]) -> bool:
    return bool(known["md5"] or known.get("sha256"))


def describe_known(known: Mapping[str, Any]) -> str:
    """Format a row of the table for a message, on several lines."""
    hashed = f"md5 {known['md5']}" if known["md5"] else f"sha256 {known.get('sha256')}..."
    if not has_hash(known):
        hashed = "none is published: known by its name and its tensors"
    old = f" (first release {known['md5_old']})" if known["md5_old"] else ""
    head = f" + {known['head']}" if known.get("head") else ""
    return (
        f"{known['name']}: {known['backbone']}{head}, {known['classes']} classes, {known['activation']}\n"
        f"  file       {known['file']}\n  page       {known['page']}\n  link       {known['link']}\n"
        f"  hash       {hashed}{old}\n  published  {known['published']}\n  licence    {known['licence']}"
    )
