"""Paths of this checkout, and the environment of a process that runs it."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "helpers" / "tiny.py"  # a plugin: a backbone of a few thousand numbers


def environment() -> dict[str, str]:
    """For a subprocess that runs this checkout's segtrain."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}
