"""A feed-forward layer of experts: every token goes to a few of them, and all to a shared one.

    out = sum over the token's k experts of p_e · expert_e(x)  +  shared(x)

`p` is the softmax over all experts; the chosen ones are not brought to a sum of 1. There is no
capacity: no token is dropped, and an expert that nobody picks costs nothing.

Tokens are sorted by expert, so that an expert's rows lie side by side, and each of the three maps
is one product per expert. On a GPU, and wherever a graph is traced, all experts' products are one
grouped kernel that takes the borders as a tensor: the host never waits to learn them. On a CPU
there is nothing to wait for, and a loop over the segments spares the copy that puts the experts'
weights side by side (142 ms for 1,408 tokens of width 512; grouped 165, all experts on all tokens
263).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


class Routing(NamedTuple):
    """Where a router sent `n` tokens: every expert's probability, the `k` chosen and theirs."""

    probabilities: Float[Tensor, "n e"]
    experts: Int[Tensor, "n k"]
    weights: Float[Tensor, "n k"]


def expert_loads(routing: Routing) -> Float[Tensor, " e"]:
    """Each expert's share of all assignments, adding up to 1; no gradient."""
    num_experts = routing.probabilities.shape[1]
    numbers = torch.arange(num_experts, device=routing.experts.device)
    of_expert = routing.experts.flatten()[:, None] == numbers
    return of_expert.float().mean(dim=0)


def balance_loss(routing: Routing) -> Float[Tensor, ""]:
    """E · sum of load_e · mean p_e: 1 when tokens are spread evenly, E when all go one way.

    Switch Transformer (arXiv 2101.03961), eq. 4, without its factor. Its gradient lowers the
    probabilities of experts that are picked often.
    """
    loads = expert_loads(routing)
    return len(loads) * (loads * routing.probabilities.float().mean(dim=0)).sum()


class FeedForward(nn.Module):
    """w2(silu(w1 x) · w3 x), without biases: SwiGLU (arXiv 2002.05202, eq. 6)."""

    def __init__(self, size: int, hidden_size: int):
        super().__init__()
        self.w1 = nn.Linear(size, hidden_size, bias=False)
        self.w2 = nn.Linear(hidden_size, size, bias=False)
        self.w3 = nn.Linear(size, hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        hidden = self.w1(x)
        if torch.is_grad_enabled():
            return self.w2(F.silu(hidden) * self.w3(x))
        return self.w2(F.silu(hidden, inplace=True).mul_(self.w3(x)))


class Router(nn.Module):
    """Scores every token for every expert and picks the `top_k` likeliest."""

    def __init__(self, size: int, num_experts: int, top_k: int):
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.zeros(num_experts, size))

    def forward(self, x: Float[Tensor, "n d"]) -> Routing:
        probabilities = F.linear(x, self.weight).softmax(dim=-1)
        weights, experts = probabilities.topk(self.top_k, dim=-1, sorted=False)
        return Routing(probabilities, experts, weights)


class MixtureOfExperts(nn.Module):
    """`num_experts` routed feed-forward layers, of which a token uses `top_k`, and a shared one."""

    def __init__(
        self, size: int, *, num_experts: int, top_k: int, expert_size: int, shared_size: int
    ):
        super().__init__()
        self.shared_experts = FeedForward(size, shared_size)
        self.experts = nn.ModuleList(FeedForward(size, expert_size) for _ in range(num_experts))
        self.gate = Router(size, num_experts, top_k)

    def forward(self, x: Float[Tensor, "*b d"]) -> tuple[Float[Tensor, "*b d"], Routing]:
        tokens = x.flatten(0, -2)  # (n, d)
        routing = self.gate(tokens)
        way = self._way(tokens)
        if way == "all":
            chosen, weights = self._all(tokens, routing)
        else:
            of_expert, order = routing.experts.flatten().sort(stable=True)  # (n k)
            places = torch.arange(len(self.experts), device=x.device)
            ends = torch.searchsorted(of_expert, places, right=True)
            run = self._grouped if way == "grouped" else self._one_by_one
            weights = routing.weights
            chosen = run(tokens, order, ends).view(*weights.shape, -1)  # (n, k, d)
        shared = self.shared_experts(tokens)[:, None]
        return torch.baddbmm(shared, weights[:, None], chosen).view_as(x), routing

    def _way(self, tokens: Tensor) -> Literal["grouped", "one by one", "all"]:
        """How the experts are computed.

        The grouped kernel is for bf16 and for experts that are weights and nothing else. Where it
        is not to be had, a traced graph runs every expert on every token, which no host has to
        steer; everything else waits for the segments' lengths.
        """
        traced = torch.compiler.is_compiling()
        if not traced and tokens.device.type != "cuda":
            return "one by one"
        layers = [w for e in self.experts for w in (e.w1, e.w2, e.w3)]
        plain = all(type(w) is nn.Linear and type(w.weight) is nn.Parameter for w in layers)
        if tokens.dtype == torch.bfloat16 and plain:
            return "grouped"
        return "all" if traced else "one by one"

    def _grouped(
        self, tokens: Float[Tensor, "n d"], order: Int[Tensor, " m"], ends: Int[Tensor, " e"]
    ) -> Float[Tensor, "m d"]:
        w1, w2, w3 = (
            side_by_side([getattr(expert, name).weight for expert in self.experts])
            for name in ("w1", "w2", "w3")
        )
        offsets = ends.to(torch.int32)

        def product(x: Tensor, weight: Tensor) -> Tensor:
            return torch._grouped_mm(x, weight.transpose(1, 2), offs=offsets)

        rows = tokens[order // (len(order) // len(tokens))]
        out = product(F.silu(product(rows, w1)) * product(rows, w3), w2)
        places = torch.arange(len(order), device=order.device)
        return out[torch.empty_like(order).scatter_(0, order, places)]

    def _one_by_one(
        self, tokens: Float[Tensor, "n d"], order: Int[Tensor, " m"], ends: Int[Tensor, " e"]
    ) -> Float[Tensor, "m d"]:
        k = len(order) // len(tokens)
        segments = order.split(ends.diff(prepend=ends.new_zeros(1)).tolist())
        outs = [
            expert(tokens[segment // k])
            for expert, segment in zip(self.experts, segments, strict=True)
        ]
        chosen = outs[0].new_empty(len(order), tokens.shape[1])
        for segment, out in zip(segments, outs, strict=True):
            chosen.index_copy_(0, segment, out)
        return chosen

    def _all(
        self, tokens: Float[Tensor, "n d"], routing: Routing
    ) -> tuple[Float[Tensor, "n e d"], Float[Tensor, "n e"]]:
        none = torch.zeros_like(routing.probabilities)
        shares = none.scatter(1, routing.experts, routing.weights)
        return torch.stack([expert(tokens) for expert in self.experts], dim=1), shares


def side_by_side(weights: Sequence[Float[Tensor, "o i"]]) -> Float[Tensor, "e o i"]:
    """The weights as one tensor: a view where they already lie so (see `pack`), else a copy."""
    first = weights[0]
    lie_so = not torch.compiler.is_compiling() and all(
        not w.requires_grad
        and w.data_ptr() == first.data_ptr() + i * first.nbytes
        and w.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        for i, w in enumerate(weights)
    )
    if lie_so:
        return first.as_strided((len(weights), *first.shape), (first.numel(), *first.stride()))
    return torch.stack(list(weights))


def pack(module: nn.Module) -> None:
    """Move the weights of every mixture's experts side by side, so that no step copies them.

    For inference: the weights need no gradient, before and after.
    """
    for mixture in module.modules():
        if not isinstance(mixture, MixtureOfExperts):
            continue
        for name in ("w1", "w2", "w3"):
            layers = [getattr(expert, name) for expert in mixture.experts]
            together = torch.stack([layer.weight.detach() for layer in layers])
            for layer, weight in zip(layers, together, strict=True):
                layer.weight = nn.Parameter(weight, requires_grad=False)
