"""The picture of `segtrain compare`: a difference and its interval a line, around 0."""

from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from segtrain.commands.compare_tables import excludes_zero, span, verdict
from segtrain.console import printable

WIDTH, LEFT, RIGHT, ROW, HEAD = 1000, 190, 170, 22, 58
INK, GREY, LIGHT = (30, 30, 30), (120, 126, 134), (222, 225, 229)
BETTER, WORSE = (24, 122, 84), (190, 62, 48)
MOST = 8  # pairs that are drawn


def forest(content: dict[str, Any]) -> np.ndarray:
    """RGB uint8 (H, 1000, 3): for each pair the mIoU and the classes, differences in points with their intervals."""
    panels = [panel(pair, content) for pair in content["pairs"][:MOST]]
    return np.concatenate(panels)


def panel(pair: dict[str, Any], content: dict[str, Any]) -> np.ndarray:
    rows = [("mIoU", pair["miou"]), *pair["per_class"].items()]
    image = Image.new("RGB", (WIDTH, HEAD + ROW * len(rows) + 34), (255, 255, 255))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    draw.text((10, 8), verdict(pair, content["images"]), INK, font)
    reach = reach_of([one for _, one in rows])
    middle, scale = (LEFT + WIDTH - RIGHT) / 2, (WIDTH - LEFT - RIGHT) / 2 / reach
    foot = HEAD + ROW * len(rows)
    step = tick_of(reach)
    for tick in range(-int(reach / step), int(reach / step) + 1):
        x = round(middle + scale * tick * step)
        draw.line((x, HEAD - 4, x, foot), fill=GREY if tick == 0 else LIGHT)
        text = f"{100 * tick * step:+.4g}" if tick else "0"
        draw.text((x - draw.textlength(text, font) / 2, foot + 4), text, GREY, font)
    draw.text((LEFT, HEAD - 24), f"{pair['first']} better", WORSE, font)
    right = f"{pair['second']} better"
    draw.text((WIDTH - RIGHT - draw.textlength(right, font), HEAD - 24), right, BETTER, font)
    for number, (name, one) in enumerate(rows):
        y = HEAD + ROW * number + ROW // 2
        draw.text((10, y - 8), printable(name, inline=True)[:26], INK, font)
        draw.text((WIDTH - RIGHT + 14, y - 8), span(one, signed=True), INK, font)
        if one["value"] is None:
            continue
        color = GREY if not excludes_zero(one) else BETTER if one["value"] > 0 else WORSE
        center = middle + scale * one["value"]
        if one["low"] is not None:
            draw.line((middle + scale * one["low"], y, middle + scale * one["high"], y), fill=color, width=2)
        size = 5 if number == 0 else 4
        draw.ellipse((center - size, y - size, center + size, y + size), fill=color)
    return np.asarray(image)


def reach_of(rows: list[dict[str, Any]]) -> float:
    """The largest distance from 0 that is drawn, fractions."""
    ends = [abs(one[key]) for one in rows for key in ("value", "low", "high") if one[key] is not None]
    return max(1.05 * max(ends, default=0), 0.001)


def tick_of(reach: float) -> float:
    """A distance of 1, 2 or 5 times a power of ten, of which two to five fit between 0 and `reach`."""
    power = 10.0 ** np.floor(np.log10(reach))
    return float(next(step for step in (0.2 * power, 0.5 * power, power, 2 * power) if reach / step <= 5))
