"""Compositing: a subject cut out by its mask, set on another picture, and the edge to harmonise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from hidream.errors import InputError, UsageError
from hidream.limits import MAX_SIDE


@dataclass(frozen=True)
class Composite:
    """A subject on a background: RGB, and two masks (L) of the same size.

    `subject` is white where the subject lies. `edge` is white on its outline and fades to black
    on both sides: how far a low-strength pass may change each pixel, to make the two one picture.
    """

    picture: Image.Image
    subject: Image.Image
    edge: Image.Image


def composite(
    source: Image.Image,
    mask: Image.Image,
    background: Image.Image,
    *,
    center: tuple[float, float] = (0.5, 0.5),
    scale: float = 1.0,
    band: int = 16,
) -> Composite:
    """The subject of `source`, which `mask` (L, of its size) shows white, on `background`.

    `center`: where the middle of the subject's box comes to lie, from (0, 0) at the background's
    top left corner to (1, 1); what is outside is cut off. `scale`: its size in pixels against that
    in `source`. `band`: how many pixels on each side of the outline the edge reaches.

    Raises:
        InputError: the mask is of another size or has no white, or no subject would be seen.
        UsageError: the scale makes it smaller than a pixel, or larger than a picture may be.
    """
    if mask.size != source.size:
        raise InputError(
            f"the subject's mask is {mask.width}x{mask.height}, but its picture is "
            f"{source.width}x{source.height}.",
            "Draw the mask on the picture itself.",
        )
    box = mask.getbbox()
    if box is None:
        raise InputError("the subject's mask is all black.", "Paint the subject white.")
    cut = source.convert("RGB")
    cut.putalpha(mask)
    cut = cut.crop(box)
    width, height = (round(scale * side) for side in cut.size)
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise UsageError(
            f"scale={scale:g} makes the subject {width}x{height} pixels; each side can be 1 … "
            f"{MAX_SIDE}.",
            f"It is {cut.width}x{cut.height} in its own picture.",
        )
    if cut.size != (width, height):
        cut = cut.resize((width, height), Image.Resampling.LANCZOS)
    left = round(center[0] * background.width - width / 2)
    top = round(center[1] * background.height - height / 2)
    subject = Image.new("L", background.size, 0)
    subject.paste(cut.getchannel("A"), (left, top))
    if subject.getbbox() is None:
        raise InputError(
            f"at {center[0]:g},{center[1]:g} the subject is outside the background.",
            "Place it between 0,0 and 1,1.",
        )
    picture = background.convert("RGB")
    picture.paste(cut.convert("RGB"), (left, top), cut.getchannel("A"))
    return Composite(picture, subject, edge_mask(subject, band))


def edge_mask(subject: Image.Image, band: int) -> Image.Image:
    """The outline of a mask (L): white on it, falling to black `band` pixels to either side.

    Where the picture ends there is no outline.
    """
    near_by = max(band, 1) // 2 + 1
    inside = (np.asarray(subject.convert("L")) > 127).astype(np.float64)
    share = _mean_around(inside, near_by)
    near = ((share > 1e-9) & (share < 1 - 1e-9)).astype(np.float64)
    soft = _mean_around(near, max(band, 1) - near_by)
    return Image.fromarray(np.rint(255 * soft).astype(np.uint8))


def _mean_around(values: np.ndarray, reach: int) -> np.ndarray:
    """The mean over the square of `2 * reach + 1` pixels around each; the border's repeat."""
    side = 2 * reach + 1
    for axis in (0, 1):
        margin = [(reach + 1, reach) if other == axis else (0, 0) for other in (0, 1)]
        total = np.pad(values, margin, mode="edge").cumsum(axis)
        upper, lower = (np.arange(values.shape[axis]) + start for start in (side, 0))
        values = (total.take(upper, axis) - total.take(lower, axis)) / side
    return values
