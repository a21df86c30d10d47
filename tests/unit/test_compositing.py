"""Compositing: where the subject comes to lie, and how its edge is masked."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from hidream.compositing import composite, edge_mask
from hidream.errors import InputError, UsageError

RED, BLUE, GREEN = (200, 20, 30), (20, 30, 200), (10, 180, 40)


def source():
    """A red square of 20 pixels on blue, and its mask."""
    picture, mask = Image.new("RGB", (60, 40), BLUE), Image.new("L", (60, 40), 0)
    for image, colour in ((picture, RED), (mask, 255)):
        ImageDraw.Draw(image).rectangle((30, 10, 49, 29), fill=colour)
    return picture, mask


BACKGROUND = Image.new("RGB", (100, 80), GREEN)


def test_the_subject_lies_where_it_is_placed_and_the_rest_is_the_background():
    made = composite(*source(), BACKGROUND, center=(0.25, 0.5), band=4)
    pixels = np.asarray(made.picture)
    expected = np.zeros((80, 100), bool)
    expected[30:50, 15:35] = True
    assert ((pixels == RED).all(-1) == expected).all()
    assert ((pixels == GREEN).all(-1) == ~expected).all()
    assert (np.asarray(made.subject) == 255 * expected).all()
    assert made.edge.size == BACKGROUND.size


def test_scaling_leaves_no_fringe_of_the_old_background():
    picture, mask = source()
    made = composite(picture, mask, BACKGROUND, scale=1.7)
    assert made.subject.getbbox() == (33, 23, 67, 57)
    assert (np.asarray(made.picture)[..., 2] <= 41).all()
    small = composite(picture, mask, BACKGROUND, scale=0.5)
    assert small.subject.getbbox() == (45, 35, 55, 45)


def test_what_leaves_the_background_is_cut_off():
    made = composite(*source(), BACKGROUND, center=(0.0, 1.0))
    assert made.subject.getbbox() == (0, 70, 10, 80)


def test_the_edge_is_white_on_the_outline_and_fades_over_the_band():
    mask = Image.new("L", (60, 9), 0)
    mask.paste(255, (30, 0, 60, 9))  # the outline lies between columns 29 and 30
    edge = np.asarray(edge_mask(mask, 8)).astype(int)
    assert (edge == edge[0]).all()  # none at the picture's own borders
    row = edge[0]
    assert row[29] == row[30] == 255
    assert (np.diff(row[:30]) >= 0).all()
    assert (np.diff(row[30:]) <= 0).all()
    assert (row[:22] == 0).all()
    assert (row[38:] == 0).all()
    assert row[22] > 0
    assert row[37] > 0


def test_a_subject_thinner_than_the_band_is_all_edge():
    mask = Image.new("L", (60, 60), 0)
    mask.paste(255, (30, 10, 32, 50))
    edge = np.asarray(edge_mask(mask, 16))
    assert edge[30, 31] == 255
    assert edge[30, 5] == edge[30, 55] == 0


@pytest.mark.parametrize(
    ("change", "error", "problem"),
    [
        ({"mask": Image.new("L", (40, 60))}, InputError, "mask is 40x60, but its picture is 60x40"),
        ({"mask": Image.new("L", (60, 40))}, InputError, "mask is all black"),
        ({"center": (2.0, 0.5)}, InputError, "outside the background"),
        ({"scale": 0.01}, UsageError, "makes the subject 0x0 pixels"),
        ({"scale": 1000.0}, UsageError, "makes the subject 20000x20000 pixels"),
    ],
)
def test_what_cannot_be_placed_is_refused(change, error, problem):
    picture, mask = source()
    with pytest.raises(error, match=problem):
        composite(picture, change.pop("mask", mask), BACKGROUND, **change)
