"""Sky, ground, shadows and the camera car's bonnet."""

from collections.abc import Sequence

import cv2
import numpy as np

from segtrain.data.scenes.canvas import (
    AIR,
    EGO,
    LACQUER,
    RAILS,
    ROAD,
    SIDEWALK,
    TERRAIN,
    Canvas,
    Paint,
    chance,
    tone,
    whole_pixels,
)
from segtrain.data.scenes.outlines import Rng, Thing
from segtrain.data.scenes.street import Street
from segtrain.data.scenes.surfaces import asphalt, grass, paving, railway


def paint_sky(canvas: Canvas) -> None:
    """A gradient with clouds over the whole image."""
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
