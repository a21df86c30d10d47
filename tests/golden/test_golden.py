"""The same request gives the same picture as ever, within the level that rounding may move.

Red after a change that was meant to change pictures? `python -m tests.golden.make`, and look.
"""

import pytest
from PIL import Image

from hidream.pipelines import load
from tests import tiny
from tests.golden.make import FOLDER, draw, requests


@pytest.fixture(scope="module")
def pipe(tiny_folder):
    return load(tiny_folder, device="cpu")


@pytest.mark.parametrize("name", requests())
def test_picture(pipe, name):
    with Image.open(FOLDER / f"{name}.png") as stored:
        assert tiny.levels(draw(pipe, requests()[name]), stored) <= 1


def test_no_picture_is_left_over():
    assert {path.stem for path in FOLDER.glob("*.png")} == requests().keys()
