"""Convex solids and what a camera sees of them: parallel rays, one depth test, no mesh.

Space is right-handed: x to the right of who looks at a figure's front, y up, z towards them; a
figure stands on y = 0. A solid is where all its half-spaces n·p ≤ k and, if it is round, its
quadric |S(p − m)| ≤ 1 hold: boxes, prisms, cylinders, ellipsoids. Along a ray each of the two is
an interval, so what a pixel sees of a solid is a few lines of arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

Array = np.ndarray
Point = tuple[float, float, float]
FAR = 1e9


@dataclass(frozen=True)
class Solid:
    """A convex body. `shade` is its tone (1 = the figure's colour, see `sprites.tone`)."""

    normals: Array  # (f, 3), of length 1
    offsets: Array  # (f,)
    corners: Array  # (8, 3): a box around it
    shade: float
    quadric: Array | None = None  # S (3, 3)
    centre: Array | None = None  # m (3,)


@dataclass(frozen=True)
class Seen:
    """What the pixels of a window see: a number for each face (h, w), 0 for nothing; the normals
    there (h, w, 3), and the shade of each face by its number."""

    face: Array
    normal: Array
    shades: Array


@dataclass(frozen=True)
class Eye:
    """Where a camera stands: `azimuth` turns it about the figure (0 = before its front, 90 = on
    its left hand), `elevation` lifts it, both in degrees. It looks along parallel rays."""

    azimuth: float
    elevation: float

    @cached_property
    def axes(self) -> tuple[Array, Array, Array]:
        """Right, up, and towards the camera: three unit vectors."""
        a, e = math.radians(self.azimuth), math.radians(self.elevation)
        right = np.array((math.cos(a), 0.0, -math.sin(a)))
        towards = np.array(
            (math.sin(a) * math.cos(e), math.sin(e), math.cos(a) * math.cos(e)), np.float64
        )
        return right, np.cross(towards, right), towards

    def project(self, points: Array) -> Array:
        """Points (n, 3) as places in the picture's plane (n, 2): to the right, up."""
        right, up, _ = self.axes
        return np.stack([points @ right, points @ up], -1)


def _corners(low: Sequence[float], high: Sequence[float]) -> Array:
    return np.array([[(low, high)[i >> k & 1][k] for k in range(3)] for i in range(8)])


def box(low: Point, high: Point, shade: float = 1.0) -> Solid:
    """A box between two corners."""
    normals = np.concatenate([np.eye(3), -np.eye(3)])
    return Solid(normals, np.array([*high, *(-v for v in low)]), _corners(low, high), shade)


def prism(low: Point, high: Point, cut: Sequence[tuple[Point, Point]], shade: float = 1.0) -> Solid:
    """A box with pieces cut off: each cut is (normal outwards, a point on the cut)."""
    whole = box(low, high, shade)
    normals = np.array([n for n, _ in cut], np.float64)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    offsets = (normals * np.array([p for _, p in cut])).sum(1)
    return replace(
        whole,
        normals=np.concatenate([whole.normals, normals]),
        offsets=np.concatenate([whole.offsets, offsets]),
    )


def ellipsoid(centre: Point, radii: Point, shade: float = 1.0) -> Solid:
    """A ball, stretched along the axes."""
    m, a = np.array(centre), np.array(radii)
    return Solid(np.zeros((0, 3)), np.zeros(0), _corners(m - a, m + a), shade, np.diag(1 / a), m)


def cylinder(centre: Point, radii: Point, axis: int, shade: float = 1.0) -> Solid:
    """An upright (axis 1) or lying (0: along x, 2: along z) cylinder; `radii[axis]` is half its
    length."""
    round_ = ellipsoid(centre, radii, shade)
    assert round_.quadric is not None
    quadric = round_.quadric.copy()
    quadric[axis, axis] = 0.0
    normals = np.array([np.eye(3)[axis], -np.eye(3)[axis]])
    offsets = np.array([centre[axis] + radii[axis], radii[axis] - centre[axis]])
    return replace(round_, normals=normals, offsets=offsets, quadric=quadric)


def bar(start: Point, end: Point, width: float, shade: float = 1.0) -> Solid:
    """A straight bar between two points, `width` thick."""
    a, b = np.array(start), np.array(end)
    along = (b - a) / np.linalg.norm(b - a)
    aside = np.cross(along, (1.0, 0.0, 0.0) if abs(along[0]) < 0.9 else (0.0, 1.0, 0.0))
    aside /= np.linalg.norm(aside)
    over = np.cross(along, aside)
    normals = np.array([along, -along, aside, -aside, over, -over])
    half = width / 2
    offsets = np.array(
        [along @ b, -along @ a, *(s * (v @ a) + half for v in (aside, over) for s in (1, -1))]
    )
    corners = np.array(
        [p + s * half * aside + t * half * over for p in (a, b) for s in (-1, 1) for t in (-1, 1)]
    )
    return Solid(normals, offsets, corners, shade)


def see(solids: Sequence[Solid], eye: Eye, xs: Array, ys: Array) -> Seen:
    """What the window with columns `xs` (rising) and rows `ys` (falling) of the plane sees."""
    axes = eye.axes
    shape = (len(ys), len(xs))
    depth, face = np.full(shape, -FAR, np.float32), np.zeros(shape, np.int16)
    normals, shades, rounds = [np.zeros((1, 3))], [1.0], []
    for solid in solids:
        first, num_flat = len(shades), len(solid.offsets)
        shades += [solid.shade] * (num_flat + 1)
        normals += [solid.normals, np.zeros((1, 3))]
        flat = eye.project(solid.corners)
        columns = slice(*np.searchsorted(xs, (flat[:, 0].min(), flat[:, 0].max())))
        rows = slice(*np.searchsorted(-ys, (-flat[:, 1].max(), -flat[:, 1].min())))
        if columns.start == columns.stop or rows.start == rows.stop:
            continue
        t, which = _hit(solid, axes, xs[columns], ys[rows])
        nearer = t > depth[rows, columns]
        depth[rows, columns][nearer] = t[nearer]
        face[rows, columns][nearer] = first + which[nearer]
        if solid.quadric is not None:
            rounds.append((solid.centre, solid.quadric.T @ solid.quadric, first + num_flat))
    normal = np.concatenate(normals).astype(np.float32)[face]
    right, up, towards = axes
    for centre, square, number in rounds:
        i, j = np.nonzero(face == number)
        place = xs[j, None] * right + ys[i, None] * up + depth[i, j, None] * towards
        outwards = (place - centre) @ square
        normal[i, j] = outwards / np.maximum(np.linalg.norm(outwards, axis=1, keepdims=True), 1e-9)
    return Seen(face, normal, np.array(shades, np.float32))


def _hit(
    solid: Solid, axes: tuple[Array, Array, Array], xs: Array, ys: Array
) -> tuple[Array, Array]:
    """Where rays enter a solid: depth (-FAR: they miss), and the number of its face there."""
    right, up, towards = axes
    x, y = xs.astype(np.float32)[None], ys.astype(np.float32)[:, None]
    shape = (len(ys), len(xs))
    enter, leave = np.full(shape, FAR, np.float32), np.full(shape, -FAR, np.float32)
    which = np.zeros(shape, np.int16)
    for i, (n, k) in enumerate(zip(solid.normals, solid.offsets, strict=True)):
        slope, a, b = (np.float32(n @ v) for v in (towards, right, up))
        if abs(slope) < 1e-6:
            enter[np.float32(k) - a * x - b * y < 0] = -FAR
            continue
        bound = (np.float32(k) - a * x) / slope - b / slope * y
        if slope > 0:
            which[bound < enter] = i
            enter = np.minimum(enter, bound)
        else:
            leave = np.maximum(leave, bound)
    if solid.quadric is not None:
        near, far = _round(solid, axes, x, y)
        which[near < enter] = len(solid.offsets)
        enter, leave = np.minimum(enter, near), np.maximum(leave, far)
    return np.where(enter > leave, enter, np.float32(-FAR)), which


def _round(
    solid: Solid, axes: tuple[Array, Array, Array], x: Array, y: Array
) -> tuple[Array, Array]:
    """The interval of a quadric along the rays, nearer end first."""
    S, m = solid.quadric, solid.centre
    assert S is not None
    assert m is not None
    right, up, towards = ((S @ v).astype(np.float32) for v in axes)
    middle = (S @ m).astype(np.float32)
    # |p + t·towards|² ≤ 1 with p = x·right + y·up − middle
    a = float(towards @ towards)
    parts = [x * right[k] + y * up[k] - middle[k] for k in range(3)]
    c = sum(p * p for p in parts) - np.float32(1)
    far = np.float32(FAR)
    if a < 1e-9:  # along the axis of a cylinder
        return np.where(c <= 0, far, -far), np.where(c <= 0, -far, far)
    b = sum(p * towards[k] for k, p in enumerate(parts))
    root = b * b - np.float32(a) * c
    hit, root = root > 0, np.sqrt(np.maximum(root, 0))
    return np.where(hit, (root - b) / a, -far), np.where(hit, (-b - root) / a, far)
