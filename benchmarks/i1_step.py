"""A step of our I1 against diffusers', same weights, on a CPU: `python -m benchmarks.i1_step`.

A small I1 (heads of 128, 128 + 128 tokens of text) of two widths draws a square and a picture of
half its area. Both networks take turns in every round; ratios are medians of the rounds' own.
Milliseconds are of the process's CPU time, on one thread, in which other work on the machine does
not count. `arithmetic` is the lead that we had if time went by the products of matrices alone,
attention aside. Memory is the resident set's highest point during steps, above what there was
before the model: weights, features and all that a step holds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hidream.bench.timing import machine
from hidream.models.i1.config import I1Config
from hidream.models.i1.model import I1, Features
from hidream.models.placement import empty_out

CONFIG = I1Config(
    num_layers=2,
    num_single_layers=4,
    num_heads=2,
    head_dim=128,
    t5_size=1024,
    llama_size=1024,
    rope_dims=(64, 32, 32),
    max_resolution=(64, 64),
    llama_layers=tuple(range(6)),
)
NUM_TEXT = 128  # of T5, and of Llama
WIDE = replace(CONFIG, num_heads=4)
SQUARE, HALF = (64, 64), (64, 32)  # latents: 1,024 and 512 patches
CASES = {
    "square_width_256": (CONFIG, SQUARE),
    "half_area_width_256": (CONFIG, HALF),
    "square_width_512": (WIDE, SQUARE),
    "half_area_width_512": (WIDE, HALF),
}
SIGMAS = torch.tensor([0.9, 0.5])
Step = Callable[[Tensor], Tensor]


def features(config: I1Config) -> Features:
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return Features(
        t5=noise(1, NUM_TEXT, config.t5_size),
        llama=noise(len(config.llama_layers), 1, NUM_TEXT, config.llama_size),
        pooled=noise(1, config.pooled_size),
    )


def diffusers_model(config: I1Config) -> Any:
    from diffusers import HiDreamImageTransformer2DModel

    torch.manual_seed(0)
    return HiDreamImageTransformer2DModel.from_config(config.to_dict()).eval()


def diffusers_step(model: Any, text: Features) -> Step:
    def step(x_t: Tensor) -> Tensor:
        timesteps = 1000 * SIGMAS[1:]
        return -model(x_t, timesteps, text.t5, text.llama, text.pooled, return_dict=False)[0]

    return step


def our_model(config: I1Config, weights: dict[str, Tensor]) -> I1:
    with torch.device("meta"):
        model = I1(config)
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).eval()


def our_step(model: I1, text: Features, size: tuple[int, int]) -> Step:
    prefix = model.prefill(text, height=size[0], width=size[1], sigmas=SIGMAS)
    return lambda x_t: model.velocity(x_t, SIGMAS[1], prefix)


def latents(size: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(1, CONFIG.in_channels, *size, generator=generator)


@torch.inference_mode()
def time_case(config: I1Config, size: tuple[int, int], rounds: int) -> dict[str, Any]:
    theirs = diffusers_model(config)
    text, x_t = features(config), latents(size)
    steps = {
        "ours": our_step(our_model(config, theirs.state_dict()), text, size),
        "diffusers": diffusers_step(theirs, text),
    }
    out, flops = {}, {}
    for name, step in steps.items():  # also the warm-up
        with FlopCounterMode(display=False) as counting:
            out[name] = step(x_t)
        flops[name] = counting.get_total_flops()
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        for name in sorted(steps, reverse=bool(number % 2)):
            start = time.process_time()
            steps[name](x_t)
            taken[name].append(time.process_time() - start)
    ratios = [b / a for a, b in zip(taken["ours"], taken["diffusers"], strict=True)]
    difference = (out["ours"] - out["diffusers"]).abs().max() / out["diffusers"].abs().max()
    return {
        "patches": size[0] * size[1] // config.patch_size**2,
        "step_ms": {name: round(1000 * median(times), 1) for name, times in taken.items()},
        "ours_faster": round(median(ratios), 3),
        "arithmetic": round(flops["diffusers"] / flops["ours"], 3),
        "rounds": [round(ratio, 3) for ratio in ratios],
        "difference_rel": float(difference),
    }


def memory(config: I1Config, size: tuple[int, int]) -> dict[str, Any]:
    """Megabytes of each, measured in a process of its own."""
    context = multiprocessing.get_context("fork")
    found = {}
    for name in ("ours", "diffusers"):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_measure, args=(name, config, size, theirs))
        process.start()
        found[name] = round(ours.recv() / 1e6, 1)
        process.join()
    return {"memory_mb": found, "memory_share": round(found["ours"] / found["diffusers"], 3)}


@torch.inference_mode()
def _measure(name: str, config: I1Config, size: tuple[int, int], answer: Any) -> None:
    torch.set_num_threads(1)
    before = _status("VmRSS")
    text, x_t = features(config), latents(size)
    step: Step
    if name == "ours":
        model = I1(config).requires_grad_(False).eval()
        model.init_weights()
        step = our_step(model, text, size)
        for module in model.prefill_modules.values():
            empty_out(module, torch.float32)
        del text
    else:
        step = diffusers_step(diffusers_model(config), text)
    Path("/proc/self/clear_refs").write_text("5")  # the highest point starts again from here
    for _ in range(2):
        step(x_t)
    answer.send(_status("VmHWM") - before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", default="benchmarks/results/i1_step_cpu.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = {name: memory(*case) for name, case in CASES.items()}
    for name, case in CASES.items():
        print(name, flush=True)
        cases[name] = time_case(*case, arguments.rounds) | cases[name]
    import diffusers

    result = {
        "machine": machine() | {"diffusers": diffusers.__version__},
        "config": asdict(CONFIG) | {"num_heads": "width / 128"},
        "text_tokens": [NUM_TEXT, NUM_TEXT],
        "cases": cases,
    }
    Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(cases, indent=1))


if __name__ == "__main__":
    main()
