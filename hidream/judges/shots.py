"""What a picture of one figure shows, and how its camera saw it, by drawing it again.

Every kind, shot scale, angle and view is compared with the picture small (32 pixels), in its best
colour; the best explanations are drawn in the middle size, moved and zoomed until they fit, and
the one that fits best is drawn large. Nothing here is trained.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image

from hidream.judges.framings import COARSE, Guess, rank
from hidream.judges.quality import edges_of, left_over_of, noise_of
from hidream.judges.templates import FINE, Array
from hidream.world.lens import HORIZONS, figure_maps, tones
from hidream.world.render import background as draw_background
from hidream.world.scene import BACKGROUNDS, COLORS, Camera
from hidream.world.shots import place

MIDDLE = 64
NUM_CLOSE = 5  # explanations looked at in the middle size, and so many more of other kinds
NUM_OTHERS = 2
ZOOMS = (0.84, 1.19)  # beyond them begins the next shot scale
BEHIND = 1.5  # times the best error: a guess settled roughly that is not settled further
MOST_NOISE = 14 / 255  # standard deviation
LEAST_EDGES = 0.18  # gradient energy against that of a clean drawing; blur of 1.2% of the width
LEFT_OVER_REACH = 3  # pixels that an edge may be off
MOST_LEFT_OVER = 0.007  # share of the picture that the explanation leaves unexplained
LEAST_SHARE = 0.75  # of the figure's contrast that the explanation accounts for
LEAST_MIX = 0.7  # share of the figure in the mixture with the next best kind


@dataclass(frozen=True, kw_only=True)
class ShotFinding:
    """The figure of a picture, its camera, and how well the drawing of both explains the picture.

    `share`: of the figure's contrast, explained; `purity`: 1 is this kind alone, 0.5 halfway to
    another. `noise`, `edges`, `left_over` and `faults` are as in `finding.Finding`.
    """

    kind: str
    color: str
    camera: Camera
    background: str
    zoom: float
    share: float
    purity: float
    noise: float
    edges: float
    left_over: float
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pose:
    """A guess in its place: moved by (dx, dy) sides of the picture, and zoomed."""

    guess: Guess
    dx: float
    dy: float
    zoom: float = 1.0
    error: float = float("inf")


def find_shot(picture: Image.Image | np.ndarray) -> ShotFinding:
    """The figure and the camera of a picture (RGB, 64 pixels or more)."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image = image.convert("RGB")
    noise = noise_of(np.asarray(image, np.float32) / 255)
    side = min(image.size)
    columns, rows = (round(length * COARSE / side) * FINE // COARSE for length in image.size)
    if image.size != (columns, rows):
        image = image.resize((columns, rows), Image.Resampling.BOX)
    pixels = np.asarray(image, np.float32) / 255
    middle = _shrink(pixels, FINE // MIDDLE)
    grounds, offset = _grounds(_shrink(middle, MIDDLE // COARSE))
    pixels, middle = pixels - offset, middle - offset
    guesses = rank(_shrink(middle, MIDDLE // COARSE), grounds)
    poses = _settled(_close(guesses), middle)
    best = poses[0]
    canvas, ground = draw_pose(best, columns, rows)
    energy = float(np.square(canvas - ground).sum())
    error = float(np.square(pixels - canvas).sum()) - noise**2 * pixels.size
    share = 1 - error / max(energy, 1e-6)
    others = [p for p in poses if p.guess.kind != best.guess.kind]
    purity = min((_purity(middle, best, other) for other in others), default=1.0)
    edges = edges_of(pixels, canvas, ground, noise)
    left_over = left_over_of(pixels, canvas, LEFT_OVER_REACH)
    return ShotFinding(
        kind=best.guess.kind,
        color=best.guess.color,
        camera=best.guess.camera,
        background=best.guess.background,
        zoom=best.zoom,
        share=share,
        purity=purity,
        noise=noise,
        edges=edges,
        left_over=left_over,
        faults=_faults(best.guess.kind, noise, edges, left_over, share, purity),
    )


def _faults(
    kind: str, noise: float, edges: float, left_over: float, share: float, purity: float
) -> tuple[str, ...]:
    """Why no reading of the picture can be right."""
    faults = []
    if noise > MOST_NOISE:
        faults.append(f"noisy ({noise * 255:.0f}/255)")
    if edges < LEAST_EDGES:
        faults.append(f"blurred (edges {edges:.2f} of a clean drawing)")
    if left_over > MOST_LEFT_OVER:
        faults.append(f"{100 * left_over:.1f}% of the picture is nothing known")
    if share < LEAST_SHARE:
        faults.append(f"the {kind} explains {100 * share:.0f}% of what is there")
    if purity < LEAST_MIX:
        faults.append(f"the {kind} is mixed with another kind")
    return tuple(faults)


def _shrink(x: Array, factor: int) -> Array:
    height, width, channels = x.shape
    blocks = x.reshape(height // factor, factor, width // factor, factor, channels)
    return blocks.mean(axis=(1, 3))


def _grounds(small: Array) -> tuple[tuple[str, ...], Array]:
    """The two likeliest backgrounds, and the small shift of colour that the whole picture has."""
    height, width = small.shape[:2]
    scores = []
    for name in BACKGROUNDS:
        for angle in HORIZONS:
            difference = small - empty(name, angle, width, height)
            distance = np.abs(difference).sum(-1)
            scores.append((float(np.minimum(distance, 0.3).mean()), name, difference, distance))
    scores.sort(key=lambda s: s[0])
    _, first, difference, distance = scores[0]
    second = next(name for _, name, _, _ in scores if name != first)
    near = distance < 0.18
    if near.mean() < 0.1:
        return (first, second), np.zeros(3, np.float32)
    return (first, second), np.clip(np.median(difference[near], axis=0), -0.06, 0.06)


@lru_cache(maxsize=128)
def empty(name: str, angle: str, width: int, height: int) -> Array:
    """A background as an angle sees it: float 0-1 (h, w, 3)."""
    drawn = draw_background(name, width, height, HORIZONS[angle])
    return np.asarray(drawn, np.float32) / 255


def _close(guesses: list[Guess]) -> list[Guess]:
    """The best guesses, and the best of the next kinds."""
    chosen = guesses[:NUM_CLOSE]
    kinds = {chosen[0].kind}
    for guess in guesses:
        if guess.kind not in kinds and len(kinds) <= NUM_OTHERS:
            kinds.add(guess.kind)
            if guess not in chosen:
                chosen.append(guess)
    return chosen


def draw_pose(pose: Pose, width: int, height: int) -> tuple[Array, Array]:
    """A guess drawn in its pose, and its empty background: float 0-1 (h, w, 3)."""
    guess = pose.guess
    maps = _moved(pose, width, height)
    ground = empty(guess.background, guess.camera.angle, width, height)
    shadow, alpha = maps[..., 2:3] / np.float32(255), maps[..., 0:1] / np.float32(255)
    colour = _tones(guess.color)[maps[..., 1]]
    shaded = ground + shadow * (np.float32(16 / 255) - ground)
    return shaded + alpha * (colour - shaded), ground


@lru_cache(maxsize=16)
def _tones(color: str) -> Array:
    return tones(color).astype(np.float32) / 255


@lru_cache(maxsize=2048)
def _maps(kind: str, camera: Camera, column: float, width: int, height: int) -> Image.Image:
    """Coverage, shade and shadow as the channels of one picture."""
    x, y = place(kind, camera, column)
    return Image.fromarray(np.stack(figure_maps(kind, camera, x, y, width, height), -1))


def _moved(pose: Pose, width: int, height: int) -> Array:
    guess = pose.guess
    image = _maps(guess.kind, guess.camera, guess.column, width, height)
    if (pose.dx, pose.dy, pose.zoom) == (0, 0, 1):
        return np.asarray(image)
    side = min(width, height)
    x, y = place(guess.kind, guess.camera, guess.column)
    inverse = 1 / pose.zoom
    left = x * width - (x * width + pose.dx * side) * inverse
    top = y * height - (y * height + pose.dy * side) * inverse
    room = side // 4  # what lies outside is as at the edge
    wide = _padded(guess.kind, guess.camera, guess.column, width, height, room)
    moved = wide.transform(
        (width, height),
        Image.Transform.AFFINE,
        (inverse, 0, left + room, 0, inverse, top + room),
        Image.Resampling.BILINEAR,
    )
    return np.asarray(moved)


@lru_cache(maxsize=1024)
def _padded(
    kind: str, camera: Camera, column: float, width: int, height: int, room: int
) -> Image.Image:
    maps = np.asarray(_maps(kind, camera, column, width, height))
    return Image.fromarray(np.pad(maps, ((room, room), (room, room), (0, 0)), mode="edge"))


def _error(pose: Pose, picture: Array) -> float:
    drawn, _ = draw_pose(pose, picture.shape[1], picture.shape[0])
    return float(np.square(picture - drawn).sum())


def _settled(guesses: list[Guess], picture: Array) -> list[Pose]:
    """The guesses moved and zoomed to fit the picture, best first. All are settled roughly; what
    is then far behind, and not the best of another kind, is left so."""
    rough = []
    for guess in guesses:
        start = Pose(guess, 0.0, 0.0)
        pose = replace(start, error=_error(start, picture))
        if guess.dx or guess.dy:
            pose = _better(pose, picture, [replace(start, dx=guess.dx, dy=guess.dy)])
        rough.append(_climb(pose, picture, 2.0, 1))
    rough.sort(key=lambda p: p.error)
    other = next((p for p in rough if p.guess.kind != rough[0].guess.kind), None)
    fine = []
    for pose in rough:
        if pose is other or pose.error < BEHIND * rough[0].error:
            pose = _climb(pose, picture, 2.0, 2)
            for step in (1.0, 0.5):
                pose = _climb(pose, picture, step, 2)
            guess = pose.guess
            others = [replace(guess, color=c) for c in COLORS if c != guess.color]
            others += [replace(guess, background=b) for b in BACKGROUNDS if b != guess.background]
            pose = _better(pose, picture, [replace(pose, guess=other) for other in others])
        fine.append(pose)
    return sorted(fine, key=lambda p: p.error)


def _climb(best: Pose, picture: Array, step: float, rounds: int) -> Pose:
    """The pose after some rounds of moves by `step` pixels of the middle size, and like zooms."""
    move, zoom = step / MIDDLE, 1 + 0.03 * step
    for _ in range(rounds):
        tries = [replace(best, dx=best.dx + s * move) for s in (-1, 1)]
        tries += [replace(best, dy=best.dy + s * move) for s in (-1, 1)]
        tries += [
            replace(best, zoom=z)
            for z in (best.zoom * zoom, best.zoom / zoom)
            if ZOOMS[0] < z < ZOOMS[1]
        ]
        better = _better(best, picture, tries)
        if better is best:
            break
        best = better
    return best


def _better(best: Pose, picture: Array, tries: list[Pose]) -> Pose:
    for pose in tries:
        error = _error(pose, picture)
        if error < best.error:
            best = replace(pose, error=error)
    return best


def _purity(picture: Array, best: Pose, other: Pose) -> float:
    """Share of `best` in the mixture of the two drawings that fits the picture best."""
    height, width = picture.shape[:2]
    one, two = (draw_pose(p, width, height)[0] for p in (best, other))
    gap = one - two
    span = float(np.square(gap).sum())
    return float(((picture - two) * gap).sum() / span) if span > 1 else 1.0
