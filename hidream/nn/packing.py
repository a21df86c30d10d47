"""Attention within each of many samples whose tokens are packed together, without padding.

Linear layers and norms see one long row of tokens and need not know whose they are. Attention
does: `Packing` says which tokens are a sample's, gathers them, and puts what was read back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hidream.nn.attention import Backend, attention
from hidream.nn.sparse import Blocks

LONG = 512  # tokens; shorter samples may be padded for attention
MAX_PADDING = 0.25  # of the tokens of a row, in those


@dataclass(frozen=True)
class Segment:
    """Where one sample's tokens are among all that are packed.

    Its causal tokens read what is before them, the others read all of it. With `blocks`, a picture
    whose patches follow the first of the others is read as `hidream.nn.sparse` says.
    """

    causal: Int[Tensor, " a"]
    others: Int[Tensor, " o"]
    blocks: Blocks | None = None

    def __len__(self) -> int:
        return len(self.causal) + len(self.others)

    def places(self) -> Int[Tensor, " l"]:
        """Of all its tokens, in the order in which attention wants them."""
        if self.blocks is None:
            return torch.cat([self.causal, self.others])
        after = 1 + self.blocks.num_patches
        patches = self.others[1:after][self.blocks.order]
        return torch.cat([self.causal, self.others[:1], patches, self.others[after:]])


@dataclass(frozen=True)
class Rows:
    """Samples that are read together: `index`, the places of their tokens.

    Either the first `num_causal` of every row are causal, and no row is padded; or a `mask` is True
    where a query may read a key.
    """

    index: Int[Tensor, "b l"]
    num_causal: int | None = None
    mask: Bool[Tensor, "b l l"] | None = None
    blocks: Blocks | None = None

    def read(
        self,
        q: Float[Tensor, "b l h d"],
        k: Float[Tensor, "b l g d"],
        v: Float[Tensor, "b l g d"],
        backend: Backend,
    ) -> Float[Tensor, "b l h d"]:
        """What every query of these rows reads."""
        a = self.num_causal
        if a is None:
            return attention(q, k, v, mask=self.mask, backend=backend)
        causal = attention(q[:, :a], k[:, :a], v[:, :a], causal=True, backend=backend)
        if a == q.shape[1]:
            return causal
        sparse = self.blocks.at(1, a + 1) if self.blocks is not None else None
        others = attention(q[:, a:], k, v, sparse=sparse, backend=backend)
        return torch.cat([causal, others], dim=1)


@dataclass(frozen=True)
class Packing:
    """All rows, and the place of every packed token in them, one row after the other."""

    rows: tuple[Rows, ...]
    back: Int[Tensor, " l"]

    @torch.compiler.disable  # else all around it is compiled for every number of rows
    def read(
        self,
        q: Float[Tensor, "l h d"],
        k: Float[Tensor, "l g d"],
        v: Float[Tensor, "l g d"],
        backend: Backend = "auto",
    ) -> Float[Tensor, "l h d"]:
        """What every query reads of its own sample."""
        read = []
        for rows in self.rows:
            flat, shape = rows.index.flatten(), rows.index.shape
            q_rows, k_rows, v_rows = (
                t.index_select(0, flat).unflatten(0, shape) for t in (q, k, v)
            )
            read.append(rows.read(q_rows, k_rows, v_rows, backend).flatten(0, 1))
        return torch.cat(read).index_select(0, self.back)

    def to(self, device: torch.device | str) -> Packing:
        """The same on another device."""
        rows = tuple(
            replace(
                r,
                index=r.index.to(device, non_blocking=True),
                mask=None if r.mask is None else r.mask.to(device, non_blocking=True),
            )
            for r in self.rows
        )
        return Packing(rows, self.back.to(device, non_blocking=True))


def pack(segments: Sequence[Segment]) -> Packing:
    """How attention reads these samples, whose tokens are all that there are.

    Long samples, and those with blocks, are read with others exactly alike; short ones are padded
    to similar lengths, since a few large products are faster than many small ones.
    """
    alike: dict[Any, list[Segment]] = defaultdict(list)
    short: list[Segment] = []
    for segment in segments:
        if len(segment) < LONG and segment.blocks is None:
            short.append(segment)
        else:
            alike[len(segment.causal), len(segment), segment.blocks].append(segment)
    groups = list(alike.values())
    short.sort(key=len, reverse=True)
    while short:
        least = (1 - MAX_PADDING) * len(short[0])
        count = next((i for i, segment in enumerate(short) if len(segment) < least), len(short))
        groups.append(short[:count])
        short = short[count:]
    rows, back, first = [], torch.zeros(sum(map(len, segments)), dtype=torch.long), 0
    for group in groups:
        index, real = _padded([segment.places() for segment in group])
        back[index[real]] = first + real.flatten().nonzero()[:, 0]
        first += real.numel()
        causal = {len(segment.causal) for segment in group}
        if len(causal) == 1 and real.all():
            rows.append(Rows(index, causal.pop(), blocks=group[0].blocks))
        else:
            rows.append(Rows(index, mask=_mask(group, real)))
    return Packing(tuple(rows), back)


def _padded(places: Sequence[Int[Tensor, " _"]]) -> tuple[Int[Tensor, "b l"], Bool[Tensor, "b l"]]:
    """The places as rows, padded with the first token, and which of them are no padding."""
    lengths = torch.tensor([len(row) for row in places])
    index = torch.nn.utils.rnn.pad_sequence(list(places), batch_first=True)
    return index, torch.arange(index.shape[1]) < lengths[:, None]


def _mask(group: Sequence[Segment], real: Bool[Tensor, "b l"]) -> Bool[Tensor, "b l l"]:
    order = torch.arange(real.shape[1])
    num_causal = torch.tensor([len(segment.causal) for segment in group])[:, None, None]
    may_look_ahead = (order[:, None] >= num_causal) | (order[:, None] >= order)
    return real[:, None, :] & may_look_ahead
