"""Tensor parallel: processes share the matrices of O1's decoder, each with some of its heads.

q, k, v, gate and up are divided by what they put out, o and down by what they read (Megatron-LM,
arXiv 1909.08053), so that a block waits for the others twice in the forward pass and twice in the
backward. What reads and writes the residual stays whole in every process, and the same.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from hidream.models.o1.decoder import Block, Decoder


def split_matrices(decoder: Decoder, mesh: DeviceMesh) -> None:
    """Leave this process its part of every matrix in the decoder's blocks.

    Queries, keys and values inside attention are then those of its own heads: a prefix's cache,
    too. `mesh` must divide the numbers of heads and the inner size.
    """
    for block in decoder.layers:
        parallelize_module(block, mesh, _plan())


def _plan() -> dict[str, ParallelStyle]:
    def read_together(num_others: int) -> ParallelStyle:
        """One sum of the gradients of what several matrices read, instead of one for each."""
        layouts = (Replicate(), *(None for _ in range(num_others)))
        return PrepareModuleInput(input_layouts=layouts, desired_input_layouts=layouts)

    return {
        "self_attn": read_together(2),
        **{f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
        "self_attn.o_proj": RowwiseParallel(),
        "mlp": read_together(0),
        **{f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")},
        "mlp.down_proj": RowwiseParallel(),
    }


def of_own_heads(decoder: Decoder) -> list[nn.Parameter]:
    """Whole parameters that this process used for its own heads: their gradients are parts."""
    blocks = [block for block in decoder.layers if isinstance(block, Block)]
    norms = [norm for b in blocks for norm in (b.self_attn.q_norm, b.self_attn.k_norm)]
    return [norm.weight for norm in norms]
