"""Requests of different lengths as one padded batch with fixed shapes: what training runs on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hidream.models.o1.tokens import Tokens

IGNORE = -100  # the label of a position that has no language-model loss


@dataclass(frozen=True)
class Batch:
    """`[text, padded to a | timestep | n target patches | references, padded to r]`.

    `labels[i]` is the token that position i should say next, or IGNORE. `image_slots` are indices
    into the flattened (b·a) text where the vision tower's tokens go, in order.
    """

    input_ids: Int[Tensor, "b a"]
    text_mask: Bool[Tensor, "b a"]
    labels: Int[Tensor, "b a"]
    position_ids: Int[Tensor, "3 b l"]
    references: Float[Tensor, "b r p"]
    reference_mask: Bool[Tensor, "b r"]
    pixel_values: Float[Tensor, "v c"] | None
    image_grids: tuple[tuple[int, int], ...]
    image_slots: Int[Tensor, " s"]

    def attention_mask(self) -> Bool[Tensor, "b l l"]:
        """True where a query may read a key: text reads earlier text, the rest reads everything."""
        (b, a), length = self.input_ids.shape, self.position_ids.shape[-1]
        num_between = length - a - self.references.shape[1]  # timestep and target
        readable = torch.cat(
            [self.text_mask, self.text_mask.new_ones(b, num_between), self.reference_mask], dim=1
        )
        order = torch.arange(length, device=readable.device)
        may_look_ahead = (order[:, None] >= a) | (order[:, None] >= order)
        return readable[:, None, :] & may_look_ahead

    def to(self, device: torch.device | str) -> Batch:
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return Batch(**moved)


def collate(
    requests: Sequence[Tokens],
    *,
    num_text: int,
    num_references: int = 0,
    labels: Sequence[slice] | None = None,
) -> Batch:
    """Pad `requests` of one picture size to `num_text` text and `num_references` patch tokens.

    `labels[i]`: the stretch of request i's text to be predicted (default: none of it).
    Raises ValueError where a request does not fit.
    """
    num_target = requests[0].num_target
    patch_dim = requests[0].references.shape[1]
    size, length = len(requests), num_text + 1 + num_target + num_references
    input_ids = torch.zeros(size, num_text, dtype=torch.long)
    text_mask = torch.zeros(size, num_text, dtype=torch.bool)
    targets = torch.full((size, num_text), IGNORE)
    position_ids = torch.zeros(3, size, length, dtype=torch.long)
    references = torch.zeros(size, num_references, patch_dim)
    reference_mask = torch.zeros(size, num_references, dtype=torch.bool)
    slots = []
    for i, tokens in enumerate(requests):
        a, r = len(tokens.input_ids), len(tokens.references)
        if a > num_text or r > num_references or tokens.num_target != num_target:
            raise ValueError(
                f"request {i} has {a} text, {tokens.num_target} target and {r} reference tokens; "
                f"the batch takes {num_text}, {num_target} and {num_references}"
            )
        input_ids[i, :a] = tokens.input_ids
        text_mask[i, :a] = True
        position_ids[:, i, :a] = tokens.position_ids[:, :a]
        position_ids[:, i, num_text : num_text + 1 + num_target + r] = tokens.position_ids[:, a:]
        references[i, :r] = tokens.references
        reference_mask[i, :r] = True
        slots.append(tokens.image_slots.nonzero()[:, 0] + i * num_text)
        if labels is not None:
            said = torch.arange(a)[labels[i]]
            said = said[said > 0]  # nothing foretells token 0
            targets[i, said - 1] = tokens.input_ids[said]
    pixels = [tokens.pixel_values for tokens in requests if tokens.image_grids]
    return Batch(
        input_ids=input_ids,
        text_mask=text_mask,
        labels=targets,
        position_ids=position_ids,
        references=references,
        reference_mask=reference_mask,
        pixel_values=torch.cat(pixels) if pixels else None,
        image_grids=tuple(grid for tokens in requests for grid in tokens.image_grids),
        image_slots=torch.cat(slots),
    )
