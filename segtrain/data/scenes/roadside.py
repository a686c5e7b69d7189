"""What stands along the street: fronts, people, plants and furniture."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from segtrain.data.scenes.canvas import (
    BICYCLE,
    BUILDING,
    FENCE,
    MOTORCYCLE,
    PERSON,
    SIDEWALK,
    UNLABELED,
    VEGETATION,
    WALL,
    Canvas,
    Paint,
    Points,
    chance,
    pick,
)
from segtrain.data.scenes.furniture import junk, pole, sign, traffic_light, tree
from segtrain.data.scenes.outlines import Rng, Thing, order
from segtrain.data.scenes.people import person, two_wheeler
from segtrain.data.scenes.street import NEAREST, Side, Street
from segtrain.data.scenes.surfaces import bars, blocks, facade, leaves

# What stands along the street, in a row in front and one behind it; UNLABELED: nothing.
IN_FRONT = (BUILDING, BUILDING, BUILDING, WALL, WALL, WALL, FENCE, FENCE, FENCE, FENCE, VEGETATION, UNLABELED)
BEHIND = (BUILDING, BUILDING, VEGETATION, UNLABELED, UNLABELED)


def upright(start: tuple[float, float], end: tuple[float, float], skyline: Points, code: int, paint: Paint) -> Thing:
    """A wall of any kind from one ground point (x, z) to another."""
    far = max(start, end, key=lambda point: point[1])
    top = max(height for _, height in skyline)
    return Thing(order(*far), np.array([start, end]), top, lambda c: c.panel(start, end, skyline, code, paint))


def random_front(street: Street, canvas: Canvas, kind: int) -> tuple[Points, Paint]:
    """Skyline and texture of a building, wall, fence or hedge."""
    geo, tex, noise = street.geo, street.tex, canvas.noise
    if kind == BUILDING:
        eaves = geo.uniform(4.5, 18)
        ridge = eaves + geo.uniform(1.5, 3.5)
        gable: Points = [(0, eaves), (0.5, ridge), (1, eaves)]
        hip: Points = [(0, eaves), (0.12, ridge), (0.88, ridge), (1, eaves)]
        flat_top: Points = [(0, eaves), (1, eaves)]
        return pick(geo, (flat_top, flat_top, gable, hip)), facade(tex, noise, eaves, canvas.night)
    if kind == WALL:
        height = geo.uniform(2.2, 5.0)
        return [(0, height), (1, height)], blocks(tex, noise, height)
    if kind == FENCE:
        height = geo.uniform(1.6, 3.4)
        return [(0, height), (1, height)], bars(tex, height)
    height, tops = geo.uniform(1.0, 5.0), geo.uniform(0.75, 1.25, 16)
    return list(zip(np.linspace(0, 1, 16), height * tops, strict=True)), leaves(tex, noise)


def roadside(street: Street, canvas: Canvas) -> list[Thing]:
    """The horizon, two rows of fronts on both sides, and what may close the view at the far end."""
    geo = street.geo
    hills: Points = list(zip(np.linspace(0, 1, 24), geo.uniform(4, 16, 24), strict=True))
    horizon = pick(geo, (VEGETATION, VEGETATION, BUILDING, UNLABELED))
    things = [upright((-400, 250.0), (400, 250.0), hills, horizon, leaves(street.tex, canvas.noise))]
    for side in street.sides:
        things += row_of_fronts(street, canvas, side, side.width + geo.uniform(6, 14), BEHIND)
        things += row_of_fronts(street, canvas, side, side.width, IN_FRONT)
    if street.end:
        left, right = (side.x(25) for side in street.sides)
        kind = pick(geo, (BUILDING, BUILDING, WALL, WALL, FENCE, FENCE, VEGETATION))
        skyline, paint = random_front(street, canvas, kind)
        things.append(upright((left, street.end), (right, street.end), skyline, kind, paint)._replace(depth=500.0))
    return things


def row_of_fronts(street: Street, canvas: Canvas, side: Side, distance: float, kinds: Sequence[int]) -> list[Thing]:
    """Fronts one after the other, `distance` metres from the kerb, where no road or railway crosses."""
    geo, things = street.geo, []
    near = geo.uniform(NEAREST, 6)
    while near < street.length - 1:
        far = min(near + geo.uniform(7, 24), street.length)
        kind = pick(geo, kinds)
        if kind != UNLABELED and street.is_free(near, far):
            skyline, paint = random_front(street, canvas, kind)
            x = side.x(distance + geo.uniform(0, 0.6))
            along = upright((x, near), (x, far), skyline, kind, paint)
            if kind in (BUILDING, VEGETATION):  # deep: its end towards the camera shows as well
                corner = (x + side.sign * (8.0 if kind == BUILDING else 2.0), near)
                end = upright((x, near), corner, [(0, skyline[0][1]), (1, skyline[0][1])], kind, paint)
                things.append(end._replace(depth=along.depth + 0.01))
            things.append(along)
        near = far + (geo.uniform(0, 6) if chance(geo, 0.3) else 0.0)
    return things


Maker = Callable[[Rng, Rng, float, float], Thing]


def footway(street: Street, canvas: Canvas) -> list[Thing]:
    """People, plants and furniture beside the road."""
    geo, tex = street.geo, street.tex
    planted: Maker = partial(tree, paint=leaves(tex, canvas.noise))
    things = []
    for side in street.sides:
        start, end = side.band(SIDEWALK) or (0.3, 2.0)
        furniture: tuple[Maker, ...] = (pole, sign, traffic_light, pick(geo, (pole, planted, planted, junk)))
        z = geo.uniform(6, 14)
        while z < 35:
            thing = pick(geo, furniture)(geo, tex, side.x(start + 0.3), z)
            if street.is_free(z, z):
                things.append(thing)
            z += geo.uniform(3.5, 10)
        for _ in range(geo.integers(3, 9)):
            x, z = side.x(geo.uniform(start + 0.4, end)), geo.uniform(6.5, pick(geo, (12, 24)))
            what = geo.random()
            if what < 0.72:
                things.append(person(geo, tex, x, z, street.new(PERSON)))
            elif what < 0.92:
                kind = pick(geo, (BICYCLE, BICYCLE, MOTORCYCLE))
                things.append(two_wheeler(geo, tex, x, z, street.new(kind), None))
            else:
                things.append(junk(geo, tex, x, z))
        if chance(geo, 0.25):  # a railing along the kerb
            x, near, length = side.x(0.2), geo.uniform(7, 14), geo.uniform(6, 16)
            if street.is_free(near, near + length):
                things.append(upright((x, near), (x, near + length), [(0, 1.1), (1, 1.1)], FENCE, bars(tex, 1.1)))
    return things
