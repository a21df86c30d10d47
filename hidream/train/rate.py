"""How fast this device multiplies matrices, and whether it does so in the recipe's precision."""

from __future__ import annotations

import platform
import time
from functools import cache

import torch

from hidream.train.config import Recipe

SIDES = (128, 256, 512, 1024, 2048, 4096, 8192)
LONG = 0.02  # seconds of a product that keeps a device busy
SECONDS = 0.3


@cache
def matrix_rate(device: str, precision: str) -> float:
    """Operations a second of products of square matrices in `precision`, on all of this process's
    threads: the fastest of 0.3 seconds' products, of the smallest side that takes 0.02 s.

    Measured once a process, as a run begins.
    """
    for side in SIDES:
        a, b = (torch.ones(side, side, device=device, dtype=getattr(torch, precision)),) * 2
        out = torch.empty_like(a)
        _seconds(a, b, out)  # the first is slower
        times = [_seconds(a, b, out)]
        if times[0] >= LONG:
            break
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        times.append(_seconds(a, b, out))
    return 2 * side**3 / min(times)


def _seconds(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> float:
    start = time.perf_counter()
    torch.mm(a, b, out=out)
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - start


def slow_precision(recipe: Recipe) -> str | None:
    """A line to warn with where the recipe's bf16 is emulated; None where all is well."""
    if recipe.device != "cpu" or recipe.precision != "bfloat16":
        return None
    has_products = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    if has_products or platform.machine() not in ("x86_64", "AMD64"):
        return None
    return (
        'precision = "bfloat16" is about ten times slower than float32 on this CPU, which has '
        'neither AMX nor AVX512-BF16: use precision="float32".'
    )
