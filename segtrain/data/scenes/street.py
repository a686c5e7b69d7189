"""The plan of a street seen from above: lanes, sides, a junction or a railway across it."""

from itertools import count
from typing import NamedTuple

from segtrain.data.scenes.canvas import (
    BICYCLE,
    BUS,
    CAR,
    MOTORCYCLE,
    PERSON,
    RAILS,
    RIDER,
    ROAD,
    SIDEWALK,
    TERRAIN,
    TRAIN,
    TRUCK,
    chance,
    pick,
)
from segtrain.data.scenes.outlines import Rng, Thing

NEAREST, FARTHEST = 1.5, 90.0  # metres ahead between which things stand


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
