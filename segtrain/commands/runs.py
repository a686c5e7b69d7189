"""`segtrain runs`: list the runs in a folder, what differs between them, and how they score, from their small files."""

import re
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from segtrain.commands.runs_table import column_names, csv_text, differing_options, screen_options, shown, which_group
from segtrain.config import RunsConfig
from segtrain.console import printable, say
from segtrain.engine.run_reader import RunSummary, read_run
from segtrain.errors import UsageError
from segtrain.files import file_to_write, write_atomically

SEED = "trainer.seed"
SHORT = 60  # characters of a note


class Row(NamedTuple):
    """A run, or several finished ones that differ in their seed only. run: the one written last, with their means."""

    run: RunSummary
    seeds: list[Any] = []
    spread: float | None = None  # standard deviations of mIoU and best mIoU
    best_spread: float | None = None  # None too where a run has no best mIoU


def runs(config: RunsConfig) -> list[RunSummary]:
    """Print a line for every run in a folder, the one written last at the end; or the paper's table."""
    root = Path(config.root)
    if not root.is_dir():
        raise UsageError(f"root={root}: no such folder; runs are in runs/, where `segtrain train` was started")
    output = None if config.output is None else file_to_write(config.output, "runs.csv", "CSV file")
    if config.table == "paper":
        from segtrain.commands.paper import paper_table  # imports Hydra and torch, which a list does not need

        paper_table(root)
        return []
    summaries = [run for folder in root.iterdir() if (run := read_run(folder)) is not None]
    summaries.sort(key=order_by(config.sort))
    if not summaries:
        say(f"no runs in {root}")
        return summaries
    keys = differing_options(summaries)
    rows = [Row(run) for run in summaries] if config.seeds == "each" else group_seeds(summaries)
    rows.sort(key=lambda row: order_by(config.sort)(row.run))
    for line in screen_lines(rows, keys):
        say(line)
    if output is not None:
        write_atomically(output, csv_text(summaries, keys).encode(errors="surrogateescape"))
        say(str(output))
    return summaries


def order_by(sort: str) -> Callable[[RunSummary], Any]:
    """The key for sorting: the newest last, or the highest score first, those without one at the end."""

    def key(run: RunSummary) -> Any:
        if sort == "written":
            return run.written, run.name
        if sort == "name":
            return run.name
        score = run.miou if sort == "miou" else run.best
        return score is None, -(score or 0.0), run.name

    return key


def group_seeds(summaries: Sequence[RunSummary]) -> list[Row]:
    """A row for all finished runs of the same options but the seed, and one for each other run."""
    groups: dict[Any, list[RunSummary]] = {}
    for run in summaries:
        is_done = run.state == "finished" and run.miou is not None and SEED in run.options
        groups.setdefault(which_group(run, SEED) if is_done else run.name, []).append(run)
    rows = []
    for members in groups.values():
        if len(members) == 1:
            rows.append(Row(members[0]))
            continue
        scores = [run.miou for run in members if run.miou is not None]
        best = [run.best for run in members if run.best is not None]
        newest = max(members, key=lambda run: run.written)
        name = re.sub(r"-(trainer\.)?seed=\d+(-[0-9a-f]{8}$)?", "", newest.name)
        of_best = (fmean(best), stdev(best)) if len(best) == len(members) else (None, None)
        mean = newest._replace(name=name, miou=fmean(scores), best=of_best[0], best_step=None, note="")
        seeds = sorted((run.options[SEED] for run in members), key=str)
        rows.append(Row(mean, seeds, stdev(scores), of_best[1]))
    return rows


def screen_lines(rows: list[Row], keys: list[str]) -> list[str]:
    """The table, its columns aligned, and what must be said about it."""
    options, left_out = screen_options([row.run for row in rows], keys)
    has_spread = any(row.seeds for row in rows)
    middle = ["mIoU %", *(["+-"] if has_spread else []), "best %", *(["+-"] if has_spread else []), "at step"]
    header = ["run", "step", "state", *middle, *column_names(options), "last written", ""]
    table = [header, *(cells(row, options, has_spread) for row in rows)]
    text_columns = {0, 2, *range(3 + len(middle), len(header))}
    numeric = {
        place for place, key in enumerate(options, 3 + len(middle))
        if all(isinstance(row.run.options.get(key), int | float) for row in rows)
    }  # fmt: skip
    widths = [max(len(line[column]) for line in table) for column in range(len(header))]
    lines = []
    for line in table:
        aligned = [
            text.ljust(width) if place in text_columns - numeric else text.rjust(width)
            for place, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(aligned).rstrip())
    if has_spread:
        lines.append("mIoU of several seeds: mean and standard deviation (n - 1); seeds=each lists every run")
    if left_out:
        few = f"{', '.join(left_out[:3])}{', ...' if len(left_out) > 3 else ''}"
        one = len(left_out) == 1
        lines.append(f"{len(left_out)} more option{'' if one else 's'} differ{'s' if one else ''} ({few}): "
                     "output=runs.csv has all")  # fmt: skip
    return lines


def cells(row: Row, options: list[str], has_spread: bool) -> list[str]:
    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    run = row.run
    spread, best_spread = ([percent(row.spread)], [percent(row.best_spread)]) if has_spread else ([], [])
    values = [
        ",".join(map(str, row.seeds)) if key == SEED and row.seeds else shown(run.options.get(key, "-"))
        for key in options
    ]
    note = f"{len(row.seeds)} seeds" if row.seeds else short(run.note)
    return [
        printable(run.name, inline=True),
        f"{run.step} of {'?' if run.max_steps is None else run.max_steps}",
        printable(run.state, inline=True),
        percent(run.miou),
        *spread,
        percent(run.best),
        *best_spread,
        "-" if run.best_step is None else str(run.best_step),
        *values,
        datetime.fromtimestamp(run.written).strftime("%Y-%m-%d %H:%M"),
        note,
    ]


def short(note: str) -> str:
    """The beginning of a note in one line; output=runs.csv has all of it."""
    text = printable(note.strip(), inline=True)
    return text if len(text) <= SHORT else f"{text[: SHORT - 3].rstrip()}..."
