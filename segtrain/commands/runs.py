"""`segtrain runs`: list the runs in a folder, how far each got and how it scores, from their small files only."""

from datetime import datetime
from pathlib import Path

from segtrain.config import RunsConfig
from segtrain.console import printable, say
from segtrain.engine.run_reader import RunSummary, read_run
from segtrain.errors import UsageError

HEADER = ("run", "step", "state", "mIoU %", "best %", "at step", "last written", "")
LEFT = (0, 2, 6, 7)  # columns of text; numbers are aligned on the right


def runs(config: RunsConfig) -> list[RunSummary]:
    """Print a line for every run in a folder, the one written last at the end; or the paper's table."""
    root = Path(config.root)
    if not root.is_dir():
        raise UsageError(f"root={root}: no such folder; runs are in runs/, where `segtrain train` was started")
    if config.table == "paper":
        from segtrain.commands.paper import paper_table  # imports Hydra and torch, which a list does not need

        paper_table(root)
        return []
    summaries = [run for folder in root.iterdir() if (run := read_run(folder)) is not None]
    summaries.sort(key=lambda run: (run.written, run.name))
    if not summaries:
        say(f"no runs in {root}")
        return summaries
    table = [HEADER, *map(cells, summaries)]
    widths = [max(len(line[column]) for line in table) for column in range(len(HEADER))]
    for line in table:
        aligned = (
            text.ljust(w) if i in LEFT else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))
        )
        say("  ".join(aligned).rstrip())
    return summaries


def cells(run: RunSummary) -> tuple[str, ...]:
    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    return (
        printable(run.name, inline=True),
        f"{run.step} of {'?' if run.max_steps is None else run.max_steps}",
        printable(run.state, inline=True),
        percent(run.miou),
        percent(run.best),
        "-" if run.best_step is None else str(run.best_step),
        datetime.fromtimestamp(run.written).strftime("%Y-%m-%d %H:%M"),
        printable(run.note, inline=True),
    )
