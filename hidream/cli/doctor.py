"""`hidream doctor`: this machine and this installation, and what stands in the way."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import time
from typing import Any

from hidream import __version__
from hidream.cli import console
from hidream.cli.abilities import abilities
from hidream.cli.arguments import Parser, add_json
from hidream.errors import HidreamError

PACKAGES = ("torch", "transformers", "safetensors", "huggingface_hub", "numpy", "pillow")


def run(argv: list[str]) -> int:
    parser = Parser("doctor", "Look at this machine and installation.")
    add_json(parser)
    arguments = parser.parse(argv)
    found, problems = _look()
    if arguments.json:
        console.show({**found, "problems": problems})
    else:
        draws = found.pop("draws", [])
        for name, value in found.items():
            text = ", ".join(f"{k} {v}" for k, v in value.items()) if name == "packages" else value
            print(f"{name:<12} {text}")
        for row in draws:
            print(f"{'draws':<12} {_ability(row)}")
        for problem in problems:
            print(f"{'problem':<12} {problem}")
        if not problems:
            print("all is well")
    return 4 if problems else 0


def _look() -> tuple[dict[str, Any], list[str]]:
    import torch

    problems: list[str] = []
    found: dict[str, Any] = {
        "hidream": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "torchvision": "absent, as it should be",
        "devices": ", ".join(_devices(torch)),
        "cpu threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "cpu type": torch.backends.cpu.get_cpu_capability(),
        "bf16": _bf16(torch),
        "memory": _memory(),
        "disk": f"{console.size(shutil.disk_usage('.').free)} free here",
    }
    if importlib.util.find_spec("torchvision") is not None:
        found["torchvision"] = "installed"
        try:
            importlib.import_module("torchvision")
        except Exception as error:
            problems.append(
                f"torchvision does not import ({type(error).__name__}), which breaks other "
                "packages too: pip uninstall torchvision"
            )
    start = time.perf_counter()
    try:
        from hidream.pipelines import load

        pipe = load("o1-nano")
        found["o1-nano"] = f"loads in {time.perf_counter() - start:.1f} s"
        found["draws"] = abilities(pipe)
    except HidreamError as error:
        found["o1-nano"] = "does not load"
        problems.append(str(error))
    return found, problems


def _ability(row: dict[str, Any]) -> str:
    """One line of what can be drawn, or of why not."""
    what = f"{row['model']} at {row['size']}"
    needs = console.size(row["memory_bytes"])
    if row["cpu_bytes"]:
        needs += f" and {console.size(row['cpu_bytes'])} of CPU memory"
    if not row["fits"]:
        return f"not {what}: --memory {row['memory']} would need {needs}"
    took = console.duration(row["seconds"])
    return f"{what}: --memory {row['memory']}, {needs}, about {took} a picture ({row['from']})"


def _devices(torch: Any) -> list[str]:
    names = ["cpu"]
    for index in range(torch.cuda.device_count()):
        total = console.size(torch.cuda.get_device_properties(index).total_memory)
        names.append(f"cuda:{index} ({torch.cuda.get_device_name(index)}, {total})")
    return names + (["mps"] if torch.backends.mps.is_available() else [])


def _bf16(torch: Any) -> str:
    """Whether half precision has an instruction of its own here; it works in any case."""
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported():
        return "on the GPU"
    fast = [
        name
        for name, check in (
            ("AMX", "_is_amx_tile_supported"),
            ("AVX512-BF16", "_is_avx512_bf16_supported"),
        )
        if getattr(torch.cpu, check, lambda: False)()
    ]
    return f"fast on this CPU ({', '.join(fast)})" if fast else "slow on this CPU; fp32 is used"


def _memory() -> str:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return console.size(total)
    except (ValueError, OSError, AttributeError):
        return "unknown"
