"""Reference pictures and layouts, prepared as the published checkpoints were trained on them.

The sizes, filters and roundings here are facts of those checkpoints; the parity fixtures hold
each of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

from PIL import Image, ImageDraw

from hidream.models.o1.config import ReferenceBudgets

Box = tuple[float, float, float, float]  # x1, x2, y1, y2 as fractions of the picture
PixelBox = tuple[int, int, int, int]  # left, top, right, bottom; both corners inside

LAYOUT_COLORS = (
    (255, 0, 0),
    (0, 180, 0),
    (0, 0, 255),
    (204, 180, 0),
    (255, 0, 255),
    (0, 255, 255),
    (128, 0, 0),
    (0, 128, 0),
    (0, 0, 128),
    (128, 128, 0),
)


def prepare_references(
    references: Sequence[Image.Image],
    layout: Sequence[Box],
    *,
    width: int,
    height: int,
    patch_size: int,
    budgets: ReferenceBudgets,
) -> list[Image.Image]:
    """Every reference at the size that their number allows; a layout is one more, the last.

    With a layout, box i belongs to reference i, which gets a border in its box's colour.
    """
    count = len(references) + bool(layout)
    side = budgets.side(count, max(width, height))
    prepared = [fit_to_area(picture, side, patch_size) for picture in references]
    if not layout:
        return prepared
    ranks = rank_by_area(pixel_boxes(layout, width, height))
    prepared = [
        fit_to_area(_framed(picture, LAYOUT_COLORS[rank]), side, patch_size)
        for picture, rank in zip(prepared, ranks, strict=True)
    ]
    return [*prepared, fit_to_area(draw_layout(layout, width, height), side, patch_size)]


def fit_to_area(picture: Image.Image, side: int, multiple: int) -> Image.Image:
    """Scale and centre-crop to about side² pixels, both sides multiples of `multiple`."""
    while min(picture.size) >= 2 * side:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = math.sqrt(side**2 / (picture.width * picture.height))
    widths, heights = (
        [max(rounded(n * scale) // multiple, 1) * multiple for rounded in (round, math.floor)]
        for n in picture.size
    )
    sizes = sorted(product(widths, heights), key=lambda size: size[0] * size[1], reverse=True)
    width, height = next((s for s in sizes if s[0] * s[1] <= side**2), sizes[-1])
    if picture.width / width < picture.height / height:
        scaled = (width, round(picture.height / (picture.width / width)))
    else:
        scaled = (round(picture.width / (picture.height / height)), height)
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    picture = picture.resize(scaled, Image.Resampling.BICUBIC)
    return picture.crop((left, top, left + width, top + height))


def vision_copy(picture: Image.Image, side: int, multiple: int) -> Image.Image:
    """A prepared reference as the vision tower sees it: about side² pixels, aspect kept."""
    ratio = picture.width / picture.height
    width = math.sqrt(side**2 * ratio)
    columns, rows = (max(int(n / multiple), 1) for n in (width, width / ratio))
    return picture.resize((columns * multiple, rows * multiple), Image.Resampling.LANCZOS)


def fit_to_bounds(picture: Image.Image, least: int, most: int, multiple: int) -> Image.Image:
    """A picture to write about, as Qwen3-VL sees it: each side at its nearest multiple, unless
    that makes fewer than `least` or more than `most` pixels; then scaled to that bound."""
    width, height = picture.size
    columns, rows = (round(n / multiple) for n in (width, height))
    pixels = columns * rows * multiple**2
    if pixels > most:
        scale = math.sqrt(width * height / most)
        columns, rows = (max(math.floor(n / scale / multiple), 1) for n in (width, height))
    elif pixels < least:
        scale = math.sqrt(least / (width * height))
        columns, rows = (math.ceil(n * scale / multiple) for n in (width, height))
    size = (columns * multiple, rows * multiple)
    return picture if size == picture.size else picture.resize(size, Image.Resampling.BICUBIC)


def pixel_boxes(layout: Sequence[Box], width: int, height: int) -> list[PixelBox]:
    """(left, top, right, bottom) of each box, both corners inside the picture."""
    return [
        (
            min(max(round(x1 * width), 0), width - 1),
            min(max(round(y1 * height), 0), height - 1),
            min(max(round(x2 * width), 0), width - 1),
            min(max(round(y2 * height), 0), height - 1),
        )
        for x1, x2, y1, y2 in layout
    ]


def rank_by_area(boxes: Sequence[PixelBox]) -> list[int]:
    """Each box's rank, 0 for the largest; the first of equals counts as larger."""
    areas = [(right - left) * (bottom - top) for left, top, right, bottom in boxes]
    order = sorted(range(len(boxes)), key=lambda i: -areas[i])
    return [order.index(i) for i in range(len(boxes))]


def draw_layout(layout: Sequence[Box], width: int, height: int) -> Image.Image:
    """Coloured outlines on black, the largest first and thickest."""
    picture = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(picture)
    thickest = int(0.05 * math.sqrt(width * height))
    boxes = pixel_boxes(layout, width, height)
    for rank, box in sorted(zip(rank_by_area(boxes), boxes, strict=True)):
        line = max(thickest - rank * max(1, thickest // 5), 5)
        draw.rectangle(box, outline=LAYOUT_COLORS[rank], width=line)
    return picture


def _framed(picture: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    picture = picture.copy()
    line = int(0.04 * math.sqrt(picture.width * picture.height))
    if line:
        right, bottom = picture.width - 1, picture.height - 1
        ImageDraw.Draw(picture).rectangle((0, 0, right, bottom), outline=color, width=line)
    return picture
