"""Sequence parallel: processes share a decoder's tokens, and around attention its heads.

Every process runs the blocks on its part of the tokens. Before attention an all-to-all trades its
tokens of all heads for all tokens of its heads, and after it another trades them back (DeepSpeed
Ulysses, arXiv 2309.14509): attention itself, and with it every mask, is what it was.

What stands before and after the decoder is computed whole by every process, on the same samples.
Gradients inside the decoder then come out `size` times each process's own part (`_Gather`), and
before it likewise: the *mean* over the processes is the gradient everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hidream.models.o1.decoder import Attend, Decoder, Read
from hidream.nn.rope import Rope


def split_sequence(decoder: Decoder, group: dist.ProcessGroup) -> None:
    """Have the processes of `group` share the decoder's tokens from now on.

    All of them must call it with the same tokens, and get all of the result.
    """
    inner, rank, size = decoder.forward, dist.get_rank(group), dist.get_world_size(group)

    def forward(
        hidden: Float[Tensor, "*b l d"],
        rope: Rope,
        attend: Attend,
        deepstack: Sequence[Float[Tensor, "*b l d"]] = (),
    ) -> Float[Tensor, "*b l d"]:
        length = hidden.shape[-2]
        num_own = -(-length // size)

        def own(tokens: Float[Tensor, "*b l e"]) -> Float[Tensor, "*b m e"]:
            padded = F.pad(tokens, (0, 0, 0, num_own * size - length))
            return padded.narrow(-2, rank * num_own, num_own)

        out = inner(
            own(hidden),
            (own(rope[0]), own(rope[1])),
            lambda layer: exchanging(attend(layer), length, group),
            [own(added) for added in deepstack],
        )
        whole: Tensor = _Gather.apply(out, group)
        return whole.narrow(-2, 0, length)

    decoder.forward = forward  # type: ignore[method-assign]


def exchanging(read: Read, length: int, group: dist.ProcessGroup) -> Read:
    """`read` of all `length` tokens and some heads, for who has all heads of some tokens."""
    size = dist.get_world_size(group)

    def exchanged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if k.shape[-2] < size:  # a head of keys for each process, all of them of one group
            k, v = (t.repeat_interleave(size // t.shape[-2], dim=-2) for t in (k, v))
        heads = [t.shape[-2] // size for t in (q, k, v)]
        parts = torch.cat([t.unflatten(-2, (size, -1)) for t in (q, k, v)], dim=-2)
        tokens = _all_to_all(parts.movedim(-3, 0), group)  # (size, *b, m, heads, d)
        tokens = tokens.movedim(0, -4).flatten(-4, -3).narrow(-3, 0, length)
        out = read(*tokens.split(heads, dim=-2))
        out = F.pad(out, (0, 0, 0, 0, 0, size * q.shape[-3] - length))
        parts = out.unflatten(-3, (size, -1)).movedim(-4, 0)  # (size, *b, m, heads, d)
        return _all_to_all(parts, group).movedim(0, -3).flatten(-3, -2)

    return exchanged


def _all_to_all(parts: Float[Tensor, "n ..."], group: dist.ProcessGroup) -> Float[Tensor, "n ..."]:
    """Part i goes to process i; part j of the result came from process j."""
    received = collectives.all_to_all_single_autograd(parts.contiguous(), None, None, group)
    return collectives.wait_tensor(received)


class _Gather(torch.autograd.Function):
    """The tokens of all processes. Each takes back the gradient of its own, `size` times."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.num_own = group, own.shape[-2]
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, own.contiguous(), group=group)
        return torch.cat(parts, dim=-2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        size, first = dist.get_world_size(ctx.group), dist.get_rank(ctx.group) * ctx.num_own
        return size * gradients[0].narrow(-2, first, ctx.num_own), None
