"""The bar picture of `segtrain plan`: what a step holds at its peak, for every way to save memory."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from segtrain.engine.planning.solve import Answer

COLORS = {
    "parameters": (86, 98, 118), "optimizer": (132, 146, 166), "averaged weights": (170, 180, 196),
    "gradients": (198, 206, 216), "kept maps": (38, 118, 190), "working set": (238, 164, 74),
}  # fmt: skip
WIDTH, LEFT, ROW, TOP, BOTTOM = 1000, 230, 26, 46, 40
INK, LIMIT = (30, 30, 30), (196, 40, 40)


def peak_bars(answers: dict[str, Answer], own: str, memory: int, budget: int) -> np.ndarray:
    """One bar a way, RGB uint8 (H, 1000, 3): what is alive at the peak of the configured step, by kind.

    The lines are what tensors may take and the whole memory of a device, bytes. own: the name that is marked.
    """
    rows = sorted(answers.items(), key=lambda item: -item[1].now.peak)
    image = Image.new("RGB", (WIDTH, TOP + ROW * len(rows) + BOTTOM), (255, 255, 255))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    longest = 1.05 * max(memory, rows[0][1].now.peak)
    scale = (WIDTH - LEFT - 120) / longest
    x: float = LEFT
    for kind, color in COLORS.items():
        draw.rectangle((round(x), 12, round(x) + 11, 23), fill=color)
        draw.text((x + 16, 10), kind, INK, font)
        x += 26 + (draw.textlength(kind, font))
    for number, (name, answer) in enumerate(rows):
        y, x = TOP + ROW * number, float(LEFT)
        draw.text((10, y + 3), f"{'* ' if name == own else '  '}{name}", INK, font)
        for kind, color in COLORS.items():
            end = x + scale * answer.now.at_peak.get(kind, 0)
            draw.rectangle((round(x), y, round(end), y + ROW - 8), fill=color)
            x = end
        draw.text((round(x) + 6, y + 3), f"{answer.now.peak / 2**30:.2f} GiB", INK, font)
    foot = TOP + ROW * len(rows)
    for size, text in ((budget, "for tensors"), (memory, "memory")):
        place = round(LEFT + scale * size)
        draw.line((place, TOP - 6, place, foot), fill=LIMIT, width=2)
        draw.text((place - 40, foot + (4 if size == budget else 18)), f"{text} {size / 2**30:.2f} GiB", LIMIT, font)
    return np.asarray(image)
