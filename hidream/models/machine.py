"""How much memory a device has, and whether what is asked of it is there."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hidream.errors import MemoryExceeded
from hidream.memory import POLICIES, Policy

_RUNTIME = {"cuda": 700_000_000}  # a GPU's context and workspaces; not arithmetic
_RUNTIME_ELSEWHERE = 400_000_000  # Python and torch themselves


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes on the device at the peak of a request, by what they are for; `cpu` beside it."""

    weights: int
    loras: int
    prefix: int
    activations: int
    runtime: int
    cpu: int

    @property
    def total(self) -> int:
        return self.weights + self.loras + self.prefix + self.activations + self.runtime


def runtime_bytes(device: str) -> int:
    return _RUNTIME.get(device, _RUNTIME_ELSEWHERE)


def check_room(
    policy: Policy, least: Callable[[Policy], int], *, beside: int, device: torch.device
) -> None:
    """MemoryExceeded where weights alone are more than there is room for; names what would fit.

    `least(policy)` is what a policy needs of the device; `beside` is what this one keeps of
    streamed blocks in CPU memory.
    """
    room = total_memory(torch.device("cpu"))
    if device.type == "cuda" and beside > room:
        raise MemoryExceeded(
            f"--memory {policy.name} keeps {beside / 1e9:.1f} GB in CPU memory; this machine has "
            f"{room / 1e9:.1f} GB.",
            "Use a policy that streams less, or int8.",
        )
    room = total_memory(device)
    if least(policy) <= room:
        return
    fitting = policy
    while fitting.smaller is not None and least(fitting) > room:
        fitting = POLICIES[fitting.smaller]
    needed, there, at_a_time = (f"{n / 1e9:.1f}" for n in (least(policy), room, least(fitting)))
    if least(fitting) > room:
        raise MemoryExceeded(
            f"--memory {policy.name} needs {needed} GB for weights alone; {device} has {there} GB.",
            "Use a smaller model.",
        )
    raise MemoryExceeded(
        f"--memory {policy.name} needs {needed} GB for weights alone; {device} has {there} GB.",
        f"Use --memory {fitting.name}, which needs {at_a_time} GB for weights.",
    )


def total_memory(device: torch.device) -> int:
    """Bytes that a device has: a GPU's own; else the machine's memory and swap."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    found = _meminfo()
    if "MemTotal" in found:
        return found["MemTotal"] + found.get("SwapTotal", 0)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory(device: torch.device) -> int:
    """Bytes of it that nobody uses."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _meminfo().get("MemAvailable") or total_memory(device)


def _meminfo() -> dict[str, int]:
    """Linux's account, in bytes; {} elsewhere."""
    found = {}
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                found[name] = int(value.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return {}
    return found
