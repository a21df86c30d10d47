"""Seams: whether a picture changes more across the borders of its patches than inside them.

A model that draws patch by patch may leave its grid in the picture. Against it stands the picture
itself: its mean absolute difference of neighbouring pixels at each of the other offsets of the
grid, all of which see the same content.

A texture should have no seam where it is laid beside itself, either; there the picture's own lines
are what it is held against.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from hidream.errors import UsageError

_LEAST = 0.01  # levels; below it differences are those of no 8-bit picture


@dataclass(frozen=True)
class Seams:
    """Of one axis, in levels of 0 … 255: the mean step across borders, and inside patches.

    `offsets` are the least and the largest mean step at the offsets inside patches, the measure of
    what chance does in this picture. There must be two patches or more along the axis. What they
    are of a picture laid beside itself, `wrap_seams_of` says.
    """

    border: float
    inside: float
    offsets: tuple[float, float]

    @property
    def ratio(self) -> float:
        """About 1 where the grid does not show, larger where it does."""
        return max(self.border, _LEAST) / max(self.inside, _LEAST)

    @property
    def range(self) -> tuple[float, float]:
        """The same ratio at the offset inside patches where it is least, and where largest."""
        low, high = (max(offset, _LEAST) / max(self.inside, _LEAST) for offset in self.offsets)
        return low, high

    @property
    def shows(self) -> bool:
        """Whether borders change more than any other offset, by 5 % of the mean at least."""
        return self.ratio > max(1.05, self.range[1])


def seams_of(picture: Image.Image, patch_size: int) -> dict[str, Seams | None]:
    """The seams of an RGB picture along `x` (between columns) and `y` (between rows).

    The grid of patches begins at the picture's top left corner. None for an axis along which
    there is no border, or nothing to hold it against.

    Raises:
        UsageError: `patch_size` is less than 2.
    """
    if patch_size < 2:
        raise UsageError(f"patch={patch_size} is less than 2.", "O1 has 32, o1-nano 16.")
    pixels = np.asarray(picture.convert("RGB"), np.int16)
    return {"x": _along(pixels, 1, patch_size), "y": _along(pixels, 0, patch_size)}


def wrap_seams_of(picture: Image.Image) -> dict[str, Seams | None]:
    """The seams of an RGB picture laid beside itself, along `x` and `y`; it tiles if none shows.

    `border` is the step from its last line to its first, `inside` the mean of the steps between
    its lines, and `offsets` are those that one of twenty is below, and above. None for an axis of
    fewer than 20 lines.
    """
    pixels = np.asarray(picture.convert("RGB"), np.int16)
    return {"x": _around(pixels, 1), "y": _around(pixels, 0)}


def _around(pixels: np.ndarray, axis: int) -> Seams | None:
    if pixels.shape[axis] < 20:
        return None
    others = tuple(other for other in range(3) if other != axis)
    steps = np.abs(pixels - np.roll(pixels, 1, axis)).mean(axis=others)  # steps[0]: last to first
    low, high = np.quantile(steps[1:], (0.05, 0.95))
    return Seams(
        border=float(steps[0]), inside=float(steps[1:].mean()), offsets=(float(low), float(high))
    )


def _along(pixels: np.ndarray, axis: int, patch_size: int) -> Seams | None:
    if pixels.shape[axis] <= patch_size:
        return None
    others = tuple(other for other in range(3) if other != axis)
    steps = np.abs(np.diff(pixels, axis=axis)).mean(axis=others)  # steps[i]: pixels i and i + 1
    border = np.arange(len(steps)) % patch_size == patch_size - 1
    offsets = [float(steps[start::patch_size].mean()) for start in range(patch_size - 1)]
    return Seams(
        border=float(steps[border].mean()),
        inside=float(steps[~border].mean()),
        offsets=(min(offsets), max(offsets)),
    )
