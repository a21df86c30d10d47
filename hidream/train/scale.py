"""What a large O1 needs of a GPU, and what GPUs tell each other: `python -m hidream.train.scale`.

Memory and communication of one training step are computed from a configuration, a layout and a
number of tokens: docs/scale.md has the formulas. Processes divide the work as `[parallel]` of a
recipe says: `replicate` copies, weights in `shard` parts (FSDP2), a sample's tokens in `sp`, the
decoder's matrices in `tp`; there is no pipeline. GB are 10⁹ bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

from hidream.errors import UsageError
from hidream.models.o1.batch import Lengths
from hidream.models.o1.config import SIZES, O1Config
from hidream.train.flops import o1_step
from hidream.train.layout import ACTIVATIONS, Layout, check_heads
from hidream.train.scale_shapes import TP_DIMENSION, block_of, shapes

MASTER, ADAM, AVERAGE = 4, 8, 4  # bytes a weight, always in shards: fp32, two moments, EMA
GRADIENT, COMPUTE = 4, 2  # gradients are added up in fp32; bf16 is what blocks compute in
ALONE = Layout()


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the processes that read the same samples compute in a step, and how fast wires are.

    `samples` pictures of `target` patches with `text` tokens before and `references` patches
    behind; `gather` is bytes a value in which weights are gathered (4: fp32, and autocast keeps a
    bf16 copy of each until the forward pass ends). Rates of a GPU: `near` and `far` bytes a second
    to GPUs in its node of `node` and to others, `flops` a second at `mfu`.
    """

    samples: int = 1
    text: int = 512
    target: int = 4096
    references: int = 0
    checkpointing: str = "full"
    gather: int = 2
    node: int = 8
    near: float = 450e9
    far: float = 50e9
    flops: float = 989e12
    mfu: float = 0.45

    @property
    def length(self) -> int:
        return self.text + 1 + self.target + self.references


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes on the fullest GPU; bytes that it sends in a step; seconds of both and of arithmetic.

    `exposed` would be the step if no transfer hid behind arithmetic.
    """

    model: str
    parameters: int
    layout: Layout
    work: Work
    memory: dict[str, int]
    sent: dict[str, int]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def total_memory(self) -> int:
        return sum(self.memory.values())

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self)
        found["num_gpus"] = self.layout.num_processes
        found["total_memory"] = self.total_memory
        return found


def shard_shape(
    name: str, shape: tuple[int, ...], layout: Layout, shard: int = 0
) -> tuple[int, ...]:
    """What process `shard` of those that share a tensor (`layout.num_shards`) holds of its part by
    tensor parallel: rows, as `torch.chunk` deals them; the first have the most."""
    rows, *rest = part_shape(name, shape, layout)
    each = -(-rows // layout.num_shards)
    return (max(min(each, rows - shard * each), 0), *rest)


def part_shape(name: str, shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """A tensor's part by tensor parallel, which is all of it outside the decoder's matrices."""
    dimension = TP_DIMENSION.get(name.rsplit(".", 2)[-2]) if block_of(name) is not None else None
    if dimension is None:
        return shape
    return tuple(n // layout.tp if i == dimension else n for i, n in enumerate(shape))


def plan(name: str, layout: Layout, work: Work) -> Plan:
    """The plan of a size; UsageError where the layout does not divide it."""
    if name not in SIZES:
        raise UsageError(f'unknown model "{name}"; sizes are {", ".join(SIZES)}.')
    config = SIZES[name]
    _check(config, layout, work)
    tensors = shapes(config)
    own = sum(prod(shard_shape(n, s, layout)) for n, s in tensors.items())
    parts = {n: prod(part_shape(n, s, layout)) for n, s in tensors.items()}
    block = sum(size for n, size in parts.items() if block_of(n) == 0)
    rest = sum(size for n, size in parts.items() if block_of(n) is None)
    blocks = block * config.text.num_layers
    memory = {
        "weights": MASTER * own,
        "gradients": GRADIENT * own,
        "optimizer": ADAM * own,
        "average": AVERAGE * own,
        "gathered": _gathered(layout, work, block, rest),
        "casts": COMPUTE * (blocks + rest) if work.gather > COMPUTE else 0,
        "activations": activations(config, layout, work),
    }
    sent = _sent(config, layout, work, blocks, rest)
    made = Plan(
        model=name,
        parameters=sum(map(prod, tensors.values())),
        layout=layout,
        work=work,
        memory=memory,
        sent=sent,
    )
    made.seconds.update(_seconds(config, layout, work, sent))
    return made


def activations(config: O1Config, layout: Layout, work: Work) -> int:
    """Bytes kept for the backward pass on one GPU, at the most."""
    kept = values_kept(config, layout)
    tokens = -(-work.length // layout.sp) * work.samples
    layers = config.text.num_layers
    values = layers * kept[work.checkpointing]
    if work.checkpointing == "full":
        values += kept["none"]  # of the block that is computed anew
    elif work.checkpointing == "selective":
        values += kept["none"] - kept["selective"]
    heads = work.samples * work.text * config.text.vocab_size * (COMPUTE + 4)  # logits, fp32 too
    return COMPUTE * tokens * values + heads


def values_kept(config: O1Config, layout: Layout = ALONE) -> dict[str, int]:
    """Values a token that a block keeps, by activation checkpointing.

    h: width; a, k: queries and keys of this process; f: its inner values. *none*: inputs and
    outputs of both norms (4h), queries and keys before their norm and as they are read, values
    and what is read (3a + 3k), gate, up, silu(gate) and their product (4f). *selective* keeps the
    block's input and what matrix products and attention give. *full*: the input.
    """
    text = config.text
    h, f = text.hidden_size, text.intermediate_size // layout.tp
    a, k = (n * text.head_dim // layout.tp for n in (text.num_heads, text.num_kv_heads))
    return {
        "none": 4 * h + 3 * a + 3 * k + 4 * f,
        "selective": 3 * h + 2 * a + 2 * k + 2 * f,
        "full": h,
    }


def _gathered(layout: Layout, work: Work, block: int, rest: int) -> int:
    """What is whole for a time: two blocks and all that is in none, in the backward pass with
    their gradients."""
    if layout.num_shards == 1:
        return 0
    return (work.gather + GRADIENT) * (2 * block + rest)


def _sent(config: O1Config, layout: Layout, work: Work, blocks: int, rest: int) -> dict[str, int]:
    """Bytes that a GPU sends in a step, by who asks for it, as rings do it."""
    shards, text = layout.num_shards, config.text
    tokens = -(-work.length // layout.sp) * work.samples
    passes = 2 + (work.checkpointing == "full")  # forward, backward, forward again
    heads = text.num_heads // layout.tp
    kv_heads = max(text.num_kv_heads // layout.tp, layout.sp if layout.sp > 1 else 0)
    read_and_written = 2 * heads + 2 * kv_heads
    exchanged = COMPUTE * tokens * text.head_dim * read_and_written
    summed = 2 * COMPUTE * tokens * text.hidden_size  # behind attention and behind the MLP
    after = 2 * COMPUTE * work.length * work.samples * text.hidden_size * (layout.sp > 1)
    own = (blocks + rest) // shards
    return {
        "all_gather_weights": _ring(shards, work.gather * (2 * blocks + rest)),
        "reduce_scatter_gradients": _ring(shards, GRADIENT * (blocks + rest)),
        "all_reduce_gradients": 2 * _ring(layout.replicate, GRADIENT * own),
        "all_to_all_tokens": _ring(layout.sp, passes * text.num_layers * exchanged + after),
        "all_reduce_tokens": 2 * _ring(layout.tp, passes * text.num_layers * summed),
    }


def _ring(size: int, total: int) -> int:
    return total * (size - 1) // size


def _seconds(
    config: O1Config, layout: Layout, work: Work, sent: dict[str, int]
) -> dict[str, float]:
    """Processes stand in the order [replicate, shard, sp, tp], tp fastest: a group is near where
    all of it is in a node."""
    reach = {
        "all_reduce_tokens": layout.tp,
        "all_to_all_tokens": layout.tp * layout.sp,
        "all_gather_weights": layout.tp * layout.num_shards,
        "reduce_scatter_gradients": layout.tp * layout.num_shards,
        "all_reduce_gradients": layout.num_processes,
    }
    found = {
        name: size / (work.near if reach[name] <= work.node else work.far)
        for name, size in sent.items()
    }
    samples = [Lengths(work.text, work.target, work.references)] * work.samples
    flops = o1_step(config, samples, num_logits=work.text * work.samples)
    found["arithmetic"] = flops / (layout.sp * layout.tp) / (work.flops * work.mfu)
    found["exposed"] = sum(found.values())
    return found


def _check(config: O1Config, layout: Layout, work: Work) -> None:
    text = config.text
    if work.checkpointing not in ACTIVATIONS:
        raise UsageError(f'checkpointing "{work.checkpointing}" is none of {ACTIVATIONS}.')
    counts = (*asdict(layout).values(), work.samples, work.text, work.target)
    if min(counts) < 1 or work.references < 0:
        raise UsageError("numbers of processes, samples and tokens must be at least 1.")
    check_heads(layout, text.num_heads, text.num_kv_heads, text.intermediate_size)


# 8B on a node; 56B on eight; 200B+ on 64, its matrices in eight parts: with samples of their own,
# with edits whose tokens two processes share, and four times all of it.
NAMED = {
    "8b": ("o1-8b", Layout(shard=8), Work(samples=8)),
    "56b": ("o1-56b", Layout(shard=64), Work(samples=3)),
    "200b": ("o1-pro", Layout(shard=64, tp=8), Work(samples=2)),
    "200b-edits": ("o1-pro", Layout(shard=32, sp=2, tp=8), Work(samples=2, references=4096)),
    "200b-times-4": ("o1-pro", Layout(replicate=4, shard=64, tp=8), Work(samples=2)),
}


def table(plans: dict[str, Plan]) -> str:
    """The plans as lines for a person: a row a quantity, a column a plan."""
    first = next(iter(plans.values()))
    rows: dict[str, Callable[[Plan], str]] = {
        "model": lambda p: p.model,
        "parameters, 10⁹": lambda p: f"{p.parameters / 1e9:.1f}",
        "GPUs": lambda p: str(p.layout.num_processes),
        "replicate × shard × sp × tp": lambda p: "×".join(map(str, asdict(p.layout).values())),
        "samples × tokens": lambda p: f"{p.work.samples}×{p.work.length}",
        "checkpointing": lambda p: p.work.checkpointing,
    }
    for name in first.memory:
        rows[f"{name}, GB"] = lambda p, name=name: f"{p.memory[name] / 1e9:.1f}"  # type: ignore
    rows["**memory, GB**"] = lambda p: f"{p.total_memory / 1e9:.1f}"
    for how in ACTIVATIONS:
        rows[f"activations, {how}, GB"] = lambda p, how=how: _with(p, how)  # type: ignore
    for name in first.sent:
        rows[f"{name}, GB sent"] = lambda p, name=name: f"{p.sent[name] / 1e9:.1f}"  # type: ignore
    for name in first.seconds:
        rows[f"{name}, s"] = lambda p, name=name: f"{p.seconds[name]:.2f}"  # type: ignore
    lines = ["| | " + " | ".join(plans) + " |", "|---|" + "---|" * len(plans)]
    lines += [
        f"| {name} | {' | '.join(map(cell, plans.values()))} |" for name, cell in rows.items()
    ]
    return "\n".join(lines)


def _with(made: Plan, checkpointing: str) -> str:
    work = Work(**{**asdict(made.work), "checkpointing": checkpointing})
    return f"{activations(SIZES[made.model], made.layout, work) / 1e9:.1f}"


def main(argv: list[str] | None = None) -> int:
    """Print the named plans, or one of a size and a layout."""
    parser = argparse.ArgumentParser(
        prog="python -m hidream.train.scale", description="Memory and communication of a large O1."
    )
    parser.add_argument("--model", choices=tuple(SIZES), help="default: the plans of docs/scale.md")
    for name in Layout.__dataclass_fields__:
        parser.add_argument(f"--{name}", type=int, default=1)
    for name, default in asdict(Work()).items():
        choices = ACTIVATIONS if name == "checkpointing" else None
        parser.add_argument(f"--{name}", type=type(default), default=default, choices=choices)
    parser.add_argument("--json", action="store_true")
    given = vars(parser.parse_args(argv))
    try:
        if given["model"]:
            layout = Layout(**{name: given[name] for name in Layout.__dataclass_fields__})
            work = Work(**{name: given[name] for name in Work.__dataclass_fields__})
            plans = {given["model"]: plan(given["model"], layout, work)}
        else:
            plans = {name: plan(*told) for name, told in NAMED.items()}
    except UsageError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    told = {name: made.to_dict() for name, made in plans.items()}
    sys.stdout.write((json.dumps(told, indent=1) if given["json"] else table(plans)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
