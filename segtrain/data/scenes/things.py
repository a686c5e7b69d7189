"""Vehicles, people, street furniture and plants, each drawn from simple outlines in metres.

A `Thing` knows how to paint itself; `geo` draws its shape, `tex` its colours.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from segtrain.data.scenes.canvas import (
    BUS_LACQUER,
    CAR_LACQUER,
    CLOTHES,
    DYNAMIC,
    LACQUER,
    LIGHT,
    METAL,
    MOTORCYCLE,
    MOTORCYCLE_LACQUER,
    POLE,
    RIDING_CLOTHES,
    SIGN,
    STATIC,
    TRAIN_LACQUER,
    TRUCK_LACQUER,
    VEGETATION,
    Canvas,
    Colour,
    FloatArray,
    Paint,
    Points,
    chance,
    pick,
    tone,
)

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


# ---------------------------------------------------------------------------------------------------------------------
# Flat things, which face the camera
# ---------------------------------------------------------------------------------------------------------------------


def paint_parts(canvas: Canvas, parts: Sequence[Part], x: float, z: float, code: int) -> None:
    """Paint outlines (across, up) in the upright plane at (x, z), each at least 2 pixels wide and high."""
    for part in parts:
        outline = np.array(part.outline)
        pixels = np.rint(canvas.camera.project(x + outline[:, 0], outline[:, 1], np.full(len(outline), z)))
        for axis, sign in ((0, 1), (1, -1)):  # pixel rows grow downwards
            if np.ptp(pixels[:, axis]) < 1:
                pixels[outline[:, axis] > outline[:, axis].mean(), axis] += sign
        canvas.fill(pixels, code if part.code < 0 else part.code, part.colour, z, part.glows)


def flat(x: float, z: float, parts: Sequence[Part], code: int, width: float, height: float) -> Thing:
    footprint = np.array([(x - width / 2, z), (x + width / 2, z)])
    return Thing(order(x, z), footprint, height, lambda canvas: paint_parts(canvas, parts, x, z, code))


def scaled(parts: Sequence[Part], across: float, up: float = 1.0) -> list[Part]:
    """Parts made wider and higher; a negative `across` mirrors them."""
    return [part._replace(outline=[(x * across, y * up) for x, y in part.outline]) for part in parts]


def person(geo: Rng, tex: Rng, x: float, z: float, code: int) -> Thing:
    top, bottom, hair = tone(tex, CLOTHES), tone(tex, CLOTHES), tone(tex, ("black", "brown", "sand", "grey", "dark"))
    skin, shoes = tone(tex, ("skin", "skin", "brown", "sand")), tone(tex, ("black", "brown", "white"))
    stride, swing, coat = geo.uniform(0, 0.17), geo.uniform(0, 0.14), chance(geo, 0.3)
    parts = [
        Part(bar((0.02, 0.5), (stride, 0.05), 0.11), 0.85 * bottom),
        Part(bar((-0.02, 0.5), (-stride, 0.05), 0.11), bottom),
        Part(box(stride - 0.05, 0, stride + 0.1, 0.05), shoes),
        Part(box(-stride - 0.05, 0, 0.1 - stride, 0.05), shoes),
        Part(bar((0.1, 0.8), (0.12 + swing, 0.45), 0.07), 0.85 * top),
        Part([(-0.13, 0.82), (0.13, 0.82), (0.12, 0.46), (-0.12, 0.46)], top),
        Part(bar((-0.12, 0.8), (-0.13 - swing, 0.45), 0.07), 0.9 * top),
        Part(box(-0.03, 0.8, 0.03, 0.87), skin),
        Part(disc(0, 0.925, 0.075), hair),
        Part(disc(0.02, 0.91, 0.06), skin),
    ]
    if coat:
        parts.insert(6, Part([(-0.11, 0.5), (0.11, 0.5), (0.19, 0.25), (-0.19, 0.25)], top))
    height = geo.uniform(1.5, 1.95) if chance(geo, 0.85) else geo.uniform(1.0, 1.4)
    return flat(x, z, scaled(parts, height * pick(geo, (-1.15, 1.15)), height), code, 0.5, height)


def bicycle_parts(tex: Rng, side_view: bool) -> list[Part]:
    frame, tyre = tone(tex, LACQUER), tone(tex, ("black", "dark"))
    if not side_view:
        return [
            Part(box(-0.07, 0, 0.07, 0.72), tyre),
            Part(bar((0, 0.5), (0, 1.0), 0.09), frame),
            Part(bar((-0.3, 1.02), (0.3, 1.02), 0.09), tyre),
        ]
    wheels = [part for x in (-0.55, 0.55)
              for part in (Part(disc(x, 0.36, 0.38), None), Part(ring(x, 0.36, 0.38, 0.25), tyre),
                           Part(disc(x, 0.36, 0.06), frame))]  # fmt: skip
    tubes = [((-0.55, 0.36), (-0.05, 0.32)), ((-0.05, 0.32), (-0.2, 0.9)), ((-0.18, 0.8), (0.38, 0.82)),
             ((-0.05, 0.32), (0.38, 0.8)), ((0.55, 0.36), (0.36, 1.05)), ((-0.55, 0.36), (-0.18, 0.8))]  # fmt: skip
    frame_parts = [Part(bar(start, end, 0.075), frame) for start, end in tubes]
    saddle, handlebar = box(-0.33, 0.9, -0.08, 0.98), bar((0.36, 1.05), (0.55, 1.08), 0.08)
    return [*wheels, *frame_parts, Part(saddle, tyre), Part(handlebar, tyre)]


def motorcycle_parts(tex: Rng, side_view: bool) -> list[Part]:
    body, tyre, steel = (
        tone(tex, MOTORCYCLE_LACQUER),
        tone(tex, ("black", "dark")),
        tone(tex, ("pale", "white", "grey")),
    )
    lamp = tone(tex, ("white", "yellow", "red"))
    if not side_view:
        return [
            Part(box(-0.12, 0, 0.12, 0.65), tyre),
            Part([(-0.36, 0.95), (-0.2, 1.25), (0.2, 1.25), (0.36, 0.95), (0.22, 0.45), (-0.22, 0.45)], body),
            Part(disc(0, 0.85, 0.14), lamp, glows=True),
            Part(bar((-0.48, 1.12), (0.48, 1.12), 0.09), tyre),
        ]
    return [
        Part(disc(-0.68, 0.33, 0.34), tyre),
        Part(disc(-0.68, 0.33, 0.13), steel),
        Part(disc(0.72, 0.33, 0.34), tyre),
        Part(disc(0.72, 0.33, 0.13), steel),
        Part([(-0.45, 0.35), (-0.3, 0.7), (0.35, 0.75), (0.4, 0.35), (0.1, 0.2), (-0.2, 0.2)], steel * 0.6),
        Part(bar((-0.9, 0.32), (-0.1, 0.28), 0.12), steel),
        Part([(-0.95, 0.85), (-0.2, 0.75), (0.05, 0.98), (0.5, 0.95), (0.62, 0.62), (-0.6, 0.55)], body),
        Part([(-0.85, 0.84), (-0.15, 0.76), (-0.15, 0.86), (-0.8, 0.98)], tyre),
        Part(bar((0.72, 0.33), (0.45, 1.12), 0.1), steel),
        Part([(0.4, 1.0), (0.62, 1.0), (0.4, 1.35)], tone(tex, ("sky", "dark", "pale"))),
        Part(disc(0.62, 0.88, 0.12), lamp, glows=True),
    ]


def rider_parts(tex: Rng, side_view: bool, seat: float, lean: float, code: int) -> list[Part]:
    """A person sitting at height `seat`, hands ahead; `lean`: how far the shoulders are ahead of the hips."""
    top, bottom, helmet = tone(tex, RIDING_CLOTHES), tone(tex, CLOTHES), tone(tex, RIDING_CLOTHES)
    skin = tone(tex, ("skin", "skin", "brown", "dark"))
    shoulder = seat + 0.5

    def head(x: float, y: float) -> list[Part]:
        cap = [(x - 0.16, y - 0.01), (x - 0.1, y + 0.17), (x + 0.1, y + 0.17), (x + 0.16, y - 0.01)]
        return [Part(disc(x, y, 0.15), skin), Part(cap, helmet)]

    if not side_view:
        parts = [
            Part(bar((-0.12, seat), (-0.22, seat - 0.5), 0.17), bottom),
            Part(bar((0.12, seat), (0.22, seat - 0.5), 0.17), bottom),
            Part([(-0.24, shoulder), (0.24, shoulder), (0.19, seat - 0.05), (-0.19, seat - 0.05)], top),
            Part(bar((-0.25, shoulder - 0.05), (-0.36, seat + 0.1), 0.12), 0.9 * top),
            Part(bar((0.25, shoulder - 0.05), (0.36, seat + 0.1), 0.12), 0.9 * top),
            *head(0, shoulder + 0.17),
        ]
    else:
        hip, neck, knee = (-0.22, seat), (lean - 0.2, shoulder), (0.2, seat - 0.15)
        parts = [
            Part(bar(hip, knee, 0.19), bottom),
            Part(bar(knee, (0.02, seat - 0.62), 0.15), bottom),
            Part(bar(hip, neck, 0.32), top),
            Part(bar((neck[0], neck[1] - 0.08), (0.42, seat + 0.14), 0.12), 0.85 * top),
            *head(neck[0] + 0.1, shoulder + 0.17),
        ]
    return [part._replace(code=code) for part in parts]


def two_wheeler(geo: Rng, tex: Rng, x: float, z: float, code: int, rider_code: int | None) -> Thing:
    """A bicycle or motorcycle, which `code` tells, with or without a rider."""
    side_view, motor = chance(geo, 0.65), code // 1000 == MOTORCYCLE
    parts = (motorcycle_parts if motor else bicycle_parts)(tex, side_view)
    if rider_code is not None:
        seat, lean = (0.95, 0.25) if motor else (1.05, 0.4)
        rider = rider_parts(tex, side_view, seat, lean, rider_code)
        parts = [*parts, *rider] if side_view else [*rider[:2], *parts, *rider[2:]]
    squash = geo.uniform(0.75, 1.0) if side_view else 1.0
    scale = geo.uniform(1.0, 1.15)
    parts = scaled(parts, squash * scale * pick(geo, (-1.0, 1.0)), scale)
    return flat(x, z, parts, code, 1.4 * squash if side_view else 0.5, 1.6)


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
    return flat(x, z, parts, POLE, width, height)


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
    return flat(x, z, parts, POLE, width, height + 1)


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
    return flat(x, z, [post, *faces], POLE, width, low + size)


def junk(geo: Rng, tex: Rng, x: float, z: float) -> Thing:
    """A bin or crate (static), or a pram (dynamic): void."""
    colour, size = tone(tex, LACQUER), geo.uniform(0.7, 1.3)
    if chance(geo, 0.6):
        parts = [Part(box(-0.35 * size, 0, 0.35 * size, size), colour),
                 Part(box(-0.4 * size, 0.85 * size, 0.4 * size, size), 0.7 * colour)]  # fmt: skip
        return flat(x, z, parts, STATIC, 0.7 * size, size)
    dark = tone(tex, ("black", "dark"))
    parts = [Part(disc(-0.3, 0.15, 0.16), dark), Part(disc(0.3, 0.15, 0.16), dark),
             Part([(-0.45, 0.75), (0.4, 0.75), (0.3, 0.3), (-0.35, 0.3)], colour),
             Part([(-0.45, 0.75), (-0.35, 1.05), (0.0, 1.1), (0.0, 0.75)], 0.8 * colour),
             Part(bar((0.4, 0.7), (0.65, 1.0), 0.08), dark)]  # fmt: skip
    return flat(x, z, parts, DYNAMIC, 0.8, 1.1)


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


# ---------------------------------------------------------------------------------------------------------------------
# Solid things: side profiles, pulled out to their width
# ---------------------------------------------------------------------------------------------------------------------


class Pose(NamedTuple):
    """Where a vehicle's middle is and where it heads: 0 away from the camera, pi towards it, pi / 2 to the right."""

    x: float
    z: float
    heading: float

    def place(self, along: FloatArray, across: FloatArray) -> tuple[FloatArray, FloatArray]:
        sine, cosine = np.sin(self.heading), np.cos(self.heading)
        return self.x + along * sine + across * cosine, self.z + along * cosine - across * sine


class Solid(NamedTuple):
    """profile: (along, up) from the rear's foot over the top to the front's foot. sides: parts (along, up) on both
    sides. edges: parts on the face over profile edge number i, (-1 to 1 across, 0 to 1 from its start to its end)."""

    profile: Points
    width: float
    colour: Colour
    sides: Sequence[Part]
    edges: Mapping[int, Sequence[Part]]


class Face(NamedTuple):
    """One side of a solid in its own metres: along, across and up of its corners, and of the parts on it."""

    corners: FloatArray  # (3, N): along, across, up; clockwise for who looks at it from outside
    light: float
    parts: list[tuple[FloatArray, Part]]


def side_face(solid: Solid, across: float) -> Face:
    turn = 1 if across > 0 else -1

    def on_side(points: Points) -> FloatArray:
        along, up = np.array(points)[::turn].T
        return np.stack([along, np.full(len(along), across), up])

    return Face(on_side(solid.profile), 1.0, [(on_side(part.outline), part) for part in solid.sides])


def edge_face(solid: Solid, number: int) -> Face:
    """The face over profile edge `number`, lighter the more it looks up."""
    half = solid.width / 2
    start, end = np.array([solid.profile[number], solid.profile[(number + 1) % len(solid.profile)]])
    step = end - start

    def on_edge(points: Points) -> FloatArray:
        across, share = np.array(points).T
        return np.stack([start[0] + share * step[0], half * across, start[1] + share * step[1]])

    light = 0.85 + 0.3 * abs(step[0]) / max(float(np.hypot(*step)), 1e-6)
    corners = on_edge([(-1, 0), (-1, 1), (1, 1), (1, 0)])
    return Face(corners, light, [(on_edge(part.outline), part) for part in solid.edges.get(number, ())])


def paint_solid(canvas: Canvas, solid: Solid, pose: Pose, code: int) -> None:
    """Paint the faces that look at the camera, from far to near."""

    def project(points: FloatArray) -> tuple[FloatArray, float]:
        x, z = pose.place(points[0], points[1])
        return canvas.camera.project(x, points[2], z), float(z.mean())

    faces = [side_face(solid, across) for across in (-solid.width / 2, solid.width / 2)]
    faces += [edge_face(solid, number) for number in range(len(solid.profile))]
    seen = [(*project(face.corners), face) for face in faces]
    for corners, distance, face in sorted(seen, key=lambda item: item[1], reverse=True):
        following = np.roll(corners, -1, axis=0)
        if np.sum(corners[:, 0] * following[:, 1] - following[:, 0] * corners[:, 1]) <= 0:
            continue  # seen from inside
        canvas.fill(corners, code, solid.colour * np.float32(face.light), distance)
        for points, part in face.parts:
            canvas.fill(project(points)[0], code, part.colour, distance, part.glows)


def vehicle(pose: Pose, code: int, solids: Sequence[Solid]) -> Thing:
    ends = [p for solid in solids for p in solid.profile]
    front, rear, top = max(e[0] for e in ends), min(e[0] for e in ends), max(e[1] for e in ends)
    half = solids[0].width / 2
    x, z = pose.place(np.array([rear, rear, front, front]), np.array([-half, half, half, -half]))

    def distance(solid: Solid) -> float:
        return float(pose.place(np.array(solid.profile)[:, 0].mean(), np.float64(0))[1])

    def paint(canvas: Canvas) -> None:
        for solid in sorted(solids, key=distance, reverse=True):
            paint_solid(canvas, solid, pose, code)

    return Thing(order(pose.x, pose.z), np.stack([x, z], axis=1), top, paint)


def wheels(tex: Rng, positions: Sequence[float], radius: float) -> list[Part]:
    tyre, hub = tone(tex, ("black", "black", "dark")), tone(tex, ("grey", "pale", "dark"))
    tyres = [Part(disc(along, radius, radius), tyre) for along in positions]
    return tyres + [Part(disc(along, radius, 0.5 * radius), hub) for along in positions]


def rear_face(tex: Rng, foot: float) -> list[Part]:
    """Tail lamps, plate, bumper, and the wheels under it; `foot`: how far the ground lies below, as a share."""
    red, tyre = np.array((200, 40, 35), np.float32), tone(tex, ("black", "dark"))
    return [
        Part(box(-0.95, -foot, -0.7, 0.02), tyre),
        Part(box(0.7, -foot, 0.95, 0.02), tyre),
        Part(box(-1, 0, 1, 0.18), tone(tex, ("dark", "black", "grey"))),
        Part(box(-0.97, 0.45, -0.72, 0.75), red, glows=True),
        Part(box(0.72, 0.45, 0.97, 0.75), red, glows=True),
        Part(box(-0.25, 0.3, 0.25, 0.5), tone(tex, ("white", "yellow"))),
    ]


def front_face(tex: Rng, foot: float) -> list[Part]:
    """Head lamps, grille, plate, and the wheels under it."""
    white, tyre = np.array((245, 240, 215), np.float32), tone(tex, ("black", "dark"))
    return [
        Part(box(-0.95, 1.0, -0.7, 1 + foot), tyre),
        Part(box(0.7, 1.0, 0.95, 1 + foot), tyre),
        Part(box(-0.5, 0.35, 0.5, 0.65), tone(tex, ("black", "dark"))),
        Part(box(-0.95, 0.25, -0.6, 0.55), white, glows=True),
        Part(box(0.6, 0.25, 0.95, 0.55), white, glows=True),
        Part(box(-0.25, 0.7, 0.25, 0.88), tone(tex, ("white", "yellow"))),
    ]


def glass_tone(tex: Rng) -> Colour:
    return tone(tex, ("black", "dark", "dark", "blue", "grey"))


def car(geo: Rng, tex: Rng, pose: Pose, code: int) -> Thing:
    """A hatchback, saloon or van: rear, boot, rear window, roof, windscreen, bonnet, front."""
    length, width, height = geo.uniform(3.8, 4.7), geo.uniform(1.7, 1.95), geo.uniform(1.4, 1.75)
    boot, screen, bonnet, slant = pick(geo, ((0.01, 0.1, 0.25, 0.05), (0.15, 0.1, 0.27, 0.1), (0.01, 0.3, 0.4, 0.01)))
    if screen == 0.3:  # a van
        height, length = height * 1.35, length * 1.1
    glass, belt = glass_tone(tex), 0.6 * height
    half = length / 2
    rear_top, front_top, front_low = (boot + slant - 0.5) * length, screen * length, bonnet * length
    profile = [(-half, 0.28), (-half, belt), ((boot - 0.5) * length, belt + 0.03), (rear_top, height),
               (front_top, height), (front_low, belt), (half, 0.5 * height), (half, 0.28)]  # fmt: skip
    low, high, middle = belt + 0.05, height - 0.1, (rear_top + front_top) / 2
    rear_window = [((boot - 0.47) * length, low), (rear_top + 0.08, high), (middle - 0.06, high), (middle - 0.06, low)]
    front_window = [(middle + 0.06, low), (middle + 0.06, high), (front_top - 0.06, high), (front_low - 0.18, low)]
    sides = [
        Part(rear_window, glass),
        Part(front_window, glass),
        Part(box(-half, 0.28, half, 0.36), tone(tex, ("black", "dark"))),
        *wheels(tex, (-0.3 * length, 0.31 * length), 0.34),
    ]
    window = [Part(box(-0.82, 0.12, 0.82, 0.85), glass)]
    foot = 0.28 / (belt - 0.28)
    edges = {0: rear_face(tex, foot), 2: window, 4: window, 6: front_face(tex, 0.28 / (0.5 * height - 0.28))}
    return vehicle(pose, code, [Solid(profile, width, tone(tex, CAR_LACQUER), sides, edges)])


def truck(geo: Rng, tex: Rng, pose: Pose, code: int) -> Thing:
    """A cab before a tall plain box with ribs or a stripe, and doors with bars at its rear."""
    length, height, width = geo.uniform(6.5, 9.5), geo.uniform(3.1, 4.0), 2.5
    half, top = length / 2, geo.uniform(2.5, 2.9)
    back = half - 2.3  # where the box ends before the cab
    load, lacquer, glass = tone(tex, TRUCK_LACQUER), tone(tex, TRUCK_LACQUER), glass_tone(tex)
    dark, red = tone(tex, ("black", "dark")), np.array((200, 40, 35), np.float32)
    sides = [Part(box(-half + 0.8, 1.6, back - 0.8, height - 0.7), tone(tex, TRUCK_LACQUER))]
    if chance(tex, 0.6):
        ribs = np.arange(-half + 0.4, back, pick(tex, (0.6, 0.9)))
        sides = [Part(box(along, 1.0, along + 0.12, height - 0.05), 0.72 * load) for along in ribs]
    sides += [Part(box(-half, 0.75, half, 1.05), dark), *wheels(tex, (-half + 1.0, -half + 2.2), 0.5)]
    foot = 1.0 / (height - 1.0)
    rear = [
        Part(box(-0.03, 0.02, 0.03, 0.98), 0.5 * load),
        *(Part(box(across - 0.03, 0.02, across + 0.03, 0.98), 0.65 * load) for across in (-0.6, -0.3, 0.3, 0.6)),
        Part(box(-1, 0.94, 1, 1), 0.7 * load),
        Part(box(-0.95, -foot, -0.6, 0), dark),
        Part(box(0.6, -foot, 0.95, 0), dark),
        Part(box(-0.98, -0.62 * foot, 0.98, -0.4 * foot), 0.6 * load + 30),
        Part(box(-0.95, -0.3 * foot, -0.65, -0.02), red, glows=True),
        Part(box(0.65, -0.3 * foot, 0.95, -0.02), red, glows=True),
    ]
    trunk = Solid([(-half, 1.0), (-half, height), (back, height), (back, 1.0)], width, load, sides, {0: rear})
    nose = [(back + 0.15, 0.5), (back + 0.15, top), (half - 0.35, top), (half, 0.55 * top), (half, 0.5)]
    window = [(half - 1.3, 1.5), (half - 1.3, top - 0.3), (half - 0.5, top - 0.3), (half - 0.2, 1.5)]
    front = {2: [Part(box(-0.9, 0.1, 0.9, 0.85), glass)], 3: front_face(tex, 0.5)}
    cab = Solid(nose, width, lacquer, [Part(window, glass), *wheels(tex, (half - 1.0,), 0.5)], front)
    return vehicle(pose, code, [trunk, cab])


def bus(geo: Rng, tex: Rng, pose: Pose, code: int) -> Thing:
    """A long box with a band of large windows, tall doors, a lit destination over the windscreen."""
    length, height, width = geo.uniform(9, 12.5), geo.uniform(2.9, 3.3), 2.55
    half, lacquer, glass = length / 2, tone(tex, BUS_LACQUER), glass_tone(tex)
    panes = [Part(box(a, 1.35, a + 1.3, 2.5), glass) for a in np.arange(-half + 0.4, half - 1.6, 1.5)]
    doors = [Part(box(a, 0.4, a + 1.2, 2.6), 0.8 * glass) for a in (half - 2.0, -0.5)]
    split = [Part(box(a + 0.56, 0.4, a + 0.64, 2.6), lacquer) for a in (half - 2.0, -0.5)]
    stripe = [Part(box(-half, 0.75, half, 1.1), tone(tex, BUS_LACQUER))] if chance(tex, 0.6) else []
    sides = [*stripe, *panes, *doors, *split, *wheels(tex, (-half + 2.6, half - 2.8), 0.5)]
    sign_ = np.array((255, 180, 60), np.float32)
    profile = [(-half, 0.3), (-half, height), (half - 0.15, height), (half, 1.2), (half, 0.3)]
    rear = [*rear_face(tex, 0.1), Part(box(-0.8, 0.55, 0.8, 0.85), glass),
            *(Part(box(-0.6, y, 0.6, y + 0.03), 0.6 * lacquer) for y in (0.22, 0.28, 0.34, 0.4, 0.46))]  # fmt: skip
    front = [Part(box(-0.92, 0.26, 0.92, 0.98), glass), Part(box(-0.6, 0.06, 0.6, 0.2), sign_, glows=True)]
    return vehicle(pose, code, [Solid(profile, width, lacquer, sides, {0: rear, 2: front, 3: front_face(tex, 0.33)})])


def train(geo: Rng, tex: Rng, pose: Pose, code: int, length: float) -> Thing:
    """Coaches with one long dark band of windows, several pairs of doors in another colour, and a dark skirt."""
    height, width, coach = geo.uniform(3.4, 3.9), 2.8, geo.uniform(10, 14)
    half, lacquer, glass, leaf = length / 2, tone(tex, TRAIN_LACQUER), glass_tone(tex), tone(tex, TRAIN_LACQUER)
    skirt, roof = tone(tex, ("black", "dark")), tone(tex, ("grey", "dark", "pale"))
    sides = [Part(box(-half, 0.15, half, 0.75), skirt), Part(box(-half, 1.6, half, 2.6), glass),
             Part(box(-half, height - 0.35, half, height), roof)]  # fmt: skip
    if chance(tex, 0.6):
        sides.append(Part(box(-half, 1.1, half, 1.4), tone(tex, TRAIN_LACQUER)))
    for start in np.arange(-half, half - 3, coach):
        for a in (start + 0.22 * coach, start + 0.68 * coach):
            sides += [Part(box(a, 0.6, a + 1.5, 2.9), leaf), Part(box(a + 0.15, 1.5, a + 0.68, 2.6), glass),
                      Part(box(a + 0.82, 1.5, a + 1.35, 2.6), glass)]  # fmt: skip
        sides.append(Part(box(start - 0.2, 0.3, start + 0.2, height - 0.1), skirt))
    rear = [(-half, 0.3), (-half - 0.3, 1.3), (-half + 0.4, height)]
    profile = [*rear, *((-along, up) for along, up in reversed(rear))]
    nose, white = [Part(box(-0.85, 0.15, 0.85, 0.75), glass)], np.array((245, 235, 210), np.float32)
    lamps = [Part(box(across - 0.12, 0.5, across + 0.12, 0.75), white, glows=True) for across in (-0.7, 0.7)]
    thing = vehicle(pose, code, [Solid(profile, width, lacquer, sides, {0: lamps, 1: nose, 3: nose, 4: lamps})])
    return thing._replace(depth=order(*map(float, thing.footprint[np.argmax(thing.footprint[:, 1])])))
