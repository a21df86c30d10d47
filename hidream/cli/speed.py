"""How fast a device is, measured in a fraction of a second: products, small steps, copies."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache

import torch

LARGEST = {"cuda": 4096}  # side of a product that is timed, large enough for its best speed
LARGEST_ELSEWHERE = 1024


def flops_a_second(sides: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a product of about these sides."""
    largest = LARGEST.get(device.type, LARGEST_ELSEWHERE)
    rows, inner, columns = (min(side, largest) for side in sides)
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
    """Seconds of `work` undisturbed: the least of three times or more, within a tenth of a second.

    What else the machine does now may be over when a picture is drawn.
    """

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    work()
    times: list[float] = []
    begun = now()
    while len(times) < 3 or (now() - begun < 0.1 and len(times) < 1000):
        start = now()
        work()
        times.append(now() - start)
    return min(times)
