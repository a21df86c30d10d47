"""Outpainting: margins that fit the patch, a canvas that holds the source as it is."""

import re

import numpy as np
import pytest

from hidream import registry
from hidream.errors import UsageError
from hidream.outpainting import GREY, check_expand, extend, fit_expand
from hidream.request import GenerateRequest, resolve, warnings_of
from tests import tiny

NANO = registry.find("o1-nano")


def ask(source, **fields):
    request = GenerateRequest(prompt="more", references=("a.png",), **fields)
    defaults = NANO.defaults_for(request.task)
    return request, resolve(request, defaults, NANO.patch_size, source_size=source)


@pytest.mark.parametrize(
    ("value", "margins"),
    [((1, 2, 3, 4), (1, 2, 3, 4)), ([0, 0, 0, 5], (0, 0, 0, 5)), (7, (7,) * 4)],
)
def test_margins(value, margins):
    assert check_expand(value) == margins


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ((1, 2), "is not four numbers"),
        ("64", "not a whole number"),
        ((1, 2, 3, -4), "expand=-4 is out of range"),
        ((1, 2, 3, 9999), "expand=9999 is out of range"),
        ((0, 0, 0, 0), "expand adds nothing"),
        ((0, 0, None, 4), "expand adds nothing"),
        ((0, 0, 0.5, 4), "expand=0.5 is not a whole number"),
        ((), "is not four numbers"),
    ],
)
def test_margins_that_are_none(value, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        check_expand(value)


@pytest.mark.parametrize(
    ("source", "asked", "fitted"),
    [
        ((100, 64), (0, 0, 20, 0), (0, 0, 28, 0)),  # 120 lies half way: up
        ((100, 64), (0, 0, 17, 0), (0, 0, 12, 0)),
        ((100, 64), (10, 0, 0, 0), (12, 0, 0, 0)),  # it grows on the left alone
        ((100, 64), (10, 0, 5, 0), (10, 0, 2, 0)),
        ((102, 64), (8, 0, 1, 0), (8, 0, 2, 0)),
        ((100, 64), (14, 0, 1, 0), (12, 0, 0, 0)),  # more than the right has is taken on the left
        ((100, 60), (0, 0, 12, 0), (0, 0, 12, 4)),  # a side that stays is filled up, never cut
        ((98, 60), (0, 0, 14, 0), (0, 0, 14, 4)),
        ((64, 64), (0, 3, 0, 0), (0, 16, 0, 0)),  # a side that grows still grows
        ((64, 64), (16, 0, 32, 16), (16, 0, 32, 16)),
    ],
)
def test_canvases_are_whole_patches(source, asked, fitted):
    if asked != fitted:
        words = ",".join(map(str, fitted))
        with pytest.raises(UsageError, match=f"is not a multiple of 16.*--expand {words},? or"):
            fit_expand(source, asked, 16)
    assert fit_expand(source, asked, 16, snap=True) == fitted
    assert fit_expand(source, fitted, 16) == fitted


def test_a_request_for_more_is_its_own_recipe():
    asked, request = ask((100, 64), expand=(0, 0, 20, 0), snap="nearest")
    assert (request.expand, request.width, request.height) == ((0, 0, 28, 0), 128, 64)
    assert request.keep_aspect is False
    (told,) = warnings_of(asked, request)
    assert "expand=(0, 0, 20, 0) is snapped to (0, 0, 28, 0)" in told
    again = GenerateRequest.from_dict(request.to_dict())
    assert again == request
    assert resolve(again, NANO.defaults, 16, source_size=(100, 64)) == request


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 64, "height": 64}, "with expand the picture is 80x64; 64x64 is asked for"),
        ({"width": 64}, "with expand the picture is 80x64"),
        ({"keep_aspect": True}, "expand and keep_aspect exclude each other"),
        ({"references": ()}, "there are 0 references"),
        ({"references": ("a.png", "b.png")}, "there are 2 references"),
        ({"init_image": "b.png"}, "1 references and an initial picture"),
    ],
)
def test_what_expand_excludes(fields, message):
    fields = {"references": ("a.png",), "expand": (16, 0, 0, 0), **fields}
    with pytest.raises(UsageError, match=re.escape(message)):
        resolve(GenerateRequest(prompt="a", **fields), NANO.defaults, 16, source_size=(64, 64))


def test_canvases_have_the_limits_of_all_pictures():
    with pytest.raises(UsageError, match="width=8256 is outside"):
        ask((64, 64), expand=(0, 0, 8192, 0))
    with pytest.raises(UsageError, match="million"):
        ask((4096, 4096), expand=(0, 0, 16, 0))


def test_the_canvas_holds_the_source():
    source, mask = tiny.picture(1, 20, 12), tiny.picture(2, 20, 12).convert("L")
    canvas, free = extend(source, (3, 1, 2, 5))
    assert canvas.size == free.size == (25, 18)
    inner = (3, 1, 23, 13)
    assert np.array_equal(np.array(canvas.crop(inner)), np.array(source))
    border = np.ones((18, 25), bool)
    border[1:13, 3:23] = False
    assert (np.array(canvas)[border] == GREY).all()
    assert np.array_equal(np.array(free) == 255, border)
    masked = extend(source, (3, 1, 2, 5), mask)[1]
    assert np.array_equal(np.array(masked.crop(inner)), np.array(mask))
    assert (np.array(masked)[border] == 255).all()
