"""How a run's processes divide its work: `[parallel]` of a recipe, and what it comes to."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from hidream.errors import UsageError

ACTIVATIONS = ("none", "selective", "full")
CHECKPOINTS = ("sharded", "whole")


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """Numbers of processes, whose product is that of all: replicate · shard · sp · tp.

    `replicate` times the model is there, each time on other samples; `shard` processes share one
    (FSDP2), and have samples of their own, too. 0 is what the other numbers leave; `shard` is asked
    first. `sp` processes share a sample's tokens, and by turns its heads; `tp` share the matrices
    of O1's decoder. `parallel = "ddp"` is all of them 1 but `replicate`, "fsdp" all but `shard`.

    `activation_checkpointing` computes blocks anew in the backward pass: "full" all of a block,
    "selective" all but its matrix products and its attention. `checkpoint`: whether a run that
    shards its weights writes them in shards, or whole by its first process. `async_save`: train
    on while a thread writes.
    """

    replicate: int = 0
    shard: int = 1
    sp: int = 1
    tp: int = 1
    activation_checkpointing: str = "none"
    checkpoint: str = "sharded"
    async_save: bool = True

    @property
    def shards_weights(self) -> bool:
        """Whether weights may be in shards: with more than one process, they are."""
        return self.shard != 1 or self.tp != 1

    @staticmethod
    def named(name: str) -> Parallel:
        """What the strings of `NAMED` stand for; UsageError for others."""
        if name not in NAMED:
            raise UsageError(
                f'parallel = "{name}" must be one of {", ".join(NAMED)}, or a table [parallel].'
            )
        return NAMED[name]


NAMED = {"ddp": Parallel(), "fsdp": Parallel(shard=0)}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The numbers of a run. Processes stand in the order [replicate, shard, sp, tp], tp fastest."""

    replicate: int = 1
    shard: int = 1
    sp: int = 1
    tp: int = 1

    @property
    def num_processes(self) -> int:
        return self.replicate * self.shard * self.sp * self.tp

    @property
    def num_shards(self) -> int:
        """Into how many parts FSDP2 cuts what tensor parallel leaves: if at all, over those who
        share tokens, too."""
        return self.shard * self.sp if self.shard > 1 else 1

    @property
    def num_readers(self) -> int:
        """Into how many parts the samples of a step are dealt."""
        return self.replicate * self.shard

    def reader(self, rank: int) -> int:
        """Which of these parts process `rank` has; those that share its samples have it too."""
        return rank // (self.sp * self.tp)

    def __str__(self) -> str:
        several = {name: number for name, number in vars(self).items() if number > 1}
        if several.keys() <= {"replicate"}:
            return "ddp"
        if several.keys() == {"shard"}:
            return "fsdp"
        return " × ".join(f"{name} {number}" for name, number in several.items())


def check_parallel(parallel: Parallel, *, muon: bool, float16: bool) -> None:
    """UsageError for values that no number of processes would make right."""
    for name in ("replicate", "shard", "sp", "tp"):
        number, least = getattr(parallel, name), 0 if name in ("replicate", "shard") else 1
        if number < least:
            raise UsageError(f"parallel.{name} = {number} must be at least {least}.")
    for name, known in (("activation_checkpointing", ACTIVATIONS), ("checkpoint", CHECKPOINTS)):
        if getattr(parallel, name) not in known:
            raise UsageError(
                f'parallel.{name} = "{getattr(parallel, name)}" must be one of {", ".join(known)}.'
            )
    if parallel.shards_weights and (muon or float16):
        raise UsageError(
            "parallel.shard and parallel.tp go with optimizer.muon = 0 and any precision but "
            "float16.",
            "Muon needs whole matrices, and fp16's scale every gradient: leave both at 1.",
        )


def layout_of(parallel: Parallel, num_processes: int) -> Layout:
    """The layout of so many processes; UsageError unless the numbers come out at them."""
    given = [parallel.sp, parallel.tp, parallel.replicate or 1, parallel.shard or 1]
    left = max(num_processes // prod(given), 1)
    shard = parallel.shard or left
    replicate = parallel.replicate or (1 if parallel.shard == 0 else left)
    found = Layout(replicate=replicate, shard=shard, sp=parallel.sp, tp=parallel.tp)
    if found.num_processes != num_processes:
        told = " × ".join(f"{name} {number}" for name, number in vars(found).items())
        raise UsageError(
            f"[parallel] is for {found.num_processes} processes ({told}), and there are "
            f"{num_processes}.",
            "Let the product be their number; a replicate or shard of 0 is what the others leave.",
        )
    return found


def check_batches(layout: Layout, batch_sizes: dict[str, int], parts: int = 1) -> None:
    """UsageError unless the samples of a step, whose number has this name, can be dealt evenly to
    the processes, each of which computes them in so many parts."""
    for name, size in batch_sizes.items():
        each = layout.num_readers * parts
        if size % each:
            raise UsageError(
                f"{name} = {size} must be a multiple of {each}: {layout.num_readers} processes "
                f"that have samples of their own (replicate × shard), in {parts} parts each "
                "(accumulate)."
            )


def check_heads(layout: Layout, num_heads: int, num_kv_heads: int, inner_size: int) -> None:
    """UsageError unless a decoder's heads and its layers of `inner_size` can be divided."""
    for name, size in (("heads", num_heads), ("key heads", num_kv_heads), ("values", inner_size)):
        if size % layout.tp:
            raise UsageError(
                f"parallel.tp = {layout.tp} does not divide the model's {size} {name}."
            )
    heads, kv_heads = num_heads // layout.tp, num_kv_heads // layout.tp
    if heads % layout.sp or (kv_heads % layout.sp and layout.sp % kv_heads):
        raise UsageError(
            f"parallel.sp = {layout.sp} does not divide the model's {num_heads} heads and "
            f"{num_kv_heads} key heads, of which {layout.tp} process(es) by tp have a part each."
        )
