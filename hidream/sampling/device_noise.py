"""The numbers of `sampling.noise`, made where they are needed: for SDEs, which ask for many.

A batch of 32 pictures of 256x256 takes 6 million normal numbers a step, a fifth of a second of a
CPU's core. Here the same counter-based generator runs as tensor operations, for a whole batch at
once, with the same integers and the same IEEE 754 operations in the same order (one kernel each, so
that nothing is fused): the bits are those of `sampling.noise`.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hidream.sampling.noise import MAX_SEED, picture_noise

_LOW_32 = 0xFFFFFFFF


def batch_noise(
    seeds: Sequence[int], stream: int, shape: Sequence[int], device: torch.device | str = "cpu"
) -> Float[Tensor, " b *shape"]:
    """`picture_noise(seed, stream, shape)` for each seed, in fp32 on `device`.

    A CUDA device makes them itself; what else there is gets them from the CPU (MPS has no fp64).
    """
    if torch.device(device).type == "cuda":
        return philox_noise(seeds, stream, shape, device)
    rows = [picture_noise(seed, stream, shape) for seed in seeds]
    return torch.stack(rows).to(device) if rows else torch.empty((0, *shape), device=device)


def philox_noise(
    seeds: Sequence[int], stream: int, shape: Sequence[int], device: torch.device | str
) -> Float[Tensor, " b *shape"]:
    """`batch_noise` as tensor operations, on any device that has fp64."""
    if not all(0 <= seed <= MAX_SEED for seed in seeds):
        raise ValueError(f"not every seed is between 0 and {MAX_SEED}.")
    size = math.prod(shape)
    keys = torch.tensor(list(seeds), dtype=torch.int64, device=device)[:, None]
    block = torch.arange(-(-size // 4), dtype=torch.int64, device=device)[None]
    low, high = (torch.full_like(block, (stream >> by) & _LOW_32) for by in (0, 32))
    words = _philox((block & _LOW_32, block >> 32, low, high), keys & _LOW_32, keys >> 32)
    pairs = [*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3])]
    normals = torch.stack([column.float() for column in pairs], -1)  # (b, blocks, 4)
    return normals.flatten(1)[:, :size].reshape(len(keys), *shape)


def _philox(counter: Sequence[Tensor], k0: Tensor, k1: Tensor) -> list[Tensor]:
    """`noise.philox4x32` in int64: a product's sign bit is one of its 64, cut off by the mask."""
    c0, c1, c2, c3 = counter
    for _ in range(10):
        product0, product2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = ((product2 >> 32) & _LOW_32) ^ c1 ^ k0, ((product0 >> 32) & _LOW_32) ^ c3 ^ k1
        c1, c3 = product2 & _LOW_32, product0 & _LOW_32
        k0, k1 = (k0 + 0x9E3779B9) & _LOW_32, (k1 + 0xBB67AE85) & _LOW_32
    return [word.expand(torch.broadcast_shapes(c0.shape, c1.shape)) for word in (c0, c1, c2, c3)]


def _box_muller(word_r: Tensor, word_angle: Tensor) -> tuple[Tensor, Tensor]:
    radius = (_log_of_uniform(word_r) * -2).sqrt()
    cos, sin = _cos_sin_of_turn(word_angle)
    return radius * cos, radius * sin


def _log_of_uniform(word: Tensor) -> Tensor:
    m, e = torch.frexp(word.double() + 0.5)
    low = m < 0.7071067811865476
    m = torch.where(low, m * 2, m)
    s = (m - 1) / (m + 1)
    series = _polynomial(s * s, [1 / k for k in range(1, 20, 2)])
    return (e - low.to(e.dtype) - 32).double() * 0.6931471805599453 + s * 2 * series


def _cos_sin_of_turn(word: Tensor) -> tuple[Tensor, Tensor]:
    quarter = (word + 2**29) >> 30
    x = (word.double() - quarter.double() * 2.0**30) * (2 * math.pi / 2**32)
    xx = x * x
    cos = _polynomial(xx, [(-1) ** k / math.factorial(2 * k) for k in range(9)])
    sin = x * _polynomial(xx, [(-1) ** k / math.factorial(2 * k + 1) for k in range(9)])
    odd = (quarter & 1).bool()
    cos, sin = torch.where(odd, -sin, cos), torch.where(odd, cos, sin)
    sign = torch.where((quarter & 2).bool(), -1.0, 1.0).double()
    return sign * cos, sign * sin


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    total = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total.mul_(x).add_(coefficient)
    return total
