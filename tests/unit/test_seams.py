"""The seam check: a grid of patches is found, and pictures without one are left in peace."""

import numpy as np
import pytest
from PIL import Image

from hidream.errors import UsageError
from hidream.judges.seams import Seams, seams_of
from hidream.sampling import picture_noise
from tests import tiny


def grainy(width=160, height=96):
    """A gradient with fine grain: no grid."""
    grain = 6 * picture_noise(0, 0, (height, width, 3)).numpy()
    pixels = np.array(tiny.picture(0, width, height).convert("L"))[..., None] / 4 + 96 + grain
    return np.clip(pixels, 0, 255).astype(np.uint8)


def with_grid(pixels, patch, strength):
    """Each patch a little lighter or darker than the next."""
    rows, columns = np.indices(pixels.shape[:2]) // patch
    return (pixels.astype(int) + strength * ((rows + columns) % 2)[..., None]).clip(0, 255)


def both(pixels, patch):
    found = seams_of(Image.fromarray(pixels.astype(np.uint8)), patch)
    return found["x"], found["y"]


@pytest.mark.parametrize("patch", [16, 32])
def test_a_picture_without_a_grid(patch):
    for seams in both(grainy(), patch):
        assert 0.9 < seams.ratio < 1.1
        assert not seams.shows


@pytest.mark.parametrize("patch", [8, 16, 32])
def test_a_grid_shows(patch):
    for seams in both(with_grid(grainy(), patch, 24), patch):
        assert seams.ratio > 2
        assert seams.shows
    weak = [both(with_grid(grainy(), patch, strength), patch)[0].ratio for strength in (4, 8, 16)]
    assert weak == sorted(weak)


def test_another_grid_is_not_taken_for_ones_own():
    for seams in both(with_grid(grainy(), 16, 24)[5:, 7:], 16):
        assert not seams.shows
        assert seams.range[1] > 2


def test_the_axes_are_apart():
    bars = np.zeros((64, 64, 3)) + (np.arange(64) // 16 % 2 * 60)[None, :, None]
    x, y = both(bars, 16)
    assert (x.border, x.inside, x.shows) == (60, 0, True)
    assert (y.border, y.inside, y.ratio, y.shows) == (0, 0, 1, False)


def test_levels():
    ramp = np.repeat(np.arange(64)[None, :, None], 3, axis=2) * np.ones((20, 1, 1))
    x, y = both(ramp, 16)
    assert x == Seams(border=1, inside=1, offsets=(1, 1))
    assert y.ratio == 1


def test_pictures_without_a_border():
    assert both(grainy(16, 16), 16) == (None, None)
    x, y = both(grainy(17, 16), 16)
    assert x is not None
    assert y is None
    with pytest.raises(UsageError, match="patch=1 is less than 2"):
        both(grainy(), 1)
