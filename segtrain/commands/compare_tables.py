"""The words of a comparison: what is printed, and compare.md. Figures are in percent, differences in points."""

from collections.abc import Iterator
from typing import Any

from segtrain.console import printable


def in_points(value: float | None, signed: bool = False) -> str:
    return "-" if value is None else f"{100 * value:{'+' if signed else ''}.2f}"


def span(one: dict[str, Any], signed: bool = False) -> str:
    """'[-0.12, +0.40]', or '-' without an interval."""
    return "-" if one["low"] is None else f"[{in_points(one['low'], signed)}, {in_points(one['high'], signed)}]"


def excludes_zero(one: dict[str, Any]) -> bool:
    return one["low"] is not None and (one["low"] > 0 or one["high"] < 0)


def verdict(pair: dict[str, Any], images: int) -> str:
    """What follows for the mIoU, in a sentence."""
    first, second, mean = pair["first"], pair["second"], pair["miou"]
    if pair["identical_counts"]:
        return f"{second} - {first}: no difference: both have the same counts in each of the {images} images"
    if mean["low"] is None:
        return f"{second} - {first}: no interval: {images} image{'s' if images > 1 else ''} cannot show a spread"
    text = f"mIoU {in_points(mean['value'], True)} points, 95 % interval {span(mean, True)}"
    if pair["better"] is None:
        return f"{second} - {first}: no difference: {text} holds 0, with {images} images"
    return f"{second} - {first}: {pair['better']} is better: {text}"


def class_verdict(pair: dict[str, Any], content: dict[str, Any]) -> str:
    """How many classes differ, beside how many would by chance."""
    known = [one for one in pair["per_class"].values() if one["low"] is not None]
    differ = sum(map(excludes_zero, known))
    chance = (1 - content["level"]) * len(known)
    return f"{differ} of {len(known)} classes have an interval without 0; about {chance:.1f} would by chance"


def rows_of(pair: dict[str, Any], content: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Class, IoU of both, difference, interval, images with the class, verdict; first of the mIoU."""
    inputs = {one["letter"]: one for one in content["inputs"]}
    one, two = inputs[pair["first"]], inputs[pair["second"]]
    yield (
        "mIoU", in_points(one["miou"]["value"]), in_points(two["miou"]["value"]),
        in_points(pair["miou"]["value"], True), span(pair["miou"], True), str(content["images"]),
        mark(pair["miou"], pair),
    )  # fmt: skip
    for name, found in pair["per_class"].items():
        few = " (few images)" if name in content["few_images"] else ""
        yield (
            printable(name, inline=True), in_points(one["per_class"][name]["value"]),
            in_points(two["per_class"][name]["value"]), in_points(found["value"], True), span(found, True),
            str(content["images_with_class"][name]), mark(found, pair) + few,
        )  # fmt: skip


def mark(found: dict[str, Any], pair: dict[str, Any]) -> str:
    if found["value"] is None or found["low"] is None:
        return "no interval"
    return (
        "no difference" if not excludes_zero(found) else f"{pair['second' if found['value'] > 0 else 'first']} better"
    )


def header(pair: dict[str, Any]) -> tuple[str, ...]:
    one, two = pair["first"], pair["second"]
    return "class", f"{one} %", f"{two} %", f"{two} - {one}", "95 % interval", "images", ""


def input_line(one: dict[str, Any]) -> str:
    seed = "" if one["seed"] is None else f", seed {one['seed']}"
    return (
        f"{one['letter']}  {in_points(one['miou']['value'])} % {span(one['miou'])}  {one['input']}"
        f"  (step {one['step']}{seed}, inference {one['inference']})"
    )


def how(content: dict[str, Any]) -> str:
    return (
        f"{content['dataset']} {content['split']}, {content['images']} images, by the rules of {content['rules']}; "
        f"{content['resamples']} resamples, seed {content['seed']}"
    )


def seed_lines(content: dict[str, Any]) -> Iterator[str]:
    """The spread of each recipe with several seeds, and the seeds that a difference needs."""
    for one in content["recipes"]:
        yield (
            f"{', '.join(one['letters'])}: {one['seeds']} seeds of one recipe: mean mIoU {in_points(one['mean'])} % "
            f"{span(one)}, standard deviation {in_points(one['deviation'])} points"
        )
        needed = ", ".join(
            f"{in_points(float(d))} points: {'more than 10000' if n is None else n}"
            for d, n in one["seeds_needed"].items()
        )
        yield f"  seeds of each recipe to see a difference of {needed} (t-test at 5 %, power 80 %)"
    for pair in content["recipe_differences"]:
        names = f"{', '.join(pair['second'])} - {', '.join(pair['first'])}"
        text = f"{in_points(pair['value'], True)} points, 95 % interval {span(pair, True)} (Welch's t, over seeds)"
        yield f"{names}: {'' if pair['differ'] else 'no difference between the recipes: '}{text}"


LIMITS = (
    "The intervals say what other images of the same kind would change, for these checkpoints. Another seed of the "
    "same recipe gives another checkpoint, whose spread only several seeds show."
)


def printed(content: dict[str, Any]) -> list[str]:
    """The lines on the screen."""
    lines = [f"comparing   {how(content)}", "", *map(input_line, content["inputs"])]
    for pair in content["pairs"]:
        rows = [header(pair), *rows_of(pair, content)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines.append("")
        for row in rows:
            cells = [cell.ljust(w) if i in (0, 6) else cell.rjust(w) for i, (cell, w) in
                     enumerate(zip(row, widths, strict=True))]  # fmt: skip
            lines.append("  ".join(cells).rstrip())
        lines += ["", verdict(pair, content["images"]), class_verdict(pair, content)]
    seeds = list(seed_lines(content))
    return [*lines, *(["", *seeds] if seeds else []), ""]


def as_markdown(content: dict[str, Any]) -> str:
    """compare.md."""

    def row(cells: tuple[str, ...]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    lines = ["# Comparison", "", f"{how(content)}.", "", "| | mIoU % | 95 % interval | step | seed | inference | |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for one in content["inputs"]:
        lines.append(row((
            one["letter"], in_points(one["miou"]["value"]), span(one["miou"]), str(one["step"]), str(one["seed"]),
            str(one["inference"]), f"`{printable(one['input'], inline=True)}`",
        )))  # fmt: skip
    for pair in content["pairs"]:
        lines += ["", f"## {pair['second']} - {pair['first']}", "", f"**{verdict(pair, content['images'])}.**"]
        lines += [class_verdict(pair, content) + ".", "", row(header(pair)), "|---|--:|--:|--:|--:|--:|---|"]
        lines += [row(cells) for cells in rows_of(pair, content)]
    if seeds := list(seed_lines(content)):
        lines += ["", "## Seeds", "", *(f"- {line.strip()}" for line in seeds)]
    lines += ["", f"Method: {content['method']}. {LIMITS}", "", "![differences](compare.png)", ""]
    return "\n".join(lines)
