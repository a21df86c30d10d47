"""Whether what was found fills the boxes that a layout asked for."""

from __future__ import annotations

from collections.abc import Sequence

from hidream.judges.finding import Found
from hidream.limits import Box

LEAST_IOU = 0.5


def overlap(found: tuple[float, float, float, float], asked: Box) -> float:
    """Intersection over union of a found box (left, top, right, bottom) and a layout's
    (x1, x2, y1, y2), both fractions of the picture."""
    left, top, right, bottom = found
    x1, x2, y1, y2 = asked
    width, height = min(right, x2) - max(left, x1), min(bottom, y2) - max(top, y1)
    shared = max(width, 0.0) * max(height, 0.0)
    return shared / ((right - left) * (bottom - top) + (x2 - x1) * (y2 - y1) - shared)


def box_overlaps(
    objects: Sequence[Found], layout: Sequence[Box], allowed: Sequence[Sequence[bool]]
) -> list[float]:
    """For each box, the overlap of the object that fills it best among those that are its subject
    (`allowed`: a row for each box, a column for each object); 0 where the subject is not there."""
    return [
        max((overlap(o.box, box) for o, ok in zip(objects, row, strict=True) if ok), default=0.0)
        for box, row in zip(layout, allowed, strict=True)
    ]
