"""Seams: whether a picture changes more across the borders of its patches than inside them.

A model that draws patch by patch may leave its grid in the picture. Against it stands the picture
itself: its mean absolute difference of neighbouring pixels at each of the other offsets of the
grid, all of which see the same content.
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
    what chance does in this picture. There must be two patches or more along the axis.
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
