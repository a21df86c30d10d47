"""A training step of O1 against a plain one: `python -m benchmarks.train_step OUT.json`.

Both take the same steps from the same weights on the same samples, those of `recipes/o1_nano.toml`
at 128×128, in fp32, and their losses are compared. *Plain* is what one writes first with
transformers: Qwen3-VL's own decoder layers under a dense mask, samples padded to the longest of
them, nothing compiled, AdamW and the moving average tensor by tensor, all cores by threads, as a
script starts. *Ours* is what `hidream train` runs: samples packed, compiled blocks, fused AdamW, a
grouped average, a process of one thread a core, tcmalloc. On one core, ours is one of the recipe's
two processes, and plain has its half of the batch; plain in our environment too, to tell what that
is worth. Sides take turns; a ratio is the rounds' median. Batches are made before the clock runs.
Muon, which plain has not, is off.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hidream.bench.timing import machine
from hidream.models.o1.batch import Batch, places
from hidream.models.o1.model import O1
from hidream.train.config import Recipe, load_recipe
from hidream.train.data import SAID, TrainBatch
from hidream.train.distributed import World, join
from hidream.train.launch import worker_environment
from hidream.train.layout import Layout
from hidream.train.loop import Trainee
from hidream.train.o1 import O1Learner
from hidream.train.parallel import Processes

ROOT = Path(__file__).parents[1]
RATE, ROUNDS = 1e-3, 7
TASKS = ("text_to_image", "edit", "mixed")  # mixed: as the recipe has them
Step = Callable[[TrainBatch, int], float]


@dataclass(frozen=True, kw_only=True)
class Side:
    """How one of the two is started."""

    kind: str
    processes: int = 1
    threads: int = 1
    batch: int = 32
    our_environment: bool = False


CASES = {
    "one core": {
        "ours": Side(kind="ours", our_environment=True),
        "plain": Side(kind="plain"),
        "plain, our environment": Side(kind="plain", our_environment=True),
    },
    "two cores": {
        "ours": Side(kind="ours", processes=2, batch=64, our_environment=True),
        "plain": Side(kind="plain", threads=2, batch=64),
    },
}


def bench_recipe(task: str, batch_size: int) -> Recipe:
    """Nano's, of one task or all, with AdamW for all."""
    recipe = load_recipe(ROOT / "recipes" / "o1_nano.toml")
    stage = replace(recipe.stages[-1], steps=10**6, decay=0, batch_size=batch_size)
    if task != "mixed":
        stage = replace(stage, tasks={task: 1.0})
    return replace(recipe, stages=(stage,), optimizer=replace(recipe.optimizer, muon=0.0))


def ours(recipe: Recipe, world: World) -> Step:
    """The loop's step."""
    processes = Processes(Layout(replicate=world.size), world)
    trainee = Trainee(O1Learner(recipe, world), processes)

    def step(batch: TrainBatch, number: int) -> float:
        values = trainee.backward([batch])
        trainee.update(number, RATE)
        return float(values["loss"])

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

    def forward(
        self, batch: Batch, x_t: Tensor, sigma: Tensor, said: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Clean patches, and logits of the text."""
        parts = [self.embed_tokens(batch.input_ids), self.time(1 - sigma)]
        parts += [self.embed(torch.cat([x_t, batch.references]))]
        deepstack: tuple[Tensor, ...] = ()
        if batch.pixel_values is not None:
            seen = self.visual(batch.pixel_values, list(batch.image_grids))
            parts[0] = parts[0].index_copy(0, batch.image_slots, seen.tokens)
            deepstack = seen.deepstack
        index, mask, back = padded(batch)
        hidden, positions = torch.cat(parts)[index], batch.position_ids[:, index]
        angles = self.rotary(hidden, positions)
        for i, layer in enumerate(self.layers):
            hidden = layer(hidden, attention_mask=mask, position_embeddings=angles)
            if i < len(deepstack):
                flat = hidden.flatten(0, 1).index_add(0, back[batch.image_slots], deepstack[i])
                hidden = flat.view_as(hidden)
        hidden = self.norm(hidden).flatten(0, 1)[back]
        first = len(batch.input_ids) + len(sigma)
        return self.head(hidden[first : first + len(x_t)]), self.lm_head(hidden[said])


def padded(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Each sample's tokens in a row as long as the longest, who may read whom, and the way back."""
    rows = [torch.cat(both) for both in places(batch.lengths)]
    real = nn.utils.rnn.pad_sequence([torch.ones(len(row)).bool() for row in rows], True)
    index = nn.utils.rnn.pad_sequence(rows, True)
    order = torch.arange(index.shape[1])
    text = torch.tensor([n.text for n in batch.lengths])[:, None, None]
    mask = real[:, None, :] & ((order[:, None] >= text) | (order[:, None] >= order))
    back = torch.empty(int(real.sum()), dtype=torch.long)
    back[index[real]] = real.flatten().nonzero()[:, 0]
    return index, mask[:, None], back


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
        sigma, targets = given.sigma, given.batch.targets
        level = sigma.repeat_interleave(torch.tensor(targets))[:, None]
        x_t = (1 - level) * given.x0 + level * objective.noise_scale * given.noise
        said = torch.cat(list(given.said.values()))
        x0, logits = model(given.batch, x_t, sigma, said)
        errors = (x0 - given.x0).square().mean(dim=1).split(targets)
        error = torch.stack([e.mean() for e in errors])
        weight = (1 - sigma).pow(objective.t_power) / sigma.clamp(min=objective.delta).square()
        loss = (weight * error).sum() / len(given.tasks)
        nats = F.cross_entropy(logits, given.batch.input_ids[said + 1], reduction="none")
        shares = given.shares | {"caption": given.pictured}
        for name, own in zip(SAID, nats.split(given.counts), strict=True):
            of_text = objective.caption_weight if name == "caption" else objective.lm_weight
            if len(own):
                loss = loss + of_text * shares[name] * own.mean()
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


def serve(side: Side, task: str, rank: int, store: str) -> None:
    """A side's process: a line in, a step, a line out."""
    torch.set_num_threads(side.threads)
    torch.set_flush_denormal(True)
    recipe, world = bench_recipe(task, side.batch), join(rank, side.processes, store)
    batch = O1Learner(recipe, world).make_batch(0, world.rank, world.size)
    step = ours(recipe, world) if side.kind == "ours" else plain(recipe)
    for number, _ in enumerate(sys.stdin):
        wall, cpu = time.perf_counter(), time.process_time()
        loss = step(batch, number)
        seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        print(json.dumps({"loss": loss, **seconds}), flush=True)


def start(side: Side, name: str, case: str, task: str, store: Path) -> list[subprocess.Popen[str]]:
    """A side's processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(side.threads)}
    if side.our_environment:
        environment = worker_environment(bench_recipe(task, side.batch))
    command = [sys.executable, "-m", "benchmarks.train_step", "--task", task, "--case", case]
    command += ["--side", name, "--store", str(store)]
    pipe = subprocess.PIPE
    return [
        subprocess.Popen(
            [*command, "--rank", str(rank)], env=environment, stdin=pipe, stdout=pipe, text=True
        )
        for rank in range(side.processes)
    ]


def measure(case: str, task: str, rounds: int) -> dict[str, Any]:
    """Seconds of a step, side by side, and the largest difference of losses."""
    with tempfile.TemporaryDirectory() as folder:
        sides = {
            name: start(side, name, case, task, Path(folder) / name)
            for name, side in CASES[case].items()
        }
        times: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        try:
            for number in range(rounds + 2):  # two to compile and to warm up
                for name in sorted(sides, reverse=bool(number % 2)):
                    times[name].append(_ask(sides[name]))
                row = {
                    name: {k: round(v, 4) for k, v in t[-1].items()} for name, t in times.items()
                }
                print(case, task, number, row, file=sys.stderr)
        finally:
            for process in [p for processes in sides.values() for p in processes]:
                process.kill()
                process.wait()
    differences = [
        abs(a["loss"] - b["loss"]) / abs(b["loss"])
        for a, b in zip(times["ours"], times["plain"], strict=True)
    ]
    result: dict[str, Any] = {"case": case, "task": task}
    result["largest_difference_of_losses"] = max(differences)
    for clock in ("wall", "cpu"):
        of = {name: [t[clock] for t in rows[2:]] for name, rows in times.items()}
        result[f"{clock}_seconds"] = {n: round(statistics.median(v), 3) for n, v in of.items()}
        for name in [n for n in of if n != "ours"]:
            ratios = [b / a for a, b in zip(of["ours"], of[name], strict=True)]
            low, high = round(min(ratios), 2), round(max(ratios), 2)
            result[f"{clock}_ratio, {name}"] = [round(statistics.median(ratios), 2), low, high]
    return result


def _ask(side: list[subprocess.Popen[str]]) -> dict[str, float]:
    """A step of all its processes: the mean of their losses, the longest time, all cores' time."""
    for process in side:
        assert process.stdin is not None
        process.stdin.write("step\n")
        process.stdin.flush()
    answers = [json.loads(process.stdout.readline()) for process in side if process.stdout]
    return {
        "loss": statistics.mean(answer["loss"] for answer in answers),
        "wall": max(answer["wall"] for answer in answers),
        "cpu": sum(answer["cpu"] for answer in answers),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="A training step of O1 against a plain one.")
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--case", choices=tuple(CASES))
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    for name in ("side", "store", "rank"):
        parser.add_argument(f"--{name}", default="0", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side != "0":
        side = CASES[arguments.case][arguments.side]
        return serve(side, arguments.task, int(arguments.rank), arguments.store)
    rows = [
        measure(case, task, arguments.rounds)
        for case in ([arguments.case] if arguments.case else CASES)
        for task in ([arguments.task] if arguments.task else TASKS)
    ]
    text = json.dumps({"machine": machine(), "rows": rows}, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
