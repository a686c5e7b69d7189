"""Polygons to pixels, and the canvas on which the objects of an image are painted.

The convention: coordinates are in pixels, (0, 0) is the upper left corner of the upper left pixel, and a pixel belongs
to a polygon if its centre, (column + 0.5, row + 0.5), is inside by the even-odd rule. A centre exactly on an edge
belongs to the polygon on its right, or below it. So polygons that share an edge never share a pixel and leave none
between them, and a polygon along the edges of pixels gives exactly these pixels.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from segtrain.errors import DataError, meant

FARTHEST = 1e7  # pixels from the image at which a coordinate is taken for a mistake


class Region(NamedTuple):
    """The pixels of an object: mask bool (h, w), whose upper left pixel is (top, left) of the image."""

    mask: np.ndarray
    top: int
    left: int

    @property
    def area(self) -> int:
        return int(np.count_nonzero(self.mask))

    @property
    def place(self) -> tuple[slice, slice]:
        height, width = self.mask.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


NOTHING = Region(np.zeros((0, 0), bool), 0, 0)


def fill_polygon(points: np.ndarray, height: int, width: int) -> Region:
    """The pixels of an image whose centres are inside a closed polygon. points: float64 (N, 2), x and y in pixels."""
    start, end = points, np.roll(points, -1, axis=0)
    upward = start[:, 1] > end[:, 1]
    # From the upper point to the lower one, so that two polygons compute the same crossings of an edge that they share.
    (x0, y0), (x1, y1) = np.where(upward[:, None], end, start).T, np.where(upward[:, None], start, end).T
    first = np.clip(np.ceil(y0 - 0.5), 0, height).astype(np.int64)  # rows whose centres are in y0 <= y < y1
    last = np.clip(np.ceil(y1 - 0.5), 0, height).astype(np.int64)
    counts = last - first
    if not counts.any():
        return NOTHING
    top, bottom = int(first[counts > 0].min()), int(last.max())
    left = int(np.clip(np.floor(points[:, 0].min()), 0, width))
    right = int(np.clip(np.ceil(points[:, 0].max()), left, width))
    edge = np.repeat(np.arange(len(points)), counts)
    rows = first[edge] + np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts)
    crossing = x0[edge] + (rows + 0.5 - y0[edge]) * ((x1 - x0)[edge] / (y1 - y0)[edge])
    columns = np.clip(np.ceil(crossing - 0.5), left, right).astype(np.int64) - left
    across = right - left + 1
    changes = np.bincount((rows - top) * across + columns, minlength=(bottom - top) * across)
    inside = np.cumsum(changes.reshape(bottom - top, across), axis=1)[:, :-1] & 1
    return Region(inside.astype(bool), top, left)


def joined(regions: Sequence[Region]) -> Region:
    """The pixels that are in any of these regions."""
    some = [region for region in regions if region.mask.size]
    if len(some) < 2:
        return some[0] if some else NOTHING
    top, left = min(region.top for region in some), min(region.left for region in some)
    bottom = max(region.top + region.mask.shape[0] for region in some)
    right = max(region.left + region.mask.shape[1] for region in some)
    mask = np.zeros((bottom - top, right - left), bool)
    for region in some:
        mask[Region(region.mask, region.top - top, region.left - left).place] |= region.mask
    return Region(mask, top, left)


def covered_parts(parts: Sequence[Region], union: Region) -> int:
    """How many parts have no pixel of their own. union: all of them joined."""
    if len(parts) < 2:
        return 0
    times = np.zeros(union.mask.shape, np.int32)
    some = [Region(part.mask, part.top - union.top, part.left - union.left) for part in parts if part.area]
    for part in some:
        times[part.place] += part.mask
    return sum(bool((times[part.place][part.mask] > 1).all()) for part in some)


def without(region: Region, hole: Region, size: tuple[int, int]) -> Region:
    """The pixels of a region that are not in the hole."""
    whole = np.zeros(size, bool)
    whole[hole.place] = hole.mask
    return Region(region.mask & ~whole[region.place], region.top, region.left)


class Classes:
    """The ids of the classes by name, as a table has them. source: of the table, for messages."""

    def __init__(self, rows: Iterable[Mapping[str, Any]], source: str) -> None:
        self.ids = {str(row["name"]): int(row["id"]) for row in rows}
        self.source = source

    def id_of(self, name: str, where: str) -> int:
        """DataError for a name that the table does not have."""
        if name not in self.ids:
            known = ", ".join(list(self.ids)[:12]) + (", ..." if len(self.ids) > 12 else "")
            raise DataError(
                f"{where}: the class {name!r} is not in {self.source}, which has {known}{meant(name, self.ids)}; add "
                "it to the table (as ignored if it means nothing)"
            )
        return self.ids[name]


class Canvas:
    """The labels of one image, painted object by object; `finish` gives ids uint8 (H, W).

    size: (height, width). order: which object covers which: "last", the later one, or "area", the one with fewer
    pixels. facts: what is counted: objects, holes, empty and degenerate polygons and so on, by their names in a report.
    Errors name the record as `where`.
    """

    def __init__(self, size: tuple[int, int], classes: Classes, order: str) -> None:
        self.size = size
        self.classes = classes
        self.order = order
        self.facts: Counter[str] = Counter()
        self.objects: list[tuple[bool, Region, int]] = []
        self.values: np.ndarray | None = None

    def polygon(
        self, name: str, rings: Sequence[Any], where: str, holes: Sequence[Any] = (), crowd: bool = False
    ) -> None:  # fmt: skip
        """An object of one or several polygons, each a list of (x, y); the holes are taken out of them all."""
        label = self.classes.id_of(name, where)
        self.facts["polygons"] += len(rings)
        self.facts["holes"] += len(holes)
        parts = [self.ring(ring, where) for ring in rings]
        region = joined(parts)
        self.facts["polygons within others of their object"] += covered_parts(parts, region)
        if holes and region.area:
            region = without(region, joined([self.ring(ring, where) for ring in holes]), self.size)
        self.add(region, label, crowd)

    def ring(self, points: Any, where: str) -> Region:
        """One polygon. DataError for what is no list of points, NaN, and coordinates that no image has."""
        array = as_points(points, where)
        if len(array) < 3 or is_flat(array):
            self.facts["degenerate polygons"] += 1
            return NOTHING
        height, width = self.size
        low, high = array.min(0), array.max(0)
        if (low < -1).any() or high[0] > width + 1 or high[1] > height + 1:
            self.facts["polygons that reach outside"] += 1
        region = fill_polygon(array, *self.size)
        if not region.mask.any():
            self.facts["empty polygons"] += 1
        return region

    def bitmap(
        self, name: str, mask: np.ndarray, where: str, top: int = 0, left: int = 0, crowd: bool = False
    ) -> None:  # fmt: skip
        """An object as a mask, bool (h, w), whose upper left pixel is (top, left). DataError if it leaves the image."""
        label = self.classes.id_of(name, where)
        height, width = mask.shape
        if top < 0 or left < 0 or top + height > self.size[0] or left + width > self.size[1]:
            raise DataError(
                f"{where}: a mask of {width}x{height} at column {left}, row {top} leaves the image, which is "
                f"{self.size[1]}x{self.size[0]} (width x height)"
            )
        self.facts["masks"] += 1
        if not mask.any():
            self.facts["empty masks"] += 1
        self.add(Region(mask, top, left), label, crowd)

    def add(self, region: Region, label: int, crowd: bool) -> None:
        self.facts["objects"] += 1
        self.facts["crowds"] += crowd
        if region.area:
            self.objects.append((not crowd, region, label))

    def skip(self, kind: str) -> None:
        """Count an annotation of a kind that has no area."""
        self.facts[f"not drawn: {kind}"] += 1

    def whole(self, ids: np.ndarray) -> None:
        """All pixels at once, uint8 (H, W)."""
        self.values = ids

    def finish(self, unlabelled: int | None) -> np.ndarray:
        """The ids; unlabelled: of the pixels that no object covers."""
        if self.values is not None:
            self.facts["pixels"] += self.values.size
            return self.values
        assert unlabelled is not None
        ids = np.full(self.size, unlabelled, np.uint8)
        covered = np.zeros(self.size, bool)
        contested = np.zeros(self.size, bool)
        # Crowds, which are outlined roughly, lie below everything else.
        objects = sorted(self.objects, key=lambda item: (item[0], -item[1].area if self.order == "area" else 0))
        for _, region, label in objects:
            place = region.place
            contested[place] |= region.mask & covered[place] & (ids[place] != label)
            ids[place][region.mask] = label
            covered[place] |= region.mask
        self.facts["pixels"] += covered.size
        self.facts["unlabelled pixels"] += covered.size - int(np.count_nonzero(covered))
        self.facts["pixels of objects of different classes"] += int(np.count_nonzero(contested))
        self.facts["images without objects"] += not self.facts["objects"]
        return ids


def as_points(points: Any, where: str) -> np.ndarray:
    """float64 (N, 2). DataError for anything but a list of (x, y) with numbers that an image can have."""
    numbers = isinstance(points, np.ndarray) or (
        isinstance(points, list)
        and all(isinstance(point, list | tuple) and len(point) == 2 for point in points)
        and all(type(number) in (int, float) for point in points for number in point)
    )
    if not numbers:
        raise DataError(f"{where}: expected a list of points, each of two numbers x and y, found {str(points)[:60]}")
    try:
        array = np.asarray(points, np.float64).reshape(-1, 2)
    except (ValueError, OverflowError) as error:  # a whole number beyond float64
        raise DataError(f"{where}: the points {str(points)[:60]} have coordinates that no image has") from error
    if not np.isfinite(array).all():
        raise DataError(f"{where}: the points have coordinates that are NaN or infinite; correct or remove this object")
    if array.size and np.abs(array).max() > FARTHEST:
        raise DataError(f"{where}: a point is at {np.abs(array).max():g} pixels, outside of any image")
    return array


def is_flat(points: np.ndarray) -> bool:
    """Whether all points are on one line."""
    away = points - points[0]
    far = away[np.abs(away).sum(1).argmax()]
    return not (away[:, 0] * far[1] != away[:, 1] * far[0]).any()
