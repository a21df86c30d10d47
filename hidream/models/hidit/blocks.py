"""Hi-DiT's layers: SiT's, and how latent and pixel tokens share one block.

They are those of DiT (arXiv 2212.09748) and SiT (arXiv 2401.08740), by the names of their
checkpoints. Every linear layer serves both kinds of token; each kind is normed, shifted, scaled
and gated by a condition of its own (adaLN). They meet in attention alone, and `attention` of the
configuration says how:

- `readonly`: pixels read latents and pixels, latents read latents. No pixel can change a latent.
- `full`: in the rows that have pixels, both read both.
- `add`: there are no pixel tokens; pixels were added to the latent tokens before the first block.

The two kinds never share a matrix product, not even where one layer serves both: how a product of
more rows is rounded may differ, and a latent's bits would then depend on there being pixels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from hidream.models.hidit.config import HiDiTConfig
from hidream.nn.attention import Backend, attention

NUM_FREQUENCIES = 256


class Block(nn.Module):
    """Attention and a feed-forward layer, for latents alone or for both kinds of token."""

    def __init__(self, config: HiDiTConfig, backend: Backend = "auto"):
        super().__init__()
        size = config.hidden_size
        self.attn = Attention(config, backend)
        self.mlp = FeedForward(size, int(size * config.mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(size, 6 * size))

    def forward(
        self,
        latents: Float[Tensor, "b l d"],
        condition: Float[Tensor, "b d"],
        pixels: Float[Tensor, "g l d"] | None = None,
        pixel_condition: Float[Tensor, "g d"] | None = None,
        rows: Int[Tensor, " g"] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The tokens behind the block. `rows`: which latents the pixels belong to; None: all."""
        shift, scale, gate, *ff = self._modulation(condition)
        normed = modulate(latents, shift, scale)
        if pixels is None or pixel_condition is None:
            latents = torch.addcmul(latents, gate, self.attn(normed))
            return self._feed(latents, *ff), None
        shift_p, scale_p, gate_p, *ff_p = self._modulation(pixel_condition)
        read, read_p = self.attn.joint(normed, modulate(pixels, shift_p, scale_p), rows)
        latents = torch.addcmul(latents, gate, read)
        pixels = torch.addcmul(pixels, gate_p, read_p)
        return self._feed(latents, *ff), self._feed(pixels, *ff_p)

    def _modulation(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate (b, 1, d) of attention, then of the feed-forward layer."""
        return self.adaLN_modulation(condition)[:, None].chunk(6, dim=-1)

    def _feed(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        return torch.addcmul(x, gate, self.mlp(modulate(x, shift, scale)))


class Attention(nn.Module):
    """Multi-head attention; `joint` is that of two kinds of token."""

    def __init__(self, config: HiDiTConfig, backend: Backend = "auto"):
        super().__init__()
        size, head_dim = config.hidden_size, config.hidden_size // config.num_heads
        self.num_heads = config.num_heads
        self.mode = config.attention
        self.backend: Backend = backend
        self.qkv = nn.Linear(size, 3 * size)
        self.proj = nn.Linear(size, size)
        self.q_norm = nn.LayerNorm(head_dim) if config.qk_norm else None
        self.k_norm = nn.LayerNorm(head_dim) if config.qk_norm else None

    def forward(self, latents: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        return self.proj(self._read(*self._project(latents)))

    def joint(
        self,
        latents: Float[Tensor, "b l d"],
        pixels: Float[Tensor, "g l d"],
        rows: Int[Tensor, " g"] | None,
    ) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "g l d"]]:
        """What latents read and what pixels read; `rows` are those latents that have pixels."""
        q, kv = self._project(latents)
        q_p, kv_p = self._project(pixels)
        both = torch.cat([take(kv, rows), kv_p], dim=1)
        if self.mode == "readonly":
            read, read_p = self._read(q, kv), self._read(q_p, both)
        else:
            mutual = self._read(torch.cat([take(q, rows), q_p], dim=1), both)
            read, read_p = mutual.chunk(2, dim=1)
            if rows is not None:
                read = self._read(q, kv).index_copy(0, rows, read)
        return self.proj(read), self.proj(read_p)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (b, l, h, d), and keys and values in one tensor (b, l, 2, h, d)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, kv = qkv[:, :, 0], qkv[:, :, 1:]
        if self.q_norm is None or self.k_norm is None:
            return q, kv
        k, v = kv.unbind(2)
        return self.q_norm(q), torch.stack([self.k_norm(k).to(v.dtype), v], dim=2)

    def _read(self, q: Tensor, kv: Tensor) -> Tensor:
        k, v = kv.unbind(2)
        return attention(q.to(k.dtype), k, v, backend=self.backend).flatten(-2)


class FeedForward(nn.Module):
    """A linear map, GELU in its tanh form, another one."""

    def __init__(self, size: int, inner_size: int):
        super().__init__()
        self.fc1 = nn.Linear(size, inner_size)
        self.fc2 = nn.Linear(inner_size, size)

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class FinalLayer(nn.Module):
    """A token → its patch of the velocity."""

    def __init__(self, size: int, patch_dim: int):
        super().__init__()
        self.linear = nn.Linear(size, patch_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(size, 2 * size))

    def forward(
        self, tokens: Float[Tensor, "b l d"], condition: Float[Tensor, "b d"]
    ) -> Float[Tensor, "b l p"]:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(tokens, shift, scale))


class PatchEmbedder(nn.Module):
    """Square patches → tokens: a convolution whose windows do not overlap is a matrix product."""

    def __init__(self, channels: int, patch_size: int, size: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(channels, size, patch_size, stride=patch_size)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b l d"]:
        p = self.patch_size
        patches = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class TimestepEmbedder(nn.Module):
    """sigma, as it is in [0, 1] → 256 sinusoids, cosines first → two linear maps."""

    def __init__(self, size: int):
        super().__init__()
        first = nn.Linear(NUM_FREQUENCIES, size)
        self.mlp = nn.Sequential(first, nn.SiLU(), nn.Linear(size, size))

    def forward(self, sigma: Float[Tensor, " b"]) -> Float[Tensor, "b d"]:
        half = NUM_FREQUENCIES // 2
        steps = torch.arange(half, dtype=torch.float32, device=sigma.device)
        angles = sigma.float()[:, None] * torch.exp(-math.log(10_000) / half * steps)
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(sinusoids.to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """A class → its row; the last row is the null label's."""

    def __init__(self, num_classes: int, size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, size)

    def forward(self, labels: Int[Tensor, " b"]) -> Float[Tensor, "b d"]:
        return self.embedding_table(labels)


def projector(size: int, width: int, feature_size: int) -> nn.Sequential:
    """REPA's three maps from a token to an encoder's feature."""
    return nn.Sequential(
        nn.Linear(size, width),
        nn.SiLU(),
        nn.Linear(width, width),
        nn.SiLU(),
        nn.Linear(width, feature_size),
    )


def modulate(
    x: Float[Tensor, "b l d"], shift: Float[Tensor, "b 1 d"], scale: Float[Tensor, "b 1 d"]
) -> Float[Tensor, "b l d"]:
    """norm(x) · (1 + scale) + shift; the norm has no weights."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def take(x: Float[Tensor, " b *rest"], rows: Int[Tensor, " g"] | None) -> Float[Tensor, " g *rest"]:
    """These rows of a batch; None is all of them, and no copy."""
    return x if rows is None else x.index_select(0, rows)


def positions(size: int, grid: int) -> Float[Tensor, "1 l size"]:
    """SiT's fixed sinusoids of a square grid, row by row.

    The first half of the width tells the column, the second the row, each as sines and then
    cosines of 10000^(−4i/size), as in MAE (arXiv 2111.06377).
    """
    quarter = size // 4
    frequencies = 1 / 10_000 ** (np.arange(quarter) / quarter)
    angles = np.arange(grid)[:, None] * frequencies
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (grid, size / 2)
    of_columns = np.broadcast_to(line[None], (grid, grid, size // 2))
    of_rows = np.broadcast_to(line[:, None], (grid, grid, size // 2))
    table = np.concatenate([of_columns, of_rows], axis=-1).reshape(1, grid**2, size)
    return torch.from_numpy(table.astype(np.float32))
