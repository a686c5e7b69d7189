"""`segtrain runs table=paper`: the tables of the In-Place ABN paper, with the scores of finished runs beside them."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from segtrain.config import flatten, is_safe, with_defaults
from segtrain.config.compose import compose_training
from segtrain.config.stored import wrong_options
from segtrain.config.user_files import read_json
from segtrain.console import say
from segtrain.data.labels import read_json_table
from segtrain.engine.run_reader import int_or_zero, read_mapping, read_run

STATED_BY_SCORE = ("inference.", "dataset.val_split")  # options that evaluation.json states; these are compared instead
PIXELS = {"scales": [1.0], "flip": False, "tile": None, "longest_side": None}  # inference of the segmentation tables
PRECISION = {"precision": "fp32"}  # of both


class Line(NamedTuple):
    """A published row, with a run of its recipe if there is one.

    published: mIoU, or top-1 and top-5, in percent. measured: the same for the run's last checkpoint, None until it is
    finished. notes: how the run differs from the published one, or how far it got.
    """

    table: str
    row: str
    protocol: str
    recipe: str
    published: tuple[float, ...]
    measured: tuple[float, ...] | None = None
    run: str = ""
    notes: tuple[str, ...] = ()


def paper_table(root: Path) -> list[Line]:
    """Print all rows in the order of the tables, with a line for each run of a recipe."""
    folders = runs_by_recipe(root)
    lines = [line for row in read_json_table("paper")["rows"] for line in lines_of(row, folders)]
    cells = [("row", "recipe", "published", "measured", "difference"), *map(cells_of, lines)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    table = None
    for line, texts in zip([None, *lines], cells, strict=True):
        if line is not None and line.table != table:
            table = line.table
            say(table)
        aligned = (
            text.ljust(w) if i < 2 else text.rjust(w) for i, (text, w) in enumerate(zip(texts, widths, strict=True))
        )
        say("  ".join(aligned).rstrip())
        if line is not None and line.run:
            say(f"    {line.run}: {'; '.join(line.notes) or 'as published, except for the hardware'}")
    rows = {(line.row, line.recipe, line.protocol) for line in lines}
    scored = {(line.row, line.recipe, line.protocol) for line in lines if line.measured is not None}
    alike = {(line.row, line.recipe, line.protocol) for line in lines if line.measured is not None and not line.notes}
    say(f"{len(scored)} of {len(rows)} rows are measured in {root}, {len(alike)} of them in the published way (%)")
    return lines


def cells_of(line: Line) -> tuple[str, ...]:
    protocol = f", {line.protocol}" if line.protocol else ""
    start = (f"{line.row}{protocol}", line.recipe, figures(line.published))
    if line.measured is None:
        return (*start, "unfinished" if line.run else "not run", "")
    away = (ours - theirs for ours, theirs in zip(line.measured, line.published, strict=True))
    return (*start, figures(line.measured), "/".join(f"{value:+.2f}" for value in away))


def figures(values: tuple[float, ...]) -> str:
    return "/".join(f"{value:.2f}" for value in values)


# ------------------------------------------------------------------------------------------------ a run and its row


def runs_by_recipe(root: Path) -> dict[str, list[Path]]:
    """Name of a recipe -> folders of its runs."""
    folders: dict[str, list[Path]] = {}
    for folder in sorted(root.iterdir()):
        config = read_mapping(folder / "config.yaml", []) if folder.is_dir() else None
        if config is not None and config.get("experiment"):
            folders.setdefault(str(config["experiment"]), []).append(folder)
    return folders


def lines_of(row: Mapping[str, Any], runs: Mapping[str, list[Path]]) -> Iterator[Line]:
    """The lines of one row of paper.json: one for each run, for ImageNet in each protocol."""
    table = f"Table {row['table']}" if isinstance(row["table"], int) else f"{row['table']} of the official repository"
    published = row.get("top1_top5", {"": [row.get("miou")]})
    folders = [*runs.get(row["recipe"], []), *runs.get(row.get("also", ""), [])]
    for protocol, values in published.items():
        line = Line(table, row["row"], protocol, row["recipe"], tuple(values))
        yield from [measured(line, row, folder) for folder in folders] or [line]


def measured(line: Line, row: Mapping[str, Any], folder: Path) -> Line:
    """The line with the run in a folder, with its score whose conditions differ least from the paper's."""
    state = read_run(folder)
    keys = ("top1", "top5") if line.protocol else ("miou",)
    broken: list[str] = []
    scores = [
        read_mapping(path, broken)
        for path in (folder / "evaluation.json", *folder.glob("evaluations/*/evaluation.json"))
    ]
    known = [
        score for score in scores
        if score is not None and is_score(score, keys) and (not line.protocol or protocol_of(score) == line.protocol)
        and evaluated_activation(score, folder) == row.get("activation", evaluated_activation({}, folder))
    ]  # fmt: skip
    if state is None or state.state != "finished" or not known:
        progress = "not evaluated in this way"
        if state is not None and state.state != "finished":
            progress = f"{state.state} at step {state.step}"
        return line._replace(run=str(folder), notes=(progress, *broken))
    notes, score = min(((conditions(row, score), score) for score in known), key=lambda item: len(item[0]))
    values = tuple(100 * float(score[key]) for key in keys)
    return line._replace(measured=values, run=str(folder), notes=(*notes, *training(row, folder), *broken))


def is_score(score: Mapping[str, Any], keys: tuple[str, ...]) -> bool:
    """Whether an evaluation.json has the figures, and the rest has the form that segtrain writes."""
    parts = [score.get(key) or {} for key in ("inference", "protocol")]
    figures_there = all(isinstance(score.get(key), int | float) for key in keys)
    return figures_there and all(isinstance(part, dict) for part in parts)


def protocol_of(score: Mapping[str, Any]) -> str:
    return str((score.get("inference") or {}).get("name"))


def evaluated_activation(score: Mapping[str, Any], folder: Path) -> str | None:
    """The activation that the network was evaluated with, by default that of its training (paper, Table 1)."""
    config = read_mapping(folder / "config.yaml", []) or {}
    trained = (config.get("model") or {}).get("activation")
    return (score.get("protocol") or {}).get("activation", trained)


def conditions(row: Mapping[str, Any], score: Mapping[str, Any]) -> list[str]:
    """How the conditions of a score differ from the paper's: images, scales, weights."""
    notes = []
    for key in ("dataset", "split"):
        if score.get(key) != row[key]:
            notes.append(f"{key} {score.get(key)}, not {row[key]}")
    how = score.get("inference") or {}
    published = PIXELS if "miou" in row else read_json_table("paper")["protocols"][protocol_of(score)]
    for key, usual in (published | PRECISION).items():
        if how.get(key, usual) != usual:
            notes.append(f"inference.{key}={how[key]}")
    if (name := Path(str(score.get("checkpoint"))).name) != "last.pt":
        notes.append(f"{name}, not last.pt")
    protocol = score.get("protocol") or {}
    if protocol.get("weights", "raw") != "raw":
        notes.append(f"{protocol['weights']} weights")
    return notes + [str(warning) for warning in protocol.get("warnings", [])]


def training(row: Mapping[str, Any], folder: Path) -> list[str]:
    """How a run's training differs from the recipe's: options, and number of crops per normalisation."""
    broken: list[str] = []
    content = read_mapping(folder / "config.yaml", broken)
    if content is None or any(wrong_options(content)):
        return broken or ["config.yaml is broken"]
    recipe, config = recipe_options(row["recipe"]), options(with_defaults(content))
    notes = [
        f"{key}={as_word(config.get(key))} (recipe: {as_word(recipe.get(key))})"
        for key in sorted(recipe.keys() | config.keys())
        if recipe.get(key) != config.get(key) and not is_safe(key) and not key.startswith(STATED_BY_SCORE)
    ]
    wanted = row.get("crops_per_card")
    if wanted is None or str(config.get("model.norm")).endswith("_sync"):
        return notes
    path = folder / "environment.json"
    sessions = read_json(path) if path.exists() else []
    known = [session for session in sessions if isinstance(session, dict)] if isinstance(sessions, list) else []
    micro_batches = {
        int_or_zero(session.get("processes")) * int_or_zero(session.get("accumulation")) for session in known
    } - {0}
    sizes = {config["trainer.batch_size"] / count for count in micro_batches} - {wanted}
    return [*notes, *(f"normalisation over {crops:g} crops, not {wanted}" for crops in sorted(sizes))]


def as_word(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@cache
def recipe_options(recipe: str) -> dict[str, Any]:
    """The options of a recipe as it is now, flat: {"trainer.seed": 0, ...}."""
    return options(asdict(compose_training(f"experiment={recipe}")))


def options(config: dict[str, Any]) -> dict[str, Any]:
    """Options in one flat dict, with the name of the weights only: the file may be in another folder."""
    flattened = flatten(config)
    return flattened | {"model.weights": Path(flattened["model.weights"]).name}
