"""Rotary position embedding: angles from positions, and the rotation itself."""

from __future__ import annotations

from collections.abc import Sequence

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


def rotate_pairs(
    x: Float[Tensor, "*b l h d"], rope: Rope, first: int = 0, *, overwrite: bool = False
) -> Float[Tensor, "*b l h d"]:
    """Rotate the pairs (x_i, x_{i+1}), i = first, first + 2, …, by the angles in `rope`, in fp32.

    `rope` has (l, r) angles, one a pair; dimensions before `first` and from `first + 2r` stay.
    With `overwrite` the result may be `x` itself.
    """
    cos, sin = (t.unsqueeze(-2) for t in rope)  # (l, 1, r)
    rotated = 2 * cos.shape[-1]
    before, turned, after = x.split([first, rotated, x.shape[-1] - first - rotated], dim=-1)
    pairs = turned.float().unflatten(-1, (-1, 2))
    if pairs.is_cuda or torch.compiler.is_compiling():
        even, odd = pairs.unbind(-1)
        pairs = torch.stack([cos * even - sin * odd, sin * even + cos * odd], dim=-1)
    else:  # one pass over memory instead of eight
        points, turn = torch.view_as_complex(pairs), torch.complex(cos, sin)
        if overwrite and x.dtype == torch.float32:
            points.mul_(turn)
            return x
        pairs = torch.view_as_real(points * turn)
    return torch.cat([before, pairs.flatten(-2).to(x.dtype), after], dim=-1)


def axial_angles(positions: Int[Tensor, "axes l"], dims: Sequence[int], theta: float) -> Rope:
    """Cosine and sine, fp32, of positions · theta^(−2i/dim), axis by axis: (l, sum(dims) / 2).

    The angles are computed in fp64: FLUX (github.com/black-forest-labs/flux), `rope`.
    """
    angles = []
    for position, dim in zip(positions, dims, strict=True):
        exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
        angles.append(torch.outer(position.cpu().double(), 1.0 / theta**exponents))
    angle = torch.cat(angles, dim=-1)
    cos, sin = angle.cos().float(), angle.sin().float()
    return cos.to(positions.device), sin.to(positions.device)
