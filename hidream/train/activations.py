"""Activation checkpointing: a block's values are computed anew in the backward pass, not kept."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

# What "selective" keeps: where the arithmetic is. The rest is norms, rotations and sums.
_aten = torch.ops.aten
KEPT = {
    *(_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default),
    _aten._grouped_mm.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_fused_attention_overrideable.default,
}


def recompute(blocks: Sequence[nn.Module], how: str) -> None:
    """Have the blocks compute anew all ("full"), all but matrix products and attention
    ("selective"), or nothing ("none"), with the same bits either way.

    A block must be a function of what it is called with, and of its device's random numbers.
    """
    if how == "none":
        return
    more: dict[str, Any] = {}
    if how == "selective":
        more["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for block in blocks:
        _checkpoint(block, more)


def _checkpoint(block: nn.Module, more: dict[str, Any]) -> None:
    inner = block.forward

    def forward(*arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return inner(*arguments, **named)
        run = partial(inner, **named)
        return checkpoint(run, *arguments, use_reentrant=False, **more)

    block.forward = forward  # type: ignore[method-assign]


def _policy(_context: Any, operation: Any, *_arguments: Any, **_named: Any) -> CheckpointPolicy:
    kept = operation in KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
