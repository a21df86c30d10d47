"""O1's vision tower: a reference picture becomes tokens of the text part (Qwen3-VL's ViT)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from hidream.models.o1.config import VisionConfig
from hidream.nn.attention import attention
from hidream.nn.rope import Rope, cos_sin, inverse_frequencies, rotate

Grid = tuple[int, int]  # rows and columns of vision patches, each a multiple of merge_size


class VisionTokens(NamedTuple):
    """`tokens` take the image placeholders; `deepstack[i]` is added there after block i."""

    tokens: Float[Tensor, "v d"]
    deepstack: tuple[Float[Tensor, "v d"], ...]


class VisionTower(nn.Module):
    """Pictures of any sizes, packed one after the other; each reads only itself.

    Patches come in merge order: the merge_size² patches of one token stand together.
    """

    def __init__(self, config: VisionConfig, out_size: int):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbedding(config)
        table = torch.zeros(config.num_positions, config.hidden_size)
        self.pos_embed = nn.Embedding(config.num_positions, config.hidden_size, _weight=table)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.num_layers))
        self.merger = Merger(config, out_size, norm_merged=False)
        self.deepstack_merger_list = nn.ModuleList(
            Merger(config, out_size, norm_merged=True) for _ in config.deepstack_layers
        )

    def forward(self, patches: Float[Tensor, "p c"], grids: list[Grid]) -> VisionTokens:
        hidden = self.patch_embed(patches) + torch.cat([self._positions(g) for g in grids])
        ropes = [self._rope(grid) for grid in grids]
        rope = (torch.cat([cos for cos, _ in ropes]), torch.cat([sin for _, sin in ropes]))
        lengths = [rows * columns for rows, columns in grids]
        deepstack = []
        for i, block in enumerate(self.blocks):
            hidden = block(hidden, rope, lengths)
            if i in self.config.deepstack_layers:
                merger = self.deepstack_merger_list[self.config.deepstack_layers.index(i)]
                deepstack.append(merger(hidden))
        return VisionTokens(self.merger(hidden), tuple(deepstack))

    def _positions(self, grid: Grid) -> Float[Tensor, "p d"]:
        """The learned square table, interpolated bilinearly to `grid`, corners aligned."""
        side = round(self.config.num_positions**0.5)
        table = rearrange(self.pos_embed.weight, "(r c) d -> r c d", r=side)
        (r0, r1, wr), (c0, c1, wc) = (_interpolate(side, n, table.device) for n in grid)
        wr, wc = wr[:, None, None].to(table), wc[None, :, None].to(table)
        out = (
            (1 - wr) * (1 - wc) * table[r0][:, c0]
            + (1 - wr) * wc * table[r0][:, c1]
            + wr * (1 - wc) * table[r1][:, c0]
            + wr * wc * table[r1][:, c1]
        )
        m = self.config.merge_size
        return rearrange(out, "(r mr) (c mc) d -> (r c mr mc) d", mr=m, mc=m)

    def _rope(self, grid: Grid) -> Rope:
        """Half of a head's angles turn with the row, half with the column."""
        config, device = self.config, self.pos_embed.weight.device
        rows, columns = torch.meshgrid(
            *(torch.arange(n, device=device) for n in grid), indexing="ij"
        )
        positions = torch.stack([rows, columns], dim=-1).float()
        m = config.merge_size
        positions = rearrange(positions, "(r mr) (c mc) a -> (r c mr mc) a", mr=m, mc=m)
        frequencies = inverse_frequencies(
            config.hidden_size // config.num_heads // 2, 10_000.0, device
        )
        return cos_sin((positions[..., None] * frequencies).flatten(1))


def _interpolate(side: int, count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Lower and upper index into `side` entries, and the upper one's weight, at `count` points."""
    points = torch.linspace(0, side - 1, count, device=device)
    lower = points.long()
    return lower, (lower + 1).clamp(max=side - 1), points - lower


class PatchEmbedding(nn.Module):
    """A linear map of a whole patch, under the published name."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = WholeConv3d(3, config.hidden_size, kernel, stride=kernel)

    def forward(self, patches: Float[Tensor, "p c"]) -> Float[Tensor, "p d"]:
        return self.proj(patches)


class WholeConv3d(nn.Conv3d):
    """A 3-D convolution of inputs of its kernel's size, flattened: one matrix product."""

    def forward(self, patches: Float[Tensor, "p c"]) -> Float[Tensor, "p d"]:
        return F.linear(patches, self.weight.flatten(1), self.bias)


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.attn = VisionAttention(config)
        self.mlp = VisionMLP(config)

    def forward(self, hidden: Tensor, rope: Rope, lengths: list[int]) -> Tensor:
        hidden = hidden + self.attn(self.norm1(hidden), rope, lengths)
        return hidden + self.mlp(self.norm2(hidden))


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, rope: Rope, lengths: list[int]) -> Tensor:
        qkv = rearrange(self.qkv(hidden), "p (n h d) -> n p h d", n=3, h=self.num_heads)
        q, k, v = rotate(qkv[0], rope), rotate(qkv[1], rope), qkv[2]
        if len(set(lengths)) == 1:  # equal pictures are one batch
            q, k, v = (rearrange(t, "(b p) h d -> b p h d", b=len(lengths)) for t in (q, k, v))
            out = attention(q, k, v).flatten(0, 1)
        else:
            pictures = zip(*(t.split(lengths) for t in (q, k, v)), strict=True)
            out = torch.cat([attention(*(t[None] for t in qkv))[0] for qkv in pictures])
        return self.proj(out.flatten(1))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.linear_fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(hidden), approximate="tanh"))


class Merger(nn.Module):
    """merge_size² neighbouring patches become one token of the decoder's width."""

    def __init__(self, config: VisionConfig, out_size: int, *, norm_merged: bool):
        super().__init__()
        self.merged_size = config.hidden_size * config.merge_size**2
        self.norm_merged = norm_merged
        self.norm = nn.LayerNorm(self.merged_size if norm_merged else config.hidden_size, eps=1e-6)
        self.linear_fc1 = nn.Linear(self.merged_size, self.merged_size)
        self.linear_fc2 = nn.Linear(self.merged_size, out_size)

    def forward(self, hidden: Float[Tensor, "p d"]) -> Float[Tensor, "v o"]:
        if self.norm_merged:
            hidden = self.norm(hidden.reshape(-1, self.merged_size))
        else:
            hidden = self.norm(hidden).reshape(-1, self.merged_size)
        return self.linear_fc2(F.gelu(self.linear_fc1(hidden)))
