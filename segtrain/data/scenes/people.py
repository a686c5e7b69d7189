"""Pedestrians, and bicycles and motorcycles with or without a rider."""

from segtrain.data.scenes.canvas import (
    CLOTHES,
    LACQUER,
    MOTORCYCLE,
    MOTORCYCLE_LACQUER,
    RIDING_CLOTHES,
    chance,
    pick,
    tone,
)
from segtrain.data.scenes.outlines import Part, Rng, Thing, bar, box, disc, flat_thing, ring, scaled


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
    return flat_thing(x, z, scaled(parts, height * pick(geo, (-1.15, 1.15)), height), code, 0.5, height)


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
    """A bicycle or motorcycle, according to `code`, with or without a rider."""
    side_view, motor = chance(geo, 0.65), code // 1000 == MOTORCYCLE
    parts = (motorcycle_parts if motor else bicycle_parts)(tex, side_view)
    if rider_code is not None:
        seat, lean = (0.95, 0.25) if motor else (1.05, 0.4)
        rider = rider_parts(tex, side_view, seat, lean, rider_code)
        parts = [*parts, *rider] if side_view else [*rider[:2], *parts, *rider[2:]]
    squash = geo.uniform(0.75, 1.0) if side_view else 1.0
    scale = geo.uniform(1.0, 1.15)
    parts = scaled(parts, squash * scale * pick(geo, (-1.0, 1.0)), scale)
    return flat_thing(x, z, parts, code, 1.4 * squash if side_view else 0.5, 1.6)
