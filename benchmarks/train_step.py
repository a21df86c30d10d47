"""A training step of O1 against a plain one: `python -m benchmarks.train_step OUT.json`.

Both take the same steps from the same weights on the same samples, those of `recipes/o1_nano.toml`
at 128×128, in fp32 on one thread: what one of the recipe's two processes does. Their losses are
compared. *Plain* is what one writes first
with transformers: Qwen3-VL's own decoder layers in a dense mask, samples padded to the longest of
them, nothing compiled, AdamW and the moving average tensor by tensor. *Ours* is what the loop
runs: the recipe's padded buckets, compiled blocks, fused AdamW, a grouped average. Each has a
process of its own: ours is started as `hidream train` starts one, with tcmalloc; plain once as
one starts a script, and once with our environment. They take turns; a ratio is the rounds' median.
Batches are made before the clock runs. Muon, which plain has not, is off.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hidream.bench.timing import machine
from hidream.models.o1.batch import IGNORE, Batch
from hidream.models.o1.model import O1
from hidream.train.config import Recipe, load_recipe
from hidream.train.data import TrainBatch
from hidream.train.distributed import World
from hidream.train.launch import worker_environment
from hidream.train.loop import Trainee
from hidream.train.o1 import O1Learner

ROOT = Path(__file__).parents[1]
RATE, BATCH, ROUNDS = 1e-3, 32, 7
TASKS = ("text_to_image", "edit")
ENVIRONMENTS = {"ours": True, "plain": False, "plain, our environment": True}
Step = Callable[[TrainBatch, int], float]


def bench_recipe(batch_size: int = BATCH, **changes: Any) -> Recipe:
    """Nano's, in one process, with AdamW for all."""
    recipe = load_recipe(ROOT / "recipes" / "o1_nano.toml")
    stage = replace(recipe.stages[-1], steps=10**6, decay=0, batch_size=batch_size)
    optimizer = replace(recipe.optimizer, muon=0.0)
    return replace(recipe, stages=(stage,), processes=1, optimizer=optimizer, **changes)


def ours(recipe: Recipe) -> Step:
    """The loop's step."""
    world = World()
    trainee = Trainee(O1Learner(recipe), world)

    def step(batch: TrainBatch, number: int) -> float:
        values = trainee.backward(batch)
        trainee.update(number, RATE)
        return _total(recipe, {name: float(value) for name, value in values.items()})

    return step


class PlainO1(nn.Module):
    """O1 around transformers' decoder layers, with the weights of ours."""

    def __init__(self, model: O1):
        super().__init__()
        from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen

        special = {f"<|{name}|>": i for i, name in enumerate(("image_pad", "video_pad"))}
        special |= {f"<|vision_{name}|>": i for i, name in enumerate(("start", "end"))}
        config: Any = qwen.Qwen3VLConfig(**model.config.to_dict(special)).text_config
        config._attn_implementation = "sdpa"
        decoder = model.model.language_model
        self.layers = nn.ModuleList(
            qwen.Qwen3VLTextDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        for theirs, own in zip(self.layers, decoder.layers, strict=True):
            theirs.load_state_dict(own.state_dict())
        self.rotary = qwen.Qwen3VLTextRotaryEmbedding(config)
        self.norm = qwen.Qwen3VLTextRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm.load_state_dict(decoder.norm.state_dict())
        self.embed_tokens, self.lm_head = decoder.embed_tokens, model.lm_head
        self.visual, self.time = model.model.visual, model.model.t_embedder1
        self.embed, self.head = model.model.x_embedder, model.model.final_layer2

    def forward(self, batch: Batch, x_t: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Clean patches, and logits of the text."""
        num_text = batch.input_ids.shape[1]
        hidden = self.embed_tokens(batch.input_ids)
        deepstack: tuple[Tensor, ...] = ()
        parts = [self.time(1 - sigma)[:, None], self.embed(x_t)]
        if batch.references.shape[1]:
            parts.append(self.embed(batch.references))
        if batch.pixel_values is not None:
            seen = self.visual(batch.pixel_values, list(batch.image_grids))
            hidden = hidden.flatten(0, 1).index_copy(0, batch.image_slots, seen.tokens)
            hidden = hidden.view(*batch.input_ids.shape, -1)
            deepstack = seen.deepstack
        hidden = torch.cat([hidden, *parts], dim=1)
        mask = batch.attention_mask()[:, None]
        angles = self.rotary(hidden, batch.position_ids)
        for i, layer in enumerate(self.layers):
            hidden = layer(hidden, attention_mask=mask, position_embeddings=angles)
            if i < len(deepstack):
                text = hidden[:, :num_text].flatten(0, 1)
                text = text.index_add(0, batch.image_slots, deepstack[i])
                text = text.view(len(hidden), num_text, -1)
                hidden = torch.cat([text, hidden[:, num_text:]], dim=1)
        hidden = self.norm(hidden)
        first = num_text + 1
        patches = self.head(hidden[:, first : first + x_t.shape[1]])
        return patches, self.lm_head(hidden[:, :num_text])


def plain(recipe: Recipe) -> Step:
    """The same step, written as one would at first."""
    objective, options = recipe.objective, recipe.optimizer
    model = PlainO1(O1Learner(recipe).build())
    ema = copy.deepcopy(model).requires_grad_(False)
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    trained = list(model.parameters())
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in tables]
    kept = [p for p in trained if p.ndim < 2 or id(p) in tables]
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=RATE, betas=options.betas, eps=options.eps, foreach=False
    )

    def step(given: TrainBatch, number: int) -> float:
        batch, sigma = trimmed(given.batch), given.sigma
        level = sigma[:, None, None]
        x_t = (1 - level) * given.x0 + level * objective.noise_scale * given.noise
        x0, logits = model(batch, x_t, sigma)
        error = (x0 - given.x0).square().mean(dim=(1, 2))
        weight = (1 - sigma).pow(objective.t_power) / sigma.clamp(min=objective.delta).square()
        text = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE)
        loss = (weight * error).mean() + objective.caption_weight * text
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        decay = min(options.ema_decay, (1 + number) / (10 + number))
        with torch.no_grad():
            for average, weight in zip(ema.parameters(), model.parameters(), strict=True):
                average.mul_(decay).add_(weight, alpha=1 - decay)
        return float(loss.detach())

    return step


def trimmed(batch: Batch) -> Batch:
    """The same samples, padded to the longest of them instead of to the bucket."""
    most_text = int(batch.text_mask.sum(1).max())
    most_references = int(batch.reference_mask.sum(1).max()) if batch.references.shape[1] else 0
    num_text, num_references = batch.input_ids.shape[1], batch.references.shape[1]
    middle = batch.position_ids.shape[-1] - num_references
    positions = [
        batch.position_ids[..., :most_text],
        batch.position_ids[..., num_text : middle + most_references],
    ]
    rows = batch.image_slots // max(num_text, 1)
    return replace(
        batch,
        input_ids=batch.input_ids[:, :most_text],
        text_mask=batch.text_mask[:, :most_text],
        labels=batch.labels[:, :most_text],
        position_ids=torch.cat(positions, dim=-1),
        references=batch.references[:, :most_references],
        reference_mask=batch.reference_mask[:, :most_references],
        image_slots=rows * most_text + batch.image_slots % max(num_text, 1),
    )


def _total(recipe: Recipe, values: dict[str, float]) -> float:
    picture = sum(v for k, v in values.items() if k in {f"loss_{task}" for task in TASKS})
    return picture + recipe.objective.caption_weight * values["loss_caption"]


def batches_of(recipe: Recipe, count: int) -> list[TrainBatch]:
    learner = O1Learner(recipe)
    return [learner.make_batch(step) for step in range(count)]


def serve(side: str, task: str) -> None:
    """A side's process: a line in, a step, a line out."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    recipe = bench_recipe()
    stage = replace(recipe.stages[0], tasks={task: 1.0})
    recipe = replace(recipe, stages=(stage,))
    batches = batches_of(recipe, 2)
    step = (ours if side == "ours" else plain)(recipe)
    for number, _ in enumerate(sys.stdin):
        wall, cpu = time.perf_counter(), time.process_time()
        loss = step(batches[0], number)
        seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        print(json.dumps({"loss": loss, **seconds}), flush=True)


def measure(task: str, rounds: int) -> dict[str, Any]:
    """Seconds of a step, side by side, and the largest difference of losses."""
    recipe = bench_recipe()
    sides = {
        name: subprocess.Popen(
            [sys.executable, "-m", "benchmarks.train_step", "--side", name, "--task", task],
            env=worker_environment(recipe) if as_we_start else _plain_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, as_we_start in ENVIRONMENTS.items()
    }
    times: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    try:
        for number in range(rounds + 2):  # two to compile and to warm up
            for name in sorted(sides, reverse=bool(number % 2)):
                times[name].append(_ask(sides[name]))
            row = {name: {k: round(v, 4) for k, v in t[-1].items()} for name, t in times.items()}
            print(number, row, file=sys.stderr)
    finally:
        for side in sides.values():
            side.kill()
            side.wait()
    differences = [
        abs(a["loss"] - b["loss"]) / abs(b["loss"])
        for a, b in zip(times["ours"], times["plain"], strict=True)
    ]
    result: dict[str, Any] = {"task": task, "largest_difference_of_losses": max(differences)}
    for clock in ("wall", "cpu"):
        of = {name: [t[clock] for t in rows[2:]] for name, rows in times.items()}
        result[f"{clock}_seconds"] = {n: round(statistics.median(v), 3) for n, v in of.items()}
        for name in [n for n in of if n != "ours"]:
            ratios = [b / a for a, b in zip(of["ours"], of[name], strict=True)]
            low, high = round(min(ratios), 2), round(max(ratios), 2)
            result[f"{clock}_ratio, {name}"] = [round(statistics.median(ratios), 2), low, high]
    return result


def _ask(side: subprocess.Popen[str]) -> dict[str, float]:
    assert side.stdin is not None
    assert side.stdout is not None
    side.stdin.write("step\n")
    side.stdin.flush()
    answer: dict[str, float] = json.loads(side.stdout.readline())
    return answer


def _plain_environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--side")
    parser.add_argument("--task", default="")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    if arguments.side:
        return serve(arguments.side, arguments.task)
    tasks = [arguments.task] if arguments.task else TASKS
    rows = [measure(task, arguments.rounds) for task in tasks]
    result = {"machine": machine(), "threads": 1, "batch": BATCH, "rows": rows}
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
