"""Tiling, two ways: a picture that continues itself at its borders, and one drawn in pieces.

Arrays are numpy's or torch's alike (torch itself is not needed); rows and columns are the last
two axes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hidream.errors import UsageError

Shift = tuple[int, int]  # rows and columns

# Multiples of these, cut to what follows the point, fill a square evenly: 1/x and 1/x², where
# x³ = x + 1 (the plane's golden ratio).
_EVENLY = (0.7548776662466927, 0.5698402909980532)


# Seamless textures


def roll(x: Any, shift: Shift) -> Any:
    """`x` moved down and to the right by `shift`; what leaves at one border enters at the other."""
    if isinstance(x, np.ndarray):
        return np.roll(x, shift, axis=(-2, -1))
    return x.roll(shift, dims=(-2, -1))


def step_shift(step: int, size: tuple[int, int], patch_size: int = 2) -> Shift:
    """How far to roll at step 0, 1, ...: whole patches, no two steps near each other."""
    rows, columns = (
        int(step * share % 1 * (side // patch_size)) * patch_size
        for share, side in zip(_EVENLY, size, strict=True)
    )
    return rows, columns


def seamless(
    denoise: Callable[[Any, Any], Any], sigmas: Sequence[float], patch_size: int = 2
) -> Callable[[Any, Any], Any]:
    """`denoise`, shown the state rolled by another shift at each step, its answer rolled back.

    So a network that knows nothing of it sees every border as an inside, and the sampler sees
    nothing of the shifts. A call finds its step by its sigma, one of `sigmas`.
    """
    steps = {float(sigma): step for step, sigma in enumerate(sigmas)}

    def rolled(x_t: Any, sigma: Any) -> Any:
        down, right = step_shift(steps[float(sigma)], x_t.shape[-2:], patch_size)
        return roll(denoise(roll(x_t, (down, right)), sigma), (-down, -right))

    return rolled


def wrap(x: Any, margin: int) -> Any:
    """`x` with `margin` more rows and columns on each side, which are those of the other side.

    For a decoder that fills up with zeros at borders: decode this, then cut the margin off.
    """
    rows, columns = (np.arange(-margin, side + margin) % side for side in x.shape[-2:])
    return x[..., rows, :][..., columns]


# Large pictures in pieces


@dataclass(frozen=True)
class Tile:
    """A piece of a larger array: where it lies, and how much it counts in each of its places.

    At every place the `weight` of all tiles that lie there add up to one.
    """

    rows: slice
    columns: slice
    weight: np.ndarray  # (rows, columns), float64, above 0

    def of(self, x: Any) -> Any:
        """What lies here of an array of the whole's size."""
        return x[..., self.rows, self.columns]


def split(size: tuple[int, int], tile: int, overlap: int, multiple: int = 1) -> list[Tile]:
    """Tiles of `tile`×`tile` that cover (height, width) and lie on each other by `overlap` or more.

    A side shorter than a tile is one piece. Tiles begin and end at multiples of `multiple`, as
    `size`, `tile` and `overlap` do. A tile's weight falls evenly over the overlap.

    Raises UsageError unless `overlap` is smaller than the tile, and all are such multiples.
    """
    for name, value in (("tile", tile), ("overlap", overlap), *zip("hw", size, strict=True)):
        if value % multiple or value < 0:
            raise UsageError(f"{name}={value} is not a multiple of {multiple}.")
    if not 0 <= overlap < tile:
        raise UsageError(f"overlap={overlap} is not below tile={tile}.", "Make it smaller.")
    (rows, down), (columns, across) = (_pieces(side, tile, overlap, multiple) for side in size)
    return [
        Tile(row, column, np.outer(weight, other))
        for row, weight in zip(rows, down, strict=True)
        for column, other in zip(columns, across, strict=True)
    ]


def join(parts: Sequence[Any], tiles: Sequence[Tile], size: tuple[int, int]) -> Any:
    """The whole from each tile's part, blended where they overlap.

    Where all parts agree it is their value, to the bit.
    """
    first = parts[0]
    shape = (*first.shape[:-2], *size)
    is_numpy = isinstance(first, np.ndarray)
    whole = np.zeros(shape, first.dtype) if is_numpy else first.new_zeros(shape)
    so_far = np.zeros(size)
    for part, tile in zip(parts, tiles, strict=True):
        here = tile.of(so_far)
        here += tile.weight  # a view: it adds to so_far
        share = tile.weight / here
        share = share.astype(first.dtype) if is_numpy else first.new_tensor(share)
        before = tile.of(whole)
        whole[..., tile.rows, tile.columns] = before + share * (part - before)
    return whole


def _pieces(
    length: int, tile: int, overlap: int, multiple: int
) -> tuple[list[slice], list[np.ndarray]]:
    """Pieces of a line and their weights, which add up to one at each place."""
    if length <= tile:
        return [slice(0, length)], [np.ones(length)]
    count = -(-(length - overlap) // (tile - overlap))
    room = (length - tile) // multiple
    starts = [index * room // (count - 1) * multiple for index in range(count)]
    ramp = (np.arange(tile) + 0.5) / max(overlap, 1)
    weights, total = [], np.zeros(length)
    for start in starts:
        weight = np.ones(tile)
        if start > 0:
            weight = np.minimum(weight, ramp)
        if start + tile < length:
            weight = np.minimum(weight, ramp[::-1])
        weights.append(weight)
        total[start : start + tile] += weight
    pieces = [slice(start, start + tile) for start in starts]
    return pieces, [w / total[piece] for w, piece in zip(weights, pieces, strict=True)]
