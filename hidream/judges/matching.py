"""From coarse candidates at one place to the one explanation that fits best, and how purely."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from hidream.judges.templates import (
    SIZES,
    Array,
    Fit,
    Look,
    View,
    all_colors,
    fit,
    placed,
    silhouette,
    stamp,
)
from hidream.world.scene import COLORS, PATTERNS

KEEP_COARSE = 0.5  # candidates within this share of the best coarse score are looked at closely
KEEP_MIDDLE = 0.6  # and of those, in the middle resolution, these
WELL = 0.85  # an explanation of less than this share of its contrast is looked at again
MOST_BESIDE = 0.12  # of an object's area, that may be in front around it: else it may be a half
TEXTURE_GAIN = 0.62  # a texture must leave less than this share of the plain colour's error


@dataclass(frozen=True)
class Explanation:
    """The best fit of a place; the share of its contrast that it explains; confidence against the
    next kind; purity (1 = this kind alone, 0.5 = halfway to another); readings of a sign."""

    fit: Fit
    share: float
    confidence: float
    purity: float
    signs: tuple[Fit, ...]


def explain(
    candidates: list[Fit], shapes: list[Fit], views: dict[int, View], fine: int
) -> Explanation:
    """The best explanation among the candidates of one place.

    Where none of them explains what is there, `shapes` (by silhouette alone) are traced as well.
    Both are sorted, best first.
    """
    close = [c for c in candidates[:8] if c.gain >= KEEP_COARSE * candidates[0].gain]
    middle = sorted((_settle(views[64], c, 2, 2) for c in close), key=lambda f: -f.gain)
    at = views[fine]
    finalists = _final(at, middle)
    best = finalists[0]
    energy = contrast(at, best)
    if best.kind != "sign" and (best.gain < WELL * energy or _beside(at, best) > MOST_BESIDE):
        # A texture, or an unusual place or size: go by the silhouette, whatever is inside it.
        guesses = [c for c in [*shapes[:4], *candidates[:3]] if c.kind != "sign"]
        outlined = [_outline(views[64], c, 2) for c in guesses]
        outlined.sort(key=lambda pair: -pair[0])
        traced = [_trace(at, guess) for _, guess in outlined[:4]]
        finalists = sorted(_best_of_each([*finalists, *traced]), key=lambda f: -f.gain)
        best = finalists[0]
        energy = contrast(at, best)
    if best.kind != "sign":
        best = _refine(at, best, 2, 1)
        energy = contrast(at, best)
    error = max(energy - best.gain, 0.0)
    others = [f for f in finalists[1:] if f.kind != best.kind]
    next_error = min((max(energy - f.gain, 0.0) for f in others), default=energy)
    return Explanation(
        fit=best,
        share=best.gain / max(energy, 1e-6),
        confidence=float(np.clip(1 - error / max(next_error, 1e-6), 0, 1)),
        purity=min((_purity(at, best, f) for f in others), default=1.0),
        signs=tuple(f for f in finalists if f.kind == "sign"),
    )


def _beside(at: View, best: Fit) -> float:
    """What stands in front of the background right around an object, in units of its area."""
    cover = silhouette(best.kind, best.size, at.side)
    height, width = cover.shape
    top = round(best.y * at.height - height / 2) + at.room
    left = round(best.x * at.width - width / 2) + at.room
    front = at.front[max(top, 0) : top + height, max(left, 0) : left + width]
    if front.shape != cover.shape:
        return 0.0
    near = np.pad(cover, 2)
    near = np.lib.stride_tricks.sliding_window_view(near, (5, 5)).max(axis=(2, 3))
    return float(np.maximum(front - near, 0).sum() / cover.sum())


def _final(at: View, middle: list[Fit]) -> list[Fit]:
    """The best of the middle resolution, settled in the fine one; best first."""
    kept = [f for f in middle[:4] if f.gain >= KEEP_MIDDLE * middle[0].gain] or middle[:1]
    if at.side != 64:
        kept = [_settle(at, f, 1, 1) for f in kept]
    return sorted(kept, key=lambda f: -f.gain)


def _best_of_each(fits: list[Fit]) -> list[Fit]:
    """The better of several fits of one kind."""
    best: dict[tuple[str, int], Fit] = {}
    for one in fits:
        key = (one.kind, one.look.letters)
        if key not in best or one.gain > best[key].gain:
            best[key] = one
    return list(best.values())


def _settle(at: View, guess: Fit, reach: int, steps: int) -> Fit:
    """The guess in its best colour or texture, at its best size and place."""
    if guess.kind == "sign":
        return fit(at, "sign", guess.look, guess.size, guess.x, guess.y, reach)
    known = guess if guess.look.color else _colour(at, guess)
    first = _refine(at, known, reach, steps)
    again = _colour(at, first)
    return first if again.look == first.look else _refine(at, again, 1, 1)


def _refine(at: View, guess: Fit, reach: int, steps: int) -> Fit:
    """The guess at the best of the sizes within `steps` of its own, and at its best place."""
    tried: dict[float, Fit] = {}
    best = guess
    while True:  # until the best size lies among sizes that were tried
        middle = nearest_size(best.size)
        for size in SIZES[max(middle - steps, 0) : middle + steps + 1]:
            if size not in tried:
                tried[size] = fit(at, guess.kind, guess.look, size, best.x, best.y, reach)
        leader = max(tried.values(), key=lambda f: f.gain)
        if leader.size == best.size:
            return leader
        best = leader


def nearest_size(size: float) -> int:
    """The place of a size in `SIZES`."""
    return min(range(len(SIZES)), key=lambda i: abs(SIZES[i] - size))


def _outline(at: View, guess: Fit, steps: int, reach: int = 3) -> tuple[float, Fit]:
    """The guess where its silhouette fits best, whatever the colours inside: (score, fit)."""
    best, score = guess, -np.inf
    middle = nearest_size(guess.size)
    for size in SIZES[max(middle - steps, 0) : middle + steps + 1]:
        cover = silhouette(guess.kind, size, at.side)
        h, w = cover.shape
        top, left = round(guess.y * at.height - h / 2), round(guess.x * at.width - w / 2)
        y0, x0 = top - reach + at.room, left - reach + at.room
        region = at.front[max(y0, 0) : y0 + h + 2 * reach, max(x0, 0) : x0 + w + 2 * reach]
        if y0 < 0 or x0 < 0 or region.shape[0] < h or region.shape[1] < w:
            continue
        slides = np.lib.stride_tricks.sliding_window_view(region, (h, w))
        patches = slides.reshape(-1, h * w)
        scores = 2 * (patches @ cover.ravel()) - float((cover * cover).sum())
        i, j = divmod(int(scores.argmax()), slides.shape[1])
        if scores.max() > score:
            score = float(scores.max())
            x, y = (left - reach + j + w / 2) / at.width, (top - reach + i + h / 2) / at.height
            best = replace(guess, size=size, x=x, y=y, look=Look(""))
    return score, best


def _trace(at: View, guess: Fit) -> Fit:
    """A guess from a silhouette, settled: the texture that fits best near its place."""
    _, outlined = _outline(at, guess, 1, 2)
    shifts = [(dx, dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1)]
    tries = [
        _colour(at, replace(outlined, x=outlined.x + dx / at.width, y=outlined.y + dy / at.height))
        for dx, dy in shifts
    ]
    return _refine(at, max(tries, key=lambda f: f.gain), 1, 1)


def contrast(at: View, found: Fit) -> float:
    """How much the object, as drawn, differs from the background: the most it can explain."""
    one = stamp(found.kind, found.look, found.size, at.side)
    ys, xs, part_y, part_x = placed(at.picture, one, found.x, found.y)
    alpha = one.alpha[part_y, part_x, None]
    return float(np.square(alpha * (one.color[part_y, part_x] - at.ground[ys, xs])).sum())


@dataclass(frozen=True)
class _Paints:
    """A kind at one size in all colours: alpha (h, w), a·colour (10, h·w·3), pattern masks
    (1 + 5, h·w) with the whole stamp first, and Σ mask·(a·colour)² (6, 10)."""

    alpha: Array
    lit: Array
    masks: Array
    energy: Array


@lru_cache(maxsize=400)
def _paints(kind: str, size: float, side: int) -> _Paints:
    alpha = stamp(kind, Look("white"), size, side).alpha
    lit = alpha[..., None] * all_colors(kind, size, side)
    masks = np.stack([np.ones_like(alpha), *(_pattern(p, kind, size, side) for p in PATTERNS)])
    energy = np.einsum("mhw,khwc->mk", masks, lit * lit)
    return _Paints(alpha, lit.reshape(len(lit), -1), masks.reshape(len(masks), -1), energy)


def _pattern(pattern: str, kind: str, size: float, side: int) -> Array:
    """Where the pattern shows its second colour, on the stamp's own grid, 0–1."""
    dark = stamp(kind, Look("black", pattern, "white"), size, side).color
    black, white = (stamp(kind, Look(color), size, side).color for color in ("black", "white"))
    span = (white - black).sum(-1)
    return np.clip((dark - black).sum(-1) / np.maximum(span, 1e-3), 0, 1)


def _colour(at: View, guess: Fit) -> Fit:
    """The guess in its best colour, or in the best texture of two colours.

    The error of a colour under a mask, Σ m·|rest − a·c|², is expanded so that all colours and
    patterns are one product.
    """
    paints = _paints(guess.kind, guess.size, at.side)
    alpha = paints.alpha
    height, width = alpha.shape
    top = round(guess.y * at.height - height / 2) + at.room
    left = round(guess.x * at.width - width / 2) + at.room
    if top < 0 or left < 0:
        return guess
    r = at.maps[top : top + height, left : left + width, :3]
    ground = at.maps[top : top + height, left : left + width, 4:7]
    if r.shape[:2] != alpha.shape:
        return guess
    rest = r + alpha[..., None] * ground
    squares = np.square(rest).sum(-1).ravel()
    weighted = paints.masks[:, :, None] * rest.reshape(1, -1, 3)
    cross = weighted.reshape(len(weighted), -1) @ paints.lit.T
    errors = (paints.masks @ squares)[:, None] - 2 * cross + paints.energy  # (6, 10)
    totals = errors[0]
    plain = int(totals.argmin())
    empty = float(np.square(r).sum())
    best = replace(guess, look=Look(COLORS[plain]), gain=empty - float(totals[plain]))
    # a second colour that explains only noise is no texture
    least = min(TEXTURE_GAIN * totals[plain], totals[plain] - 0.01 * float(alpha.sum()))
    for pattern, second in zip(PATTERNS, errors[1:], strict=True):
        first = totals - second
        a, b = int(first.argmin()), int(second.argmin())
        if a != b and first[a] + second[b] < least:
            least = first[a] + second[b]
            look = Look(COLORS[a], pattern, COLORS[b])
            best = replace(guess, look=look, gain=empty - float(least))
    return best


def _purity(at: View, best: Fit, other: Fit) -> float:
    """Share of `best` in the mixture of the two explanations that fits the picture best."""
    if best.kind == "sign" or other.kind == "sign":
        return 1.0
    one = stamp(best.kind, best.look, best.size, at.side)
    window = placed(at.picture, one, best.x, best.y)[:2]  # beyond it stand other objects
    drawn = []
    for guess in (best, replace(other, look=best.look)):
        canvas = at.ground.copy()
        sprite = stamp(guess.kind, guess.look, guess.size, at.side)
        ys, xs, part_y, part_x = placed(canvas, sprite, guess.x, guess.y)
        alpha = sprite.alpha[part_y, part_x, None]
        canvas[ys, xs] += alpha * (sprite.color[part_y, part_x] - canvas[ys, xs])
        drawn.append(canvas[window])
    gap = drawn[0] - drawn[1]
    span = float(np.square(gap).sum())
    if span < 1e-3:
        return 1.0
    return float(((at.picture[window] - drawn[1]) * gap).sum() / span)
