"""Noise: standard normal numbers that depend on a picture's seed and on nothing else.

A counter-based generator (Philox4x32-10: Salmon, Moraes, Dror and Shaw 2011, "Parallel random
numbers: as easy as 1, 2, 3") has no state: number i of stream k of a seed is a function of the
three. So a picture's noise is the same in any batch, order, process or thread. Its uniforms become
normal by Box and Muller (1958), in float64 with nothing but the operations that IEEE 754 rounds in
one way (+, *, /, sqrt): the bits are the same on every machine, which those of a mathematics
library's `log` and `cos` are not.

All of it runs on the CPU, about 30 million numbers a second on one core.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

MAX_SEED = 2**63 - 1

_CHUNK = 2**14  # blocks of four numbers at a time: what fits a core's cache
_LOW_32 = np.uint64(0xFFFFFFFF)


def initial_noise(seeds: Sequence[int], shape: Sequence[int]) -> Float[Tensor, " b *shape"]:
    """The noise that pictures start from, one of `shape` for each seed."""
    return torch.stack([picture_noise(seed, 0, shape) for seed in seeds])


def step_noise(seeds: Sequence[int], step: int, shape: Sequence[int]) -> Float[Tensor, " b *shape"]:
    """The fresh noise of step 0, 1, ... of a sampler, one of `shape` for each seed.

    Step k has stream k + 1: stream 0 is the noise that the pictures started from.
    """
    return torch.stack([picture_noise(seed, step + 1, shape) for seed in seeds])


def picture_noise(seed: int, stream: int, shape: Sequence[int]) -> Float[Tensor, "*shape"]:
    """Standard normal noise, fp32 on the CPU, filled in C order from a stream of a seed.

    `seed` is 0 ... 2**63 - 1 and `stream` 0 ... 2**64 - 1. A larger shape starts with the numbers
    of a smaller one.
    """
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed {seed} is not between 0 and {MAX_SEED}.")
    size = math.prod(shape)
    num_blocks = -(-size // 4)
    normals = np.empty((num_blocks, 4), np.float32)
    key = (seed & 0xFFFFFFFF, seed >> 32)
    stream_low, stream_high = np.array([stream & 0xFFFFFFFF, stream >> 32], np.uint64)
    for start in range(0, num_blocks, _CHUNK):
        block = np.arange(start, min(start + _CHUNK, num_blocks), dtype=np.uint64)
        counter = (block & _LOW_32, block >> np.uint64(32), stream_low, stream_high)
        words = philox4x32(counter, key)
        rows = normals[start : start + len(block)]
        rows[:, 0], rows[:, 1] = _box_muller(words[0], words[1])
        rows[:, 2], rows[:, 3] = _box_muller(words[2], words[3])
    return torch.from_numpy(normals.reshape(-1)[:size].reshape(tuple(shape)))


def uniform(seed: int, index: int) -> float:
    """Number `index` (0 ... 2**64 - 1) of a seed, even over [0, 1), a multiple of 2**-32."""
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed {seed} is not between 0 and {MAX_SEED}.")
    block = [np.array([word], np.uint64) for word in (index & 0xFFFFFFFF, index >> 32, 0, 0)]
    return float(philox4x32(block, (seed & 0xFFFFFFFF, seed >> 32))[0][0]) / 2**32


Words = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def philox4x32(counter: Sequence[np.ndarray | np.uint64], key: tuple[int, int]) -> Words:
    """Philox4x32-10: four random 32-bit words for each counter of four, keyed by two.

    Words are held in uint64 arrays, so that a product of two fits. Ten rounds of: multiply two
    words, spread the halves of the products over the others, and add Weyl's constants to the key.
    """
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    k0, k1 = key
    half = np.uint64(32)
    for _ in range(10):
        product0 = c0 * np.uint64(0xD2511F53)
        product2 = c2 * np.uint64(0xCD9E8D57)
        c0, c2 = (product2 >> half) ^ c1 ^ np.uint64(k0), (product0 >> half) ^ c3 ^ np.uint64(k1)
        c1, c3 = product2 & _LOW_32, product0 & _LOW_32
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _box_muller(word_r: np.ndarray, word_angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two normals from two 32-bit words: `sqrt(-2 log u)` times cosine and sine of a turn."""
    radius = np.sqrt(-2 * _log_of_uniform(word_r))
    cos, sin = _cos_sin_of_turn(word_angle)
    return radius * cos, radius * sin


def _log_of_uniform(word: np.ndarray) -> np.ndarray:
    """log u for u = (word + 0.5) / 2**32, within 1e-14: u = 2**e * m, log m by its atanh series."""
    m, e = np.frexp(word.astype(np.float64) + 0.5)
    low = m < 0.7071067811865476
    m = np.where(low, 2 * m, m)  # sqrt(1/2) <= m < sqrt(2)
    e = e - low - 32.0
    s = (m - 1) / (m + 1)
    series = _polynomial(s * s, [1 / k for k in range(1, 20, 2)])
    return e * 0.6931471805599453 + 2 * s * series


def _cos_sin_of_turn(word: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of word / 2**32 of a turn: Taylor within an eighth of it, then quarters."""
    quarter = (word + np.uint64(2**29)) >> np.uint64(30)
    rest = word.astype(np.float64) - quarter.astype(np.float64) * 2.0**30
    x = rest * (2 * math.pi / 2**32)  # -pi/4 <= x < pi/4
    xx = x * x
    cos = _polynomial(xx, [(-1) ** k / math.factorial(2 * k) for k in range(9)])
    sin = x * _polynomial(xx, [(-1) ** k / math.factorial(2 * k + 1) for k in range(9)])
    odd = (quarter & np.uint64(1)).astype(bool)
    # A quarter turn takes (cos, sin) to (-sin, cos).
    cos, sin = np.where(odd, -sin, cos), np.where(odd, cos, sin)
    sign = np.where(quarter & np.uint64(2), -1.0, 1.0)
    return sign * cos, sign * sin


def _polynomial(x: np.ndarray, coefficients: Sequence[float]) -> np.ndarray:
    """Sum of coefficients[k] * x**k, by Horner's rule."""
    total = np.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total *= x
        total += coefficient
    return total
