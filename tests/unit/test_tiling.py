"""Tiling: shifts that cancel, tiles whose weights are one, and a check for borders that show."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from hidream.errors import UsageError
from hidream.judges.seams import wrap_seams_of
from hidream.sampling import euler, initial_noise, linear_sigmas, picture_noise
from hidream.tiling import join, roll, seamless, split, step_shift, wrap

LATENTS = initial_noise([1, 2], (3, 8, 12))


@pytest.mark.parametrize("x", [LATENTS, LATENTS.numpy()])
def test_rolling_there_and_back(x):
    moved = roll(x, (2, 5))
    assert (moved[..., 2, 5] == x[..., 0, 0]).all()
    assert (roll(moved, (-2, -5)) == x).all()
    wrapped = wrap(x, 3)
    assert wrapped.shape[-2:] == (14, 18)
    assert (wrapped[..., 3:-3, 3:-3] == x).all()
    assert (wrapped[..., :3, 3:-3] == x[..., -3:, :]).all()
    assert (wrapped[..., 3:-3, -3:] == x[..., :3]).all()


def test_shifts_are_whole_patches_and_reach_everywhere():
    shifts = [step_shift(step, (64, 96)) for step in range(28)]
    assert shifts[0] == (0, 0)
    assert all(down % 2 == right % 2 == 0 for down, right in shifts)
    assert {down // 16 for down, _ in shifts} == set(range(4))
    assert {right // 16 for _, right in shifts} == set(range(6))
    assert len(set(shifts)) == 28
    for (down, right), (down_2, right_2) in pairwise(shifts):
        assert abs(down - down_2) >= 8 or abs(right - right_2) >= 8


def blind(x_t, sigma):
    """A field that draws a frame: its answer is another at the borders that it sees."""
    frame = torch.ones_like(x_t)
    frame[..., 1:-1, 1:-1] = 0
    return x_t + frame


def test_a_seamless_field_has_no_border_of_its_own():
    sigmas = linear_sigmas(12)
    x_t = torch.zeros(1, 1, 32, 32)
    framed = euler(blind, x_t, sigmas)[0, 0]
    spread = euler(seamless(blind, sigmas), x_t, sigmas)[0, 0]
    inside = framed[16, 16]
    assert (framed[0] - inside).abs().min() > 0.9 * (framed - inside).abs().max()
    assert (spread[0] - inside).abs().mean() < 0.3 * (framed[0] - inside).abs().mean()

    def plain(x_t, sigma):
        return torch.sin(3 * x_t) + sigma

    moved = euler(seamless(plain, sigmas), LATENTS, sigmas)
    torch.testing.assert_close(moved, euler(plain, LATENTS, sigmas), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "tile", "overlap", "multiple"),
    [
        ((256, 384), 128, 16, 16),
        ((144, 128), 128, 32, 16),
        ((100, 47), 16, 5, 1),
        ((96, 96), 32, 0, 2),
        ((10, 64), 32, 30, 2),
        ((8, 8), 32, 4, 2),
    ],
)
def test_tiles_cover_overlap_and_weigh_one(size, tile, overlap, multiple):
    tiles = split(size, tile, overlap, multiple)
    total = np.zeros(size)
    for piece in tiles:
        part = piece.of(total)
        assert part.shape == piece.weight.shape == tuple(min(tile, side) for side in size)
        assert piece.weight.min() > 0
        part += piece.weight
        assert piece.rows.start % multiple == piece.columns.start % multiple == 0
    np.testing.assert_allclose(total, 1, rtol=0, atol=1e-12)
    for axis in ("rows", "columns"):
        spans = sorted({(getattr(p, axis).start, getattr(p, axis).stop) for p in tiles})
        for (_, stop), (start, _) in pairwise(spans):
            assert stop - start >= overlap


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_picture_in_pieces_is_itself_again_to_the_bit(dtype):
    whole = picture_noise(3, 0, (3, 100, 64)).to(dtype)
    tiles = split((100, 64), 32, 12)
    assert torch.equal(join([tile.of(whole) for tile in tiles], tiles, (100, 64)), whole)
    if dtype == torch.float32:
        array = whole.numpy()
        again = join([tile.of(array) for tile in tiles], tiles, (100, 64))
        assert (again == array).all()
        assert again.dtype == array.dtype


def test_where_pieces_differ_they_are_weighed():
    tiles = split((8, 48), 32, 16)
    joined = join([np.full((8, 32), value) for value in (0.0, 1.0)], tiles, (8, 48))
    assert (joined[:, :16] == 0).all()
    assert (joined[:, 32:] == 1).all()
    np.testing.assert_allclose(joined[0, 16:32], (np.arange(16) + 0.5) / 16)
    np.testing.assert_allclose(sum_of(tiles, (0.0, 1.0), (8, 48)), joined)


def sum_of(tiles, values, size):
    total = np.zeros(size)
    for tile, value in zip(tiles, values, strict=True):
        part = tile.of(total)
        part += value * tile.weight
    return total


def test_tiles_that_cannot_be_are_refused():
    with pytest.raises(UsageError, match="overlap=32 is not below tile=32"):
        split((64, 64), 32, 32)
    with pytest.raises(UsageError, match="h=65 is not a multiple of 16"):
        split((65, 64), 32, 16, 16)


# The check


def waves(width, height, turns):
    """A grainy pattern of so many turns across and down: whole ones tile."""
    y, x = np.indices((height, width))
    waves = np.sin(2 * np.pi * turns * x / width) + np.cos(2 * np.pi * turns * y / height)
    grain = picture_noise(0, 0, (height, width, 3)).numpy()
    return Image.fromarray((128 + 40 * waves[..., None] + 3 * grain).clip(0, 255).astype(np.uint8))


def test_a_texture_tiles_and_a_picture_does_not():
    for seams in wrap_seams_of(waves(128, 96, 3)).values():
        assert 0.5 < seams.ratio < 1.5
        assert not seams.shows
    for seams in wrap_seams_of(waves(128, 96, 3).crop((0, 0, 118, 80))).values():
        assert seams.ratio > 3
        assert seams.shows
    assert wrap_seams_of(waves(128, 19, 1))["y"] is None
