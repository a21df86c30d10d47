"""Noise: the generator's known answers, normality, and one picture's noise wherever it is made."""

import hashlib
import math

import numpy as np
import pytest
import torch

from hidream.sampling import initial_noise, picture_noise, step_noise
from hidream.sampling.noise import MAX_SEED, philox4x32

# Known answers of Philox4x32-10, from the kat_vectors file of Random123.
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    words = philox4x32([np.array([word, word]) for word in counter], key)
    assert [tuple(row) for row in np.stack(words, axis=1)] == [expected, expected]


def test_box_muller_equals_the_library_functions():
    seed, stream, num_blocks = 2**40 + 7, 3, 5000
    zeros = np.zeros(num_blocks, np.uint64)
    counter = (np.arange(num_blocks), zeros, zeros + np.uint64(stream), zeros)
    w0, w1, w2, w3 = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
    radius_01, radius_23 = (np.sqrt(-2 * np.log((w + 0.5) / 2**32)) for w in (w0, w2))
    turn_01, turn_23 = (2 * math.pi * w / 2**32 for w in (w1, w3))
    pairs = (radius_01, turn_01), (radius_23, turn_23)
    expected = np.stack([r * f(a) for r, a in pairs for f in (np.cos, np.sin)], axis=1)
    noise = picture_noise(seed, stream, (num_blocks, 4)).numpy()
    np.testing.assert_allclose(noise, expected, rtol=1e-7, atol=1e-9)


def test_bits_are_the_same_on_every_machine():
    noise = picture_noise(7, 0, (3, 128, 128))
    assert hashlib.sha256(noise.numpy().tobytes()).hexdigest()[:16] == "3f006f57f64fd7e7"


def test_is_normal():
    noise = picture_noise(11, 0, (1_000_000,)).double()
    moments = torch.stack([(noise**k).mean() for k in (1, 2, 3, 4)])
    # Four standard errors of each moment.
    limits = 4e-3 * torch.tensor([1.0, 2.0, 15.0, 96.0], dtype=torch.float64).sqrt()
    assert ((moments - torch.tensor([0.0, 1.0, 0.0, 3.0])).abs() < limits).all()
    # Kolmogorov-Smirnov distance; 1.95 / sqrt(n) is its 0.1 % point.
    ordered = noise.sort().values
    cumulative = 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))
    steps = torch.arange(1, len(noise) + 1) / len(noise)
    assert (cumulative - steps).abs().max() < 1.95 / math.sqrt(len(noise))


def test_seeds_streams_and_neighbours_are_independent():
    size = (200_000,)
    rows = torch.stack(
        [
            picture_noise(seed, stream, size)
            for seed in (1, 2, 1 + 2**32)
            for stream in (0, 1, 2**32)
        ]
        + [picture_noise(1, 0, size).roll(shift) for shift in (1, 2, 4)]
    )
    correlation = rows.corrcoef() - torch.eye(len(rows))
    assert correlation.abs().max() < 5 / math.sqrt(200_000)


@pytest.mark.parametrize("seeds", [[5], [5, 9], [9, 5], [1, 9, 5, MAX_SEED], [MAX_SEED, 5, 5, 9]])
def test_a_picture_has_the_same_noise_in_every_batch(seeds):
    shape = (3, 8, 8)
    assert torch.equal(
        initial_noise(seeds, shape)[seeds.index(5)], picture_noise(5, stream=0, shape=shape)
    )
    assert torch.equal(
        step_noise(seeds, 2, shape)[seeds.index(5)], picture_noise(5, stream=3, shape=shape)
    )


def test_no_step_repeats_the_initial_noise():
    draws = [initial_noise([5], (64,))] + [step_noise([5], step, (64,)) for step in range(3)]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == len(draws)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 7])
def test_any_size_starts_alike(size):
    noise = picture_noise(3, 0, (size,))
    assert noise.dtype == torch.float32
    assert torch.equal(noise, picture_noise(3, 0, (100,))[:size])


def test_chunks_do_not_show():
    from hidream.sampling import noise as module

    size = 4 * module._CHUNK + 10
    whole = picture_noise(3, 0, (size,))
    assert torch.equal(whole[: size - 10], picture_noise(3, 0, (size - 10,)))
    assert not torch.equal(whole[:10], whole[-10:])


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1])
def test_refuses_seeds_out_of_range(seed):
    with pytest.raises(ValueError, match="seed"):
        picture_noise(seed, 0, (4,))
