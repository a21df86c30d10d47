"""What a person would ask a model for, to get a sample's picture."""

from __future__ import annotations

from PIL import Image

from hidream.request import GenerateRequest
from hidream.world.panels import panel_sheet
from hidream.world.sample import Sample

SIDE = 128  # pixels, of the pictures that go in
SHEET_SIDE = 256  # and of a storyboard


def request_of(
    item: Sample, seed: int, *, side: int = SIDE, sheet_side: int = SHEET_SIDE
) -> GenerateRequest:
    """The prompt, the pictures that go with it, squares of `side` pixels, and their boxes; for a
    storyboard, the sheet of `sheet_side` pixels. The picture's own size is left to the model."""
    if item.panels:
        sheet = panel_sheet(len(item.panels), item.columns, sheet_side, sheet_side)
        return GenerateRequest(prompt=item.prompt, sheet=sheet, seed=seed)
    pictures = item.reference_pictures(side, side) if item.task != "text_to_image" else ()
    references = tuple(Image.fromarray(picture) for picture in pictures)
    return GenerateRequest(
        prompt=item.prompt, references=references, layout=item.layout or None, seed=seed
    )
