"""What `--preview-every 1` costs: `python benchmarks/previews.py OUT.json [SIDE:STEPS:PAIRS …]`.

o1-nano draws each picture of a pair with a preview after every step and without any, in turn
first, through the CLI's own `Previews` and up to the finished file. OUT holds, for each size, the
median milliseconds of a step without previews and how much longer pictures with them took: the
median over the pairs, and its quartiles. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

import hidream
from hidream.cli.console import Progress
from hidream.cli.previews import Previews
from hidream.cli.recording import Inputs, note_of
from hidream.pictures import write_picture
from hidream.request import GenerateRequest

CASES = ("128:25:20", "256:10:20")


def seconds(pipe: hidream.Pipeline, request: GenerateRequest, every: int | None) -> float:
    """The time of one picture, files and all."""
    arguments = argparse.Namespace(preview_every=every, overwrite=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.png"
        start = time.perf_counter()
        with Previews(arguments) as previews:
            note = note_of(request, 0, pipe, "0" * 64, Inputs())
            on_step = previews.on_step(Progress(1), [path], lambda: [note])
            output = pipe(request, on_step=on_step)
            write_picture(output.images[0], path, note)
        return time.perf_counter() - start


def measure(pipe: hidream.Pipeline, side: int, steps: int, pairs: int) -> dict[str, float]:
    request = GenerateRequest(
        prompt="three red cubes left of a blue sphere",
        width=side,
        height=side,
        num_inference_steps=steps,
        seed=0,
    )
    for every in (1, None):
        seconds(pipe, request, every)  # warm
    without, longer = [], []
    for pair in range(pairs):
        times = {every: seconds(pipe, request, every) for every in ((1, None), (None, 1))[pair % 2]}
        without.append(times[None])
        longer.append(100 * (times[1] / times[None] - 1))
    low, middle, high = statistics.quantiles(longer, n=4)
    step_ms = 1000 * statistics.median(without) / steps
    found = {"step_ms": step_ms, "percent_longer": middle, "low": low, "high": high}
    return {name: round(value, 2) for name, value in found.items()}


def main() -> None:
    pipe = hidream.load("o1-nano", device="cpu")
    rows = []
    for case in sys.argv[2:] or CASES:
        side, steps, pairs = map(int, case.split(":"))
        row = measure(pipe, side, steps, pairs)
        rows.append({"side": side, "steps": steps, "pairs": pairs, **row})
    found = {"model": "o1-nano", "threads": torch.get_num_threads(), "torch": torch.__version__}
    Path(sys.argv[1]).write_text(json.dumps({**found, "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
