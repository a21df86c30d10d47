"""The figures of scenes with a camera: each a few solids, whose front, side and back differ.

Lengths are in units of the figure; it stands on y = 0 and its front faces z. Shades are those of
`sprites.tone`: 1 is the figure's colour, DARK ink, LIGHT nearly white.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from hidream.world.solids import Point, Solid, bar, box, cylinder, ellipsoid, prism

DARK, DIM, LIGHT = 0.08, 0.62, 1.52


@dataclass(frozen=True)
class Figure:
    """`focus` is the point that close shots look at, `back` the same from behind; `foot` half the
    width (x) and depth (z) of what touches the ground."""

    solids: tuple[Solid, ...]
    focus: Point
    back: Point
    foot: tuple[float, float]


def _both(make: Callable[[float], Solid]) -> tuple[Solid, Solid]:
    """The same on both sides: x and −x."""
    return make(1.0), make(-1.0)


def _pad(x: float, y: float, z: float, half: Point, shade: float) -> Solid:
    """A box around a point."""
    return box(
        (x - half[0], y - half[1], z - half[2]), (x + half[0], y + half[1], z + half[2]), shade
    )


def _car() -> Figure:
    cabin = prism(
        (-0.21, 0.28, -0.34),
        (0.21, 0.49, 0.2),
        (
            ((0, 0.75, 1), (0, 0.29, 0.2)),
            ((0, 0.45, -1), (0, 0.29, -0.34)),
            ((1, 0.22, 0), (0.21, 0.29, 0)),
            ((-1, 0.22, 0), (-0.21, 0.29, 0)),
        ),
        LIGHT,
    )
    roof = prism(
        (-0.2, 0.46, -0.3),
        (0.2, 0.52, 0.08),
        (((0, 1, 1), (0, 0.5, 0.07)), ((0, 1, -1), (0, 0.5, -0.29))),
    )
    body = prism(
        (-0.24, 0.1, -0.5),
        (0.24, 0.3, 0.5),
        (((0, 1, 0.35), (0, 0.3, 0.3)), ((0, 1, -0.5), (0, 0.3, -0.44))),
    )
    pillars = [
        bar((s * 0.2, 0.29, z), (s * 0.17, 0.48, z - lean), 0.035)
        for s in (1, -1)
        for z, lean in ((0.19, 0.17), (-0.07, 0.0), (-0.33, -0.07))
    ]
    wheels = [
        part
        for s in (1.0, -1.0)
        for z in (0.29, -0.29)
        for part in (
            cylinder((s * 0.2, 0.115, z), (0.055, 0.115, 0.115), 0, DARK),
            cylinder((s * 0.25, 0.115, z), (0.012, 0.055, 0.055), 0, 1.35),
        )
    ]
    front = (
        *_both(lambda s: cylinder((s * 0.17, 0.215, 0.5), (0.052, 0.052, 0.018), 2, 1.6)),
        _pad(0, 0.2, 0.5, (0.08, 0.035, 0.012), DARK),
        _pad(0, 0.115, 0.5, (0.24, 0.022, 0.025), 0.5),
    )
    back = (
        *_both(lambda s: _pad(s * 0.19, 0.215, -0.5, (0.035, 0.055, 0.014), 0.3)),
        _pad(0, 0.19, -0.5, (0.09, 0.035, 0.014), 1.6),
        _pad(0, 0.115, -0.5, (0.24, 0.022, 0.025), 0.5),
    )
    solids = (body, cabin, roof, *pillars, *wheels, *front, *back)
    return Figure(solids, (0.1, 0.22, 0.36), (0.1, 0.22, -0.5), (0.24, 0.46))


def _house() -> Figure:
    slope = 0.86
    roof = prism(
        (-0.42, 0.42, -0.38),
        (0.42, 0.85, 0.38),
        (((0, 1, slope), (0, 0.78, 0)), ((0, 1, -slope), (0, 0.78, 0))),
        DIM,
    )
    gable = prism(
        (-0.36, 0.0, -0.3),
        (0.36, 0.76, 0.3),
        (((0, 1, slope), (0, 0.74, 0)), ((0, 1, -slope), (0, 0.74, 0))),
    )
    windows = [
        _pad(x, 0.25, z, (half, half, deep), shade)
        for x, z in ((0.17, 0.3), (-0.2, -0.3), (0.2, -0.3))
        for half, deep, shade in ((0.095, 0.012, 0.5), (0.075, 0.022, 1.6))
    ]
    windows += [
        _pad(s * 0.36, 0.25, 0, (deep, half, half), shade)
        for s in (1, -1)
        for half, deep, shade in ((0.095, 0.012, 0.5), (0.075, 0.022, 1.6))
    ]
    door = (
        _pad(-0.17, 0.16, 0.3, (0.09, 0.16, 0.014), 0.3),
        _pad(-0.115, 0.15, 0.315, (0.016, 0.016, 0.012), LIGHT),
    )
    chimney = box((0.14, 0.5, -0.2), (0.27, 0.96, -0.07), 0.8)
    top = box((0.125, 0.92, -0.215), (0.285, 0.97, -0.055), 0.45)
    solids = (gable, roof, chimney, top, *windows, *door)
    return Figure(solids, (0.08, 0.3, 0.2), (-0.2, 0.3, -0.3), (0.38, 0.32))


def _fish() -> Figure:
    body = ellipsoid((0, 0.34, 0.06), (0.17, 0.27, 0.42))
    tail = prism(
        (-0.03, 0.02, -0.62),
        (0.03, 0.66, -0.22),
        (((0, 1, 1.05), (0, 0.36, -0.26)), ((0, -1, 1.05), (0, 0.32, -0.26))),
        0.8,
    )
    fin = prism(
        (-0.025, 0.5, -0.2),
        (0.025, 0.74, 0.22),
        (((0, 1, 1.1), (0, 0.58, 0.2)), ((0, 0.2, -1), (0, 0.6, -0.18))),
        0.8,
    )
    sides = _both(lambda s: ellipsoid((s * 0.2, 0.27, 0.06), (0.1, 0.025, 0.1), 0.7))
    eyes = (
        *_both(lambda s: ellipsoid((s * 0.115, 0.43, 0.29), (0.055, 0.065, 0.065), 1.6)),
        *_both(lambda s: ellipsoid((s * 0.145, 0.435, 0.322), (0.035, 0.036, 0.036), DARK)),
    )
    mouth = ellipsoid((0, 0.28, 0.455), (0.075, 0.035, 0.04), DARK)
    bands = [
        cylinder((0, 0.34, z), (0.178 * w, 0.278 * w, 0.022), 2, LIGHT)
        for z, w in ((-0.06, 0.96), (0.1, 0.995))
    ]
    return Figure(
        (body, tail, fin, *sides, *eyes, mouth, *bands),
        (0.03, 0.4, 0.25),
        (0.03, 0.4, -0.3),
        (0.13, 0.3),
    )


def _mug() -> Figure:
    body = cylinder((0, 0.4, 0), (0.34, 0.4, 0.34), 1)
    inside = cylinder((0, 0.8, 0), (0.285, 0.008, 0.285), 1, 0.2)
    angles = [math.radians(d) for d in range(-80, 81, 20)]
    arc = [(0.0, 0.4 + 0.24 * math.sin(a), -0.33 - 0.22 * math.cos(a)) for a in angles]
    arc = [(0.0, 0.4 - 0.24, -0.28), *arc, (0.0, 0.4 + 0.24, -0.28)]
    handle = [bar(a, b, 0.1, 0.9) for a, b in pairwise(arc)]
    bands = (cylinder((0, 0.08, 0), (0.347, 0.035, 0.347), 1, DIM),)

    def on(x: float, y: float, half: Point, shade: float) -> Solid:
        return ellipsoid((x, y, math.sqrt(0.34**2 - x * x)), half, shade)

    face = (
        ellipsoid((0, 0.42, 0.32), (0.21, 0.25, 0.05), 1.55),
        *_both(lambda s: ellipsoid((s * 0.085, 0.49, 0.355), (0.038, 0.055, 0.035), DARK)),
        *(
            bar((x, y, 0.365), (x2, y2, 0.365), 0.04, DARK)
            for x, y, x2, y2 in (
                (-0.11, 0.36, -0.06, 0.31),
                (-0.07, 0.315, 0.07, 0.315),
                (0.06, 0.31, 0.11, 0.36),
            )
        ),
    )
    return Figure(
        (body, inside, *handle, *bands, *face), (0.03, 0.46, 0.16), (0.05, 0.5, -0.5), (0.34, 0.34)
    )


def _robot() -> Figure:
    legs = _both(lambda s: box((s * 0.1 - 0.065, 0.0, -0.08), (s * 0.1 + 0.065, 0.26, 0.08), DIM))
    feet = _both(lambda s: box((s * 0.1 - 0.08, 0.0, -0.1), (s * 0.1 + 0.08, 0.07, 0.16), 0.35))
    body = box((-0.22, 0.24, -0.13), (0.22, 0.62, 0.13))
    arms = _both(lambda s: box((s * 0.285 - 0.05, 0.28, -0.06), (s * 0.285 + 0.05, 0.6, 0.06), DIM))
    hands = _both(lambda s: ellipsoid((s * 0.285, 0.27, 0.02), (0.065, 0.065, 0.065), 0.35))
    neck = cylinder((0, 0.64, 0), (0.07, 0.04, 0.07), 1, 0.35)
    head = box((-0.19, 0.66, -0.15), (0.19, 0.93, 0.15))
    antenna = (
        cylinder((0, 0.97, 0), (0.015, 0.06, 0.015), 1, 0.3),
        ellipsoid((0, 1.03, 0), (0.045, 0.045, 0.045), LIGHT),
    )
    ears = _both(lambda s: cylinder((s * 0.2, 0.79, 0), (0.025, 0.07, 0.07), 0, 0.35))
    face = (
        _pad(0, 0.81, 0.15, (0.15, 0.075, 0.012), 1.6),
        *_both(lambda s: cylinder((s * 0.07, 0.81, 0.165), (0.038, 0.045, 0.012), 2, DARK)),
        _pad(0, 0.7, 0.15, (0.08, 0.018, 0.012), DARK),
    )
    chest = (
        _pad(0, 0.46, 0.13, (0.12, 0.09, 0.012), LIGHT),
        *(
            cylinder((x, 0.46, 0.145), (0.028, 0.028, 0.01), 2, shade)
            for x, shade in ((-0.065, DARK), (0.0, 0.5), (0.065, DARK))
        ),
    )
    pack = (
        _pad(0, 0.45, -0.18, (0.15, 0.14, 0.06), 0.35),
        *_both(lambda s: cylinder((s * 0.07, 0.47, -0.245), (0.042, 0.042, 0.01), 2, LIGHT)),
        *(_pad(0, y, -0.15, (0.12, 0.016, 0.012), DARK) for y in (0.74, 0.79, 0.84)),
    )
    solids = (*legs, *feet, body, *arms, *hands, neck, head, *antenna, *ears, *face, *chest, *pack)
    return Figure(solids, (0.03, 0.8, 0.08), (0.03, 0.74, -0.15), (0.26, 0.14))


def _chair() -> Figure:
    seat = box((-0.27, 0.4, -0.25), (0.27, 0.47, 0.27))
    cushion = box((-0.22, 0.46, -0.17), (0.22, 0.52, 0.25), LIGHT)
    legs = [
        box((x - 0.035, 0.0, z - 0.035), (x + 0.035, 0.42, z + 0.035), 0.75)
        for x in (-0.23, 0.23)
        for z in (-0.21, 0.23)
    ]
    posts = _both(
        lambda s: box((s * 0.235 - 0.035, 0.4, -0.25), (s * 0.235 + 0.035, 1.0, -0.18), 0.9)
    )
    rest = box((-0.22, 0.62, -0.24), (0.22, 0.98, -0.19))
    knobs = _both(lambda s: ellipsoid((s * 0.235, 1.01, -0.215), (0.05, 0.05, 0.05), 0.5))
    front = _pad(0, 0.8, -0.19, (0.15, 0.12, 0.02), LIGHT)
    back = [_pad(0, y, -0.245, (0.2, 0.025, 0.015), 0.3) for y in (0.7, 0.8, 0.9)]
    return Figure(
        (seat, cushion, *legs, *posts, rest, *knobs, front, *back),
        (0.06, 0.72, -0.1),
        (0.06, 0.8, -0.24),
        (0.3, 0.3),
    )


def _bird() -> Figure:
    body = ellipsoid((0, 0.42, -0.03), (0.2, 0.22, 0.3))
    belly = ellipsoid((0, 0.37, 0.07), (0.165, 0.19, 0.22), 1.4)
    head = ellipsoid((0, 0.72, 0.19), (0.165, 0.165, 0.165))
    beak = prism(
        (-0.07, 0.62, 0.3),
        (0.07, 0.74, 0.52),
        (
            ((1, 0, 0.35), (0.07, 0.7, 0.3)),
            ((-1, 0, 0.35), (-0.07, 0.7, 0.3)),
            ((0, 1, 0.35), (0, 0.74, 0.3)),
            ((0, -1, 0.1), (0, 0.63, 0.3)),
        ),
        0.3,
    )
    eyes = (
        *_both(lambda s: ellipsoid((s * 0.105, 0.76, 0.29), (0.05, 0.055, 0.05), 1.6)),
        *_both(lambda s: ellipsoid((s * 0.125, 0.765, 0.322), (0.03, 0.034, 0.03), DARK)),
    )
    wings = _both(lambda s: ellipsoid((s * 0.2, 0.44, -0.08), (0.045, 0.14, 0.26), 0.66))
    tail = prism(
        (-0.12, 0.34, -0.62),
        (0.12, 0.66, -0.2),
        (((0, 1, 0.35), (0, 0.5, -0.2)), ((0, -1, -0.35), (0, 0.43, -0.2))),
        0.66,
    )
    legs = [
        part
        for s in (1.0, -1.0)
        for part in (
            bar((s * 0.08, 0.02, 0.0), (s * 0.08, 0.26, 0.0), 0.04, 0.2),
            _pad(s * 0.085, 0.015, 0.05, (0.055, 0.018, 0.1), 0.2),
        )
    ]
    crest = prism(
        (-0.03, 0.82, 0.06),
        (0.03, 0.98, 0.26),
        (((0, 1, 0.9), (0, 0.86, 0.26)),),
        0.66,
    )
    return Figure(
        (body, belly, head, beak, *eyes, *wings, tail, *legs, crest),
        (0.03, 0.71, 0.2),
        (0.03, 0.76, 0.05),
        (0.2, 0.25),
    )


_MAKE: dict[str, Callable[[], Figure]] = {
    "car": _car,
    "house": _house,
    "fish": _fish,
    "mug": _mug,
    "robot": _robot,
    "chair": _chair,
    "bird": _bird,
}
FIGURES = tuple(_MAKE)


@cache
def figure(kind: str) -> Figure:
    """The figure of a kind of `FIGURES`."""
    return _MAKE[kind]()
