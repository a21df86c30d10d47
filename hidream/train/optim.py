"""What happens after the backward pass: clipping, learning rate, update, moving average."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from hidream.train.config import Optimizer, Stage
from hidream.train.distributed import World
from hidream.train.muon import Muon
from hidream.train.sharding import by_mesh, local, num_copies

# What is inside O1's decoder and vision tower; in I1's blocks, but for gates and adaLN; in a VAE.
INNER = (
    *(".layers.", ".blocks.", "merger"),
    *(".attn1.", ".experts.", ".shared_experts.", ".ff_t."),
    *(".resnets.", "samplers."),
)
ADAMW_RMS = 0.2  # of what AdamW adds to a weight at rate 1, on the whole: arXiv 2502.16982


def build_optimizers(
    model: nn.Module, options: Optimizer, world: World | None = None
) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the matrices inside the transformers where the recipe asks for it.

    What needs no gradient has no optimizer.
    """
    inner, decayed, kept = split_parameters(model, options)
    groups = [
        {"params": params, "weight_decay": decay}
        for together, decay in ((decayed, options.weight_decay), (kept, 0.0))
        for params in by_mesh(together)
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=0.0, betas=options.betas, eps=options.eps, fused=True)
    ]
    if inner:
        decay, rms = options.weight_decay, ADAMW_RMS * options.muon
        optimizers.append(Muon(inner, rms=rms, weight_decay=decay, world=world))
    return optimizers


def split_parameters(
    model: nn.Module, options: Optimizer
) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """What Muon updates; what AdamW updates and decays; what it updates alone.

    Norms, biases and embedding tables do not decay.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    inner: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if options.muon > 0 and parameter.ndim in (2, 4) and any(part in name for part in INNER):
            inner.append(parameter)
        elif parameter.ndim >= 2 and id(parameter) not in tables:
            decayed.append(parameter)
        else:
            kept.append(parameter)
    return inner, decayed, kept


def learning_rate(stages: Sequence[Stage], step: int) -> float:
    """The rate of the run's step `step` (from 0): ramp, hold, linear fall, stage after stage.

    A ramp starts from the rate at which the stage before ended (0 in the first stage) and reaches
    the stage's rate with its last step, so the very first step already moves.
    """
    start = 0.0
    for stage in stages:
        if step >= stage.steps:
            step -= stage.steps
            start = stage.final_rate if stage.decay else stage.learning_rate
            continue
        if step < stage.warmup:
            return start + (stage.learning_rate - start) * (step + 1) / stage.warmup
        left = stage.steps - step  # 1 in the last step
        if left <= stage.decay:
            return stage.final_rate + (stage.learning_rate - stage.final_rate) * left / stage.decay
        return stage.learning_rate
    return start


def set_learning_rate(optimizers: Sequence[torch.optim.Optimizer], rate: float) -> None:
    """Give every parameter group the same rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[Tensor], limit: float, shares: World | None = None
) -> Tensor:
    """Scale gradients down to norm `limit` if they exceed it (0: never). Returns their norm.

    `shares`: the processes that have shares of them, if they are sharded.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    own = [local(gradient) for gradient in gradients]
    norms = torch.stack(torch._foreach_norm(own))
    if shares is None:
        norm = torch.linalg.vector_norm(norms)
    else:
        copies = norms.new_tensor([num_copies(gradient, shares.size) for gradient in gradients])
        square = (norms.square() / copies).sum()
        shares.sum_in_place(square)
        norm = square.sqrt()
    if limit > 0:
        scale = torch.clamp(limit / (norm + 1e-6), max=1.0)
        torch._foreach_mul_(own, scale)
    return norm


def ema_decay(limit: float, step: int) -> float:
    """Decay of the moving average at `step` (from 0): min(limit, (1 + step) / (10 + step)).

    The short memory at the start forgets the random initialisation.
    """
    return min(limit, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(ema: list[Tensor], weights: list[Tensor], decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * weights, in place and in fp32."""
    torch._foreach_lerp_(ema, weights, 1.0 - decay)
