"""What a picture shows, by drawing it again.

The background is recognised, every kind, colour and size is compared with the picture at every
place (coarse), the best explanations are refined with the world's own sprites (fine), and what was
found is drawn again. A picture that its own explanation does not account for (something left over,
blurred, noisy, between two kinds) has a fault. Nothing here is trained, so nothing can be trained
on a model's outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from hidream.judges.matching import Explanation, explain
from hidream.judges.quality import edges_of, left_over_of, noise_of
from hidream.judges.templates import (
    COARSE,
    FINE,
    Array,
    Fit,
    Scan,
    View,
    backdrop,
    paste,
    placed,
    scan,
    stamp,
    view,
)
from hidream.judges.words import read_word, word_stamp
from hidream.world.scene import BACKGROUNDS, Object, boxes_apart, extent

LEAST_GAIN = 0.12  # of a hypothesis in the coarse picture (squared colour distance summed)
CLEAR_SHARE = 0.8  # of its contrast that an object explains at once; poorer ones wait their turn
LEAST_SHARE = 0.3  # of an object's contrast to the background that its sprite must explain
MOST_TRIES = 9  # places looked at closely
OVERLAP = 0.95  # objects overlap where their centres are closer than this share of their sizes
MOST_NOISE = 14 / 255  # standard deviation
LEAST_EDGES = 0.085  # gradient energy against that of a clean drawing; blur of 1.5% of the width
LEAST_EDGES_SMALL = 0.17  # the same below 128 pixels
MOST_LEFT_OVER = 0.006  # share of the picture that the explanation leaves unexplained
LEAST_MIX = 0.7  # share of the kind named, in a mixture with the next best kind
LEAST_MIX_SMALL = 0.57  # the same below 128 pixels, where kinds look more alike


@dataclass(frozen=True, kw_only=True)
class Found(Object):
    """An object found in a picture, and how sure (0–1) the judge is of it."""

    confidence: float
    purity: float = 1.0  # 1: this kind alone; 0.5: halfway to another kind


@dataclass(frozen=True, kw_only=True)
class Finding:
    """All that the judge sees in a picture. `faults` are reasons why no reading can be right."""

    objects: tuple[Found, ...]
    background: str
    noise: float  # standard deviation, 0–1
    edges: float  # gradient energy against a clean drawing of the same objects
    left_over: float  # share of the picture that the explanation does not account for
    faults: tuple[str, ...] = ()


def find(picture: Image.Image | np.ndarray) -> Finding:
    """What a picture (RGB, any size from 64 up) shows."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image = image.convert("RGB")
    side = min(image.size)
    fine = FINE if side >= FINE else 64
    unit = fine // COARSE
    columns, rows = (round(length * COARSE / side) * unit for length in image.size)
    size = (columns, rows)
    noise = noise_of(np.asarray(image, np.float32) / 255)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BOX, reducing_gap=None)
    pixels = np.asarray(image, np.float32) / 255
    name, offset = _background(_shrink(pixels, unit))
    pixels = pixels - offset
    objects, fits = _objects(pixels, name, fine)
    canvas = backdrop(name, *size).copy()
    for one, match in sorted(zip(objects, fits, strict=True), key=lambda pair: pair[0].box[3]):
        sprite = (
            word_stamp(one.word, match.look.color, fine)
            if one.kind == "sign" and "?" not in one.word
            else stamp(match.kind, match.look, match.size, fine)
        )
        paste(canvas, sprite, match.x, match.y)
    ground = backdrop(name, *size)
    edges = edges_of(pixels, canvas, ground, noise)
    left_over = left_over_of(pixels, canvas, 2 if fine == FINE else 1)
    faults = []
    if noise > MOST_NOISE:
        faults.append(f"noisy ({noise * 255:.0f}/255)")
    if edges < (LEAST_EDGES if fine == FINE else LEAST_EDGES_SMALL):
        faults.append(f"blurred (edges {edges:.2f} of a clean drawing)")
    if left_over > MOST_LEFT_OVER:
        faults.append(f"{100 * left_over:.1f}% of the picture is nothing known")
    least_mix = LEAST_MIX if fine == FINE else LEAST_MIX_SMALL
    faults += [f"the {o.kind} is mixed with another kind" for o in objects if o.purity < least_mix]
    return Finding(
        objects=objects,
        background=name,
        noise=noise,
        edges=edges,
        left_over=left_over,
        faults=tuple(faults),
    )


def _shrink(x: Array, factor: int) -> Array:
    height, width, channels = x.shape
    blocks = x.reshape(height // factor, factor, width // factor, factor, channels)
    return blocks.mean(axis=(1, 3))


def _background(small: Array) -> tuple[str, Array]:
    """The background's name and the small shift of colour that the whole picture has."""
    height, width = small.shape[:2]
    best = ("", np.inf)
    for name in BACKGROUNDS:
        distance = np.abs(small - backdrop(name, width, height)).sum(-1)
        score = float(np.minimum(distance, 0.3).mean())
        if score < best[1]:
            best = (name, score)
    difference = small - backdrop(best[0], width, height)
    near = np.abs(difference).sum(-1) < 0.18
    if near.sum() < 20:
        return best[0], np.zeros(3, np.float32)
    return best[0], np.clip(np.median(difference[near], axis=0), -0.06, 0.06)


def _objects(pixels: Array, name: str, fine: int) -> tuple[tuple[Found, ...], list[Fit]]:
    """The objects of a picture, one after the other, the plainest first."""
    views: dict[int, View] = {}
    for side in {COARSE, 64, fine}:
        small = _shrink(pixels, fine // side)
        views[side] = view(small, backdrop(name, small.shape[1], small.shape[0]), side)
    scans = scan(views[COARSE], name)
    at = views[fine]
    canvas = at.ground.copy()
    found: list[tuple[Found, Fit]] = []
    doubtful: list[tuple[Explanation, Fit, str, float]] = []
    for _ in range(MOST_TRIES):
        candidates, shapes = _peak(scans, views[COARSE])
        if not candidates:
            break
        explained = explain(candidates, shapes, views, fine)
        match, word, certain = explained.fit, "", explained.confidence
        if match.kind == "sign":
            word, match, certain = read_word(explained.signs, at)
        unread = word.count("?") > len(word) / 2
        clear = explained.share >= CLEAR_SHARE or (word and "?" not in word)
        if not clear or unread or not _explains(at, canvas, match):
            if not unread:
                doubtful.append((explained, match, word, certain))
            _dismiss(scans, views[COARSE], candidates[0])
            continue
        found.append((_found(match, word, certain, explained.purity), match))
        paste(canvas, stamp(match.kind, match.look, match.size, fine), match.x, match.y)
        _suppress(scans, views[COARSE], match)
    doubtful.sort(key=lambda d: -d[0].share * d[1].gain)
    for explained, match, word, certain in doubtful:
        one = _found(match, word, certain, explained.purity)
        free = all(boxes_apart(one.box, other.box, -0.03) for other, _ in found)
        if free and _explains(at, canvas, match):
            found.append((one, match))
            paste(canvas, stamp(match.kind, match.look, match.size, fine), match.x, match.y)
    return tuple(one for one, _ in found), [match for _, match in found]


def _found(match: Fit, word: str, confidence: float, purity: float) -> Found:
    return Found(
        kind=match.kind,
        color=match.look.color,
        size=match.size,
        x=match.x,
        y=match.y,
        confidence=round(confidence, 3),
        word=word or ("?" if match.kind == "sign" else ""),
        pattern=match.look.pattern,
        color2=match.look.color2,
        purity=purity,
    )


def _explains(at: View, canvas: Array, match: Fit) -> bool:
    """Whether an object accounts for what the picture shows beyond the objects found so far."""
    one = stamp(match.kind, match.look, match.size, at.side)
    ys, xs, part_y, part_x = placed(canvas, one, match.x, match.y)
    change = one.alpha[part_y, part_x, None] * (one.color[part_y, part_x] - canvas[ys, xs])
    missing = at.picture[ys, xs] - canvas[ys, xs]
    gain = float(np.square(missing).sum() - np.square(missing - change).sum())
    return gain >= LEAST_SHARE * float(np.square(change).sum())


def _peak(scans: list[Scan], coarse: View) -> tuple[list[Fit], list[Fit]]:
    """The best coarse hypothesis, with the best of every other kind around the same place; and
    the kinds whose silhouettes fit best there. Both best first."""
    top = max(scans, key=lambda s: s.gains.max(initial=-1))
    if top.gains.max(initial=-1) < LEAST_GAIN:
        return [], []
    i, j, _ = np.unravel_index(int(top.gains.argmax()), top.gains.shape)
    y, x = top.row + int(i), top.column + int(j)
    colored, shaped = _around(scans, coarse, y, x, 2, False), _around(scans, coarse, y, x, 4, True)
    return colored, [f for f in shaped if f.kind != "sign"]


def _around(
    scans: list[Scan], coarse: View, y: int, x: int, reach: int, by_shape: bool
) -> list[Fit]:
    """The best hypothesis of every kind within `reach` coarse pixels of a place, best first."""
    best: dict[str, Fit] = {}
    for one in scans:
        i0, j0 = max(y - reach - one.row, 0), max(x - reach - one.column, 0)
        scores = one.shapes if by_shape else one.gains
        around = scores[
            i0 : max(y + reach + 1 - one.row, 0), j0 : max(x + reach + 1 - one.column, 0)
        ]
        if around.size == 0:
            continue
        spots = around.reshape(-1, around.shape[-1])
        where = spots.argmax(0)
        for n, (kind, look, size) in enumerate(one.bank.labels):
            gain = float(spots[where[n], n])
            key = f"{look.color}{look.letters}" if kind == "sign" else kind
            if gain > 0 and (key not in best or best[key].gain < gain):
                di, dj = divmod(int(where[n]), around.shape[1])
                cy, cx = one.row + i0 + di, one.column + j0 + dj
                best[key] = Fit(kind, look, size, cx / coarse.width, cy / coarse.height, gain)
    return sorted(best.values(), key=lambda f: -f.gain)


def _dismiss(scans: list[Scan], coarse: View, candidate: Fit) -> None:
    """Takes out hypotheses like a candidate that came to nothing, and leaves others near it."""
    cx, cy = round(candidate.x * coarse.width), round(candidate.y * coarse.height)
    for one in scans:
        kind, _, size = one.bank.labels[0]
        if (kind == "sign") != (candidate.kind == "sign"):
            continue
        if kind != "sign" and abs(size / candidate.size - 1) > 0.15:
            continue
        y0, x0 = cy - 3 - one.row, cx - 3 - one.column
        one.gains[max(y0, 0) : max(y0 + 7, 0), max(x0, 0) : max(x0 + 7, 0)] = -1


def _suppress(scans: list[Scan], coarse: View, match: Fit) -> None:
    """Takes out every hypothesis that would overlap the object found."""
    scale = min(coarse.width, coarse.height)
    width, height = extent(match.kind, match.size, "X" * max(match.look.letters, 1))
    cx, cy = match.x * coarse.width, match.y * coarse.height
    for one in scans:
        for n, (other_width, other_height) in enumerate(one.bank.extents):
            reach_x = OVERLAP * (width + other_width) * scale / 2
            reach_y = OVERLAP * (height + other_height) * scale / 2
            y0, y1 = int(np.ceil(cy - reach_y)), int(np.floor(cy + reach_y)) + 1
            x0, x1 = int(np.ceil(cx - reach_x)), int(np.floor(cx + reach_x)) + 1
            rows = slice(max(y0 - one.row, 0), max(y1 - one.row, 0))
            columns = slice(max(x0 - one.column, 0), max(x1 - one.column, 0))
            one.gains[rows, columns, n] = one.shapes[rows, columns, n] = -1
