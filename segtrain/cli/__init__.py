"""The words on the command line: commands, help, completion."""

from segtrain.cli.commands import COMMANDS
from segtrain.cli.entry import main

__all__ = ["COMMANDS", "main"]
