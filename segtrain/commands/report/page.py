"""The page of a report: its sections, in one HTML file that loads nothing."""

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

import yaml

from segtrain.commands.report.charts import heat_map, line_chart
from segtrain.commands.report.facts import RunFacts
from segtrain.commands.report.pictures import (
    RIGHT,
    UNLABELLED,
    WRONG,
    Pictures,
    Shown,
    Uris,
    as_uris,
    checkpoint_facts,
    confused_pairs,
)
from segtrain.commands.report.tables import class_table, image_table, in_percent, pair_table, text
from segtrain.console import duration
from segtrain.data.labels import LabelTable
from segtrain.scoring.report import describe_inference

CURVES = (("loss", "train/loss", ""), ("learning rate", "train/lr", ""), ("validation mIoU", "val/miou", ""),
          ("validation top-1", "val/top1", ""), ("gradient norm", "train/gradient_norm", ""))  # fmt: skip
MACHINE = (("images per second", "train/images_per_s", ""), ("memory, GB", "train/memory_gb", " GB"),
           ("fraction of the time spent waiting for data", "train/data_wait", ""))  # fmt: skip

PROTOCOL = (("rules", "rules"), ("averaging", "averaging"), ("absent classes", "absent_classes"),
            ("predictions outside the classes", "ignored_predictions"), ("labels from", "labels_from"),
            ("resolution", "resolution"), ("precision", "precision"), ("weights", "weights"), ("code", "code"),
            ("SHA-256 of the names of the images", "split_sha256"))  # fmt: skip


def asset(name: str) -> str:
    return resources.files("segtrain.commands.report").joinpath(name).read_text(encoding="utf-8")


def page(facts: RunFacts, shown: Pictures) -> str:
    """The whole file. It may load nothing: its policy forbids every request and every script but its own."""
    style, script = asset("page.css"), asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    sections = [
        ("scores", "Scores", scores(facts)), ("curves", "Curves", charts(facts, CURVES)),
        ("classes", "Classes", classes(facts)), ("confusions", "Confusions", confusions(facts)),
        ("examples", "Best and worst images", example_images(facts, shown)),
        ("images", "All images", all_images(facts)),
        ("machine", "Memory and throughput", charts(facts, MACHINE)),
        ("made", "What the run was made of", made_of(facts)),
    ]  # fmt: skip
    sections = [section for section in sections if section[2]]
    links = "".join(f'<li><a href="#{key}">{title}</a></li>' for key, title, _ in sections)
    body = "".join(
        f'<section aria-labelledby="{key}"><h2 id="{key}">{title}</h2>{content}</section>'
        for key, title, content in sections
    )
    name = text(facts.summary.name)
    notes = "".join(f'<p class="note">{text(note)}</p>' for note in [*facts.notes, *shown.notes])
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,"><title>{name}</title>'
        f"<style>{style}</style></head><body><header><h1>{name}</h1>{headline(facts)}{notes}"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header><main>{body}</main>'
        f"<script>{script}</script></body></html>\n"
    )


def headline(facts: RunFacts) -> str:
    """The large figures at the top."""
    summary, result = facts.summary, facts.result or {}
    metric = "top-1" if facts.classifies else "mIoU"
    value = result.get("top1", result.get("miou", summary.miou))
    steps = f"{summary.step} of {summary.max_steps or '?'}"
    figures = [(f"{metric} %", in_percent(value)), ("state", summary.state), ("steps", steps)]
    if result.get("pixel_accuracy") is not None:
        figures.insert(1, ("pixels right %", in_percent(result["pixel_accuracy"])))
    if isinstance(facts.saved.get("elapsed"), int | float):
        figures.append(("training", duration(facts.saved["elapsed"])))
    return f'<dl class="big">{"".join(f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for k, v in figures)}</dl>'


def card(entries: Iterable[tuple[str, Any]]) -> str:
    """Names and values; those without a value are left out."""
    rows = "".join(
        f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in entries if value not in (None, "", [])
    )
    return f'<dl class="card">{rows}</dl>'


def scores(facts: RunFacts) -> str:
    """The averages, and the protocol by which they were measured."""
    result = facts.result
    if result is None:
        return ""
    protocol = result.get("protocol") or {}
    named = (("mIoU %", "miou"), ("top-1 %", "top1"), ("top-5 %", "top5"), ("iIoU %", "iiou"),
             ("category mIoU %", "category_miou"), ("category iIoU %", "category_iiou"),
             ("pixel accuracy %", "pixel_accuracy"), ("mean accuracy %", "mean_accuracy"),
             ("frequency weighted IoU %", "frequency_weighted_iou"), ("boundary mIoU %", "boundary_miou"),
             ("position prior, mIoU %", "position_prior_miou"))  # fmt: skip
    entries: list[tuple[str, Any]] = [
        (name, in_percent(result[key])) for name, key in named if result.get(key) is not None
    ]
    counted = protocol.get("images") or {}
    inference = protocol.get("inference") or result.get("inference")
    entries += [
        ("dataset", f"{result.get('dataset')} {result.get('split')}"),
        ("images", counted.get("seen", result.get("images"))),
        ("images as published", counted.get("published")),
        ("inference", f"{inference.get('name')}: {describe_inference(inference)}" if inference else None),
        ("checkpoint", f"{result.get('checkpoint')}, step {result.get('step')}"),
        ("ignored labels", with_commas(protocol.get("ignored_labels"))),
    ]
    entries += [(name, protocol.get(key)) for name, key in PROTOCOL]
    warnings = "".join(f'<p class="note">{text(line)}</p>' for line in protocol.get("warnings") or [])
    other = protocol.get("miou_under_other_rules") or {}
    more = card((name, in_percent(value)) for name, value in other.items())
    under = f"<details><summary>mIoU % of the same counts under other rules</summary>{more}</details>" if other else ""
    return f"{warnings}{card(entries)}{under}"


def with_commas(values: Any) -> str:
    return ", ".join(map(str, values)) if isinstance(values, list) else ""


def charts(facts: RunFacts, wanted: Iterable[tuple[str, str, str]]) -> str:
    drawn = [line_chart(title, facts.series(key), unit, dots=key.startswith("val/")) for title, key, unit in wanted]
    return f'<div class="charts">{"".join(drawn)}</div>' if any(drawn) else ""


def classes(facts: RunFacts) -> str:
    if facts.result is None or "per_class" not in facts.result:
        return ""
    note = ""
    if facts.images is not None:
        note = ('<p class="soft">The line on a bar is a 95 % interval: what other images of the same kind would give, '
                f"by resampling these {len(facts.images.names)}.</p>")  # fmt: skip
    table = class_table(facts.result, facts.images)
    return f'{note}<div class="scroll" tabindex="0" role="region" aria-label="IoU of each class">{table}</div>'


def confusions(facts: RunFacts) -> str:
    """The heat map, and the pairs."""
    if facts.images is None:
        return ""
    matrix, names = facts.images.evaluated().confusion(), [*facts.images.classes, "(other)"]
    data = json.dumps({"names": names, "matrix": matrix.tolist()}, separators=(",", ":")).replace("<", "\\u003c")
    return (
        '<p class="soft">Rows: labelled class, columns: predicted class, stronger for a higher fraction of the row. '
        "Point at a cell, or move with the arrow keys.</p>"
        f'{heat_map(matrix, names)}<p id="cell" role="status" aria-live="polite"></p>'
        f'<script type="application/json" id="matrix">{data}</script>'
        '<div class="scroll" tabindex="0" role="region" aria-label="Confused pairs">'
        f"{pair_table(facts.images, confused_pairs(facts.images, 20))}</div>"
    )


def example_images(facts: RunFacts, shown: Pictures) -> str:
    """Best, worst and confused images: image, labels, prediction, errors."""
    if shown.table is None:
        return ""
    groups = (("Worst images", shown.worst), ("Best images", shown.best), ("Confused classes", shown.confused))
    made = as_uris((images for _, images in groups), shown.table)
    parts = [color_legend(shown.table)]
    for (title, images), uris in zip(groups, made, strict=True):
        if images:
            parts.append(f"<h3>{title}</h3>")
            parts += [example(one, uri) for one, uri in zip(images, uris, strict=True)]
    moved = sum(one.moved for one in {one.name: one for _, images in groups for one in images}.values())
    if moved:
        parts.append(f'<p class="note">At least {moved:,} pixels of these images are predicted otherwise than '
                     "in the evaluation, as on another device or with another version of torch.</p>")  # fmt: skip
    return "".join(parts)


def example(one: Shown, uri: Uris) -> str:
    name, what = text(one.name), f"{text(one.title)}: " if one.title else ""
    kinds = (("image", uri.image), ("labels", uri.target), ("prediction", uri.prediction), ("errors", uri.errors))
    parts = "".join(
        f'<div><img src="{source}" width="{uri.width}" height="{uri.height}" alt="{kind} of {name}">'
        f"<span>{kind}</span></div>"
        for kind, source in kinds
    )
    return f'<figure class="example"><figcaption>{what}{name}</figcaption><div class="parts">{parts}</div></figure>'


def color_legend(table: LabelTable) -> str:
    """The colours of the classes and of the error map."""

    def patch(name: str, color: Iterable[int]) -> str:
        fill = "rgb({},{},{})".format(*color)
        return (
            f'<li><svg viewBox="0 0 1 1" aria-hidden="true"><rect width="1" height="1" fill="{fill}"/></svg> '
            f"{text(name)}</li>"
        )

    classes = "".join(patch(name, color.tolist()) for name, color in zip(table.names, table.colors, strict=True))
    errors = patch("right", RIGHT) + patch("wrong", WRONG) + patch("no label", UNLABELLED)
    return (
        f'<ul class="legend" aria-label="Colours of the classes">{classes}</ul>'
        f'<ul class="legend" aria-label="Colours of the error map"><li>errors:</li>{errors}</ul>'
    )


def all_images(facts: RunFacts) -> str:
    if facts.images is None:
        return ""
    table = image_table(facts.images)
    return f'<div class="scroll tall" tabindex="0" role="region" aria-label="All images">{table}</div>'


def made_of(facts: RunFacts) -> str:
    """Weights, data and their licences, the sessions, the configuration."""
    found = checkpoint_facts(facts)
    start = found.get("start") or {}
    limits = "".join(
        f'<p class="note">not for commercial use: {text(line)}</p>' for line in found.get("noncommercial") or []
    )
    entries = [("data", f"{name} ({licence})") for name, licence in (found.get("data") or {}).items()]
    entries += [("weights", f"{one.get('file')} ({one.get('licence')})") for one in found.get("weights") or []]
    entries += [("started from", f"{start.get('file')}, SHA-256 {start.get('sha256')}")] if start else []
    sessions = "".join(card(session_entries(one)) for one in facts.sessions)
    config = yaml.safe_dump(facts.config, sort_keys=False, allow_unicode=True)
    parts = [limits, card(entries) if entries else '<p class="soft">The checkpoint names neither data nor weights.</p>']
    if sessions:
        parts.append(f"<h3>Sessions</h3>{sessions}")
    lines = "\n".join(map(text, config.splitlines()))
    parts.append(f'<details><summary>Configuration (config.yaml)</summary><pre tabindex="0">{lines}</pre></details>')
    return "".join(parts)


def session_entries(session: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    git = session.get("git") or {}
    yield from ((key, session.get(key)) for key in ("started", "command", "host", "processes", "threads"))
    yield (
        "versions",
        f"segtrain {session.get('segtrain')}, torch {session.get('torch')}, Python {session.get('python')}",
    )
    yield "GPUs", with_commas(session.get("cards"))
    yield "commit", git.get("segtrain") if isinstance(git, dict) else None
