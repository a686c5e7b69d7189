"""Textures of street scenes, in metres. They distinguish the classes, which share their colours.

Every function gives a `Paint`: (u, v, pixels per metre), arrays of one shape, to (RGB float (..., 3), where it covers
what lies behind, or None for everywhere). On the ground u, v are x, z; on upright planes along, up.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from segtrain.data.scenes.canvas import (
    ASPHALT,
    LACQUER,
    MASONRY,
    METAL,
    PAVING,
    PLANTS,
    SOIL,
    WALLS,
    FloatArray,
    Noise,
    Paint,
    chance,
    lines,
    pick,
    tone,
    visible,
)


def asphalt(tex: np.random.Generator, noise: Noise, markings: Sequence[float],
            junction: tuple[float, float] | None) -> Paint:  # fmt: skip
    """Grain, repaired patches, lines at the lateral positions `markings`, and zebra stripes before a junction."""
    colours = np.stack([tone(tex, ASPHALT), tone(tex, ("white", "pale", "yellow"))])
    patches, dashed, wear = tex.uniform(0.05, 0.18), chance(tex, 0.7), tex.uniform(0.5, 1.0)

    def paint(x: FloatArray, z: FloatArray, detail: FloatArray) -> tuple[FloatArray, None]:
        shade = 1 + 0.10 * noise(x, z, 25) * visible(detail, 0.08) + 0.05 * noise(x, z, 0.35)
        shade = np.where(noise(x, z, 0.4, stretch=3) > 0.55, shade - patches, shade)
        painted = np.zeros(x.shape, bool)
        for position in markings:
            painted |= np.abs(x - position) < 0.09
        if dashed:
            painted &= lines(z, 6.0, 3.2)
        if junction:
            painted &= (z < junction[0] - 3.5) | (z > junction[1] + 3.5)
            painted |= (np.abs(z - junction[0] + 1.8) < 1.4) & lines(x, 1.0, 0.5)
        rgb = np.where(painted[..., None], wear * colours[1] + (1 - wear) * colours[0], colours[0])
        return rgb * shade[..., None], None

    return paint


def paving(tex: np.random.Generator, noise: Noise) -> Paint:
    """Slabs with dark joints."""
    colour, slab = tone(tex, PAVING), tex.uniform(0.5, 1.1)

    def paint(x: FloatArray, z: FloatArray, detail: FloatArray) -> tuple[FloatArray, None]:
        row = np.floor(z / slab)
        column = np.floor((x + 0.5 * slab * (row % 2)) / slab)
        joint = lines(x + 0.5 * slab * (row % 2), slab, 0.07) | lines(z, slab, 0.1)
        shade = 1 + (0.12 * noise(column, row, 1) - 0.3 * joint) * visible(detail, slab)
        return colour * shade[..., None], None

    return paint


def grass(tex: np.random.Generator, noise: Noise) -> Paint:
    """Short strokes, with bare patches."""
    colour, bare = tone(tex, SOIL), tone(tex, SOIL)

    def paint(x: FloatArray, z: FloatArray, detail: FloatArray) -> tuple[FloatArray, None]:
        shade = 1 + 0.28 * noise(x, z, 14, stretch=6) + 0.12 * noise(x, z, 2)
        patch = noise(x, z, 0.5) > 0.35
        return np.where(patch[..., None], bare, colour) * shade[..., None], None

    return paint


def railway(tex: np.random.Generator, noise: Noise, centre: float, across: bool) -> Paint:
    """Ballast, sleepers and two rails; `across`: the track runs along x at distance `centre`."""
    ballast, sleeper, steel = tone(tex, WALLS), tone(tex, ("dark", "brown", "grey")), tone(tex, ("pale", "white"))

    def paint(x: FloatArray, z: FloatArray, detail: FloatArray) -> tuple[FloatArray, None]:
        along, side = (x, z) if across else (z, x)
        off = np.abs(side - centre)
        rgb = ballast * (1 + 0.3 * noise(x, z, 9))[..., None]
        rgb = np.where((lines(along, 0.7, 0.28) & (off < 1.3))[..., None], sleeper, rgb)
        return np.where((np.abs(off - 0.75) < 0.08)[..., None], steel, rgb), None

    return paint


def facade(tex: np.random.Generator, noise: Noise, eaves: float, night: bool) -> Paint:
    """Rows of windows over a ground floor of shops or doors; above the eaves a tiled roof."""
    colours = np.stack([tone(tex, MASONRY), tone(tex, ("dark", "blue", "black", "grey")), tone(tex, MASONRY),
                        tone(tex, ("brick", "dark", "brown", "grey")), tone(tex, ("yellow", "white"))])  # fmt: skip
    pitch, storey, course = tex.uniform(1.6, 3.4), tex.uniform(2.7, 3.5), tex.uniform(0.2, 0.4)
    wide, high, shop = tex.uniform(0.22, 0.4), tex.uniform(0.22, 0.36), chance(tex, 0.5)
    bricks = 0.25 if chance(tex, 0.4) else 0.0

    def paint(u: FloatArray, v: FloatArray, detail: FloatArray) -> tuple[FloatArray, None]:
        column, level = np.floor(u / pitch), np.floor(v / storey)
        du, dv = np.abs(u / pitch - column - 0.5), np.abs(v / storey - level - 0.55)
        roof, first = v > eaves, v < storey
        reach = np.where(first & shop, 0.43, wide)
        glass = (du < reach) & (dv < high) & ~roof & (v < eaves - 0.5)
        frame = (du < reach + 0.07) & (dv < high + 0.06) & ~roof & (v < eaves - 0.4) & ~glass
        glint = noise(column, level, 1)
        material = np.select([roof, glass, frame], [3, 1, 2], 0)
        if night:
            material = np.where(glass & (glint > 0.25), 4, material)
        joint = (lines(v, course, 0.05) | lines(u + course * (np.floor(v / course) % 2), 2 * course, 0.05)) & ~glass
        shade = 1 + 0.05 * noise(u, v, 1.2) - bricks * joint * visible(detail, course)
        shade = shade + np.where(glass, 0.45 * glint, 0) - 0.2 * (lines(v, storey, 0.18) & ~glass)
        return colours[material] * shade[..., None], None

    return paint


def blocks(tex: np.random.Generator, noise: Noise, height: float) -> Paint:
    """Large stones in courses under a cap, with stains and sometimes scribbles."""
    colour, scribble = tone(tex, WALLS), tone(tex, LACQUER)
    course, stained, written = tex.uniform(0.35, 0.6), tex.uniform(0.1, 0.3), chance(tex, 0.25)

    def paint(u: FloatArray, v: FloatArray, detail: FloatArray) -> tuple[FloatArray, None]:
        row = np.floor(v / course)
        shifted = u + course * (row % 2)
        joint = lines(v, course, 0.08) | lines(shifted, 2 * course, 0.08)
        cap = v > height - 0.25
        shade = 1 + 0.16 * noise(np.floor(shifted / (2 * course)), row, 1) - 0.35 * joint * visible(detail, course)
        shade = np.where(cap, 1.22, shade) - stained * (noise(u, v, 0.6, stretch=2) > 0.2)
        rgb = colour * shade[..., None]
        if written:
            ink = (np.abs(noise(u, v, 2.5)) < 0.12) & (v > 0.4) & (v < 1.6)
            rgb = np.where(ink[..., None], scribble, rgb)
        return rgb, None

    return paint


def bars(tex: np.random.Generator, height: float) -> Paint:
    """Upright bars, planks or a mesh between posts; what lies behind shows through."""
    colour, post = tone(tex, METAL), tone(tex, METAL)
    pitch, share, mesh = tex.uniform(0.28, 0.45), pick(tex, (0.5, 0.6, 0.85)), chance(tex, 0.3)

    def paint(u: FloatArray, v: FloatArray, detail: FloatArray) -> tuple[FloatArray, NDArray[np.bool_]]:
        upright = lines(u, pitch, share * pitch)
        if mesh:
            upright = lines(u + v, pitch, 0.3 * pitch) | lines(u - v, pitch, 0.3 * pitch)
        rail = (np.abs(v - 0.15 * height) < 0.07) | (np.abs(v - 0.92 * height) < 0.09)
        posts = lines(u, 2.4, 0.16)
        shade = np.where(upright, 1.0, 0.8) + 0.1 * lines(u, 2 * pitch, pitch)
        return np.where(posts[..., None], post, colour) * shade[..., None], upright | rail | posts

    return paint


def leaves(tex: np.random.Generator, noise: Noise) -> Paint:
    """Clumps of leaves, lit and dark."""
    colour = tone(tex, PLANTS)

    def paint(u: FloatArray, v: FloatArray, detail: FloatArray) -> tuple[FloatArray, None]:
        shade = 0.9 + 0.45 * noise(u, v, 7) + 0.4 * noise(u, v, 2.2)
        return colour * shade.clip(0.2, 1.8)[..., None], None

    return paint
