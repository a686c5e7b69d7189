"""The words on the command line: commands, help, completion."""

from segtrain.cli.entry import main

__all__ = ["main"]
