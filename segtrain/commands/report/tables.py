"""The tables of a report as HTML. Whatever comes from files, names of classes and images too, is escaped."""

from collections.abc import Iterable
from html import escape
from typing import Any

import numpy as np

from segtrain.commands.report.charts import score_bar
from segtrain.commands.report.pictures import Pair, image_scores, ranked
from segtrain.console import as_utf8, printable
from segtrain.scoring import bootstrap
from segtrain.scoring.image_counts import ImageConfusions

MOST_ROWS = 2000


def text(value: Any) -> str:
    """Any value as HTML text, also inside an attribute."""
    return escape(as_utf8(printable(str(value), inline=True)), quote=True)


def in_percent(value: float | None) -> str:
    return "-" if value is None or value != value else f"{100 * value:.1f}"


def cell(shown: str, value: float | str | None = None, kind: str = "") -> str:
    """A cell; value: what the column is sorted by."""
    sorts = "" if value is None else f' data-value="{text("" if value != value else value)}"'
    own = f' class="{kind}"' if kind else ""
    return f"<td{sorts}{own}>{shown}</td>"


def sortable(caption: str, columns: Iterable[tuple[str, str]], rows: Iterable[str]) -> str:
    """A table whose headers sort it. columns: name, and 'text' for one that is sorted as text. rows: <tr> elements."""
    heads = "".join(head(name, kind) for name, kind in columns)
    return (
        f'<table class="sortable"><caption>{text(caption)}</caption><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def head(name: str, kind: str) -> str:
    """A header with a button that sorts; without a name there is none."""
    if not name:
        return '<td aria-hidden="true"></td>'
    own = f' class="{kind}"' if kind else ""
    return f'<th scope="col" aria-sort="none"{own}><button type="button">{text(name)}</button></th>'


def class_table(result: dict[str, Any], images: ImageConfusions | None) -> str:
    """IoU of each class as a bar, with its interval where the counts of the images are known."""
    found: list[bootstrap.Estimate] | None = None
    if images is not None:
        found = bootstrap.score_intervals(images.evaluated().parts(), images.about["absent_classes"]).classes
    objects = result.get("per_class_iiou") or {}
    rows = []
    for number, (name, value) in enumerate(result["per_class"].items()):
        limits: tuple[float, float] | None = None
        if found is not None and found[number].low == found[number].low:
            limits = max(found[number].low, 0.0), min(found[number].high, 1.0)
        cells = [f'<th scope="row" class="text">{text(name)}</th>', cell(score_bar(value, limits), kind="wide")]
        cells.append(cell(in_percent(value), "" if value is None else value))
        if limits is None:
            cells.append(cell("-", ""))
        else:
            cells.append(cell(f"{in_percent(limits[0])} to {in_percent(limits[1])}", limits[0]))
        if objects:
            cells.append(cell(in_percent(objects.get(name)), "" if objects.get(name) is None else objects[name]))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    columns = [("class", "text"), ("", ""), ("IoU %", ""), ("95 % interval", "")]
    return sortable("IoU of each class", [*columns, *([("iIoU %", "")] if objects else [])], rows)


def image_table(images: ImageConfusions) -> str:
    """The images with their scores, the worst first; of more than MOST_ROWS the worst and the best half of these."""
    order, scores = ranked(images), image_scores(images)
    left_out = len(order) - MOST_ROWS
    if left_out > 0:
        order = np.concatenate([order[: MOST_ROWS // 2], order[-MOST_ROWS // 2 :]])
    names = [*images.classes, "(other)"]
    evaluated, rows = images.evaluated(), []
    starts = np.searchsorted(evaluated.image, np.arange(len(images.names) + 1))
    for number in order:
        part = slice(starts[number], starts[number + 1])
        truth, prediction, count = evaluated.truth[part], evaluated.prediction[part], evaluated.pixels[part]
        wrong = np.where(truth != prediction, count, 0)
        total, errors, most = int(count.sum()), int(wrong.sum()), int(np.argmax(wrong))
        pair = f"{names[truth[most]]} as {names[prediction[most]]}" if errors else ""
        height, width = images.sizes[number]
        rows.append(
            f'<tr><th scope="row" class="text">{text(images.names[number])}</th>'
            + cell(in_percent(scores[number]), round(float(scores[number]), 6))
            + cell(in_percent(1 - errors / total), round(1 - errors / total, 6)) + cell(f"{errors:,}", errors)
            + cell(f"{width}x{height}", int(width) * int(height)) + cell(text(pair), kind="text") + "</tr>"
        )  # fmt: skip
    columns = [("image", "text"), ("mIoU %", ""), ("pixels right %", ""), ("wrong pixels", ""), ("size", ""),
               ("most confused", "text")]  # fmt: skip
    note = f", of which the {left_out} in the middle are left out" if left_out > 0 else ""
    caption = f"{len(ranked(images))} images with labels{note}; mIoU over the classes that occur in the image"
    return sortable(caption, columns, rows)


def pair_table(images: ImageConfusions, pairs: list[Pair]) -> str:
    """The most confused pairs of classes."""
    names = [*images.classes, "(other)"]
    rows = [
        f'<tr><th scope="row" class="text">{text(names[pair.truth])}</th>'
        + cell(text(names[pair.prediction]), kind="text") + cell(f"{pair.pixels:,}", pair.pixels)
        + cell(in_percent(pair.share), pair.share) + "</tr>"
        for pair in pairs
    ]  # fmt: skip
    columns = [("class", "text"), ("predicted as", "text"), ("pixels", ""), ("% of the class", "")]
    return sortable("Pairs of classes with the most confused pixels", columns, rows)
