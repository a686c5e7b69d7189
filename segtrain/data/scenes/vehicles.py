"""Vehicles as solids: side profiles, extruded to their width."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from segtrain.data.scenes.canvas import (
    BUS_LACQUER,
    CAR_LACQUER,
    TRAIN_LACQUER,
    TRUCK_LACQUER,
    Canvas,
    Colour,
    FloatArray,
    Points,
    chance,
    pick,
    tone,
)
from segtrain.data.scenes.outlines import Part, Rng, Thing, box, disc, order


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
    """Tail lamps, plate, bumper, and the wheels under it; `foot`: how far the ground lies below, as a fraction."""
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


def draw_train(geo: Rng, tex: Rng, pose: Pose, code: int, length: float) -> Thing:
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
