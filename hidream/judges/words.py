"""Reading the word on a sign: each cell against the twenty-six letters the world draws."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np

from hidream.judges.templates import FINE, LETTERS, Array, Fit, Look, Stamp, View, placed, stamp
from hidream.world.scene import sign_cell
from hidream.world.sprites import SIGN_TONES, board_sprite, letter_mask

LEAST_LETTER = 0.5  # correlation of a cell's ink with the letter read there
LEAST_INK = 1.0  # the norm of a cell's ink, in pixels, below which no letter is there
REACH = 2  # how far, in fine pixels, a letter may sit off its place


@lru_cache(maxsize=64)
def _letters(letters: int, side: int) -> Array:
    """Ink of the twenty-six letters on signs of that length: (26, h, w), 0–1, zero mean."""
    masks = [np.asarray(letter_mask(x, letters, side), np.float32) / 255 for x in LETTERS]
    return np.stack(masks)


def _corner(found: Fit, at: View) -> tuple[float, float, float]:
    """Left and top of the first letter's cell, and the cell's width, in pixels."""
    board, _, pad = board_sprite(found.look.color, found.look.letters, at.side)
    left = found.x * at.width - board.width / 2
    top = found.y * at.height - board.height / 2
    cell = sign_cell("X" * found.look.letters) * at.side
    inner = board.width - 2 * pad
    return left + pad + (inner - cell * found.look.letters) / 2, top + pad + 0.0275 * at.side, cell


def read_word(signs: tuple[Fit, ...], at: View) -> tuple[str, Fit, float]:
    """The word on a sign, the reading of the sign that fits best, and the least sure letter's
    correlation. A cell that is no letter is read as "?", an empty one amid letters as a space."""
    best: tuple[float, str, Fit, float] | None = None
    for found in signs:
        word, scores = _read(found, at)
        gain = found.gain if "?" in word else _word_gain(found, word, at)
        if best is None or gain > best[0]:
            best = (gain, word, found, min(scores))
    assert best is not None
    return best[1], best[2], best[3]


def _word_gain(found: Fit, word: str, at: View) -> float:
    """How much better than the background the sign explains the picture, with its word on it."""
    one = word_stamp(word, found.look.color, at.side)
    ys, xs, part_y, part_x = placed(at.picture, one, found.x, found.y)
    alpha = one.alpha[part_y, part_x, None]
    missing = at.picture[ys, xs] - at.ground[ys, xs]
    change = alpha * (one.color[part_y, part_x] - at.ground[ys, xs])
    return float(np.square(missing).sum() - np.square(missing - change).sum())


def _read(found: Fit, at: View) -> tuple[str, list[float]]:
    board, _, ink = (np.array(tone, np.float32) / 255 for tone in SIGN_TONES[found.look.color])
    x0, y0, cell = _corner(found, at)
    templates = _letters(found.look.letters, at.side)
    _, height, width = templates.shape
    flat = templates.reshape(26, -1)
    flat = flat - flat.mean(1, keepdims=True)
    flat = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    along = ink - board
    word = ""
    scores: list[float] = []
    for i in range(found.look.letters):
        left, top = round(x0 + i * cell) - REACH, round(y0) - REACH
        ys = slice(max(top, 0), top + height + 2 * REACH)
        xs = slice(max(left, 0), left + width + 2 * REACH)
        part = at.picture[ys, xs]
        inked = np.clip(((part - board) * along).sum(-1) / (along @ along), -0.2, 1.2)
        if inked.shape[0] < height or inked.shape[1] < width:
            word, scores = word + "?", [*scores, 0.0]
            continue
        slides = np.lib.stride_tricks.sliding_window_view(inked, (height, width))
        spots = slides.reshape(-1, height * width)
        spots = spots - spots.mean(1, keepdims=True)
        norm = np.linalg.norm(spots, axis=1, keepdims=True)
        if norm.min() < LEAST_INK:
            word, scores = word + " ", [*scores, 1.0]
            continue
        match = ((spots / np.maximum(norm, 0.5)) @ flat.T).max(0)
        which = int(match.argmax())
        score = float(match[which])
        word += LETTERS[which] if score >= LEAST_LETTER else "?"
        scores.append(score)
    between = word.lstrip(" ")
    between = "?" * (len(word) - len(between)) + between
    return between.rstrip(" ").ljust(len(word), "?"), scores


@lru_cache(maxsize=512)
def word_stamp(word: str, style: str, side: int) -> Stamp:
    """The sign with its word, as a stamp."""
    blank = stamp("sign", Look(style, letters=len(word)), 0.0, FINE)
    board, _, pad = board_sprite(style, len(word), FINE)
    image = board.copy()
    cell = sign_cell(word) * FINE
    x0 = pad + (board.width - 2 * pad - cell * len(word)) / 2
    for i, letter in enumerate(word):
        at = (round(x0 + i * cell), round(pad + 0.0275 * FINE))
        image.paste(SIGN_TONES[style][2], at, letter_mask(letter, len(word), FINE))
    full = replace(blank, color=np.asarray(image, np.float32) / 255)
    if side == FINE:
        return full
    coarse = stamp("sign", Look(style, letters=len(word)), 0.0, side)
    height, width = coarse.shape
    factor = FINE // side
    extra_y, extra_x = height * factor - full.shape[0], width * factor - full.shape[1]
    pads = (
        (extra_y // 2, extra_y - extra_y // 2),
        (extra_x // 2, extra_x - extra_x // 2),
        (0, 0),
    )
    padded = np.pad(full.color * full.alpha[..., None], pads)
    lit = padded.reshape(height, factor, width, factor, 3).mean((1, 3))
    return Stamp(coarse.alpha, lit / np.maximum(coarse.alpha, 1e-4)[..., None])
