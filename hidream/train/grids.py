"""Pictures while it trains: the same prompts from the averaged weights, as one PNG a time."""

from __future__ import annotations

from PIL import Image

PROMPTS = (
    "a red cube",
    "a blue sphere",
    "a yellow star",
    "a green tree",
    "a white house on grass",
    "an orange fish",
    "a red cube left of a blue sphere",
    "a purple heart above a yellow cylinder",
    "a green cone to the right of a pink star",
    "a black car below a white moon",
    "two red spheres",
    "three yellow cubes",
    "four blue stars",
    "a large green cube and a small red cone",
    "a brown mug at night",
    'a sign that says "HELLO"',
)
COLUMNS = 4
GAP = 4


def montage(pictures: list[Image.Image], size: int) -> Image.Image:
    """Square pictures in rows of four, on grey."""
    rows = -(-len(pictures) // COLUMNS)
    width, height = (count * (size + GAP) + GAP for count in (COLUMNS, rows))
    sheet = Image.new("RGB", (width, height), (128, 128, 128))
    for i, picture in enumerate(pictures):
        row, column = divmod(i, COLUMNS)
        sheet.paste(picture, (GAP + column * (size + GAP), GAP + row * (size + GAP)))
    return sheet
