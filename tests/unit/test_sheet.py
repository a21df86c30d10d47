"""Sheets of panels: whole patches, nothing overlaps, nothing is changed in silence."""

import json
import math
import re
from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image

from hidream import registry
from hidream.errors import UsageError
from hidream.request import GenerateRequest, resolve, warnings_of
from hidream.sheet import Sheet, blank, cut, default_columns, read_sheet, resolve_sheet

NANO, FULL = registry.find("o1-nano"), registry.find("o1")


def ask(spec=NANO, **fields):
    """A request and what it becomes."""
    request = GenerateRequest(prompt="a", **fields)
    return request, resolve(request, spec.defaults_for(request.task), spec.patch_size)


@pytest.mark.parametrize("number", [2, 3, 5, 6, 12, 16, 64])
@pytest.mark.parametrize("spec", [NANO, FULL], ids=["nano", "o1"])
def test_every_sheet_is_of_whole_patches_and_its_panels_lie_apart(number, spec):
    sheet = Sheet(number=number, columns=default_columns(number))
    _, request = ask(spec, sheet=sheet)
    sheet = request.sheet
    assert (request.width, request.height) == sheet.size
    assert len(sheet.boxes) == number
    drawn = np.zeros((request.height, request.width), int)
    for left, top, right, bottom in sheet.boxes:
        assert (right - left, bottom - top) == (sheet.width, sheet.height)
        assert left % spec.patch_size == top % spec.patch_size == 0
        drawn[top:bottom, left:right] += 1
    assert drawn.max() == 1
    assert drawn.sum() == number * sheet.width * sheet.height
    assert request.width % spec.patch_size == request.height % spec.patch_size == 0
    if spec is FULL:
        area = spec.defaults.width * spec.defaults.height
        assert 0.8 * area <= math.prod(sheet.size) <= area
        assert 1.6 < sheet.width / sheet.height < 2


@pytest.mark.parametrize(
    ("number", "columns"), [(2, 1), (3, 1), (4, 2), (5, 2), (6, 2), (9, 3), (12, 3), (16, 4)]
)
def test_default_columns(number, columns):
    assert default_columns(number) == columns


def test_columns_follow_the_shapes():
    assert default_columns(6, sheet_aspect=3) == 3
    assert default_columns(6, panel_aspect=0.5) == 3
    assert default_columns(4, sheet_aspect=8) == 4


def test_a_panel_size_decides_the_sheets():
    _, request = ask(sheet=Sheet(number=5, columns=2, width=48, height=32))
    assert (request.width, request.height) == (2 * 48 + 16, 3 * 32 + 2 * 16)
    assert request.sheet.boxes[4] == (0, 96, 48, 128)


def test_a_sheets_size_decides_the_panels():
    _, request = ask(sheet=Sheet(number=4, columns=2, gutter=0), width=128, height=64)
    assert (request.sheet.width, request.sheet.height) == (64, 32)
    assert request.sheet.is_covered
    _, request = ask(sheet=Sheet(number=3, columns=2, gutter=32), width=128, height=96)
    assert (request.sheet.width, request.sheet.height) == (48, 32)
    assert not replace(request.sheet, gutter=0).is_covered  # one cell is left over


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 128, "height": 128}, "width=128 does not part into 2 panels"),
        ({"width": 112, "height": 128}, "height=128 does not part into 2 panels"),
        ({"width": 16, "height": 16}, "the nearest is 48"),
        ({"sheet": {"gutter": 8}}, "gutter=8 is not a multiple of 16; the nearest are 0 and 16"),
        ({"sheet": {"width": 40, "height": 32}}, "of a panel, width=40 is not a multiple of 16"),
        (
            {"sheet": {"width": 48, "height": 32}, "width": 64, "height": 64},
            "the size is 64x64, but 4 panels of 48x32 need 112x80",
        ),
        ({"sheet": {"width": 6400, "height": 32}}, "width=12816 is outside 1 … 8192"),
        ({"sheet": {"width": 3200, "height": 3200}}, "million"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    sheet = {"number": 4, "columns": 2, **fields.pop("sheet", {})}
    with pytest.raises(UsageError, match=re.escape(message)):
        ask(sheet=sheet, **fields)


@pytest.mark.parametrize(
    ("fields", "sheet"),
    [
        ({"width": 128, "height": 128}, (64, 64, 16)),
        ({"width": 16, "height": 16}, (16, 16, 16)),
        ({"sheet": {"gutter": 9, "width": 55, "height": 1}}, (48, 16, 16)),
    ],
)
def test_snapping_is_said_and_then_stays(fields, sheet):
    fields = {**fields, "sheet": {"number": 4, "columns": 2, **fields.get("sheet", {})}}
    asked, request = ask(snap="nearest", **fields)
    found = request.sheet
    assert (found.width, found.height, found.gutter) == sheet
    assert any("snapped" in told for told in warnings_of(asked, request))
    again = resolve(request, NANO.defaults, NANO.patch_size)
    assert again == request
    assert warnings_of(request, again) == ()


def test_a_sheet_survives_json():
    _, request = ask(sheet=Sheet(number=6, columns=2))
    again = GenerateRequest.from_dict(json.loads(json.dumps(request.to_dict())))
    assert again == request
    assert resolve(again, NANO.defaults, NANO.patch_size) == request


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (6, "sheet=6 is no sheet"),
        ({"number": 6}, "sheet.columns is not given"),
        ({"columns": 6}, "sheet.number is not given"),
        ({"number": 6, "column": 2}, 'sheet has no "column"; did you mean "columns"'),
        ({"number": 1, "columns": 1}, "sheet.number=1 is out of range: 2 … 64"),
        ({"number": 65, "columns": 1}, "sheet.number=65"),
        ({"number": 6, "columns": 0}, "sheet.columns=0"),
        ({"number": 6, "columns": 7}, "sheet.columns=7 is more than its 6 panels"),
        ({"number": 6, "columns": 2.5}, "sheet.columns=2.5 is not a whole number"),
        ({"number": 6, "columns": 2, "gutter": -1}, "sheet.gutter=-1"),
        ({"number": 6, "columns": 2, "width": 0, "height": 4}, "sheet.width=0"),
        ({"number": 6, "columns": 2, "width": 16}, "width or its height alone"),
    ],
)
def test_sheets_that_are_none(value, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        read_sheet(value)


@pytest.mark.parametrize(
    "fields",
    [
        {"init_image": "a.png"},
        {"references": ("a.png",), "mask": "m.png"},
        {"references": ("a.png",), "expand": (16, 0, 0, 0)},
        {"width": 64},
        {"keep_aspect": True},
    ],
)
def test_what_a_sheet_excludes(fields):
    with pytest.raises(UsageError, match="sheet"):
        GenerateRequest(prompt="a", sheet=Sheet(number=4, columns=2), **fields)


def test_cutting_takes_each_panel_and_blank_frees_nothing_else():
    sheet = resolve_sheet(Sheet(number=3, columns=2, width=32, height=16), 16, native_area=0)
    white, mask = blank(sheet)
    assert white.size == mask.size == sheet.size == (80, 48)
    for index, box in enumerate(sheet.boxes):
        white.paste((index, 0, 0), box)
    assert [panel.getcolors() for panel in cut(white, sheet)] == [
        [(512, (index, 0, 0))] for index in range(3)
    ]
    free = np.array(mask) == 255
    assert np.array_equal(free, (np.array(white) != 255).any(-1))
    with pytest.raises(UsageError, match="the picture is 80x32, its sheet 80x48"):
        cut(white.crop((0, 0, 80, 32)), sheet)
    assert read_sheet(asdict(sheet)) == sheet
    assert isinstance(white, Image.Image)
