"""What street scenes are painted with: colours, noise, a pinhole camera and a canvas that keeps image and labels.

Labels come from integer pixel outlines without smoothing, or from comparisons of numbers made by + - * / alone, so
that they are the same everywhere. Metres: x to the right, y up, z ahead.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
FloatArray = NDArray[np.floating]
Colour = NDArray[np.float32]  # (3,), RGB, 0 to 255
Points = Sequence[tuple[float, float]]
Paint = Callable[[FloatArray, FloatArray, FloatArray], tuple[FloatArray, NDArray[np.bool_] | None]]

# Cityscapes label ids.
UNLABELED, EGO, STATIC, DYNAMIC, ROAD, SIDEWALK, RAILS, BUILDING, WALL, FENCE = 0, 1, 4, 5, 7, 8, 10, 11, 12, 13
POLE, LIGHT, SIGN, VEGETATION, TERRAIN, SKY = 17, 19, 20, 21, 22, 23
PERSON, RIDER, CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE = 24, 25, 26, 27, 28, 31, 32, 33

COLOURS = {
    "black": (38, 38, 42), "dark": (66, 66, 70), "grey": (112, 112, 114), "pale": (176, 174, 168),
    "white": (222, 222, 218), "brick": (142, 88, 70), "sand": (178, 156, 122), "brown": (108, 84, 62),
    "green": (82, 102, 58), "olive": (114, 112, 72), "blue": (80, 102, 142), "sky": (150, 178, 208),
    "red": (164, 54, 48), "yellow": (204, 170, 64), "orange": (198, 110, 50), "skin": (186, 140, 112),
}  # fmt: skip
# Every colour is in several of these lists, with different frequencies.
ASPHALT = ("grey", "grey", "grey", "dark", "dark", "pale")
PAVING = ("pale", "pale", "sand", "sand", "brick", "grey")
MASONRY = ("brick", "brick", "sand", "sand", "pale", "white", "blue")
WALLS = ("grey", "grey", "olive", "olive", "brown", "pale")
METAL = ("dark", "dark", "black", "green", "brown", "white")
PLANTS = ("green", "green", "green", "green", "olive", "brown")
SOIL = ("olive", "olive", "sand", "brown", "green")
AIR = ("sky", "sky", "sky", "white", "pale", "grey", "blue")
LACQUER = ("white", "pale", "grey", "black", "blue", "red", "green", "sand", "yellow")
CAR_LACQUER = ("grey", "pale", "white", "black", "blue", "blue", "red", "red", "green")
TRUCK_LACQUER = ("white", "white", "blue", "blue", "green", "pale", "orange")
BUS_LACQUER = ("yellow", "yellow", "orange", "white", "red")
TRAIN_LACQUER = ("red", "red", "green", "green", "white", "yellow")
MOTORCYCLE_LACQUER = ("red", "red", "black", "orange", "blue")
CLOTHES = ("dark", "black", "blue", "blue", "red", "white", "green", "brown")
RIDING_CLOTHES = ("orange", "orange", "yellow", "yellow", "red", "white", "blue")


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]


def chance(rng: np.random.Generator, probability: float) -> bool:
    return bool(rng.random() < probability)


def tone(tex: np.random.Generator, names: Sequence[str]) -> Colour:
    """One of the named colours, a bit off."""
    base = np.array(COLOURS[pick(tex, names)], np.float32)
    return (base * tex.uniform(0.75, 1.2) + tex.normal(0, 7, 3)).clip(8, 250).astype(np.float32)


class Noise:
    """Smooth random values about -1 to 1 over the plane, the same at every call."""

    def __init__(self, tex: np.random.Generator) -> None:
        tile = tex.standard_normal((256, 256)).astype(np.float32)
        self.tile = (tile + 1.5 * cv2.GaussianBlur(tile, (0, 0), 1.0)).clip(-2, 2) / 2

    def __call__(self, u: FloatArray, v: FloatArray, per_metre: float, stretch: float = 1.0) -> FloatArray:
        column = (u * per_metre).astype(np.int32) & 255
        row = (v * (per_metre / stretch)).astype(np.int32) & 255
        return self.tile[row, column]


def lines(position: FloatArray, period: float, width: float, offset: float = 0.0) -> NDArray[np.bool_]:
    """True on stripes of `width` that repeat with `period`."""
    return (position + offset) % period < width


def visible(detail: FloatArray, period: float) -> FloatArray:
    """1 where a pattern of this period in metres can be seen, 0 where it is too far away. `detail`: pixels a metre."""
    return (detail * period * 0.5 - 0.5).clip(0, 1)


class Camera(NamedTuple):
    """A camera over the ground plane. World metres: x to the right, y up, z ahead; x = 0, z = 0 under the camera."""

    focal: float  # pixels
    height: float  # metres
    horizon: float  # row
    centre: float  # column of the street's vanishing point
    bend: float  # the street at z lies bend * z * z to the right

    def shift(self, z: FloatArray | float) -> FloatArray:
        return self.bend * np.minimum(z, 120.0) ** 2

    def project(self, x: FloatArray, y: FloatArray, z: FloatArray) -> FloatArray:
        """Columns and rows, (N, 2), of points given in street coordinates."""
        columns = self.centre + self.focal * (x + self.shift(z)) / z
        rows = self.horizon + self.focal * (self.height - y) / z
        return np.stack([columns, rows], axis=-1)


def whole_pixels(pixels: FloatArray) -> NDArray[np.int32]:
    """Rounded, and near enough to the image for OpenCV's fixed-point arithmetic."""
    return np.rint(pixels.clip(-20000, 20000)).astype(np.int32)


class Canvas:
    """The image so far: image float32 (H, W, 3), ids uint16 (H, W) in instance coding, depth float32 (H, W)."""

    def __init__(self, camera: Camera, size: tuple[int, int], tex: np.random.Generator, night: bool) -> None:
        self.camera, self.tex, self.night = camera, tex, night
        self.image = np.zeros((*size, 3), np.float32)
        self.ids = np.full(size, SKY, np.uint16)
        self.depth = np.full(size, np.inf, np.float32)
        self.noise = Noise(tex)
        self.lit = np.zeros(size, np.uint8)  # 1 where a lamp shines at night

    def fill(self, pixels: FloatArray, code: int, colour: Colour | None, z: float, glows: bool = False) -> None:
        """Fill a polygon; without a colour only the labels change and what lies behind stays to be seen."""
        outline = [whole_pixels(pixels)]
        cv2.fillPoly(self.ids, outline, code)
        if colour is not None:
            cv2.fillPoly(self.image, outline, colour.tolist())
            cv2.fillPoly(self.depth, outline, z)
            cv2.fillPoly(self.lit, outline, int(glows))

    def texture(self, pixels: FloatArray, code: int, paint: Paint, z: float) -> None:
        """Fill a polygon with a texture in metres of the upright plane at distance z."""
        height, width = self.ids.shape
        outline = whole_pixels(pixels)
        left, top = np.maximum(outline.min(axis=0), 0)
        right, bottom = np.minimum(outline.max(axis=0) + 1, (width, height))
        if left >= right or top >= bottom:
            return
        mask = np.zeros((bottom - top, right - left), np.uint8)
        cv2.fillPoly(mask, [outline - np.array([left, top], np.int32)], 1)
        scale = self.camera.focal / z
        rows, columns = np.mgrid[top:bottom, left:right].astype(np.float32) / np.float32(scale)
        self.put(top, left, mask > 0, code, paint(columns, rows, np.float32(scale) * np.ones_like(rows)), z)

    def put(self, top: int, left: int, inside: NDArray[np.bool_], code: int,
            painted: tuple[FloatArray, NDArray[np.bool_] | None], z: FloatArray | float) -> None:  # fmt: skip
        """Lay a painted rectangle down where `inside` is true."""
        rgb, cover = painted
        box = np.s_[top : top + inside.shape[0], left : left + inside.shape[1]]
        self.ids[box][inside] = code
        seen = inside if cover is None else inside & cover
        np.copyto(self.image[box], rgb, where=seen[..., None], casting="same_kind")
        np.copyto(self.depth[box], np.float32(z), where=seen)
        self.lit[box][seen] = 0

    def panel(self, start: tuple[float, float], end: tuple[float, float], skyline: Points, code: int,
              paint: Paint) -> None:  # fmt: skip
        """Paint an upright wall from ground point (x, z) to another; `skyline`: (fraction of its length, height)."""
        camera = self.camera
        (xa, za), (xb, zb) = start, end
        xa, xb = xa + float(camera.shift(za)), xb + float(camera.shift(zb))
        first, last = sorted((camera.centre + camera.focal * xa / za, camera.centre + camera.focal * xb / zb))
        left, right = max(int(np.ceil(first)), 0), min(int(np.floor(last)) + 1, self.ids.shape[1])
        if left >= right:
            return
        slope = (np.arange(left, right) - camera.centre) / camera.focal
        along = ((xa - slope * za) / (slope * (zb - za) - (xb - xa))).clip(0, 1)
        z = za + along * (zb - za)
        fractions, heights = zip(*skyline, strict=True)
        top = camera.horizon + camera.focal * (camera.height - np.interp(along, fractions, heights)) / z
        base = camera.horizon + camera.focal * camera.height / z
        first_row, last_row = max(int(top.min()), 0), min(int(base.max()) + 1, self.ids.shape[0])
        if first_row >= last_row:
            return
        rows = np.arange(first_row, last_row)[:, None]
        inside = (rows >= top) & (rows <= base)
        v = (camera.height - (rows - camera.horizon) * z / camera.focal).astype(np.float32)
        length = float(np.hypot(xb - xa, zb - za))
        u = np.broadcast_to((along * length).astype(np.float32), v.shape)
        detail = np.broadcast_to((camera.focal / z).astype(np.float32), v.shape)
        self.put(first_row, left, inside, code, paint(u, v, detail), np.broadcast_to(z, v.shape))
