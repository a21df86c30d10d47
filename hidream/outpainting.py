"""Outpainting: a picture on a larger canvas, and where of the canvas something may be drawn."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from hidream.errors import UsageError
from hidream.limits import MAX_SIDE, check_in_range, size_error

if TYPE_CHECKING:
    from PIL import Image

Margins = tuple[int, int, int, int]  # left, top, right, bottom, in pixels
GREY = (127, 127, 127)  # of the part that is yet to be drawn, as the model sees it in the source


def check_expand(value: Any) -> Margins | None:
    """Pixels to add at the left, top, right and bottom; one number is for all four.

    Raises:
        UsageError: not one or four whole numbers from 0 to MAX_SIDE, or all of them 0.
    """
    if value is None:
        return None
    numbers = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else value
    numbers = numbers if isinstance(numbers, tuple) else (numbers,)
    if len(numbers) not in (1, 4):
        raise UsageError(
            f"expand={value!r} is not four numbers.", "Write LEFT,TOP,RIGHT,BOTTOM in pixels."
        )
    limits = {"expand": (True, 0, MAX_SIDE, True)}
    checked = [check_in_range("expand", number, limits) for number in numbers]
    if None in checked or not any(checked):
        raise UsageError("expand adds nothing.", "Give the pixels to add at one side or more.")
    left, top, right, bottom = checked if len(checked) == 4 else checked * 4
    return left, top, right, bottom


def canvas_size(source: tuple[int, int], expand: Margins) -> tuple[int, int]:
    """The (width, height) of a picture of size `source` with its margins."""
    left, top, right, bottom = expand
    return source[0] + left + right, source[1] + top + bottom


def fit_expand(
    source: tuple[int, int], expand: Margins, patch_size: int, *, snap: bool = False
) -> Margins:
    """The margins, if with them each side of the canvas is a multiple of the patch.

    With `snap` they become the nearest with which it is, and none smaller than 0. What is missing
    is added, or what is too much taken, on the right and below, or on the left and above where
    the picture grows only there.

    Raises:
        UsageError: it is not, and the message has margins with which it would be.
    """
    width, height = canvas_size(source, expand)
    problem = size_error(width, height, patch_size)
    if not problem:
        return expand
    left, right = _snapped(source[0], expand[0], expand[2], patch_size)
    top, bottom = _snapped(source[1], expand[1], expand[3], patch_size)
    if snap:
        return left, top, right, bottom
    raise UsageError(
        f"the canvas is {width}x{height}: {problem}",
        f"Write --expand {left},{top},{right},{bottom}, or --snap nearest.",
    )


def extend(
    source: Image.Image, expand: Margins, mask: Image.Image | None = None
) -> tuple[Image.Image, Image.Image]:
    """The source (RGB) on a grey canvas, and where the canvas may be drawn on (L, white there).

    `mask` is the source's own, of its size: white where the source may change too.
    """
    from PIL import Image

    size, place = canvas_size(source.size, expand), expand[:2]
    canvas, free = Image.new("RGB", size, GREY), Image.new("L", size, 255)
    canvas.paste(source, place)
    free.paste(mask or Image.new("L", source.size, 0), place)
    return canvas, free


def _snapped(side: int, before: int, after: int, patch_size: int) -> tuple[int, int]:
    """Two margins of a side, changed so that their sum and it are a multiple of the patch."""
    whole = side + before + after
    least = side + min(1, before + after)  # a side that grows still grows
    target = max((whole + patch_size // 2) // patch_size, -(-least // patch_size)) * patch_size
    change = target - whole
    if before and not after:
        return before + change, 0
    return before + min(0, after + change), max(0, after + change)
