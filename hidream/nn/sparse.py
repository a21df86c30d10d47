"""Block-sparse attention: each block of a picture's patches reads the blocks that suit it best.

A picture's patches are put in an order in which 64 in a row are a compact region, about 8×8.
Queries and keys are averaged over each such block; for every head and block of queries, the
blocks of keys whose averages agree most with the query's are kept. All else is left out: it is
neither multiplied nor read. What is no whole block of the picture – text, references, padding, the
patches left over at the end – is always read, and reads everything.

The choice is made anew in every layer and step, from the queries and keys themselves, as in
SpargeAttn (arXiv 2502.18137), but with a given share in place of its thresholds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise, product
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hidream.limits import SPARSE_BLOCK, skipped_blocks

# read(q, k, v, bias) -> what q reads in all of k and v: dense attention
Read = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Blocks:
    """A picture in blocks, for patches of `grid`, or of several such grids one after the other.

    `x[..., order, :]` puts patches in block order and `x[..., back, :]` back into rows.
    `num_kept` of the `num_blocks` blocks of keys are read by each block of queries. `order` is of
    one grid's patches.
    """

    grid: tuple[int, int]
    num_grids: int
    num_kept: int
    size: int
    order: Int[Tensor, " n"] = field(compare=False, repr=False)
    back: Int[Tensor, " n"] = field(compare=False, repr=False)

    @staticmethod
    def of(
        grid: tuple[int, int],
        sparsity: float,
        *,
        num_grids: int = 1,
        size: int = SPARSE_BLOCK,
        device: torch.device | str = "cpu",
    ) -> Blocks | None:
        """None where nothing would be skipped: attention is then dense, and exact."""
        num_patches = num_grids * grid[0] * grid[1]
        num_skipped = skipped_blocks(num_patches, sparsity, size)
        if num_skipped == 0:
            return None
        order = block_order(*grid, size).to(device)
        return Blocks(
            grid, num_grids, num_patches // size - num_skipped, size, order, order.argsort()
        )

    @property
    def num_patches(self) -> int:
        return self.num_grids * self.grid[0] * self.grid[1]

    @property
    def num_blocks(self) -> int:
        """Whole blocks; the patches that are left over are always read."""
        return self.num_patches // self.size

    def at(self, first_query: int, first_key: int) -> Sparse:
        """For an attention in which the picture's patches begin at these places."""
        return Sparse(first_query, first_key, self.num_blocks, self.num_kept, self.size)


@dataclass(frozen=True)
class Sparse:
    """Where an attention's blocks of patches are, and how many of them a block reads.

    Keys hold `num_blocks` of `size` from `first_key` on, queries as many or the first of them
    from `first_query` on.
    """

    first_query: int
    first_key: int
    num_blocks: int
    num_kept: int
    size: int


def block_order(rows: int, columns: int, size: int = SPARSE_BLOCK) -> Int[Tensor, " n"]:
    """Places (row · columns + column) in an order of which every `size` are a compact region.

    The grid is cut into bands of about √size rows, which are read column by column, one to the
    right and the next to the left. Where √size divides both sides, the regions are squares.
    """
    num_bands = max(1, round(rows / size**0.5))
    starts = [rows * band // num_bands for band in range(num_bands + 1)]
    places = torch.arange(rows * columns).view(rows, columns)
    bands = [places[a:b] for a, b in pairwise(starts)]
    return torch.cat(
        [(band.flip(1) if number % 2 else band).T.flatten() for number, band in enumerate(bands)]
    )


def sparse_attention(
    q: Float[Tensor, "b l h d"],
    k: Float[Tensor, "b s g d"],
    v: Float[Tensor, "b s g d"],
    sparse: Sparse,
    *,
    bias: Float[Tensor, " s"] | None,
    read: Read,
) -> Float[Tensor, "b l h d"]:
    """What every query reads; the picture's whole blocks read what `choose_blocks` says.

    Gradients are those of what is read; the choice itself has none.
    """
    first, size = sparse.first_query, sparse.size
    num_blocks = min(sparse.num_blocks, (q.shape[1] - first) // size)
    if num_blocks == 0:
        return read(q, k, v, bias)
    before, blocks, after = q.split(
        [first, num_blocks * size, q.shape[1] - first - num_blocks * size], dim=1
    )
    with torch.no_grad():
        chosen = choose_blocks(blocks, k, sparse)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        picture = gather_anew(blocks, k, v, chosen, sparse, bias, read)
    elif has_flex(q):
        picture = flex(blocks, k, v, chosen, sparse, bias, compiled=True)
    else:
        picture = gather(blocks, k, v, chosen, sparse, bias, read)
    if before.shape[1] + after.shape[1] == 0:
        return picture
    others = read(torch.cat([before, after], dim=1), k, v, bias)
    before, after = others.split([before.shape[1], after.shape[1]], dim=1)
    return torch.cat([before, picture, after], dim=1)


def choose_blocks(
    q: Float[Tensor, "b m h d"], k: Float[Tensor, "b s g d"], sparse: Sparse
) -> Int[Tensor, "b h blocks kept"]:
    """For every head and block of queries the blocks of keys to read, rising."""
    keys = k[:, sparse.first_key :][:, : sparse.num_blocks * sparse.size]
    pooled_q, pooled_k = (
        t.unflatten(1, (-1, sparse.size)).mean(2, dtype=torch.float32).transpose(1, 2)
        for t in (q, keys)
    )  # (b, heads, blocks, d)
    pooled_k = pooled_k.repeat_interleave(q.shape[2] // k.shape[2], dim=1)
    scores = pooled_q @ pooled_k.transpose(-1, -2)
    return scores.topk(sparse.num_kept, dim=-1).indices.sort(dim=-1).values


def gather(
    q: Float[Tensor, "b m h d"],
    k: Float[Tensor, "b s g d"],
    v: Float[Tensor, "b s g d"],
    chosen: Int[Tensor, "b h blocks kept"],
    sparse: Sparse,
    bias: Float[Tensor, " s"] | None,
    read: Read,
) -> Float[Tensor, "b m h d"]:
    """Copies what a block of queries reads, head by head, and lets the block read it.

    A head's copy is used for all of its blocks: what is always read is put there once, and the
    rest is still in the processor's cache when it is read. For all heads at once this takes 1.4
    times as long.
    """
    h, size = q.shape[2], sparse.size
    num_picked = sparse.num_kept * size
    num_read = num_picked + k.shape[1] - sparse.num_blocks * size
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    tables = [_Table(bias, sparse, num_picked, num_read)] if bias is not None else []
    for i in range(len(q)):
        for head in range(h):
            shared = head * k.shape[2] // h
            keys, values = (_Table(t[i, :, shared], sparse, num_picked, num_read) for t in (k, v))
            for number, which in enumerate(chosen[i, head]):
                for table in (keys, values, *tables):
                    table.pick(which)
                place = slice(number * size, (number + 1) * size)
                out[i, place, head] = read(
                    q[i : i + 1, place, head : head + 1],
                    keys.read[None, :, None],
                    values.read[None, :, None],
                    tables[0].read if tables else None,
                )[0, :, 0]
    return out


def gather_anew(
    q: Float[Tensor, "b m h d"],
    k: Float[Tensor, "b s g d"],
    v: Float[Tensor, "b s g d"],
    chosen: Int[Tensor, "b h blocks kept"],
    sparse: Sparse,
    bias: Float[Tensor, " s"] | None,
    read: Read,
) -> Float[Tensor, "b m h d"]:
    """As `gather`, with gradients: each block's copy is kept for the backward pass."""
    heads = []
    for i, head in product(range(len(q)), range(q.shape[2])):
        shared = head * k.shape[2] // q.shape[2]
        which = chosen[i, head]
        keys, values = (_copies(t[i, :, shared], which, sparse)[:, :, None] for t in (k, v))
        queries = q[i, :, head].unflatten(0, (-1, sparse.size))[:, :, None]
        if bias is None:
            out = read(queries, keys, values, None)
        else:
            rows = _copies(bias, which, sparse)
            parts = zip(*(t.split(1) for t in (queries, keys, values)), rows, strict=True)
            out = torch.cat([read(*part) for part in parts])
        heads.append(out.flatten(0, 1)[:, 0])
    return torch.stack(heads).unflatten(0, (len(q), -1)).transpose(1, 2)


def _copies(
    rows: Float[Tensor, "s ..."], which: Int[Tensor, "blocks kept"], sparse: Sparse
) -> Float[Tensor, "blocks n ..."]:
    """For every block of queries the rows it reads: the picked, then all that are no block."""
    first, last = sparse.first_key, sparse.first_key + sparse.num_blocks * sparse.size
    picked = rows[first:last].unflatten(0, (-1, sparse.size))[which].flatten(1, 2)
    others = torch.cat([rows[:first], rows[last:]]).expand(len(which), *[-1] * rows.ndim)
    return torch.cat([picked, others], dim=1)


class _Table:
    """Rows of keys as blocks, and a copy of those to read: the picked, then all that are no block.

    `rows`: (s, d), or (s,) of a bias.
    """

    def __init__(self, rows: Tensor, sparse: Sparse, num_picked: int, num_read: int):
        first, last = sparse.first_key, sparse.first_key + sparse.num_blocks * sparse.size
        self.blocks = rows[first:last].reshape(sparse.num_blocks, -1)
        self.read = rows.new_empty(num_read, *rows.shape[1:])
        self.picked = self.read[:num_picked].view(sparse.num_kept, -1)
        self.read[num_picked : num_picked + first] = rows[:first]
        self.read[num_picked + first :] = rows[last:]

    def pick(self, which: Int[Tensor, " kept"]) -> None:
        torch.index_select(self.blocks, 0, which, out=self.picked)


def flex(
    q: Float[Tensor, "b m h d"],
    k: Float[Tensor, "b s g d"],
    v: Float[Tensor, "b s g d"],
    chosen: Int[Tensor, "b h blocks kept"],
    sparse: Sparse,
    bias: Float[Tensor, " s"] | None,
    *,
    compiled: bool,
) -> Float[Tensor, "b m h d"]:
    """FlexAttention (arXiv 2412.05496) with a mask of blocks: those that are not kept cost nothing.

    Uncompiled, it computes every score and masks them: for tests.
    """
    from torch.nn.attention.flex_attention import flex_attention

    last = sparse.first_key + sparse.num_blocks * sparse.size
    # Blocks must begin at multiples of their size: the picture's come first.
    k, v = (
        torch.cat([t[:, sparse.first_key : last], t[:, : sparse.first_key], t[:, last:]], dim=1)
        for t in (k, v)
    )
    score_mod = None
    if bias is not None:
        moved = torch.cat(
            [bias[sparse.first_key : last], bias[: sparse.first_key], bias[last:]]
        ).float()

        def score_mod(score: Any, b: Any, h: Any, query: Any, key: Any) -> Any:
            return score + moved[key]

    table = kept_table(chosen, sparse, k.shape[1])
    run = _compiled_flex() if compiled else flex_attention
    out = run(
        *(t.transpose(1, 2) for t in (q, k, v)),
        score_mod=score_mod,
        block_mask=block_mask(table, sparse.size, k.shape[1]),
        enable_gqa=q.shape[2] != k.shape[2],
        kernel_options={"BLOCK_M": sparse.size, "BLOCK_N": sparse.size},
    )
    return out.transpose(1, 2)


def kept_table(
    chosen: Int[Tensor, "b h blocks kept"], sparse: Sparse, num_keys: int
) -> Bool[Tensor, "b h blocks all"]:
    """Which blocks of all keys are read, where the picture's stand first."""
    shape = (*chosen.shape[:3], -(-num_keys // sparse.size))
    table = torch.ones(shape, dtype=torch.bool, device=chosen.device)
    table[..., : sparse.num_blocks] = False
    return table.scatter_(3, chosen, True)


def block_mask(table: Bool[Tensor, "b h m n"], size: int, num_keys: int) -> Any:
    """FlexAttention's mask; blocks that end within the keys need no look at single ones."""
    from torch.nn.attention.flex_attention import BlockMask

    whole = table.clone()
    whole[..., num_keys // size :] = False

    def listed(kept: Tensor) -> tuple[Tensor, Tensor]:
        """How many, and which: those that are kept first, in their order."""
        first = kept.int().argsort(dim=-1, descending=True, stable=True)
        return kept.sum(-1, dtype=torch.int32), first.int().contiguous()

    def mask_mod(b: Any, h: Any, query: Any, key: Any) -> Any:
        return table[b, h, query // size, key // size]

    return BlockMask.from_kv_blocks(
        *listed(table & ~whole),
        *listed(whole),
        BLOCK_SIZE=size,
        mask_mod=mask_mod,
        seq_lengths=(table.shape[2] * size, num_keys),
        compute_q_blocks=False,  # only gradients need them
    )


def has_flex(q: Tensor) -> bool:
    """Whether FlexAttention can be compiled for this: Triton, and a GPU with tensor cores."""
    return (
        q.is_cuda
        and q.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and q.shape[-1] >= 16
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        and find_spec("triton") is not None
    )


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    """For any lengths: prompts have many, and every one would be compiled anew."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)
