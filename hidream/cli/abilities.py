"""What this machine can draw: models, sizes, the memory policy for each, and how fast."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

from hidream.cli.estimate import estimate
from hidream.memory import POLICIES
from hidream.registry import SPECS
from hidream.request import GenerateRequest, resolve

if TYPE_CHECKING:
    from hidream.pipelines import Pipeline

PROMPT = "a red cube left of a blue sphere"
# Of published models: squares.
SIZES = {
    **dict.fromkeys(("o1", "o1-dev", "o1-dev-2604"), (1024, 2048)),
    **dict.fromkeys(("i1-full", "i1-dev", "i1-fast", "e1-1"), (1024,)),
    "e1-full": (768,),
}
TIMED_STEPS = 6


def abilities(pipe: Pipeline) -> list[dict[str, Any]]:
    """For each model and size the first policy that fits and changes no pixel, and seconds.

    `pipe`, a small model, is timed at its steps. For the published ones the seconds are their
    operations at the speed that a matrix product of their shape has here.
    """
    rows = [_timed(pipe)]
    for name, sides in SIZES.items():
        spec = SPECS[name]
        for side in sides:
            request = resolve(
                GenerateRequest(prompt=PROMPT, width=side, height=side, seed=0),
                spec.defaults,
                spec.patch_size,
            )
            found = estimate(request, None, spec, device=str(pipe.device))
            policies = [row for row in found["policies"] if POLICIES[row["name"]].exact]
            best = next((row for row in policies if row["fits"]), None)
            least = best or min(policies, key=lambda row: row["memory_bytes"])
            rows.append(
                {
                    "model": name,
                    "size": f"{side}x{side}",
                    "memory": least["name"],
                    "fits": best is not None,
                    "memory_bytes": least["memory_bytes"],
                    "cpu_bytes": least["cpu_bytes"],
                    "seconds": least["seconds"],
                    "from": "the speed of a matrix product",
                }
            )
    return rows


def _timed(pipe: Pipeline) -> dict[str, Any]:
    """A picture's seconds from a few of its steps; the first one also reads the prompt."""
    spec, times = pipe.spec, [time.perf_counter()]
    asked = GenerateRequest(prompt=PROMPT, seed=0)
    whole = resolve(asked, spec.defaults, spec.patch_size)
    few = replace(asked, num_inference_steps=TIMED_STEPS)
    output = pipe(few, on_step=lambda *_: times.append(time.perf_counter()))
    step = median(b - a for a, b in pairwise(times[1:]))
    before = max(0.0, output.timings["total"] - TIMED_STEPS * step)
    found = estimate(whole, None, spec, device=str(pipe.device))
    return {
        "model": spec.name,
        "size": f"{whole.width}x{whole.height}",
        "memory": "auto",
        "fits": True,
        "memory_bytes": found["memory_bytes"],
        "cpu_bytes": 0,
        "seconds": round(before + (whole.num_inference_steps or 1) * step, 3),
        "step_seconds": round(step, 5),
        "from": f"{TIMED_STEPS} steps",
    }
