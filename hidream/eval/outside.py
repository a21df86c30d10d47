"""What an edit changes outside the region that it is about."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from hidream.judges.finding import Found
from hidream.judges.world import IN_PLACE
from hidream.world.sample import Sample
from hidream.world.scene import Object
from hidream.world.sprites import PAD


def outside_change(
    picture: Image.Image | np.ndarray, item: Sample, found: Sequence[Found] = ()
) -> float | None:
    """Mean absolute change against the source, in percent of the range, of the pixels (of any
    channel) outside the edited region. None for an edit of the background, which has no outside.

    The region is the boxes, with their shadows, of the objects that the edit touches, as they were
    and as they are to be; and, where the instruction leaves the place open, of what was `found` of
    that kind elsewhere.
    """
    if item.edit == "background" or item.source is None:
        return None
    pixels = np.asarray(picture, np.float32)
    height, width = pixels.shape[:2]
    source = item.reference_pictures(width, height)[0].astype(np.float32)
    outside = np.ones((height, width), bool)
    for thing in edited_objects(item, found):
        left, top, right, bottom = _with_shadow(thing, width, height)
        outside[max(top, 0) : bottom, max(left, 0) : right] = False
    if not outside.any():
        return None
    return float(np.abs(pixels - source)[outside].mean() / 2.55)


def edited_objects(item: Sample, found: Sequence[Found] = ()) -> list[Object]:
    """The objects that an edit touches: before, after, and as found."""
    assert item.source is not None
    after = item.scene.objects
    touched = [after[i] for i in item.changed]
    before = [o for o in item.source.objects if o not in after]
    kinds = {o.kind for o in touched}
    kept = [o for o in after if o not in touched]
    elsewhere = [
        f
        for f in found
        if f.kind in kinds
        and not any(abs(f.x - o.x) < IN_PLACE and abs(f.y - o.y) < IN_PLACE for o in kept)
    ]
    return [*touched, *before, *(elsewhere if item.edit in ("add", "move", "word") else ())]


def _with_shadow(thing: Object, width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom in pixels of all that the object's sprite may cover."""
    room = PAD * thing.size * min(width, height) + 2
    tall, wide = (extent * min(width, height) / 2 for extent in thing.extent[::-1])
    x, y = thing.x * width, thing.y * height
    return (
        int(x - wide - room),
        int(y - tall - room),
        int(np.ceil(x + wide + room)),
        int(np.ceil(y + tall + room)),
    )
