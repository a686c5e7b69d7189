"""Street scenes drawn from a seed: labelled images to train on without a downloaded dataset.

`draw` makes one scene. A camera looks along a street whose width, bend, surroundings and traffic are random; things
are painted from far to near. The classes share their colours and the light varies, so that neither position nor
colour identifies a class: shape, texture and context do. layouts.py writes such scenes as files.

Two random generators make a scene: `geo` decides everything that the labels show, `tex` only what the image shows.
"""

import zlib
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from segtrain.data.scenes.canvas import (
    AIR,
    Camera,
    Canvas,
    chance,
    tone,
)
from segtrain.data.scenes.ground import paint_ground, paint_hood, paint_shadows, paint_sky
from segtrain.data.scenes.outlines import Rng
from segtrain.data.scenes.roadside import footway, roadside
from segtrain.data.scenes.street import Street
from segtrain.data.scenes.traffic import traffic

VERSION = 1  # of the labels: a change of any label pixel needs a new one


class Scene(NamedTuple):
    """An image and its labels.

    image: uint8 (H, W, 3), RGB. label_ids: uint8 (H, W), Cityscapes ids 0 to 33. instance_ids: uint16 (H, W),
    id * 1000 + k (k from 0) for persons, riders and vehicles, the plain id elsewhere.
    """

    image: NDArray[np.uint8]
    label_ids: NDArray[np.uint8]
    instance_ids: NDArray[np.uint16]


def draw(seed: int, split: str, index: int, size: tuple[int, int] = (256, 512)) -> Scene:
    """Draw scene `index` of a split; the split called "night" is dark. `size` is (height, width), width = 2 * height.

    The labels depend on nothing but VERSION and the arguments; the image may differ in its last bits
    between versions of OpenCV.
    """
    sequence = np.random.SeedSequence((VERSION, seed, zlib.crc32(split.encode()), index))
    geo, tex = np.random.default_rng(sequence), np.random.default_rng(sequence.spawn(1)[0])
    canvas = Canvas(random_camera(geo, size), size, tex, night=split == "night")
    street = Street(geo, tex)
    paint_sky(canvas)
    paint_ground(canvas, street)
    things = [*roadside(street, canvas), *traffic(street), *footway(street, canvas)]
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
