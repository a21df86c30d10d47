"""Devices and dtypes by name, and what is said when one is full."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from hidream.errors import MemoryExceeded, UsageError
from hidream.memory import Policy
from hidream.registry import nearest

DTYPES: Mapping[str, torch.dtype] = {
    **dict.fromkeys(("fp32", "float32"), torch.float32),
    **dict.fromkeys(("bf16", "bfloat16"), torch.bfloat16),
    **dict.fromkeys(("fp16", "float16"), torch.float16),
}


def find_device(name: str) -> torch.device:
    """The device of this name, "auto" for the best there is. UsageError if it is not here."""
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if name == "auto":
        return torch.device(next(n for n in ("cuda", "mps", "cpu") if available[n]))
    kind = name.split(":")[0]
    if kind not in available:
        raise UsageError(f'unknown device "{name}"; {nearest(name, ["auto", *available])}')
    if not available[kind]:
        raise UsageError(f'this machine has no device "{name}".', "Use --device auto.")
    return torch.device(name)


def find_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype of this name; None is fp32 on a CPU, bf16 elsewhere. UsageError if unusable."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UsageError(f'unknown dtype "{dtype}"; {nearest(dtype, DTYPES)}')
    if DTYPES[dtype] is torch.float16 and device.type == "cpu":
        raise UsageError("fp16 has no fast path on a CPU.", "Use fp32 or bf16.")
    return DTYPES[dtype]


@contextmanager
def told_when_full(
    device: torch.device, policy: Policy, what: str, remedy: str | None = None
) -> Iterator[None]:
    """Turn a failed allocation into MemoryExceeded, with `remedy`; by default a smaller request
    or the next smaller policy."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error).lower()
        full = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not full and "allocate memory" not in text and "out of memory" not in text:
            raise
        if remedy is None:
            smaller = f", or use --memory {policy.smaller}" if policy.smaller else ""
            remedy = f"Ask for a smaller size or fewer pictures{smaller}."
        raise MemoryExceeded(
            f"{what} do not fit the memory of {device} under --memory {policy.name}.", remedy
        ) from error
