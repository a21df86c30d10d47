"""The look of things: each kind drawn once, large, as coverage and shade; colours come after.

A drawing is two maps: `alpha` (what the object covers) and `shade` (1 = the plain colour, below:
darker, above: lighter). They are scaled down to the pixel size asked for (so edges are smooth)
and turned into a colour there. Everything is cached: a picture is a few pastes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from hidream.world.scene import KINDS, sign_cell, sign_shape

M = 512  # side of a drawing in pixels
Array = np.ndarray

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (224, 36, 40),
    "orange": (252, 134, 14),
    "yellow": (252, 218, 34),
    "green": (34, 158, 66),
    "blue": (38, 92, 228),
    "purple": (132, 50, 190),
    "pink": (252, 140, 192),
    "brown": (128, 76, 40),
    "black": (38, 38, 42),
    "white": (248, 248, 250),
}
INK = np.array((26, 24, 30), np.float32)  # the darkest detail of a coloured object
OUTLINE = 0.035  # width of the rim, in units of the object's size
OUTLINE_SHADE = 0.56
SHADOW = 0.34
PAD = 0.17  # room for the shadow around a sprite, in units of its size


def tone(shade: Array, color: str) -> Array:
    """Shade map (h, w) -> RGB (h, w, 3), float 0–255, near the colour's own hue.

    Black turns lighter where others turn darker, so that its rim and details show on any ground.
    """
    base = np.array(PALETTE[color], np.float32)
    s = shade[..., None]
    if color == "black":
        return base + 110 * np.abs(np.clip(s, 0.2, 1.4) - 1) ** 1.1
    dark = np.clip(s, 0.5, 1) * base
    ink = np.clip((0.5 - s) * 2, 0, 1)
    light = np.clip(s - 1, 0, 0.6)
    return (dark * (1 - ink) + INK * ink) * (1 - light) + 255 * light


class Canvas:
    """A drawing under way, in coordinates 0–1; later parts cover earlier ones."""

    def __init__(self) -> None:
        self.alpha = np.zeros((M, M), np.float32)
        self.shade = np.ones((M, M), np.float32)
        y, x = np.mgrid[0:M, 0:M].astype(np.float32) / M
        self.x, self.y = x, y

    def mask(self, *shapes: tuple[str, list[tuple[float, float]]]) -> Array:
        image = Image.new("L", (M, M))
        draw = ImageDraw.Draw(image)
        for kind, points in shapes:
            scaled = [(a * M, b * M) for a, b in points]
            if kind == "polygon":
                draw.polygon(scaled, fill=1)
            else:
                draw.ellipse([*scaled[0], *scaled[1]], fill=1)
        return np.asarray(image, bool)

    def polygon(self, *points: tuple[float, float]) -> Array:
        return self.mask(("polygon", list(points)))

    def ellipse(self, cx: float, cy: float, rx: float, ry: float | None = None) -> Array:
        ry = rx if ry is None else ry
        return self.mask(("ellipse", [(cx - rx, cy - ry), (cx + rx, cy + ry)]))

    def box(self, x0: float, y0: float, x1: float, y1: float, radius: float = 0.0) -> Array:
        image = Image.new("L", (M, M))
        box = [v * M for v in (x0, y0, x1, y1)]
        ImageDraw.Draw(image).rounded_rectangle(box, radius * M, fill=1)
        return np.asarray(image, bool)

    def put(self, mask: Array, shade: Array | float) -> None:
        self.alpha[mask] = 1
        self.shade[mask] = (
            np.broadcast_to(shade, (M, M))[mask] if isinstance(shade, np.ndarray) else shade
        )

    def ball(self, cx: float, cy: float, radius: float) -> Array:
        """The shade of a round body lit from the upper left."""
        d = np.hypot(self.x - (cx - 0.35 * radius), self.y - (cy - 0.4 * radius)) / radius
        return 1.3 - 0.36 * d - 0.08 * np.clip(d - 1, 0, 1) + 0.2 * np.exp(-((d / 0.22) ** 2))

    def round_side(self, x0: float, x1: float) -> Array:
        """The shade of an upright round wall between two x."""
        t = np.clip((self.x - x0) / (x1 - x0), 0, 1)
        return 1.16 - 0.5 * np.abs(t - 0.32) ** 1.2 - 0.12 * t


def _cube(c: Canvas) -> None:
    top, mid, low = 0.27, 0.5, 0.76
    c.put(c.polygon((0.02, top), (0.5, mid), (0.5, 1), (0.02, low)), 1.0 - 0.08 * c.y)
    c.put(c.polygon((0.98, top), (0.5, mid), (0.5, 1), (0.98, low)), 0.74 - 0.06 * c.y)
    c.put(c.polygon((0.5, 0.02), (0.98, top), (0.5, mid), (0.02, top)), 1.26)


def _sphere(c: Canvas) -> None:
    c.put(c.ellipse(0.5, 0.5, 0.49), c.ball(0.5, 0.5, 0.49))


def _cone(c: Canvas) -> None:
    spread = 0.46 * np.clip(c.y / 0.88, 0.04, 1)
    t = np.clip((c.x - 0.5) / spread, -1, 1)
    shade = 1.14 - 0.3 * np.abs(t + 0.35) ** 1.2
    c.put(c.ellipse(0.5, 0.88, 0.46, 0.11) | c.polygon((0.5, 0), (0.96, 0.88), (0.04, 0.88)), shade)


def _cylinder(c: Canvas) -> None:
    body = c.box(0.16, 0.14, 0.84, 0.87) | c.ellipse(0.5, 0.87, 0.34, 0.12)
    c.put(body, c.round_side(0.16, 0.84) - 0.08)
    c.put(c.ellipse(0.5, 0.14, 0.34, 0.12), 1.28)


def _star(c: Canvas) -> None:
    points = []
    for i in range(10):
        r = 0.5 if i % 2 == 0 else 0.23
        a = math.pi * (i / 5 - 0.5)
        points.append((0.5 + r * math.cos(a), 0.5 + r * math.sin(a)))
    for i in range(10):
        facet = c.polygon((0.5, 0.5), points[i], points[(i + 1) % 10])
        c.put(facet, 1.16 if i % 2 else 0.92)


def _heart(c: Canvas) -> None:
    t = np.linspace(0, 2 * np.pi, 200)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    points = [(0.5 + a / 33, 0.45 + b / 33) for a, b in zip(x, y, strict=True)]
    c.put(c.polygon(*points), c.ball(0.42, 0.4, 0.5))


def _ring(c: Canvas) -> None:
    r = np.hypot(c.x - 0.5, c.y - 0.5)
    angle = ((c.x - 0.5) + (c.y - 0.5)) / np.maximum(r, 1e-3)
    across = (r - 0.345) / 0.145
    shade = 1.1 - 0.12 * across * angle - 0.2 * np.abs(across) ** 2
    c.put(c.ellipse(0.5, 0.5, 0.49) & ~c.ellipse(0.5, 0.5, 0.2), shade)


def _moon(c: Canvas) -> None:
    crescent = c.ellipse(0.5, 0.5, 0.49) & ~c.ellipse(0.75, 0.47, 0.4)
    c.put(crescent, c.ball(0.4, 0.45, 0.55))


def _house(c: Canvas) -> None:
    c.put(c.box(0.68, 0.08, 0.8, 0.4), 0.66)
    c.put(c.box(0.13, 0.42, 0.87, 0.99), 1.08)
    c.put(c.polygon((0.5, 0.02), (0.98, 0.46), (0.02, 0.46)), 0.72)
    c.put(c.box(0.2, 0.64, 0.4, 0.99), 0.3)
    c.put(c.box(0.54, 0.6, 0.76, 0.79), 1.55)


def _tree(c: Canvas) -> None:
    c.put(c.box(0.41, 0.6, 0.59, 0.99, 0.02), 0.52)
    for cx, cy, r in ((0.28, 0.45, 0.23), (0.72, 0.45, 0.23), (0.5, 0.52, 0.22), (0.5, 0.26, 0.25)):
        c.put(c.ellipse(cx, cy, r), c.ball(cx - 0.02, cy - 0.02, r * 1.15))


def _fish(c: Canvas) -> None:
    c.put(c.polygon((0.66, 0.5), (0.99, 0.25), (0.92, 0.5), (0.99, 0.75)), 0.86)
    c.put(c.polygon((0.3, 0.3), (0.55, 0.15), (0.64, 0.32)), 0.8)
    c.put(c.ellipse(0.4, 0.5, 0.39, 0.26), c.ball(0.38, 0.44, 0.42))
    c.put(c.ellipse(0.2, 0.44, 0.062), 1.58)
    c.put(c.ellipse(0.19, 0.44, 0.034), 0.1)


def _car(c: Canvas) -> None:
    c.put(c.polygon((0.2, 0.5), (0.33, 0.24), (0.68, 0.24), (0.84, 0.5)), 0.98)
    c.put(c.polygon((0.27, 0.49), (0.36, 0.3), (0.48, 0.3), (0.48, 0.49)), 1.56)
    c.put(c.polygon((0.53, 0.49), (0.53, 0.3), (0.65, 0.3), (0.76, 0.49)), 1.56)
    c.put(c.box(0.01, 0.47, 0.99, 0.7, 0.08), 1.28 - 0.4 * c.y)
    for cx in (0.25, 0.75):
        c.put(c.ellipse(cx, 0.7, 0.125), 0.06)
        c.put(c.ellipse(cx, 0.7, 0.055), 1.3)


def _mug(c: Canvas) -> None:
    c.put(c.ellipse(0.72, 0.54, 0.26, 0.25) & ~c.ellipse(0.72, 0.54, 0.15, 0.145), 0.84)
    body = c.box(0.02, 0.17, 0.72, 0.86) | c.ellipse(0.37, 0.86, 0.35, 0.1)
    c.put(body, c.round_side(0.02, 0.72))
    c.put(c.ellipse(0.37, 0.17, 0.35, 0.1), 1.3)
    c.put(c.ellipse(0.37, 0.175, 0.28, 0.066), 0.34)


def _umbrella(c: Canvas) -> None:
    c.put(c.box(0.465, 0.01, 0.535, 0.9), 0.42)
    hook = c.ellipse(0.59, 0.87, 0.125, 0.125) & ~c.ellipse(0.59, 0.87, 0.055, 0.055)
    c.put(hook & (c.y > 0.86), 0.42)
    dome = c.ellipse(0.5, 0.54, 0.49, 0.48) & (c.y < 0.56)
    for cx in (0.132, 0.377, 0.623, 0.868):
        dome &= ~c.ellipse(cx, 0.57, 0.123, 0.075)
    t = np.abs(c.x - 0.5) / np.sqrt(np.clip(1 - ((c.y - 0.54) / 0.48) ** 2, 0.01, 1))
    inner = t < 0.245
    c.put(dome, np.where(inner, 1.14, np.where(c.x < 0.5, 0.98, 0.8)))


_DRAW: dict[str, Callable[[Canvas], None]] = {
    "cube": _cube,
    "sphere": _sphere,
    "cone": _cone,
    "cylinder": _cylinder,
    "star": _star,
    "heart": _heart,
    "ring": _ring,
    "moon": _moon,
    "house": _house,
    "tree": _tree,
    "fish": _fish,
    "car": _car,
    "mug": _mug,
    "umbrella": _umbrella,
}


@contextmanager
def added_kind(
    kind: str, extent: tuple[float, float], draw: Callable[[Canvas], None]
) -> Iterator[None]:
    """One kind more while the context lasts, for what is drawn and judged in it.

    Nothing that the world draws by itself changes: its prompts keep to their kinds. `extent` is the
    width and height of its box in units of its size. Drawings are kept by name: a name stands for
    one of them. Threads outside of the context see it, too.
    """
    if kind in KINDS:
        raise ValueError(f"{kind} is one of the world's kinds")
    KINDS[kind], _DRAW[kind] = extent, draw
    try:
        yield
    finally:
        del KINDS[kind], _DRAW[kind]


@cache
def drawing(kind: str) -> tuple[Image.Image, Image.Image]:
    """Alpha and shade·alpha of a kind, cropped to its box, as float images."""
    canvas = Canvas()
    _DRAW[kind](canvas)
    alpha, shade = canvas.alpha, canvas.shade
    inner = Image.fromarray((alpha * 255).astype(np.uint8))
    rim = round(OUTLINE * M) | 1
    eroded = np.asarray(inner.filter(ImageFilter.MinFilter(rim)), np.float32) / 255
    border = np.zeros_like(eroded)  # what touches the canvas's edge is a rim too
    border[rim // 2 : -(rim // 2), rim // 2 : -(rim // 2)] = 1
    eroded *= border
    edge = (alpha > 0) & (eroded == 0)
    shade = np.where(edge, np.minimum(shade, OUTLINE_SHADE), shade)
    ys, xs = np.nonzero(alpha)
    window = np.s_[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    return Image.fromarray(alpha[window]), Image.fromarray((shade * alpha)[window])


@lru_cache(maxsize=4096)
def maps(kind: str, pixels: int) -> tuple[Array, Array, Array, int]:
    """Alpha, shade and shadow (h, w) of a kind at a pixel size, with room around; and the room."""
    width, height = (max(3, round(v * pixels)) for v in KINDS[kind])
    alpha, lit = (
        np.clip(np.asarray(m.resize((width, height), Image.Resampling.BOX)), 0, 2)
        for m in drawing(kind)
    )
    pad = max(2, math.ceil(PAD * pixels))
    shade = np.where(alpha > 1e-3, lit / np.maximum(alpha, 1e-3), 1)
    y, x = np.mgrid[-pad : height + pad, -pad : width + pad].astype(np.float32) + 0.5
    rx = {"umbrella": 0.2, "tree": 0.32, "star": 0.38, "heart": 0.3}.get(kind, 0.46) * width
    d = ((x - width * 0.5) / (rx + 0.05 * pixels)) ** 2 + (
        (y - height * 0.985) / (0.085 * pixels)
    ) ** 2
    shadow = SHADOW * np.exp(-1.1 * d**1.9)
    return np.pad(alpha, pad), np.pad(shade, pad, constant_values=1), shadow, pad


def over_shadow(alpha: Array, rgb: Array, shadow: Array) -> Image.Image:
    """Colour (h, w, 3) over its own shadow, as one RGBA picture."""
    total = alpha + shadow * (1 - alpha)
    colour = (rgb * alpha[..., None] + 16 * (shadow * (1 - alpha))[..., None]) / np.maximum(
        total, 1e-3
    )[..., None]
    rgba = np.concatenate([colour, 255 * total[..., None]], axis=-1)
    return Image.fromarray((np.clip(rgba, 0, 255) + 0.5).astype(np.uint8), "RGBA")


@lru_cache(maxsize=8192)
def plain_sprite(kind: str, color: str, pixels: int) -> tuple[Image.Image, Image.Image, int]:
    """RGB, mask and padding of an object of one colour, `pixels` large."""
    alpha, shade, shadow, pad = maps(kind, pixels)
    rgba = over_shadow(alpha, tone(shade, color), shadow)
    return rgba.convert("RGB"), rgba.getchannel("A"), pad


@lru_cache(maxsize=1024)
def _pattern(pattern: str, kind: str, pixels: int) -> Image.Image:
    """Where a pattern shows its second colour: a mask of the sprite's shape."""
    width, height = (max(3, round(v * pixels)) for v in KINDS[kind])
    y, x = np.mgrid[0 : height * 4, 0 : width * 4].astype(np.float32) + 0.5
    x, y = (x - width * 2) / (4 * pixels), (y - height * 2) / (4 * pixels)
    cell = 0.2
    if pattern == "stripes":
        on = np.floor(x / (cell * 0.8) + 0.5) % 2 == 0
    elif pattern == "bands":
        on = np.floor(y / (cell * 0.8) + 0.5) % 2 == 0
    elif pattern == "checks":
        on = (np.floor(x / cell) + np.floor(y / cell)) % 2 == 0
    elif pattern == "halves":
        on = x + 0.0 * y > 0
    else:  # dots
        row = np.floor(y / cell + 0.5)
        u = (x / cell + 0.5 * (row % 2)) % 1 - 0.5
        v = (y / cell + 0.5) % 1 - 0.5
        on = np.hypot(u, v) < 0.34
    small = Image.fromarray((on * 255).astype(np.uint8)).reduce(4)
    _, _, _, pad = maps(kind, pixels)
    mask = Image.new("L", (width + 2 * pad, height + 2 * pad))
    mask.paste(small, (pad, pad))
    return mask


@lru_cache(maxsize=4096)
def textured_sprite(
    kind: str, pattern: str, color: str, color2: str, pixels: int
) -> tuple[Image.Image, Image.Image, int]:
    """RGB, mask and padding of an object with a pattern of two colours."""
    first, mask, pad = plain_sprite(kind, color, pixels)
    second, _, _ = plain_sprite(kind, color2, pixels)
    return Image.composite(second, first, _pattern(pattern, kind, pixels)), mask, pad


SIGN_TONES = {  # board, frame, letters
    "white": ((250, 247, 236), (120, 112, 104), (34, 36, 46)),
    "wooden": ((140, 88, 48), (88, 52, 28), (255, 244, 214)),
}


@lru_cache(maxsize=512)
def board_sprite(style: str, letters: int, side: int) -> tuple[Image.Image, Image.Image, int]:
    """RGB, mask and padding of an empty sign for `letters` letters on a picture of that side."""
    board_width, board_height, post = sign_shape("X" * letters)
    board, frame, _ = SIGN_TONES[style]
    width, height = round(board_width * side), round((board_height + post) * side)
    pad = max(2, math.ceil(0.04 * side))
    k = 4
    image = Image.new("RGB", (width * k, height * k), frame)
    alpha = Image.new("L", (width * k, height * k))
    rim, low = 0.011 * side * k, height * k - post * side * k
    for canvas, fills in ((alpha, (255, 255, 255)), (image, (frame, frame, board))):
        draw = ImageDraw.Draw(canvas)
        half = 0.022 * side * k
        draw.rectangle([width * k / 2 - half, low / 2, width * k / 2 + half, height * k], fills[0])
        draw.rounded_rectangle([0, 0, width * k - 1, low], rim * 2, fills[1])
        draw.rounded_rectangle([rim, rim, width * k - 1 - rim, low - rim], rim, fills[2])
    colour = np.asarray(image.reduce(k), np.float32)
    cover = np.asarray(alpha.reduce(k), np.float32) / 255
    y, x = np.mgrid[-pad : height + pad, -pad : width + pad].astype(np.float32) + 0.5
    d = ((x - width / 2) / (0.12 * side)) ** 2 + ((y - height) / (0.03 * side)) ** 2
    rgba = over_shadow(
        np.pad(cover, pad),
        np.pad(colour, ((pad, pad), (pad, pad), (0, 0)), mode="edge"),
        SHADOW * np.exp(-1.1 * d**1.5),
    )
    return rgba.convert("RGB"), rgba.getchannel("A"), pad


@lru_cache(maxsize=4096)
def letter_mask(letter: str, letters: int, side: int) -> Image.Image:
    """The coverage of one letter in its cell, on a sign of that many letters."""
    cell = sign_cell("X" * letters) * side
    k = 4
    width, height = round(cell), round(cell * 1.25)
    font = ImageFont.load_default(cell * 1.2 * k)
    stroke = max(1, round(cell * k * 0.045))
    image = Image.new("L", (width * k, height * k))
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = draw.textbbox((0, 0), letter, font=font, stroke_width=stroke)
    glyph = Image.new("L", (math.ceil(right - left) + 2, math.ceil(bottom - top) + 2))
    ImageDraw.Draw(glyph).text(
        (1 - left, 1 - top), letter, fill=255, font=font, stroke_width=stroke
    )
    glyph = glyph.resize(
        (min(glyph.width, round(width * k * 0.9)), min(glyph.height, round(height * k * 0.92)))
    )
    image.paste(glyph, ((image.width - glyph.width) // 2, (image.height - glyph.height) // 2))
    return image.reduce(k)
