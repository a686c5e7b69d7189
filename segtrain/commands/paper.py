"""`segtrain runs table=paper`: the tables of the In-Place ABN paper, measured beside published, from finished runs."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from segtrain.commands.runs import read, read_mapping, whole
from segtrain.config import is_safe, with_defaults
from segtrain.config.compose import compose_training
from segtrain.data.labels import read_json_table
from segtrain.engine.run import flatten

TOLD_BY_SCORE = ("inference.", "dataset.val_split")  # options that are judged by what a score says of itself
PIXELS = {"scales": [1.0], "flip": False, "tile": None, "longest_side": None}  # how segmentation's figures were found


class Line(NamedTuple):
    """A published row, and a run of its recipe if there is one. published: mIoU, or top-1 and top-5, in percent.

    measured: the same of the run's last checkpoint, None before it is finished. notes: what of the run is not as
    published, or how far it is.
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
    """Prints all rows, in the order of the tables, each run of a recipe on a line of its own."""
    found = runs_by_recipe(root)
    lines = [line for row in read_json_table("paper")["rows"] for line in lines_of(row, found)]
    cells = [("row", "recipe", "published", "measured", "difference"), *map(cells_of, lines)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    shown = None
    for line, texts in zip([None, *lines], cells, strict=True):
        if line is not None and line.table != shown:
            shown = line.table
            print(shown)
        aligned = (
            text.ljust(w) if i < 2 else text.rjust(w) for i, (text, w) in enumerate(zip(texts, widths, strict=True))
        )
        print("  ".join(aligned).rstrip())
        if line is not None and line.run:
            print(f"    {line.run}: {'; '.join(line.notes) or 'as published, but for the hardware'}")
    rows = {(line.row, line.recipe, line.protocol) for line in lines}
    scored = {(line.row, line.recipe, line.protocol) for line in lines if line.measured is not None}
    alike = {(line.row, line.recipe, line.protocol) for line in lines if line.measured is not None and not line.notes}
    print(f"{len(scored)} of {len(rows)} rows are measured in {root}, {len(alike)} of them in the published way (%)")
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
    found: dict[str, list[Path]] = {}
    for folder in sorted(root.iterdir()):
        config = read_mapping(folder / "config.yaml", []) if folder.is_dir() else None
        if config is not None and config.get("experiment"):
            found.setdefault(str(config["experiment"]), []).append(folder)
    return found


def lines_of(row: Mapping[str, Any], found: Mapping[str, list[Path]]) -> Iterator[Line]:
    """The lines of one row of paper.json; an ImageNet row has one for each protocol."""
    table = f"Table {row['table']}" if isinstance(row["table"], int) else f"{row['table']} of the official repository"
    published = row.get("top1_top5", {"": [row.get("miou")]})
    folders = [*found.get(row["recipe"], []), *found.get(row.get("also", ""), [])]
    for protocol, values in published.items():
        line = Line(table, row["row"], protocol, row["recipe"], tuple(values))
        yield from [measured(line, row, folder) for folder in folders] or [line]


def measured(line: Line, row: Mapping[str, Any], folder: Path) -> Line:
    """The line with the run in a folder: with its score that was found most as the paper does it."""
    state = read(folder)
    broken: list[str] = []
    scores = [
        read_mapping(path, broken)
        for path in (folder / "evaluation.json", *folder.glob("evaluations/*/evaluation.json"))
    ]
    known = [
        score for score in scores
        if score is not None and (not line.protocol or protocol_of(score) == line.protocol)
        and activation_of(score, folder) == row.get("activation", activation_of({}, folder))
    ]  # fmt: skip
    if state is None or state.state != "finished" or not known:
        how_far = (
            "not evaluated so" if state is None or state.state == "finished" else f"{state.state} at step {state.step}"
        )
        return line._replace(run=str(folder), notes=(how_far, *broken))
    keys = ("top1", "top5") if line.protocol else ("miou",)
    told = sorted(((conditions(row, score), score) for score in known), key=lambda item: len(item[0]))
    notes, score = told[0]
    values = tuple(100 * float(score[key]) for key in keys)
    return line._replace(measured=values, run=str(folder), notes=(*notes, *training(row, folder), *broken))


def protocol_of(score: Mapping[str, Any]) -> str:
    return str((score.get("inference") or {}).get("name"))


def activation_of(score: Mapping[str, Any], folder: Path) -> str | None:
    """What a network was evaluated with: by default what it was trained with (paper, Table 1)."""
    config = read_mapping(folder / "config.yaml", []) or {}
    trained = (config.get("model") or {}).get("activation")
    return (score.get("protocol") or {}).get("activation", trained)


def conditions(row: Mapping[str, Any], score: Mapping[str, Any]) -> list[str]:
    """What of a score's conditions is not the paper's: on which pictures, at which scales, of which weights."""
    found = []
    for key in ("dataset", "split"):
        if score.get(key) != row[key]:
            found.append(f"{key} {score.get(key)}, not {row[key]}")
    how = score.get("inference") or {}
    published = PIXELS if "miou" in row else read_json_table("paper")["protocols"][protocol_of(score)]
    for key, usual in published.items():
        if how.get(key, usual) != usual:
            found.append(f"inference.{key}={how[key]}")
    if (name := Path(str(score.get("checkpoint"))).name) != "last.pt":
        found.append(f"{name}, not last.pt")
    card = score.get("protocol") or {}
    if card.get("weights", "raw") != "raw":
        found.append(f"{card['weights']} weights")
    return found + [str(warning) for warning in card.get("warnings", [])]


def training(row: Mapping[str, Any], folder: Path) -> list[str]:
    """What of a run's training is not the recipe's, and norms that saw more or fewer crops at a time."""
    broken: list[str] = []
    content = read_mapping(folder / "config.yaml", broken)
    if content is None:
        return broken
    recipe, config = recipe_options(row["recipe"]), options(with_defaults(content))
    found = [
        f"{key}={shown(config.get(key))} (recipe: {shown(recipe.get(key))})"
        for key in sorted(recipe.keys() | config.keys())
        if recipe.get(key) != config.get(key) and not is_safe(key) and not key.startswith(TOLD_BY_SCORE)
    ]
    wanted = row.get("crops_per_card")
    if wanted is None or str(config.get("model.norm")).endswith("_sync"):
        return found
    sessions = json.loads((folder / "environment.json").read_text()) if (folder / "environment.json").exists() else []
    parts = {whole(session.get("processes")) * whole(session.get("accumulation")) for session in sessions} - {0}
    seen = {config["trainer.batch_size"] / part for part in parts} - {wanted}
    return [*found, *(f"norms saw {crops:g} crops at a time, not {wanted}" for crops in sorted(seen))]


def shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@cache
def recipe_options(recipe: str) -> dict[str, Any]:
    """{"trainer.seed": 0, ...} of a recipe as it is now."""
    return options(asdict(compose_training(f"experiment={recipe}")))


def options(config: dict[str, Any]) -> dict[str, Any]:
    """Flat; of the file of weights its name only, which may lie anywhere."""
    found = flatten(config)
    return found | {"model.weights": Path(found["model.weights"]).name}
