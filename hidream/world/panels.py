"""Panels: scenes side by side in one picture, as `hidream storyboard` parts it."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from hidream.sheet import Sheet
from hidream.world.render import draw
from hidream.world.scene import Scene


def panel_sheet(number: int, columns: int, width: int, height: int) -> Sheet:
    """The sheet of `number` panels, up to three to a row or column, on a picture of that size.

    Gutters are an eighth of the shorter side: on a square, with two panels to a side or three, all
    measures then are whole sixteenths of it.
    """
    gutter = 2 * (min(width, height) // 16)
    rows = -(-number // columns)
    return Sheet(
        number=number,
        columns=columns,
        gutter=gutter,
        width=(width - (columns - 1) * gutter) // columns,
        height=(height - (rows - 1) * gutter) // rows,
    )


def draw_panels(scenes: Sequence[Scene], columns: int, width: int, height: int) -> Image.Image:
    """The scenes in their panels (RGB); what lies between is white."""
    sheet = panel_sheet(len(scenes), columns, width, height)
    picture = Image.new("RGB", (width, height), "white")
    for scene, (left, top, right, bottom) in zip(scenes, sheet.boxes, strict=True):
        picture.paste(draw(scene, right - left, bottom - top), (left, top))
    return picture


def cut_panels(picture: Image.Image, number: int, columns: int) -> list[Image.Image]:
    """The panels of a picture, in their order."""
    return [picture.crop(box) for box in panel_sheet(number, columns, *picture.size).boxes]
