"""All that a picture of one figure may show, small: every kind as every camera sees it, at once.

A framing has coverage a, shadow s and, of its shades, what multiplies the colour k (d) and what
does not (e). It draws p' = g·B + c + D·k over a background B, with g = (1-a)(1-s), D = a·d and
c = (1-a)·s·ink + a·e. Its error |p - p'|² is a sum of products of (g, c, D) with pictures, so that
all framings, colours and small moves are a few matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from hidream.judges.templates import Array
from hidream.world.figures import FIGURES
from hidream.world.lens import (
    ANGLES,
    HORIZONS,
    SHOTS,
    VIEWS,
    eye_of,
    frame_of,
    light_of,
    look_at,
    shadow_of,
    with_edges,
)
from hidream.world.render import background as draw_background
from hidream.world.scene import COLORS, Camera
from hidream.world.shots import place
from hidream.world.sprites import INK, PALETTE

COARSE = 32
SHADOW_INK = 16 / 255
MOVES = tuple((dx, dy) for dy in (-1, 0, 1) for dx in (-1, 0, 1))  # coarse pixels
NUM_GUESSES = 60


@dataclass(frozen=True)
class Guess:
    """A framing with its colour and background, moved by (dx, dy) sides of the picture."""

    kind: str
    camera: Camera
    column: float
    color: str
    background: str
    dx: float
    dy: float
    error: float


@dataclass(frozen=True)
class Paint:
    """c and D of framings, each (n, h·w), and Σ D·c and Σ D² of each (n,)."""

    rest: Array
    light: Array
    crossed: Array
    square: Array


@dataclass(frozen=True)
class Framings:
    """The framings of one angle: labels (kind, camera, column), g (n, h·w), and how they look in a
    colour and in black, whose shades are its own."""

    labels: tuple[tuple[str, Camera, float], ...]
    ground: Array
    paints: tuple[Paint, Paint]


@lru_cache(maxsize=16)
def framings(angle: str, width: int, height: int) -> Framings:
    """Every framing of an angle on a small picture of that many pixels."""
    labels, grounds, rests, lights, blacks, covers = [], [], [], [], [], []
    for kind in FIGURES:
        for view in VIEWS:
            for turn in (1, -1) if view in ("side", "three-quarter") else (1,):
                eye_maps = _Eye(kind, Camera(shot="full", angle=angle, view=view, turn=turn))
                for shot in SHOTS:
                    camera = Camera(shot=shot, angle=angle, view=view, turn=turn)
                    for column in (0.5, 0.375, 0.625) if shot == "extreme-full" else (0.5,):
                        cover, d, e, black, shadow = eye_maps.small(camera, column, width, height)
                        labels.append((kind, camera, column))
                        grounds.append((1 - cover) * (1 - shadow))
                        rest = (1 - cover) * shadow * SHADOW_INK
                        rests.append(rest + e)
                        lights.append(d)
                        blacks.append(rest + black)
                        covers.append(cover)
    stacked = [
        np.stack([m.ravel() for m in maps]).astype(np.float32)
        for maps in (grounds, rests, lights, blacks, covers)
    ]
    g, c, d, c_black, a = stacked
    paints = [
        Paint(rest, light, (light * rest).sum(1), np.square(light).sum(1))
        for rest, light in ((c, d), (c_black, a))
    ]
    return Framings(tuple(labels), g, (paints[0], paints[1]))


class _Eye:
    """A figure from one place, in few rays, to be made small for each shot scale."""

    def __init__(self, kind: str, camera: Camera):
        self.kind, self.eye = kind, eye_of(camera)
        self.look = look_at(kind, self.eye)
        self.cover = (self.look.seen.face > 0).astype(np.float32)
        self.light = light_of(self.look.seen, self.eye)
        self.step_x, self.step_y = (
            float(np.ptp(v)) / (len(v) - 1) for v in (self.look.xs, self.look.ys)
        )

    def small(self, camera: Camera, column: float, width: int, height: int) -> tuple[Array, ...]:
        """Coverage, d·a, e·a, black's e·a, and shadow: (height, width) each."""
        frame, side, look = frame_of(self.kind, camera), min(width, height), self.look
        x, y = place(self.kind, camera, column)
        unit = side * frame.scale
        shade = with_edges(self.light, look.seen, frame.scale, 1 / max(self.step_x, self.step_y))
        d, e, black = _affine(shade)
        # how much of each small pixel each ray fills
        left = (look.xs - self.step_x / 2 - frame.x) * unit + x * width
        top = (frame.y - look.ys - self.step_y / 2) * unit + y * height
        across = _overlaps(left, self.step_x * unit, width)
        down = _overlaps(top, self.step_y * unit, height)
        maps = [down @ (m * self.cover) @ across.T for m in (1.0, d, e, black)]
        xs = frame.x + (np.arange(width) + 0.5 - x * width) / unit
        ys = frame.y - (np.arange(height) + 0.5 - y * height) / unit
        return (*maps, shadow_of(self.kind, self.eye, xs, ys))


def _overlaps(starts: Array, length: float, count: int) -> Array:
    """The share of each pixel 0 … count that each of the stretches from `starts` covers."""
    pixels = np.arange(count)[:, None]
    low, high = np.maximum(starts[None], pixels), np.minimum(starts[None] + length, pixels + 1)
    return np.maximum(high - low, 0).astype(np.float32)


def _affine(shade: Array) -> tuple[Array, Array, Array]:
    """`sprites.tone` as d·k + e for colours, and black's e."""
    ink, light = np.clip((0.5 - shade) * 2, 0, 1), np.clip(shade - 1, 0, 0.6)
    d = np.clip(shade, 0.5, 1) * (1 - ink) * (1 - light)
    e = float(INK.mean()) / 255 * ink * (1 - light) + light
    return d, e, 110 / 255 * np.abs(np.clip(shade, 0.2, 1.4) - 1) ** 1.1


def _shifted(picture: Array, dx: int, dy: int) -> Array:
    """The picture (h, w, c) seen (dx, dy) pixels further right and down; edges are repeated."""
    height, width = picture.shape[:2]
    rows = np.clip(np.arange(height) + dy, 0, height - 1)
    columns = np.clip(np.arange(width) + dx, 0, width - 1)
    return picture[rows][:, columns]


@lru_cache(maxsize=64)
def _moved_grounds(name: str, angle: str, width: int, height: int) -> Array:
    """The empty background under every move: (moves, h·w, 3)."""
    ground = np.asarray(draw_background(name, width, height, HORIZONS[angle]), np.float32) / 255
    return np.stack([_shifted(ground, dx, dy).reshape(-1, 3) for dx, dy in MOVES])


@lru_cache(maxsize=64)
def _ground_terms(name: str, angle: str, width: int, height: int) -> tuple[Array, ...]:
    """What of the errors depends on framing and background alone. For every framing and move:
    |gB|² + 2·gB·c (colours, black), and D·gB a channel (colours, black)."""
    known = framings(angle, width, height)
    grounds = _moved_grounds(name, angle, width, height)
    total, square = grounds.sum(-1).T, np.square(grounds).sum(-1).T  # (h·w, moves)
    flat = grounds.transpose(1, 0, 2).reshape(len(total), -1)
    terms = []
    for paint in known.paints:
        alone = np.square(known.ground) @ square + 2 * (known.ground * paint.rest) @ total
        crossed = ((known.ground * paint.light) @ flat).reshape(-1, len(MOVES), 3)
        terms += [alone + 3 * np.square(paint.rest).sum(1)[:, None], crossed]
    return tuple(terms)


def rank(picture: Array, backgrounds: tuple[str, ...]) -> list[Guess]:
    """The framings that explain a small picture (h, w, 3) best, each in its best colour."""
    height, width = picture.shape[:2]
    moved = np.stack([_shifted(picture, dx, dy).reshape(-1, 3) for dx, dy in MOVES])
    guesses: list[Guess] = []
    for angle in ANGLES:
        known = framings(angle, width, height)
        for name, errors in _errors(moved, known, angle, backgrounds, width, height):
            flat = errors.reshape(len(errors), -1)
            best = flat.argmin(1)
            for i in np.argsort(flat.min(1))[:NUM_GUESSES]:
                move, k = divmod(int(best[i]), len(COLORS))
                dx, dy = (v / min(width, height) for v in MOVES[move])
                error = float(errors[i, move, k])
                kind, camera, column = known.labels[i]
                guesses.append(Guess(kind, camera, column, COLORS[k], name, dx, dy, error))
    return sorted(guesses, key=lambda g: g.error)


def _errors(
    moved: Array, known: Framings, angle: str, backgrounds: tuple[str, ...], width: int, height: int
) -> Iterator[tuple[str, Array]]:
    """For each background, the errors of the framings: (n, moves, colours)."""
    palette = np.array([PALETTE[color] for color in COLORS], np.float32) / 255
    flat = moved.transpose(1, 0, 2).reshape(moved.shape[1], -1)
    total, energy = moved.sum(-1).T, np.square(moved).sum((1, 2))
    seen = []
    for paint in known.paints:
        lit = (paint.light @ flat).reshape(-1, len(MOVES), 3) - paint.crossed[:, None, None]
        seen.append((energy - 2 * (paint.rest @ total), lit))
    for name in backgrounds:
        grounds = _moved_grounds(name, angle, width, height)
        on_ground = known.ground @ (moved * grounds).sum(-1).T
        terms = _ground_terms(name, angle, width, height)
        errors = np.empty((len(known.labels), len(MOVES), len(COLORS)), np.float32)
        for which, (paint, (apart, lit)) in enumerate(zip(known.paints, seen, strict=True)):
            alone, crossed = terms[2 * which : 2 * which + 2]
            base, linear = apart - 2 * on_ground + alone, lit - crossed
            for k, color in enumerate(COLORS):
                if (color == "black") == bool(which):
                    square = float(palette[k] @ palette[k]) * paint.square[:, None]
                    errors[..., k] = base - 2 * linear @ palette[k] + square
        yield name, errors
