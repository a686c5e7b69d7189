"""What a run folder says about its run, from its small files only: no checkpoint is read and torch is not needed."""

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

from segtrain.config.keys import flatten
from segtrain.config.stored import with_defaults
from segtrain.config.user_files import read_json, read_yaml
from segtrain.errors import DataError

FILES = ("config.yaml", "metrics.jsonl", "evaluation.json", "state.json", "last.pt")
SILENT = 120  # seconds without a heartbeat after which a run counts as stopped
OTHER_INFERENCE = "other_inference_until"  # in environment.json: up to this step another inference was validated with
RECENT = 600  # the same since the last written file, for runs of versions without a heartbeat


class RunSummary(NamedTuple):
    """One run. miou, best: fractions on the validation split. note: files that cannot be read, or why it ended.
    options: those of config.yaml by their keys, such as trainer.seed."""

    name: str
    step: int
    max_steps: int | None
    state: str
    miou: float | None
    best: float | None
    best_step: int | None
    written: float
    note: str
    options: dict[str, Any] = {}


def read_run(folder: Path) -> RunSummary | None:
    """Summarise the run in a folder; None if the folder holds no run."""
    if not (folder / "config.yaml").is_file():
        return None
    notes: list[str] = []
    config = read_mapping(folder / "config.yaml", notes)
    if config is not None and not isinstance(config.get("trainer"), dict):
        return None  # the file of another program
    evaluation = read_mapping(folder / "evaluation.json", notes) or {}
    status = read_mapping(folder / "state.json", notes) or {}
    last, scores = read_metrics(folder / "metrics.jsonl", notes)
    written = max(path.stat().st_mtime for name in FILES if (path := folder / name).exists())
    max_steps = status.get("max_steps") or ((config or {}).get("trainer") or {}).get("max_steps")
    if max_steps is None and evaluation:
        max_steps = evaluation.get("step")  # finished; its length was given in epochs
    comparable = [score for score in scores if score[0] > other_inference(folder / "environment.json")]
    best = max(comparable, key=lambda score: score[1], default=None)
    if status.get("reason"):
        notes.append(str(status["reason"]))
    return RunSummary(
        folder.name, max(last, int_or_zero(status.get("step")), int_or_zero(evaluation.get("step"))), max_steps,
        state_of(status, bool(evaluation), written), scores[-1][1] if scores else None,
        best[1] if best else None, best[0] if best else None, written, "; ".join(notes),
        flatten(completed(config or {})),
    )  # fmt: skip


def completed(config: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration with the options that came later, so that they make no difference between runs."""
    try:
        return with_defaults(config) if config else config
    except (AttributeError, TypeError):  # groups that are no mappings, by hand
        return config


def other_inference(path: Path) -> int:
    """The last step that was validated with other options than the run has now; 0 if there is none."""
    try:
        sessions = read_json(path) if path.exists() else []
    except DataError:
        return 0
    found = [item.get(OTHER_INFERENCE) for item in sessions if isinstance(item, dict)]
    return max(map(int_or_zero, found), default=0)


def state_of(status: dict[str, Any], evaluated: bool, written: float) -> str:
    """finished, stopped, failed or running; "running?" if only the time of the last written file suggests it.

    status: the content of state.json. evaluated: there is an evaluation.json. written: time of the last written file.
    """
    if status.get("state") == "running":
        heartbeat = status.get("heartbeat")
        alive = isinstance(heartbeat, int | float) and time.time() - heartbeat < SILENT
        return "running" if alive else "stopped"
    if status.get("state"):
        return str(status["state"])
    if evaluated:
        return "finished"
    return "running?" if time.time() - written < RECENT else "stopped"


def int_or_zero(value: Any) -> int:
    return value if isinstance(value, int) else 0


def read_mapping(path: Path, notes: list[str]) -> dict[str, Any] | None:
    """The content of a YAML or JSON file; None if there is no such file, or, with a note, if it cannot be read."""
    if not path.exists():
        return None
    try:
        content = read_json(path) if path.suffix == ".json" else read_yaml(path)
    except DataError:
        content = None
    if isinstance(content, dict):
        return content
    notes.append(f"{path.name} is broken")
    return None


def read_metrics(path: Path, notes: list[str]) -> tuple[int, list[tuple[int, float]]]:
    """The last step, and (step, mIoU) of every validation. An incomplete last line is no error: the run was killed."""
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
