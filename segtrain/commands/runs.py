"""`segtrain runs`: what is in runs/ and how far it got, from the small files of each run only."""

import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from segtrain.config import RunsConfig
from segtrain.errors import UsageError

FILES = ("config.yaml", "metrics.jsonl", "evaluation.json", "state.json", "last.pt")
SILENT = 120  # seconds without a heartbeat after which a run is not taken to be running
RECENT = 600  # the same for a run of a version that writes none
HEADER = ("run", "step", "state", "mIoU %", "best %", "at step", "last written", "")


class Row(NamedTuple):
    """One run. miou, best: fractions on the validation split. note: files that could not be read, or why it ended."""

    name: str
    step: int
    max_steps: int | None
    state: str
    miou: float | None
    best: float | None
    best_step: int | None
    written: float
    note: str


def runs(config: RunsConfig) -> list[Row]:
    """Prints a line for every run in a folder, the one written last at the end."""
    root = Path(config.root)
    if not root.is_dir():
        raise UsageError(f"root={root}: no such folder; runs are in runs/, where `segtrain train` was started")
    if config.table == "paper":
        from segtrain.commands.paper import paper_table  # needs Hydra and torch, which a list does not

        paper_table(root)
        return []
    found = [row for folder in root.iterdir() if (row := read(folder)) is not None]
    found.sort(key=lambda row: (row.written, row.name))
    if not found:
        print(f"no runs in {root}")
        return found
    table = [HEADER, *map(cells, found)]
    widths = [max(len(line[column]) for line in table) for column in range(len(HEADER))]
    for line in table:
        left = (0, 2, 6, 7)  # numbers are aligned on the right
        aligned = (
            text.ljust(w) if i in left else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join(aligned).rstrip())
    return found


def cells(row: Row) -> tuple[str, ...]:
    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    return (
        row.name,
        f"{row.step} of {'?' if row.max_steps is None else row.max_steps}",
        row.state,
        percent(row.miou),
        percent(row.best),
        "-" if row.best_step is None else str(row.best_step),
        datetime.fromtimestamp(row.written).strftime("%Y-%m-%d %H:%M"),
        row.note,
    )


def read(folder: Path) -> Row | None:
    """The run in a folder, or None if that is none."""
    if not (folder / "config.yaml").is_file():
        return None
    notes: list[str] = []
    config = read_mapping(folder / "config.yaml", notes)
    if config is not None and not isinstance(config.get("trainer"), dict):
        return None  # somebody else's
    evaluation = read_mapping(folder / "evaluation.json", notes) or {}
    told = read_mapping(folder / "state.json", notes) or {}
    last, scores = read_metrics(folder / "metrics.jsonl", notes)
    written = max(path.stat().st_mtime for name in FILES if (path := folder / name).exists())
    max_steps = told.get("max_steps") or ((config or {}).get("trainer") or {}).get("max_steps")
    if max_steps is None and evaluation:
        max_steps = evaluation.get("step")  # given as epochs, and finished
    best = max(scores, key=lambda score: score[1], default=None)
    if told.get("reason"):
        notes.append(str(told["reason"]))
    return Row(
        folder.name, max(last, whole(told.get("step")), whole(evaluation.get("step"))), max_steps,
        state_of(told, bool(evaluation), written), scores[-1][1] if scores else None,
        best[1] if best else None, best[0] if best else None, written, "; ".join(notes),
    )  # fmt: skip


def state_of(told: dict[str, Any], evaluated: bool, written: float) -> str:
    """finished, stopped, failed or running; 'running?' where only the time of the files speaks for it."""
    if told.get("state") == "running":
        heartbeat = told.get("heartbeat")
        alive = isinstance(heartbeat, int | float) and time.time() - heartbeat < SILENT
        return "running" if alive else "stopped"
    if told.get("state"):
        return str(told["state"])
    if evaluated:
        return "finished"
    return "running?" if time.time() - written < RECENT else "stopped"


def whole(value: Any) -> int:
    return value if isinstance(value, int) else 0


def read_mapping(path: Path, notes: list[str]) -> dict[str, Any] | None:
    """The content of a YAML or JSON file; None if there is no such file, or with a note if it cannot be read."""
    if not path.exists():
        return None
    try:
        text = path.read_text()
        fast = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        content = json.loads(text) if path.suffix == ".json" else yaml.load(text, fast)
    except (OSError, ValueError, yaml.YAMLError):
        content = None
    if isinstance(content, dict):
        return content
    notes.append(f"{path.name} is broken")
    return None


def read_metrics(path: Path, notes: list[str]) -> tuple[int, list[tuple[int, float]]]:
    """The last step, and (step, mIoU) of every validation. A last line that was cut short is no fault."""
    try:
        lines = path.read_text().splitlines() if path.exists() else []
    except (OSError, ValueError):
        lines = ["broken", ""]
    last, scores = 0, []
    for number, line in enumerate(lines, 1):
        wanted = '"val/miou"' in line or number >= len(lines) - 1
        if not wanted and line.startswith('{"step": ') and line.endswith("}"):
            continue  # parsing all lines of hundreds of runs would take seconds
        try:
            values = json.loads(line)
            last = max(last, int(values["step"]))
            if values.get("val/miou") is not None:
                scores.append((int(values["step"]), float(values["val/miou"])))
        except (ValueError, KeyError, TypeError, AttributeError):
            if number < len(lines):
                notes.append(f"{path.name}, line {number} is broken")
    return last, scores
