"""What the judge compares pictures with: the world's own sprites, at several resolutions.

A hypothesis says "this kind, in this look, this large, stands here". Its *gain* is how much
better the hypothesis explains the picture than the empty background does:

    gain = |p − B|² − |p − ((1−a)·B + a·c)|²,   summed over the sprite,

with picture p, background B, the sprite's coverage a and colour c. With r = p − B it is linear in
eight feature maps (r, r·B, B, |B|²), so that many hypotheses at many places are one product.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from hidream.world.render import background as draw_background
from hidream.world.scene import COLORS, KINDS, SIGN_STYLES, extent, sign_cell, sign_shape
from hidream.world.sprites import (
    SIGN_TONES,
    board_sprite,
    letter_mask,
    maps,
    plain_sprite,
    textured_sprite,
)

Array = np.ndarray
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
#: The sizes that hypotheses take: those of the world, and some between them.
SIZES = (0.185, 0.2, 0.22, 0.24, 0.265, 0.29, 0.31, 0.33, 0.37, 0.41, 0.43, 0.45, 0.48)
COARSE_SIZES = (0.2, 0.24, 0.29, 0.33, 0.41, 0.45)
FINE = 128  # the resolution that stamps are drawn at; the coarser ones are reduced from it


@dataclass(frozen=True)
class Look:
    """How an object is coloured. A sign has its style as colour and `letters` letters."""

    color: str
    pattern: str = ""
    color2: str = ""
    letters: int = 0


@lru_cache(maxsize=256)
def all_colors(kind: str, size: float, side: int) -> Array:
    """The stamps of a kind in all ten colours: (10, h, w, 3). Coverage is the same for all."""
    return np.stack([stamp(kind, Look(color), size, side).color for color in COLORS])


@dataclass(frozen=True)
class Stamp:
    """A sprite to compare with: coverage (h, w) and colour (h, w, 3), both 0–1."""

    alpha: Array
    color: Array

    @property
    def shape(self) -> tuple[int, int]:
        return self.alpha.shape[0], self.alpha.shape[1]


@lru_cache(maxsize=256)
def _mean_letter(letters: int, side: int) -> Image.Image:
    masks = [np.asarray(letter_mask(x, letters, side), np.float32) for x in LETTERS]
    return Image.fromarray(np.mean(masks, axis=0).astype(np.uint8))


@lru_cache(maxsize=6000)
def stamp(kind: str, look: Look, size: float, side: int) -> Stamp:
    """The stamp at a resolution of `side` pixels for the picture's shorter side."""
    factor = FINE // side
    if kind == "sign":
        sprite, mask, pad = board_sprite(look.color, look.letters, FINE)
        sprite = sprite.copy()
        cell = sign_cell("X" * look.letters) * FINE
        x0 = pad + (sprite.width - 2 * pad - cell * look.letters) / 2
        for i in range(look.letters):
            at = (round(x0 + i * cell), round(pad + 0.0275 * FINE))
            sprite.paste(SIGN_TONES[look.color][2], at, _mean_letter(look.letters, FINE))
    elif look.pattern:
        sprite, mask, _ = textured_sprite(
            kind, look.pattern, look.color, look.color2, round(size * FINE)
        )
    else:
        sprite, mask, _ = plain_sprite(kind, look.color, round(size * FINE))
    alpha = np.asarray(mask, np.float32) / 255
    color = np.asarray(sprite, np.float32) / 255
    if factor > 1:
        height, width = alpha.shape
        extra_y, extra_x = -height % (2 * factor), -width % (2 * factor)
        pads = ((extra_y // 2, extra_y - extra_y // 2), (extra_x // 2, extra_x - extra_x // 2))
        alpha, color = np.pad(alpha, pads), np.pad(color, (*pads, (0, 0)))
        lit = _reduce(alpha[..., None] * color, factor)
        alpha = _reduce(alpha[..., None], factor)[..., 0]
        color = lit / np.maximum(alpha, 1e-4)[..., None]
    return Stamp(alpha.astype(np.float32), color.astype(np.float32))


def _reduce(x: Array, factor: int) -> Array:
    height, width, channels = x.shape
    blocks = x.reshape(height // factor, factor, width // factor, factor, channels)
    return blocks.mean(axis=(1, 3))


@lru_cache(maxsize=64)
def backdrop(name: str, width: int, height: int) -> Array:
    """The empty background as float 0–1 (h, w, 3)."""
    return np.asarray(draw_background(name, width, height), np.float32) / 255


def features(residual: Array, ground: Array) -> tuple[Array, Array]:
    """The feature maps that gains are linear in: (r, r·B) and (B, |B|²), each (h, w, 4)."""
    first = np.concatenate([residual, (residual * ground).sum(-1, keepdims=True)], -1)
    second = np.concatenate([ground, (ground * ground).sum(-1, keepdims=True)], -1)
    return first, second


def linear(one: Stamp) -> tuple[Array, Array, float]:
    """A stamp's weights for the two feature maps, each (h, w, 4), and its constant."""
    a = one.alpha[..., None]
    ac = a * one.color
    first = np.concatenate([2 * ac, -2 * a], -1)
    second = np.concatenate([2 * a * ac, -a * a], -1)
    return first, second, float((ac * ac).sum())


@lru_cache(maxsize=4096)
def _flat(kind: str, look: Look, size: float, side: int) -> tuple[Array, float]:
    first, second, constant = linear(stamp(kind, look, size, side))
    return np.concatenate([first, second], -1).ravel(), constant


def windows(planes: Array, height: int, width: int) -> Array:
    """All windows of (H, W, c) planes: (H−h+1, W−w+1, h·w·c)."""
    slides = np.lib.stride_tricks.sliding_window_view(planes, (height, width), axis=(0, 1))
    slides = slides.transpose(0, 1, 3, 4, 2)
    return slides.reshape(*slides.shape[:2], -1)


@dataclass(frozen=True)
class View:
    """A picture at one resolution: feature maps (h + 2·room, w + 2·room, 8) with room around."""

    side: int
    width: int
    height: int
    room: int
    picture: Array
    ground: Array
    maps: Array
    front: Array  # how surely a pixel is neither background nor shadow, 0–1, with room around


def view(picture: Array, ground: Array, side: int) -> View:
    """Prepares a picture (h, w, 3) of 0–1 for hypotheses at its resolution."""
    room = side // 2
    first, second = features(picture - ground, ground)
    planes = np.pad(np.concatenate([first, second], -1), ((room, room), (room, room), (0, 0)))
    height, width = picture.shape[:2]
    front = np.pad(_front(picture, ground), room)
    return View(side, width, height, room, picture, ground, planes, front)


def _front(picture: Array, ground: Array) -> Array:
    """How far a pixel is from every darkening of its background, as 0–1."""
    dark = 16 / 255 - ground
    share = ((picture - ground) * dark).sum(-1) / np.square(dark).sum(-1)
    nearest = ground + np.clip(share, 0, 0.42)[..., None] * dark
    return np.clip(np.sqrt(np.square(picture - nearest).sum(-1)) / 0.14, 0, 1)


@dataclass(frozen=True)
class Fit:
    """A hypothesis at its best place: centre in fractions of the picture, and its gain."""

    kind: str
    look: Look
    size: float
    x: float
    y: float
    gain: float


def fit(
    at: View, kind: str, look: Look, size: float, x: float, y: float, reach: int, step: int = 1
) -> Fit:
    """The best place of a hypothesis within `reach` pixels of (x, y)."""
    height, width = stamp(kind, look, size, at.side).shape
    top, left = round(y * at.height - height / 2), round(x * at.width - width / 2)
    y0, x0 = top - reach + at.room, left - reach + at.room
    region = at.maps[max(y0, 0) : y0 + height + 2 * reach, max(x0, 0) : x0 + width + 2 * reach]
    if y0 < 0 or x0 < 0 or region.shape[0] < height or region.shape[1] < width:
        return Fit(kind, look, size, x, y, -1.0)
    weights, constant = _flat(kind, look, size, at.side)
    patches = windows(region, height, width)[::step, ::step]
    gains = patches @ weights - constant
    best = int(gains.argmax())
    row, column = divmod(best, gains.shape[1])
    return Fit(
        kind,
        look,
        size,
        (left - reach + column * step + width / 2) / at.width,
        (top - reach + row * step + height / 2) / at.height,
        float(gains.flat[best]),
    )


def paste(canvas: Array, one: Stamp, x: float, y: float) -> tuple[slice, slice]:
    """Draws a stamp with its centre at (x, y) onto the canvas (h, w, 3); returns where."""
    ys, xs, part_y, part_x = placed(canvas, one, x, y)
    a = one.alpha[part_y, part_x, None]
    canvas[ys, xs] += a * (one.color[part_y, part_x] - canvas[ys, xs])
    return ys, xs


def placed(canvas: Array, one: Stamp, x: float, y: float) -> tuple[slice, slice, slice, slice]:
    """Where a stamp centred at (x, y) lies: slices of the canvas and of the stamp."""
    height, width = one.shape
    top, left = round(y * canvas.shape[0] - height / 2), round(x * canvas.shape[1] - width / 2)
    y0, y1 = max(top, 0), min(top + height, canvas.shape[0])
    x0, x1 = max(left, 0), min(left + width, canvas.shape[1])
    return (
        slice(y0, y1),
        slice(x0, x1),
        slice(y0 - top, y1 - top),
        slice(x0 - left, x1 - left),
    )


# The coarse scan: every kind and size at every place of a small picture, in its best colour

COARSE = 32
SHAPE = 0.12  # weight of the silhouette's agreement beside that of the colours
MISFIT = 0.5  # what a hypothesis leaves unexplained under itself counts this much against its gain


@dataclass(frozen=True)
class Bank:
    """Hypotheses of about one size as matrices over a kernel (h, w) of pixels.

    With coverage a and light l = a·shade, an object of unknown colour k is p = (1−a)·B + l·k. The
    least-squares k per channel is Σ l·(r + a·B) / Σ l², and the gain of the best k is
    Σ_channels (Σ l·(r + a·B))² / Σ l² − 2 Σ a r·B − Σ a²|B|².
    """

    labels: tuple[tuple[str, Look, float], ...]
    kernel: tuple[int, int]
    extents: Array  # (n, 2): width and height of each in fractions
    light: Array  # (h·w, n)
    cover: Array
    light_cover: Array  # l·a
    cover_square: Array  # a²
    light_energy: Array  # (n,)


@dataclass(frozen=True)
class Scan:
    """Scores of a bank's hypotheses; gains[i, j] is for centre (row + i, column + j), in pixels."""

    bank: Bank
    gains: Array  # (rows, columns, n)
    shapes: Array  # the silhouette's agreement alone, alike
    row: int
    column: int


@lru_cache(maxsize=2)
def banks(kinds: tuple[str, ...]) -> tuple[Bank, ...]:
    """The banks, by size: objects of these kinds of each coarse size, then signs of each length."""
    made = [_bank([(kind, Look(""), size) for kind in kinds]) for size in COARSE_SIZES]
    for letters in range(1, 9):
        width = sign_shape("X" * letters)[0]
        made.append(_bank([("sign", Look(style, letters=letters), width) for style in SIGN_STYLES]))
    return tuple(made)


def _shape(kind: str, look: Look, size: float) -> tuple[Array, Array]:
    """Coverage without the shadow, and light, at the coarse resolution."""
    if kind == "sign":
        one = stamp(kind, look, size, COARSE)
        cover = one.alpha * (one.alpha > 0.4)
        return cover, cover * one.color.mean(-1)
    return _object_shape(kind, size, COARSE)


@lru_cache(maxsize=1024)
def _object_shape(kind: str, size: float, side: int) -> tuple[Array, Array]:
    alpha, shade, _, _ = maps(kind, round(size * FINE))
    both = np.stack([alpha, alpha * shade], -1)
    factor = FINE // side
    if factor > 1:
        height, width = alpha.shape
        extra_y, extra_x = -height % (2 * factor), -width % (2 * factor)
        pads = ((extra_y // 2, extra_y - extra_y // 2), (extra_x // 2, extra_x - extra_x // 2))
        both = _reduce(np.pad(both, (*pads, (0, 0))), factor)
    return both[..., 0], both[..., 1]


def silhouette(kind: str, size: float, side: int) -> Array:
    """What an object covers, without its shadow: (h, w), 0–1, on its stamp's grid."""
    return _object_shape(kind, size, side)[0]


def _bank(labels: list[tuple[str, Look, float]]) -> Bank:
    shapes = [_shape(kind, look, size) for kind, look, size in labels]
    height, width = (max(a.shape[i] for a, _ in shapes) for i in (0, 1))
    columns: list[list[Array]] = [[], [], [], []]
    for cover, light in shapes:
        dy, dx = (height - cover.shape[0]) // 2, (width - cover.shape[1]) // 2
        pads = ((dy, height - cover.shape[0] - dy), (dx, width - cover.shape[1] - dx))
        a, lit = np.pad(cover, pads).ravel(), np.pad(light, pads).ravel()
        for column, values in zip(columns, (lit, a, lit * a, a * a), strict=True):
            column.append(values)
    light, cover, light_cover, cover_square = (
        np.stack(column, 1).astype(np.float32) for column in columns
    )
    return Bank(
        labels=tuple(labels),
        kernel=(height, width),
        extents=np.array([extent(k, s, "X" * look.letters) for k, look, s in labels], np.float32),
        light=light,
        cover=cover,
        light_cover=light_cover,
        cover_square=cover_square,
        light_energy=np.square(light).sum(0),
    )


def scan(at: View, name: str) -> list[Scan]:
    """The gains of every hypothesis at every place of the coarse picture."""
    found = []
    planes = np.concatenate([at.maps[..., :4], at.front[..., None]], -1)
    kinds = tuple(KINDS)  # those of `added_kind` as well
    for number, bank in enumerate(banks(kinds)):
        rows, columns, lit_ground, ground = _ground_part(name, at.width, at.height, number, kinds)
        maps_here = _around(planes, bank, at, rows, columns)
        patches = _channel_windows(maps_here, *bank.kernel)  # (5, rows, columns, h·w)
        shape = bank.cover_square.sum(0)
        gains = ground - 2 * (patches[3] @ bank.cover)
        empty = np.square(patches[:3]).sum(0) @ bank.cover
        for channel in range(3):
            lit = patches[channel] @ bank.light + lit_ground[channel]
            gains += lit * lit / bank.light_energy
        shapes = 2 * (patches[4] @ bank.cover) - shape
        scores = gains - MISFIT * (empty - gains) + SHAPE * shapes
        found.append(Scan(bank, scores, shapes, rows.start, columns.start))
    return found


def _channel_windows(maps_here: Array, height: int, width: int) -> Array:
    slides = np.lib.stride_tricks.sliding_window_view(maps_here, (height, width), axis=(0, 1))
    slides = slides.transpose(2, 0, 1, 3, 4)
    return slides.reshape(*slides.shape[:3], -1)


def _around(maps_here: Array, bank: Bank, at: View, rows: range, columns: range) -> Array:
    """The part of the maps that centres in `rows` × `columns` look at."""
    height, width = bank.kernel
    y0, x0 = rows.start - height // 2 + at.room, columns.start - width // 2 + at.room
    return maps_here[y0 : y0 + len(rows) + height - 1, x0 : x0 + len(columns) + width - 1]


@lru_cache(maxsize=256)
def _ground_part(
    name: str, width: int, height: int, number: int, kinds: tuple[str, ...]
) -> tuple[range, range, Array, Array]:
    """What of the gains depends on the background alone, for centres whose objects lie inside."""
    bank = banks(kinds)[number]
    smallest = bank.extents.min(0) * COARSE / 2
    low_y, low_x = int(smallest[1]), int(smallest[0])
    rows, columns = range(low_y, height - low_y + 1), range(low_x, width - low_x + 1)
    ground = backdrop(name, width, height)
    at = view(ground, ground, COARSE)
    maps_here = _around(at.maps[..., 4:], bank, at, rows, columns)
    patches = _channel_windows(maps_here, *bank.kernel)
    lit = np.stack([patches[channel] @ bank.light_cover for channel in range(3)])
    return rows, columns, lit, -(patches[3] @ bank.cover_square)
