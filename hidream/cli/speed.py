"""How fast a device is, measured in a fraction of a second: products, small steps, copies."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache

import torch

SIDE = 2048  # of the largest product that is timed


def flops_a_second(sides: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a product of about these sides."""
    rows, inner, columns = (min(side, SIDE) for side in sides)
    return _flops_a_second(rows, inner, columns, device, dtype)


@lru_cache(maxsize=32)
def _flops_a_second(
    rows: int, inner: int, columns: int, device: torch.device, dtype: torch.dtype
) -> float:
    left = torch.ones(rows, inner, device=device, dtype=dtype)
    right = torch.ones(inner, columns, device=device, dtype=dtype)
    return 2.0 * rows * inner * columns / _seconds(lambda: left @ right, device)


@lru_cache(maxsize=32)
def seconds_a_layer(device: torch.device, dtype: torch.dtype) -> float:
    """What a decoder layer takes whatever its size: one so small that only starting it counts."""
    from hidream.models.o1.config import O1_TINY
    from hidream.models.o1.decoder import Block
    from hidream.nn.attention import attention
    from hidream.nn.rope import cos_sin

    text = O1_TINY.text
    block = Block(text).to(device, dtype).requires_grad_(False)
    hidden = torch.ones(4, text.hidden_size, device=device, dtype=dtype)
    rope = cos_sin(torch.zeros(4, text.head_dim // 2, device=device))

    def read(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q[None], k[None], v[None])[0]

    with torch.inference_mode():
        return _seconds(lambda: block(hidden, rope, read), device)


@lru_cache(maxsize=32)
def bytes_a_second(device: torch.device, dtype: torch.dtype) -> float:
    """Bytes of weights (bf16 in CPU memory) that come to the device, as `dtype`, in a second.

    What a disk adds where the file is not in memory is not in it.
    """
    weights = torch.ones(16 * 2**20, dtype=torch.bfloat16)
    weights = weights.pin_memory() if device.type == "cuda" else weights
    seconds = _seconds(lambda: weights.to(device, dtype, non_blocking=True, copy=True), device)
    return len(weights) * dtype.itemsize / seconds


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of `work`, the mean of as many times as take a twentieth of a second."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    work()
    start, count = now(), 0
    while count < 1 or (now() - start < 0.05 and count < 1000):
        work()
        count += 1
    return (now() - start) / count
