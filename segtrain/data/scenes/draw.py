"""Street scenes drawn from a seed: labelled pictures to train on where no data set is at hand.

`draw` gives one scene. A camera looks along a street whose width, bend, surroundings and traffic are random; things
are painted from far to near. The classes share their colours and the light varies, so that neither position nor
colour gives a class away: shape, texture and context do. Files of such scenes: see street_layouts.

Two random generators make a scene: `geo` decides everything that the labels show, `tex` only what the picture shows.
"""

import zlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from segtrain.data.scenes.canvas import (
    AIR,
    BICYCLE,
    BUILDING,
    BUS,
    CAR,
    EGO,
    FENCE,
    LACQUER,
    MOTORCYCLE,
    PERSON,
    RAILS,
    RIDER,
    ROAD,
    SIDEWALK,
    TERRAIN,
    TRAIN,
    TRUCK,
    UNLABELED,
    VEGETATION,
    WALL,
    Camera,
    Canvas,
    Paint,
    Points,
    chance,
    pick,
    tone,
    whole_pixels,
)
from segtrain.data.scenes.surfaces import asphalt, bars, blocks, facade, grass, leaves, paving, railway
from segtrain.data.scenes.things import (
    Pose,
    Rng,
    Thing,
    bus,
    car,
    junk,
    order,
    person,
    pole,
    sign,
    traffic_light,
    train,
    tree,
    truck,
    two_wheeler,
)

VERSION = 1  # of the labels: a change of any label pixel needs a new one
NEAREST, FARTHEST = 1.5, 90.0  # metres ahead between which things stand
# What stands along the street, in a row in front and one behind it; UNLABELED: nothing.
IN_FRONT = (BUILDING, BUILDING, BUILDING, WALL, WALL, WALL, FENCE, FENCE, FENCE, FENCE, VEGETATION, UNLABELED)
BEHIND = (BUILDING, BUILDING, VEGETATION, UNLABELED, UNLABELED)


class Scene(NamedTuple):
    """A picture and its labels.

    image: uint8 (H, W, 3), RGB. label_ids: uint8 (H, W), Cityscapes ids 0 to 33. instance_ids: uint16 (H, W),
    id * 1000 + k (k from 0) for persons, riders and vehicles, the plain id elsewhere.
    """

    image: NDArray[np.uint8]
    label_ids: NDArray[np.uint8]
    instance_ids: NDArray[np.uint16]


def draw(seed: int, split: str, index: int, size: tuple[int, int] = (256, 512)) -> Scene:
    """Draw scene `index` of a split; the split called "night" is dark. `size` is (height, width), width = 2 * height.

    The labels depend on nothing but VERSION and the arguments; the picture may differ in its last bits
    between versions of OpenCV.
    """
    sequence = np.random.SeedSequence((VERSION, seed, zlib.crc32(split.encode()), index))
    geo, tex = np.random.default_rng(sequence), np.random.default_rng(sequence.spawn(1)[0])
    canvas = Canvas(random_camera(geo, size), size, tex, night=split == "night")
    street = Street(geo, tex)
    paint_sky(canvas)
    paint_ground(canvas, street)
    things = [*surroundings(street, canvas), *traffic(street), *footway(street, canvas)]
    paint_shadows(canvas, things)
    for thing in sorted(things, key=street.painting_order, reverse=True):
        thing.paint(canvas)
    if chance(geo, 0.3):
        paint_hood(canvas, geo)
    ids = canvas.ids
    return Scene(develop(canvas), np.where(ids < 1000, ids, ids // 1000).astype(np.uint8), ids)


def random_camera(geo: Rng, size: tuple[int, int]) -> Camera:
    height, width = size
    return Camera(
        focal=width * geo.uniform(0.95, 1.3),
        height=geo.uniform(1.3, 2.5),
        horizon=height * geo.uniform(0.34, 0.54),
        centre=width * geo.uniform(0.3, 0.7),
        bend=geo.uniform(-0.0022, 0.0022),
    )


class Side(NamedTuple):
    """What lies beside the road: from the kerb outwards (x = kerb + sign * distance), bands (width, ground label)."""

    sign: int
    kerb: float
    bands: list[tuple[float, int]]
    beyond: int  # ground label farther out

    def x(self, distance: float) -> float:
        return self.kerb + self.sign * distance

    @property
    def width(self) -> float:
        return sum(width for width, _ in self.bands)

    def band(self, kind: int) -> tuple[float, float] | None:
        """Distances from the kerb between which this kind of ground lies."""
        start = 0.0
        for width, label in self.bands:
            if label == kind:
                return start, start + width
            start += width
        return None


def random_side(geo: Rng, sign: int, kerb: float, tram: bool) -> Side:
    bands = []
    if chance(geo, 0.35):
        bands.append((geo.uniform(0.8, 3.0), TERRAIN))
    if tram:
        bands.append((4.0, RAILS))
    if chance(geo, 0.9):
        bands.append((geo.uniform(1.8, 4.5), SIDEWALK))
    if chance(geo, 0.45):
        bands.append((geo.uniform(1.0, 6.0), TERRAIN))
    return Side(sign, kerb, bands, pick(geo, (TERRAIN, TERRAIN, SIDEWALK)))


class Street:
    """The plan of a street seen from above: its lanes, its two sides, a junction or a railway across it."""

    def __init__(self, geo: Rng, tex: Rng) -> None:
        self.geo, self.tex = geo, tex
        self._numbers = {kind: count() for kind in (PERSON, RIDER, CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE)}
        width = geo.uniform(6, 15)
        left = -width * geo.uniform(-0.1, 1.1)
        lanes = max(2, int(width / 3.2))
        self.lane_width = width / lanes
        self.lanes = [left + (number + 0.5) * self.lane_width for number in range(lanes)]
        kind, start = geo.random(), geo.uniform(16, 40)
        self.junction = (start, start + geo.uniform(8, 16)) if kind < 0.4 else None
        self.railway = start if 0.4 <= kind < 0.62 else None  # distance of a track across the street
        self.end = geo.uniform(35, 75) if chance(geo, 0.45) else None  # where something closes the view
        tram = pick(geo, (-1, 1)) if kind >= 0.75 else 0  # the side on which rails run along the street
        self.sides = (random_side(geo, -1, left, tram == -1), random_side(geo, 1, left + width, tram == 1))

    def new(self, kind: int) -> int:
        """The instance code of one more thing of a class."""
        return kind * 1000 + next(self._numbers[kind])

    @property
    def length(self) -> float:
        return self.end or FARTHEST

    def is_free(self, near: float, far: float) -> bool:
        """Whether nothing crosses the street between these distances."""
        if self.railway is not None and near < self.railway + 3 and far > self.railway - 3:
            return False
        return self.junction is None or far < self.junction[0] or near > self.junction[1]

    def ground(self) -> tuple[list[float], list[int]]:
        """Edges x from left to right, and the ground label left of each and right of the last."""
        left, right = self.sides
        edges, labels = [left.kerb, right.kerb], [ROAD]
        for width, label in left.bands:
            edges, labels = [edges[0] - width, *edges], [label, *labels]
        for width, label in right.bands:
            edges, labels = [*edges, edges[-1] + width], [*labels, label]
        return edges, [left.beyond, *labels, right.beyond]

    def painting_order(self, thing: Thing) -> tuple[bool, float]:
        """Falls from far to near. A train across the street, wider than things are, parts them by z alone."""
        return self.railway is not None and thing.footprint[:, 1].max() > self.railway + 3, thing.depth


# ---------------------------------------------------------------------------------------------------------------------
# Sky and ground
# ---------------------------------------------------------------------------------------------------------------------


def paint_sky(canvas: Canvas) -> None:
    """A gradient with clouds over the whole picture."""
    tex, (height, width) = canvas.tex, canvas.ids.shape
    top, bottom, cloud = tone(tex, AIR), tone(tex, AIR), tone(tex, AIR)
    blend = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    coarse = tex.standard_normal((6, 8)).astype(np.float32)
    clouds = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)[..., None]
    clouds = (clouds * tex.uniform(0.2, 1.2)).clip(0, 1)
    canvas.image[:] = ((1 - blend) * top + blend * bottom) * (1 - clouds) + cloud * clouds


def paint_ground(canvas: Canvas, street: Street) -> None:
    camera, tex, noise = canvas.camera, canvas.tex, canvas.noise
    height, width = canvas.ids.shape
    first = max(int(np.floor(camera.horizon)) + 1, 0)
    rows = np.arange(first, height)[:, None]
    z = np.broadcast_to(camera.focal * camera.height / (rows - camera.horizon), (height - first, width))
    x = (np.arange(width) - camera.centre) * z / camera.focal - camera.shift(z)
    edges, kinds = street.ground()
    labels = np.array(kinds, np.uint16)[np.searchsorted(edges, x)]
    tracks = [(side.x(sum(band) / 2), False) for side in street.sides if (band := side.band(RAILS))]
    if street.junction:
        labels[(z > street.junction[0]) & (z < street.junction[1])] = ROAD
    if street.railway:
        labels[np.abs(z - street.railway) < 2.2] = RAILS
        tracks = [(street.railway, True)]
    paints: dict[int, Paint] = {
        ROAD: asphalt(tex, noise, [lane + street.lane_width / 2 for lane in street.lanes[:-1]], street.junction),
        SIDEWALK: paving(tex, noise),
        TERRAIN: grass(tex, noise),
    }
    if tracks:
        paints[RAILS] = railway(tex, noise, *tracks[0])
    canvas.ids[first:] = labels
    canvas.depth[first:] = z
    detail = (camera.focal / z).astype(np.float32)
    for kind, paint in paints.items():
        inside = labels == kind
        canvas.image[first:][inside] = paint(x[inside], z[inside], detail[inside])[0]


def paint_shadows(canvas: Canvas, things: Sequence[Thing]) -> None:
    """Darken the ground where a thing stands between it and the sun, or under an overcast sky just below it."""
    tex, camera = canvas.tex, canvas.camera
    mask = np.zeros(canvas.ids.shape, np.uint8)
    reach = tex.uniform(-1.2, 1.2, 2) if chance(tex, 0.6) and not canvas.night else np.zeros(2)
    for thing in things:
        ground = np.concatenate([thing.footprint, thing.footprint + reach * thing.height])
        ground[:, 1] = ground[:, 1].clip(1.0)
        pixels = camera.project(ground[:, 0], np.zeros(len(ground)), ground[:, 1])
        cv2.fillConvexPoly(mask, cv2.convexHull(whole_pixels(pixels)), 1)
    shade = cv2.blur(mask.astype(np.float32), (3, 3)) * tex.uniform(0.25, 0.6)
    first = max(int(np.floor(camera.horizon)) + 1, 0)
    canvas.image[first:] *= (1 - shade[first:])[..., None]


def paint_hood(canvas: Canvas, geo: Rng) -> None:
    """The bonnet of the car that carries the camera, at the bottom."""
    height, width = canvas.ids.shape
    top = height * geo.uniform(0.88, 0.96)
    bend = height * geo.uniform(0.02, 0.08)
    left = [(0, height), (0, top + bend), (0.2 * width, top)]
    right = [(0.8 * width, top), (width, top + bend), (width, height)]
    canvas.fill(np.array(left + right), EGO, tone(canvas.tex, LACQUER), 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# What stands along the street
# ---------------------------------------------------------------------------------------------------------------------


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


def surroundings(street: Street, canvas: Canvas) -> list[Thing]:
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


def traffic(street: Street) -> list[Thing]:
    """Vehicles in the lanes, across the junction, and on rails."""
    geo, tex = street.geo, street.tex
    left, right = street.sides
    things = []
    for lane in street.lanes:
        heading = 0.0 if lane > (left.kerb + right.kerb) / 2 else np.pi
        z = geo.uniform(8, 18)
        while z < min(55, street.length - 12):
            thing = road_user(street, lane + geo.uniform(-0.3, 0.3), z, heading + geo.uniform(-0.07, 0.07))
            if street.is_free(z - 2, z + 10):
                things.append(thing)
            z += geo.uniform(9, 20)
    if street.junction:
        z = sum(street.junction) / 2
        x = geo.uniform(-18, 0)
        while x < 18:
            things.append(road_user(street, x, z, pick(geo, (-1, 1)) * np.pi / 2))
            x += geo.uniform(8, 18)
    for side in street.sides:
        band = side.band(RAILS)
        if band and chance(geo, 0.85):
            length = geo.uniform(20, 50)
            pose = Pose(side.x(sum(band) / 2), geo.uniform(7, 16) + length / 2, 0.0)
            things.append(train(geo, tex, pose, street.new(TRAIN), length))
    if street.railway and chance(geo, 0.85):
        length = geo.uniform(25, 60)
        pose = Pose(geo.uniform(-20, 20), street.railway, np.pi / 2)
        things.append(train(geo, tex, pose, street.new(TRAIN), length)._replace(depth=500.0))
    return things


def road_user(street: Street, x: float, z: float, heading: float) -> Thing:
    geo, tex, pose = street.geo, street.tex, Pose(x, z, heading)
    what = geo.random()
    if what < 0.36:
        return car(geo, tex, pose, street.new(CAR))
    if what < 0.52:
        return truck(geo, tex, pose._replace(z=z + 3), street.new(TRUCK))
    if what < 0.66:
        return bus(geo, tex, pose._replace(z=z + 4), street.new(BUS))
    kind = pick(geo, (BICYCLE, MOTORCYCLE))
    return two_wheeler(geo, tex, x, max(6.0, 0.6 * z), street.new(kind), street.new(RIDER))


# ---------------------------------------------------------------------------------------------------------------------
# From the painted scene to a photograph
# ---------------------------------------------------------------------------------------------------------------------


def develop(canvas: Canvas) -> NDArray[np.uint8]:
    """Haze, stains, light, lamps, lens and sensor: the painted image to uint8 RGB."""
    tex, (height, width) = canvas.tex, canvas.ids.shape
    image = canvas.image
    haze = 1 - np.exp(-canvas.depth / np.float32(tex.uniform(120, 600)))
    haze[np.isinf(canvas.depth)] = 0  # the sky has its colours already
    image += haze[..., None] * (tone(tex, AIR) - image)
    stains = tex.normal(1, 0.06, (8, 16)).astype(np.float32)
    image *= cv2.resize(stains, (width, height), interpolation=cv2.INTER_CUBIC)[..., None]
    light = tex.uniform(0.8, 1.2) * tex.normal(1, 0.04, 3)
    if canvas.night:
        lamps = image * canvas.lit[..., None]
        image *= (light * tex.uniform(0.25, 0.45) * np.array((0.85, 0.92, 1.15))).astype(np.float32)
        small = cv2.resize(lamps, (width // 4, height // 4), interpolation=cv2.INTER_AREA)
        halo = cv2.GaussianBlur(small, (0, 0), height / 64) + 0.3 * cv2.GaussianBlur(small, (0, 0), height / 16)
        image += lamps + 1.5 * cv2.resize(halo, (width, height))
    else:
        image *= light.astype(np.float32)
    image = 255 * (image.clip(0, 255) / 255) ** np.float32(tex.uniform(0.85, 1.2))
    image = cv2.GaussianBlur(image, (0, 0), tex.uniform(0.3, 0.8) * height / 256).astype(np.float32)
    image += tex.standard_normal((height, width, 1), np.float32) * np.float32(tex.uniform(0.5, 4))
    image += tex.standard_normal((height, width, 3), np.float32) * np.float32(tex.uniform(0.5, 3))
    return np.rint(image.clip(0, 255)).astype(np.uint8)
