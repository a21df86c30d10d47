"""Muon: momentum whose singular values are made equal, for the matrices inside the network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hidream.train.distributed import World

# p(s) = a s + b s^3 + c s^5 moves every singular value in (0, 1] to about 1 within five rounds:
# Keller Jordan, https://kellerjordan.github.io/posts/muon
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 5


class Muon(torch.optim.Optimizer):
    """Matrices of one shape are one group and one batched product; processes share the work.

    torch.optim.Muon is the same rule (a test compares them), one matrix at a time and in bfloat16,
    which takes 1.4 times as long on a CPU. `rms`: of the values of an update at rate 1. Every
    process of `world` must hold the same gradients.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        *,
        rms: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        world: World | None = None,
    ):
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for matrix in matrices:
            by_shape.setdefault(matrix.shape, []).append(matrix)
        groups = [{"params": group} for group in by_shape.values()]
        super().__init__(groups, {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay})
        self.rms, self.world = rms, world or World()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient; `closure` must be None."""
        assert closure is None
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            if not matrices:
                continue
            momenta = self._momenta(matrices, group).flatten(2)  # a convolution is out × (in h w)
            updates = self._orthogonal(momenta).view(-1, *matrices[0].shape)
            scale = self.rms * max(momenta.shape[1:]) ** 0.5
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(matrices, list(updates), alpha=-group["lr"] * scale)

    def _momenta(
        self, matrices: list[nn.Parameter], group: dict[str, Any]
    ) -> Float[Tensor, "n rows *columns"]:
        """Nesterov's: the gradient mixed with its moving average, which this step has joined."""
        gradients = [p.grad for p in matrices if p.grad is not None]
        for p in matrices:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        averages = [self.state[p]["momentum"] for p in matrices]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        return torch.stack(torch._foreach_lerp(gradients, averages, group["momentum"]))

    def _orthogonal(self, momenta: Float[Tensor, "n r c"]) -> Float[Tensor, "n r c"]:
        """Each process works out every size-th matrix; their sum is all of them, to the bit."""
        rank, size = self.world.rank, self.world.size
        if size == 1:
            return orthogonal(momenta)
        updates = torch.zeros_like(momenta)
        updates[rank::size] = orthogonal(momenta[rank::size])
        self.world.sum_in_place(updates)
        return updates


def orthogonal(matrices: Float[Tensor, "n r c"]) -> Float[Tensor, "n r c"]:
    """U V^T of each matrix U S V^T, nearly: its singular values come out between 0.7 and 1.2."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
