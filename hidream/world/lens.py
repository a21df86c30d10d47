"""What a camera makes of a figure: coverage, shade and shadow of a picture; colours come after.

A shot scale is the share of the picture that the figure's longer side would take; beyond 1 it is
cropped, and the closer the shot, the nearer the camera looks to the figure's focus. An angle lifts
or lowers the camera and moves the horizon; a view turns it about the figure. The maps depend on
neither colour nor background: they are drawn once for each framing and kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter

from hidream.world.figures import figure
from hidream.world.scene import Camera, Object
from hidream.world.solids import Eye, Seen, see
from hidream.world.sprites import OUTLINE_SHADE, SHADOW, tone

Array = np.ndarray

#: Shot scale -> the figure's longer side in sides of the picture, and how far the camera looks
#: from the figure's middle (0) to its focus (1).
SHOTS: dict[str, tuple[float, float]] = {
    "extreme-full": (0.26, 0.0),
    "full": (0.5, 0.0),
    "medium-full": (0.8, 0.0),
    "medium": (1.15, 0.3),
    "medium-close-up": (1.6, 0.6),
    "close-up": (2.2, 0.85),
    "extreme-close-up": (3.1, 1.0),
}
#: Angle -> elevation of the camera in degrees.
ANGLES: dict[str, float] = {"high": 38.0, "low": -26.0, "eye-level": 7.0, "birds-eye": 80.0}
#: Angle -> height of the horizon in the picture (0 = its top); below 0 there is only ground.
HORIZONS: dict[str, float] = {"high": 0.08, "low": 0.88, "eye-level": 0.45, "birds-eye": -0.3}
#: View -> azimuth of the camera in degrees, for turn 1.
VIEWS: dict[str, float] = {"front": 0.0, "side": 90.0, "back": 180.0, "three-quarter": 40.0}

LOOK = 112  # rays along each side of a whole figure, to find its box
OVERSAMPLE = 2  # rays a pixel, along each axis
INNER_SHADE = 0.7  # of an edge inside the figure, times the shade there
LIGHT = (-0.42, 0.72, 0.56)  # to the right, up and towards the camera's side: upper left, before


def eye_of(camera: Camera) -> Eye:
    """Where the camera stands."""
    return Eye(VIEWS[camera.view] * camera.turn, ANGLES[camera.angle])


@dataclass(frozen=True)
class Frame:
    """A camera's framing: the point of the picture plane that is looked at, and how many sides of
    the picture one unit of the figure takes."""

    x: float
    y: float
    scale: float
    low: float  # the figure's lowest point in the plane


@dataclass(frozen=True)
class Look:
    """A whole figure from one place, in `LOOK` rays along each side of its window: what is seen,
    at which columns `xs` and rows `ys` of the plane, and its box there (left, right, low, high)."""

    seen: Seen
    xs: Array
    ys: Array
    box: tuple[float, float, float, float]


@lru_cache(maxsize=256)
def look_at(kind: str, eye: Eye) -> Look:
    """A figure as `eye` sees all of it."""
    solids = figure(kind).solids
    flat = eye.project(np.concatenate([s.corners for s in solids]))
    low, high = flat.min(0), flat.max(0)
    xs, ys = np.linspace(low[0], high[0], LOOK), np.linspace(high[1], low[1], LOOK)
    seen = see(solids, eye, xs, ys)
    columns, rows = (np.nonzero((seen.face > 0).any(axis))[0] for axis in (0, 1))
    box = (xs[columns[0]], xs[columns[-1]], ys[rows[-1]], ys[rows[0]])
    return Look(seen, xs, ys, (float(box[0]), float(box[1]), float(box[2]), float(box[3])))


@lru_cache(maxsize=512)
def frame_of(kind: str, camera: Camera) -> Frame:
    """The framing of a kind by its camera's shot scale."""
    eye = eye_of(camera)
    left, right, low, high = look_at(kind, eye).box
    share, closeness = SHOTS[camera.shot]
    one = figure(kind)
    focus = eye.project(np.array([one.back if camera.view == "back" else one.focus]))[0]
    middle = np.array(((left + right) / 2, (low + high) / 2))
    x, y = middle + closeness * (focus - middle)
    return Frame(float(x), float(y), share / max(right - left, high - low), low)


@lru_cache(maxsize=2048)
def figure_maps(
    kind: str, camera: Camera, x: float, y: float, width: int, height: int
) -> tuple[Array, Array, Array]:
    """Coverage, shade / 2 and shadow of a figure in a whole picture, uint8 (height, width), where
    the point that the camera looks at lies at (x, y)."""
    frame, eye = frame_of(kind, camera), eye_of(camera)
    side, k = min(width, height), OVERSAMPLE
    unit = side * frame.scale  # pixels a unit
    columns = (np.arange(width * k) + 0.5) / k
    rows = (np.arange(height * k) + 0.5) / k
    xs = frame.x + (columns - x * width) / unit
    ys = frame.y - (rows - y * height) / unit
    seen = see(figure(kind).solids, eye, xs, ys)
    alpha = (seen.face > 0).astype(np.float32)
    lit = with_edges(light_of(seen, eye), seen, frame.scale, unit * k) * alpha
    cover, light = (_reduce(m, k) for m in (alpha, lit))
    shade = light / np.maximum(cover, 1e-3)
    shadow = shadow_of(kind, eye, xs[k // 2 :: k], ys[k // 2 :: k])
    return _byte(cover), _byte(shade / 2), _byte(shadow)


def light_of(seen: Seen, eye: Eye) -> Array:
    """The shade of each ray, lit."""
    right, _, towards = eye.axes
    level = np.array((towards[0], 0.0, towards[2]))
    level /= np.linalg.norm(level)
    light = LIGHT[0] * right + LIGHT[1] * np.array((0.0, 1.0, 0.0)) + LIGHT[2] * level
    lit = 0.7 + 0.5 * np.clip(seen.normal @ light.astype(np.float32), -0.4, 1)
    plain = seen.shades[seen.face]
    body = np.abs(plain - 0.95) < 0.44  # neither ink nor light
    return np.where(body, plain * lit, plain * (0.9 + 0.1 * lit))


def with_edges(lit: Array, seen: Seen, scale: float, unit: float) -> Array:
    """The shade with a rim and inner edges, where `scale` sides of the picture are a unit of the
    figure, and `unit` rays."""
    reach = float(np.clip(0.03 * scale, 0.011, 0.028)) * unit / scale / 2
    inner, outer = max(1, round(reach / 2)), max(1, round(reach))
    edges = np.zeros(seen.face.shape, bool)
    edges[:, 1:] |= seen.face[:, 1:] != seen.face[:, :-1]
    edges[1:] |= seen.face[1:] != seen.face[:-1]
    shade = np.where(_near(edges, inner), lit * INNER_SHADE, lit)
    return np.where(_near(seen.face == 0, outer), np.minimum(shade, OUTLINE_SHADE), shade)


def _near(mask: Array, reach: int) -> Array:
    """Where the mask is set within `reach` pixels, in a square."""
    image = Image.fromarray(np.where(mask, 0, 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.BoxBlur(reach))) < 255


def shadow_of(kind: str, eye: Eye, xs: Array, ys: Array) -> Array:
    """The shadow on the ground, 0 … 1, where the camera is above it."""
    right, up, towards = eye.axes
    if towards[1] <= 0:
        return np.zeros((len(ys), len(xs)), np.float32)
    x, y = np.meshgrid(xs, ys)
    depth = -y * up[1] / towards[1]
    (half_x, half_z), places = figure(kind).foot, []
    for axis, half in ((0, half_x), (2, half_z)):
        place = x * right[axis] + y * up[axis] + depth * towards[axis]
        places.append(place / (1.15 * half + 0.05))
    d = places[0] ** 2 + places[1] ** 2
    return 1.25 * SHADOW * np.exp(-1.1 * d**1.5)


def _reduce(x: Array, k: int) -> Array:
    height, width = x.shape
    return np.asarray(x.reshape(height // k, k, width // k, k).mean(axis=(1, 3)))


def _byte(x: Array) -> Array:
    return (np.clip(x, 0, 1) * 255 + 0.5).astype(np.uint8)


@lru_cache(maxsize=16)
def tones(color: str) -> Array:
    """The colour of each shade / 2 of `figure_maps`: uint8 (256, 3)."""
    shades = (np.arange(256, dtype=np.float32) / 127.5)[None]
    return (np.clip(tone(shades, color)[0], 0, 255) + 0.5).astype(np.uint8)


def figure_sprite(
    thing: Object, camera: Camera, width: int, height: int
) -> tuple[Image.Image, Image.Image, Image.Image]:
    """RGB, mask and shadow of a figure, each of a whole picture."""
    cover, shade, shadow = figure_maps(thing.kind, camera, thing.x, thing.y, width, height)
    colour = Image.fromarray(np.take(tones(thing.color), shade, axis=0))
    return colour, Image.fromarray(cover), Image.fromarray(shadow)
