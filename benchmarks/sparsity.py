"""What sparse attention costs and saves, on one CPU thread: `python -m benchmarks.sparsity PART`.

Parts: `attention` (one layer, random tensors, 1k, 4k and 16k patches), `i1` (a whole step of a
random I1 of width 256) and `nano` (steps of the shipped o1-nano, whose attention has learnt what
to look at). Each adds to the same file. Milliseconds are the process's CPU time; dense and sparse
take turns in every round, and `faster` is the median of the rounds' ratios. Errors are
‖sparse − dense‖ / ‖dense‖ for the same input. `skipped` is the share of the blocks of keys that
the picture's blocks of queries leave out. Random tensors have no structure to choose by: their
errors are the worst case.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.i1_step import CONFIG
from hidream.bench.timing import machine
from hidream.models.i1.model import I1, Features
from hidream.models.o1 import model as o1_model
from hidream.models.o1.model import O1, Prefix
from hidream.models.o1.patches import patchify
from hidream.models.o1.tokens import encode
from hidream.nn.attention import attention
from hidream.nn.sparse import Blocks
from hidream.pipelines import load
from hidream.sampling import initial_noise

Cases = Iterator[tuple[str, dict[str, Any]]]
Sides = list[int]  # in patches; none: all
SPARSITIES = (0.5, 0.7, 0.85)
ROWS_AT = 0.7  # where blocks are also taken row by row, for the error
NUM_TEXT = 256
ATTENTION = {32: (4, 5), 64: (4, 2), 128: (1, 1)}  # patches a side: heads, rounds
I1_SIDES = {32: 3, 64: 1}  # patches a side: rounds
PROMPT = "a red cube left of a blue sphere"
# Patches a side: patches in a block, rounds of timing. At 8, nano's own size, 64 would be all.
NANO = {8: (16, 0), 16: (64, 3), 32: (64, 1)}
NANO_SIGMAS = (0.8, 0.4)


def attention_part(sides: Sides) -> Cases:
    for side in [s for s in ATTENTION if s in sides or not sides]:
        heads, rounds = ATTENTION[side]
        n, generator = side * side, torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, n + NUM_TEXT, heads, 128, generator=generator) for _ in range(3))
        ways: dict[float, Callable[[], Tensor]] = {0.0: partial(attention, q, k, v)}
        for sparsity in SPARSITIES:
            blocks = _blocks((side, side), sparsity)
            ways[sparsity] = partial(attention, q, k, v, sparse=blocks.at(0, 0))
        yield f"{n}_patches", {"heads": heads} | _timed(ways, rounds, side)[0]


def i1_part(sides: Sides) -> Cases:
    torch.manual_seed(0)
    model = I1(CONFIG).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(std=module.in_features**-0.5, generator=generator)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    features = Features(
        t5=noise(1, NUM_TEXT // 2, 1024),
        llama=noise(6, 1, NUM_TEXT // 2, 1024),
        pooled=noise(1, CONFIG.pooled_size),
    )
    sigma = torch.tensor([0.6])
    for side in [s for s in I1_SIDES if s in sides or not sides]:
        rounds = I1_SIDES[side]
        x_t = noise(1, CONFIG.in_channels, 2 * side, 2 * side)
        options: dict[str, Any] = {"height": 2 * side, "width": 2 * side, "sigmas": sigma}
        prefixes = {
            sparsity: model.prefill(features, sparsity=sparsity, **options)
            for sparsity in (0.0, *SPARSITIES)
        }
        ways: dict[float, Callable[[], Tensor]] = {
            sparsity: partial(model.velocity, x_t, sigma[0], prefix)
            for sparsity, prefix in prefixes.items()
        }
        case, dense = _timed(ways, rounds, side)
        in_rows = torch.arange(side * side)
        raster = replace(_blocks((side, side), ROWS_AT), order=in_rows, back=in_rows)
        out = model.velocity(x_t, sigma[0], replace(prefixes[0.0], blocks=raster))
        case["sparsity"][str(ROWS_AT)]["error_in_rows"] = _rounded(_error(out, dense))
        yield f"{side * side}_patches", case


def nano_part(sides: Sides) -> Cases:
    pipe = load("o1-nano", device="cpu")
    model = pipe.model
    assert isinstance(model, O1)
    for side in [s for s in NANO if s in sides or not sides]:
        pixels, (size, rounds) = 16 * side, NANO[side]
        tokens = encode(pipe.tokenizer, model.config, PROMPT, width=pixels, height=pixels)
        dense = model.prefill([tokens])
        states = _states(model, dense, pixels)
        rows = {}
        for sparsity in SPARSITIES:
            blocks = _blocks(tokens.grid, sparsity, size)
            in_rows = torch.arange(tokens.num_target)
            raster = replace(blocks, order=in_rows, back=in_rows)
            rows[str(sparsity)] = {
                "skipped": _skipped(blocks),
                "x0_error": _x0_error(model, states, with_blocks(dense, blocks)),
                "x0_error_in_rows": _x0_error(model, states, with_blocks(dense, raster)),
                "attention_error": _attention_error(model, states, with_blocks(dense, blocks)),
                "attention_error_in_rows": _attention_error(
                    model, states, with_blocks(dense, raster)
                ),
            }
        case: dict[str, Any] = {"block": size, "sparsity": rows}
        if rounds:
            x_t, sigma, _ = states[0]
            ways = {
                s: partial(
                    model.predict_x0,
                    x_t,
                    sigma,
                    with_blocks(dense, _blocks(tokens.grid, s, size)) if s else dense,
                )
                for s in (0.0, *SPARSITIES)
            }
            times, ratios = _rounds(ways, rounds)
            case["dense_ms"] = times[0.0]
            for s in SPARSITIES:
                rows[str(s)] |= {"ms": times[s], "faster": ratios[s]}
        yield f"{tokens.num_target}_patches", case


def with_blocks(prefix: Prefix, blocks: Blocks) -> Prefix:
    """A dense prefix with blocks of one's own; the timestep stands before the patches."""
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + blocks.order])
    ropes = tuple((cos[order], sin[order]) for cos, sin in prefix.ropes)
    return replace(prefix, ropes=ropes, blocks=blocks)


def _states(model: O1, prefix: Prefix, pixels: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What dense steps come by, (x_t, sigma, x0), from the noise of seed 7."""
    noise = patchify(initial_noise([7], (3, pixels, pixels)), model.config.patch_size)
    x_t, states = noise, []
    for number, value in enumerate(NANO_SIGMAS):
        sigma = torch.tensor(value)
        x0 = model.predict_x0(x_t, sigma, prefix)
        states.append((x_t, sigma, x0))
        following = NANO_SIGMAS[number + 1] if number + 1 < len(NANO_SIGMAS) else 0.0
        x_t = x0 + following * (x_t - x0) / value
    return states


def _x0_error(model: O1, states: list[tuple[Tensor, Tensor, Tensor]], prefix: Prefix) -> float:
    return _rounded(
        mean(_error(model.predict_x0(x_t, sigma, prefix), x0) for x_t, sigma, x0 in states)
    )


def _attention_error(
    model: O1, states: list[tuple[Tensor, Tensor, Tensor]], prefix: Prefix
) -> float:
    """Mean over layers, each from what it is given in a dense step."""
    errors = []

    def compare(*qkv: Tensor, sparse: Any = None, **options: Any) -> Tensor:
        out = attention(*qkv, **options)
        errors.append(_error(attention(*qkv, sparse=sparse, **options), out))
        return out

    o1_model.attention = compare  # type: ignore[attr-defined]
    try:
        model.predict_x0(*states[0][:2], prefix)
    finally:
        o1_model.attention = attention  # type: ignore[attr-defined]
    return _rounded(mean(errors))


def _timed(
    ways: dict[float, Callable[[], Tensor]], rounds: int, side: int
) -> tuple[dict[str, Any], Tensor]:
    """By sparsity: error, share of blocks skipped, time; 0.0 is dense, and its result is given."""
    outs = {sparsity: way() for sparsity, way in ways.items()} if rounds > 2 else {}
    times, ratios = _rounds(ways, rounds, outs)
    rows = {
        str(sparsity): {
            "skipped": _skipped(_blocks((side, side), sparsity)),
            "error": _rounded(_error(outs[sparsity], outs[0.0])),
            "ms": times[sparsity],
            "faster": ratios[sparsity],
        }
        for sparsity in SPARSITIES
    }
    return {"dense_ms": times[0.0], "sparsity": rows}, outs[0.0]


def _rounds(
    ways: dict[float, Callable[[], Tensor]],
    rounds: int,
    outs: dict[float, Tensor] | None = None,
) -> tuple[dict[float, float], dict[float, float]]:
    taken: dict[float, list[float]] = {sparsity: [] for sparsity in ways}
    for number in range(rounds):
        for sparsity in sorted(ways, reverse=bool(number % 2)):
            start = time.process_time()
            out = ways[sparsity]()
            taken[sparsity].append(time.process_time() - start)
            if outs is not None:
                outs[sparsity] = out
    return (
        {s: round(1000 * median(t), 1) for s, t in taken.items()},
        {
            s: round(median(a / b for a, b in zip(taken[0.0], t, strict=True)), 2)
            for s, t in taken.items()
        },
    )


def _blocks(grid: tuple[int, int], sparsity: float, size: int = 64) -> Blocks:
    blocks = Blocks.of(grid, sparsity, size=size)
    assert blocks is not None
    return blocks


def _skipped(blocks: Blocks) -> float:
    return round(1 - blocks.num_kept / blocks.num_blocks, 3)


def _error(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).norm() / exact.norm())


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


PARTS = {"attention": attention_part, "i1": i1_part, "nano": nano_part}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--sides", type=int, nargs="+", default=[], help="in patches (all)")
    parser.add_argument("-o", "--output", default="benchmarks/results/sparsity_cpu.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = Path(arguments.output)
    for part in arguments.parts:
        with torch.inference_mode():
            for name, case in PARTS[part](arguments.sides):
                result = json.loads(path.read_text()) if path.exists() else {}
                result["machine"] = machine()
                result[part] = result.get(part, {}) | {name: case}
                path.write_text(json.dumps(result, indent=1) + "\n")
                print(part, name, json.dumps(case), flush=True)


if __name__ == "__main__":
    main()
