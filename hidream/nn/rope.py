"""Rotary position embedding: angles from positions, and the rotation itself."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

Rope = tuple[Tensor, Tensor]  # (cos, sin), each (..., l, head_dim), fp32


def rotate(x: Float[Tensor, "*b l h d"], rope: Rope) -> Float[Tensor, "*b l h d"]:
    """Rotate the pairs (x_i, x_{i + d/2}) by the angles in `rope`, in fp32."""
    cos, sin = (t.unsqueeze(-2) for t in rope)
    x1, x2 = x.float().chunk(2, dim=-1)
    x_perpendicular = torch.cat([-x2, x1], dim=-1)
    return (x.float() * cos + x_perpendicular * sin).to(x.dtype)


def cos_sin(angles: Float[Tensor, "*b l half"]) -> Rope:
    """Cosine and sine for both halves of a head from `head_dim / 2` angles."""
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def inverse_frequencies(dim: int, theta: float, device: torch.device) -> Float[Tensor, " half"]:
    """theta^(−2i/dim) for i in [0, dim/2): RoFormer (arXiv 2104.09864), eq. 15."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    return 1.0 / theta**exponents


def interleaved_mrope(
    positions: Int[Tensor, "3 *b l"], head_dim: int, theta: float, sections: tuple[int, int, int]
) -> Rope:
    """Qwen3-VL's rotary embedding of (time, row, column) positions.

    The `head_dim / 2` frequencies are dealt out in turn, time–row–column, until row and column
    have their `sections`; time keeps the rest. Text has three equal positions, for which this is
    ordinary RoPE.
    """
    frequencies = inverse_frequencies(head_dim, theta, positions.device)
    axis = torch.zeros(head_dim // 2, dtype=torch.long, device=positions.device)
    for i in (1, 2):
        axis[i : 3 * sections[i] : 3] = i
    position = positions.float().movedim(0, -1)[..., axis]  # (*b, l, head_dim / 2)
    return cos_sin(position * frequencies)
