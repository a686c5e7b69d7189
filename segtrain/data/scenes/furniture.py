"""Street furniture and trees: poles, lamps, traffic lights, signs, bins."""

import numpy as np

from segtrain.data.scenes.canvas import (
    DYNAMIC,
    LACQUER,
    LIGHT,
    METAL,
    POLE,
    SIGN,
    STATIC,
    VEGETATION,
    Canvas,
    Paint,
    chance,
    pick,
    tone,
)
from segtrain.data.scenes.outlines import Part, Rng, Thing, bar, box, disc, flat_thing, order, paint_parts


def pole(geo: Rng, tex: Rng, x: float, z: float) -> Thing:
    """A plain post, or a street lamp whose arm reaches towards the middle of the street."""
    colour, height, width = tone(tex, (*METAL, "brown")), geo.uniform(3.5, 9), geo.uniform(0.25, 0.5)
    parts = [Part(box(-width / 2, 0, width / 2, height), colour),
             Part(box(-width / 2, 0, -width / 6, height), 0.75 * colour),
             Part(box(-0.8 * width, 0, 0.8 * width, 0.7), 0.85 * colour)]  # fmt: skip
    if chance(geo, 0.5):
        reach = -1.0 if x > 0 else 1.0
        parts.append(Part(bar((0, height - 0.1), (1.6 * reach, height), 0.16), colour))
        lantern = box(1.2 * reach, height - 0.25, 2.0 * reach, height - 0.05)
        parts.append(Part(lantern, tone(tex, ("white", "yellow")), glows=True))
    return flat_thing(x, z, parts, POLE, width, height)


def lamp_box(geo: Rng, tex: Rng, x: float, y: float) -> list[Part]:
    """The dark box of a traffic light over (x, y); one of three lamps is lit, unless it is seen from behind."""
    case, height = tone(tex, ("black", "black", "dark", "green")), geo.uniform(1.2, 1.8)
    radius = 0.155 * height
    parts = [Part(box(x - 0.24 * height, y, x + 0.24 * height, y + height), case, code=LIGHT)]
    lit = geo.integers(3)
    if chance(geo, 0.15):
        return parts
    for number, rgb in enumerate(((60, 240, 150), (255, 190, 60), (255, 60, 50))):
        bright = number == lit
        colour = np.array(rgb, np.float32) * (1.0 if bright else 0.25)
        parts.append(Part(disc(x, y + (number + 0.5) * height / 3, radius), colour, glows=bright, code=LIGHT))
    return parts


def traffic_light(geo: Rng, tex: Rng, x: float, z: float) -> Thing:
    """On a post, sometimes with a second box on an arm over the street."""
    metal, width, height = tone(tex, METAL), geo.uniform(0.2, 0.36), geo.uniform(2.0, 3.4)
    parts = [Part(box(-width / 2, 0, width / 2, height), metal)]
    if chance(geo, 0.4):
        end, level = geo.uniform(2.0, 4.5) * (-1.0 if x > 0 else 1.0), geo.uniform(5.0, 6.5)
        parts.append(Part(box(-width / 2, 0, width / 2, level), metal))
        parts.append(Part(bar((0, level), (end, level), 0.18), metal))
        parts += lamp_box(geo, tex, end, level - 1.5)
    parts += lamp_box(geo, tex, 0, height)
    return flat_thing(x, z, parts, POLE, width, height + 1)


def sign_face(geo: Rng, tex: Rng, y: float, size: float) -> list[Part]:
    """A disc, triangle, rectangle, board, diamond or octagon with a border and a symbol, or its grey back."""
    kind = pick(geo, ("disc", "triangle", "rectangle", "diamond", "octagon", "board"))
    border = tone(tex, ("red", "red", "white", "blue", "black"))
    inner = tone(tex, ("white", "white", "yellow", "blue", "red", "green"))
    symbol = tone(tex, ("black", "black", "white", "red"))
    half = size / 2
    if kind == "board":
        half, inner = size * 0.8, tone(tex, ("blue", "green", "white", "yellow"))
        shape = [(-1.4, -0.7), (-1.4, 0.7), (1.4, 0.7), (1.4, -0.7)]
    elif kind == "rectangle":
        shape = [(-0.75, -1.0), (-0.75, 1.0), (0.75, 1.0), (0.75, -1.0)]
    elif kind == "triangle":
        shape = pick(geo, ([(-1.1, -0.9), (0, 1.0), (1.1, -0.9)], [(-1.1, 0.9), (0, -1.0), (1.1, 0.9)]))
    elif kind == "diamond":
        shape = [(-1.1, 0.0), (0, 1.1), (1.1, 0.0), (0, -1.1)]
    else:
        shape = list(disc(0, 0, 1, 8 if kind == "octagon" else 16))
    marks = (box(-0.15, -0.45, 0.15, 0.4), box(-0.5, -0.12, 0.5, 0.14), bar((-0.35, -0.35), (0.35, 0.35), 0.25))
    layers = [(half, border, shape), (0.76 * half, inner, shape), (0.9 * half, symbol, pick(geo, marks))]
    if chance(geo, 0.12):  # seen from behind
        layers = [(half, tone(tex, ("grey", "pale", "dark")), shape)]
    return [Part([(s * px, y + s * py) for px, py in points], colour, code=SIGN) for s, colour, points in layers]


def sign(geo: Rng, tex: Rng, x: float, z: float) -> Thing:
    """One or two signs on a post."""
    width, low, size = geo.uniform(0.16, 0.26), geo.uniform(1.7, 2.8), geo.uniform(1.0, 1.6)
    faces = sign_face(geo, tex, low + size / 2, size)
    if chance(geo, 0.4):
        faces += sign_face(geo, tex, low + 1.65 * size, size)
    post = Part(box(-width / 2, 0, width / 2, low + size / 2), tone(tex, METAL))
    return flat_thing(x, z, [post, *faces], POLE, width, low + size)


def junk(geo: Rng, tex: Rng, x: float, z: float) -> Thing:
    """A bin or crate (static), or a pram (dynamic): void."""
    colour, size = tone(tex, LACQUER), geo.uniform(0.7, 1.3)
    if chance(geo, 0.6):
        parts = [Part(box(-0.35 * size, 0, 0.35 * size, size), colour),
                 Part(box(-0.4 * size, 0.85 * size, 0.4 * size, size), 0.7 * colour)]  # fmt: skip
        return flat_thing(x, z, parts, STATIC, 0.7 * size, size)
    dark = tone(tex, ("black", "dark"))
    parts = [Part(disc(-0.3, 0.15, 0.16), dark), Part(disc(0.3, 0.15, 0.16), dark),
             Part([(-0.45, 0.75), (0.4, 0.75), (0.3, 0.3), (-0.35, 0.3)], colour),
             Part([(-0.45, 0.75), (-0.35, 1.05), (0.0, 1.1), (0.0, 0.75)], 0.8 * colour),
             Part(bar((0.4, 0.7), (0.65, 1.0), 0.08), dark)]  # fmt: skip
    return flat_thing(x, z, parts, DYNAMIC, 0.8, 1.1)


def tree(geo: Rng, tex: Rng, x: float, z: float, paint: Paint) -> Thing:
    """A trunk under a ragged crown of many discs; trunks are vegetation too."""
    height, radius, trunk = geo.uniform(4, 10), geo.uniform(1.2, 2.8), geo.uniform(0.15, 0.35)
    clumps = [disc(dx, dy, r, 9) for dx, dy, r in zip(
        geo.uniform(-radius, radius, 12), height - geo.uniform(0.3, 2.2, 12) * radius,
        geo.uniform(0.35, 0.7, 12) * radius, strict=True)]  # fmt: skip
    bark = tone(tex, ("brown", "dark", "grey", "olive"))

    def paint_tree(canvas: Canvas) -> None:
        paint_parts(canvas, [Part(box(-trunk / 2, 0, trunk / 2, height - radius), bark)], x, z, VEGETATION)
        for clump in clumps:
            outline = np.array(clump)
            pixels = canvas.camera.project(x + outline[:, 0], outline[:, 1], np.full(len(outline), z))
            canvas.texture(pixels, VEGETATION, paint, z)

    return Thing(order(x, z), np.array([(x - radius / 2, z), (x + radius / 2, z)]), height, paint_tree)
