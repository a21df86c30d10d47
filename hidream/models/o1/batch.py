"""Samples of any tasks, sizes and lengths as one row of tokens: what training runs on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hidream.models.o1.tokens import Tokens
from hidream.nn.packing import Packing, Segment, pack
from hidream.nn.sparse import Blocks


class Lengths(NamedTuple):
    """One sample's tokens by kind; with a target comes a timestep."""

    text: int
    target: int
    references: int

    @property
    def total(self) -> int:
        return self.text + (1 + self.target if self.target else 0) + self.references


@dataclass(frozen=True)
class Batch:
    """`[all texts | all timesteps | all target patches | all reference patches]`, no padding.

    Within a kind, tokens stand sample by sample, as `lengths` says; `packing` tells attention which
    are whose. `image_slots` are the text positions where the vision tower's tokens go, in order.
    """

    input_ids: Int[Tensor, " a"]
    position_ids: Int[Tensor, "3 l"]
    references: Float[Tensor, "r p"]
    pixel_values: Float[Tensor, "v c"] | None
    image_grids: tuple[tuple[int, int], ...]
    image_slots: Int[Tensor, " s"]
    lengths: tuple[Lengths, ...]
    packing: Packing

    @property
    def targets(self) -> list[int]:
        """How many patches each sample's picture has, of those that have one."""
        return [n.target for n in self.lengths if n.target]

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return Batch(**{**moved, "packing": self.packing.to(device)})


def collate(requests: Sequence[Tokens], sparsity: float = 0.0) -> Batch:
    """Pack `requests`, whatever they are. `sparsity` is the share of each target's own attention
    that is skipped (see `hidream.nn.sparse`)."""
    lengths = tuple(Lengths(len(r.input_ids), r.num_target, len(r.references)) for r in requests)
    pixels = [tokens.pixel_values for tokens in requests if tokens.image_grids]
    segments, size = [], sum(n.total for n in lengths)
    position_ids = torch.zeros(3, size, dtype=torch.long)
    for tokens, (causal, others) in zip(requests, places(lengths), strict=True):
        blocks = Blocks.of(tokens.grid, sparsity) if tokens.num_target else None
        segments.append(Segment(causal, others, blocks))
        count = len(causal) + len(others)  # text alone has the next token's position, too
        position_ids[:, torch.cat([causal, others])] = tokens.position_ids[:, :count]
    return Batch(
        input_ids=torch.cat([tokens.input_ids for tokens in requests]),
        position_ids=position_ids,
        references=torch.cat([tokens.references for tokens in requests]),
        pixel_values=torch.cat(pixels) if pixels else None,
        image_grids=tuple(grid for tokens in requests for grid in tokens.image_grids),
        image_slots=torch.cat([tokens.image_slots for tokens in requests]).nonzero()[:, 0],
        lengths=lengths,
        packing=pack(segments),
    )


def places(
    lengths: Sequence[Lengths],
) -> list[tuple[Int[Tensor, " a"], Int[Tensor, " o"]]]:
    """Where each sample's text and its other tokens are among those of all."""
    counts = torch.tensor([[n.text, n.target > 0, n.target, n.references] for n in lengths])
    ends = counts.T.flatten().cumsum(0).view(4, -1).T  # kind by kind
    found = []
    for row, end in zip(counts.tolist(), ends.tolist(), strict=True):
        kinds = [torch.arange(e - n, e) for n, e in zip(row, end, strict=True)]
        found.append((kinds[0], torch.cat(kinds[1:])))
    return found
