"""How much memory a device has."""

from __future__ import annotations

import os

import torch


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
