"""`segtrain report`: write the page of a run."""

from pathlib import Path

from segtrain.commands.report.facts import read_facts
from segtrain.commands.report.page import page
from segtrain.commands.report.pictures import pictures
from segtrain.config import ReportConfig
from segtrain.console import say
from segtrain.files import file_to_write, write_atomically


def report_run(config: ReportConfig) -> Path:
    """Write one HTML file about a run, which loads nothing. Returns its path.

    The best and worst images are predicted again by last.pt, where the data are there; else the page says why not.
    UsageError if the output is a folder; DataError if the folder holds no run.
    """
    folder = Path(config.run or "")
    output = file_to_write(config.output or folder / "report.html", "report.html", "HTML file")
    facts = read_facts(folder)
    shown = pictures(facts, config.pictures, config.root, config.device)
    for note in [*facts.notes, *shown.notes]:
        say(f"note        {note}")
    content = page(facts, shown).encode("utf-8", "backslashreplace")
    write_atomically(output, content)
    say(f"report      {len(content) / 1e6:.2f} MB, one file, needs no network")
    say(str(output))
    return output
