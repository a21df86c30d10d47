"""Runs the cases: every way in turn, again and again, and ratios within the same round."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import hidream
from hidream.bench.cases import TEXT_TO_IMAGE, WITH_REFERENCES, Case, branches_of
from hidream.bench.peers import WAYS, Way
from hidream.models.o1.model import O1
from hidream.models.o1.tokens import Tokenizer

FIRST_STEP = """
import json, time
start = time.perf_counter()
import hidream.pipelines
imported = time.perf_counter()
pipe = hidream.pipelines.load({model!r}, device={device!r})
loaded = time.perf_counter()
times = []
pipe("a red cube", seed=1, num_inference_steps=2,
     on_step=lambda *a: times.append(time.perf_counter()))
print(json.dumps({{"import": imported - start, "load": loaded - imported,
                   "first_step": times[0] - loaded}}))
"""


@torch.inference_mode()
def time_case(
    model: O1, tokenizer: Tokenizer, case: Case, *, num_steps: int, rounds: int
) -> dict[str, Any]:
    """Milliseconds of a guided step and of a picture of `num_steps`, for every way.

    The ways take turns in every round, so that a busy machine slows them alike; figures are
    medians over rounds, ratios medians of the rounds' ratios. `arithmetic` is the lead that we had
    if time went by the products of matrices alone. `max_difference` is the largest difference of
    any way's clean patches from ours.
    """
    device = next(model.parameters()).device
    branches = [tokens.to(device) for tokens in branches_of(case, tokenizer, model.config)]
    generator = torch.Generator().manual_seed(0)
    shape = (1, branches[0].num_target, model.config.patch_dim)
    x_t = torch.randn(shape, generator=generator).to(device).expand(2, -1, -1)
    sigma = torch.tensor(0.7)
    ways: dict[str, Way] = {name: way(model) for name, way in WAYS.items()}
    clean: dict[str, Tensor] = {}
    flops: dict[str, int] = {}
    for name, way in ways.items():  # also the warm-up
        begin, _ = _flops(partial(way.begin, branches))
        step, clean[name] = _flops(partial(way.step, x_t, sigma))
        flops[name] = begin + num_steps * step
    begun: dict[str, list[float]] = {name: [] for name in ways}
    stepped: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in _turned(list(ways), number):
            begun[name].append(_seconds(partial(ways[name].begin, branches), device))
            stepped[name].append(_seconds(partial(ways[name].step, x_t, sigma), device))
    pictures = {
        name: [b + num_steps * s for b, s in zip(begun[name], stepped[name], strict=True)]
        for name in ways
    }
    others = [name for name in ways if name != "ours"]
    return {
        "case": case.name,
        "tokens": {
            "causal": [len(tokens.input_ids) for tokens in branches],
            "target": branches[0].num_target,
            "references": len(branches[0].references),
        },
        "step_ms": {name: round(1000 * median(stepped[name]), 2) for name in ways},
        "begin_ms": {name: round(1000 * median(begun[name]), 2) for name in ways},
        "picture_ms": {name: round(1000 * median(pictures[name]), 1) for name in ways},
        "ours_faster": {
            name: round(_ratio(pictures[name], pictures["ours"]), 3) for name in others
        },
        "arithmetic": {name: round(flops[name] / flops["ours"], 3) for name in others},
        "max_difference": {
            name: float((clean[name] - clean["ours"]).abs().max()) for name in others
        },
    }


def run(
    model: O1,
    tokenizer: Tokenizer,
    *,
    num_steps: int = 50,
    rounds: int = 5,
    cases: Sequence[Case] = (*TEXT_TO_IMAGE, *WITH_REFERENCES),
    on_progress: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Every case, and by task the geometric means of our lead over each other way."""
    rows = []
    for number, case in enumerate(cases, 1):
        on_progress(f"case {number}/{len(cases)}: {case.name}")
        rows.append(time_case(model, tokenizer, case, num_steps=num_steps, rounds=rounds))
    means = {figure: _means(rows, figure) for figure in ("ours_faster", "arithmetic")}
    return {"steps": num_steps, "rounds": rounds, "cases": rows} | means


def cold_start(model: str, device: str) -> dict[str, float]:
    """Seconds of a fresh process to import, to load, and from there to the first step's end."""
    code = FIRST_STEP.format(model=model, device=device)
    made = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600
    )
    return {name: round(value, 3) for name, value in json.loads(made.stdout).items()}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else name
    found = {
        "cpu": name,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hidream": hidream.__version__,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _means(rows: Sequence[dict[str, Any]], figure: str) -> dict[str, dict[str, float]]:
    """Geometric means over each task's cases, for every other way."""
    means: dict[str, dict[str, float]] = {}
    for task in sorted({row["case"].split("_")[0] for row in rows}):
        of_task = [row[figure] for row in rows if row["case"].startswith(task)]
        means[task] = {
            other: round(geometric_mean(row[other] for row in of_task), 3) for other in of_task[0]
        }
    return means


def _flops(work: Callable[[], Any]) -> tuple[int, Any]:
    """Floating-point operations of the products of matrices in `work`, and what it returns."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # not counted by itself
    counting = FlopCounterMode(display=False, custom_mapping={attention: _attention_flops})
    with counting:
        result = work()
    return counting.get_total_flops(), result


def _attention_flops(q: Sequence[int], k: Sequence[int], *_: object, **__: object) -> int:
    """Two products for queries and keys of these shapes, (..., tokens, head_dim)."""
    return 4 * prod(q) * k[-2]


def _turned(names: list[str], by: int) -> list[str]:
    by %= len(names)
    return names[by:] + names[:by]


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    return median(a / b for a, b in zip(slow, fast, strict=True))
