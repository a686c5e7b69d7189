"""Road users and trains."""

import numpy as np

from segtrain.data.scenes.canvas import BICYCLE, BUS, CAR, MOTORCYCLE, RAILS, RIDER, TRAIN, TRUCK, chance, pick
from segtrain.data.scenes.outlines import Thing
from segtrain.data.scenes.people import two_wheeler
from segtrain.data.scenes.street import Street
from segtrain.data.scenes.vehicles import Pose, bus, car, draw_train, truck


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
            things.append(draw_train(geo, tex, pose, street.new(TRAIN), length))
    if street.railway and chance(geo, 0.85):
        length = geo.uniform(25, 60)
        pose = Pose(geo.uniform(-20, 20), street.railway, np.pi / 2)
        things.append(draw_train(geo, tex, pose, street.new(TRAIN), length)._replace(depth=500.0))
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
