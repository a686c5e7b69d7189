"""What a report says about a run, read from the run's folder."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from segtrain.config.stored import wrong_options
from segtrain.config.user_files import read_json, read_yaml
from segtrain.engine.run_reader import RunSummary, read_run
from segtrain.errors import DataError
from segtrain.scoring.evaluation_file import read_evaluation
from segtrain.scoring.image_counts import ImageConfusions
from segtrain.weights import checkpoint


class RunFacts(NamedTuple):
    """result: content of evaluation.json; None for a run that is not finished. images: the counts of each image.
    metrics: the lines of metrics.jsonl. sessions: content of environment.json. saved: the checkpoint last.pt, or the
    newest that can be read; {} if there is none. notes: what is missing and how to get it."""

    folder: Path
    summary: RunSummary
    config: dict[str, Any]
    result: dict[str, Any] | None
    images: ImageConfusions | None
    metrics: list[dict[str, Any]]
    sessions: list[dict[str, Any]]
    saved: dict[str, Any]
    notes: list[str]

    @property
    def classifies(self) -> bool:
        """Whether it is a run of image classification."""
        model = self.config.get("model", {})
        return isinstance(model, dict) and model.get("head") == "classifier"

    def series(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of every line of the log that has the value."""
        pairs = [(as_number(line.get("step")), as_number(line.get(key))) for line in self.metrics]
        return [(step, value) for step, value in pairs if step is not None and value is not None]


def as_number(value: Any) -> float | None:
    """A finite number; None for anything else."""
    is_one = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
    return value if is_one else None


def read_facts(folder: Path) -> RunFacts:
    """Read a run folder. DataError if it holds no run; what is missing in it becomes a note."""
    summary = read_run(folder) if folder.is_dir() else None
    if summary is None:
        raise DataError(f"{folder} is no run: it has no config.yaml (`segtrain runs` lists those that are)")
    config = read_yaml(folder / "config.yaml")
    if faults := list(wrong_options(config)):
        raise DataError(f"{folder / 'config.yaml'} holds no options of a training: {'; '.join(faults[:3])}")
    notes = [summary.note] if summary.note else []
    result, images = None, None
    if not (folder / "evaluation.json").is_file():
        notes.append("The run is not finished: it has no evaluation.json. The scores are those of its last validation.")
    else:
        try:
            result = read_json(folder / "evaluation.json")
            if not isinstance(result, dict):
                raise DataError(f"{folder / 'evaluation.json'} is no evaluation")
            images = None if "top1" in result else read_evaluation(folder).images
        except DataError as error:
            notes.append(f"No figures of single images: {error}")
    found = checkpoint.newest_file(folder)
    if found is None:
        notes.append("There is no checkpoint in the run folder: no image can be predicted again.")
    return RunFacts(
        folder, summary, config, result, images, read_log(folder / "metrics.jsonl"),
        read_sessions(folder / "environment.json"), {} if found is None else found[1], notes,
    )  # fmt: skip


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that can be read."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:  # half a line, at the end of a run that was killed
            continue
    return [line for line in found if isinstance(line, dict)]


def read_sessions(path: Path) -> list[dict[str, Any]]:
    try:
        content = read_json(path)
    except DataError:
        return []
    return [item for item in content if isinstance(item, dict)] if isinstance(content, list) else []
