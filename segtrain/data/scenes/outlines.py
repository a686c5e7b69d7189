"""Things of a street scene as outlines in metres, and flat things, which face the camera.

A `Thing` knows how to paint itself; `geo` draws its shape, `tex` its colours.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from segtrain.data.scenes.canvas import Canvas, Colour, FloatArray, Points

Rng = np.random.Generator


class Thing(NamedTuple):
    """Something that stands on the ground. Things are painted in the order of falling `depth`."""

    depth: float
    footprint: FloatArray  # (N, 2), ground points x, z: what casts the shadow
    height: float
    paint: Callable[[Canvas], None]


class Part(NamedTuple):
    """An outline in metres. Without a colour it is see-through: it has labels but shows what lies behind."""

    outline: Points
    colour: Colour | None
    glows: bool = False
    code: int = -1  # instance coding; -1: that of the whole


def order(x: float, z: float) -> float:
    """Depth for painting. Along a line of sight it grows with z; of things side by side the outer one comes first."""
    return z + 0.8 * abs(x)


def disc(x: float, y: float, radius: float, corners: int = 14) -> Points:
    angles = np.arange(corners) * (2 * np.pi / corners)
    return [(x + radius * float(np.cos(a)), y + radius * float(np.sin(a))) for a in angles]


def ring(x: float, y: float, outer: float, inner: float) -> Points:
    """A closed band as one outline (there and back), which even-odd filling leaves open in the middle."""
    there, back = list(disc(x, y, outer)), list(disc(x, y, inner))
    return [*there, there[0], back[0], *back[::-1]]


def box(left: float, low: float, right: float, high: float) -> Points:
    return [(left, low), (left, high), (right, high), (right, low)]


def bar(start: tuple[float, float], end: tuple[float, float], width: float) -> Points:
    """A thick line."""
    (xa, ya), (xb, yb) = start, end
    length = max(float(np.hypot(xb - xa, yb - ya)), 1e-6)
    dx, dy = (yb - ya) / length * width / 2, (xa - xb) / length * width / 2
    return [(xa - dx, ya - dy), (xb - dx, yb - dy), (xb + dx, yb + dy), (xa + dx, ya + dy)]


def paint_parts(canvas: Canvas, parts: Sequence[Part], x: float, z: float, code: int) -> None:
    """Paint outlines (across, up) in the upright plane at (x, z), each at least 2 pixels wide and high."""
    for part in parts:
        outline = np.array(part.outline)
        pixels = np.rint(canvas.camera.project(x + outline[:, 0], outline[:, 1], np.full(len(outline), z)))
        for axis, sign in ((0, 1), (1, -1)):  # pixel rows grow downwards
            if np.ptp(pixels[:, axis]) < 1:
                pixels[outline[:, axis] > outline[:, axis].mean(), axis] += sign
        canvas.fill(pixels, code if part.code < 0 else part.code, part.colour, z, part.glows)


def flat_thing(x: float, z: float, parts: Sequence[Part], code: int, width: float, height: float) -> Thing:
    footprint = np.array([(x - width / 2, z), (x + width / 2, z)])
    return Thing(order(x, z), footprint, height, lambda canvas: paint_parts(canvas, parts, x, z, code))


def scaled(parts: Sequence[Part], across: float, up: float = 1.0) -> list[Part]:
    """Parts made wider and higher; a negative `across` mirrors them."""
    return [part._replace(outline=[(x * across, y * up) for x, y in part.outline]) for part in parts]
