"""I1's layers: joint attention, the two kinds of block, embedders and the final layer.

Every norm is followed by a shift, a scale and, after the layer, a gate that depend on the noise
level and on the pooled text alone (adaLN, arXiv 2212.09748). They come in from outside as
`modulation`, so that they can be computed for all steps at once: see `I1.modulations`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from hidream.models.i1.config import I1Config
from hidream.nn.attention import Backend, attention
from hidream.nn.moe import FeedForward, MixtureOfExperts, Routing
from hidream.nn.rope import Rope, rotate_pairs


@dataclass(frozen=True)
class Where:
    """What attention must know of the tokens, which stand as [picture, pad, text, caption].

    `rope`: (l, r) angles of all of them; those that are no patch do not turn. `first`: the
    dimension of a head at which the turning ones begin. `pad`: the place of the token that stands
    for all the padding, whose key is zero; `bias`: (l,), its log-count. None: there is none.
    """

    rope: Rope
    first: int
    pad: int | None
    bias: Float[Tensor, " l"] | None
    backend: Backend = "auto"

    def rotate(self, x: Float[Tensor, "b l h d"]) -> Float[Tensor, "b l h d"]:
        """Where no gradient is asked for, x itself is rotated."""
        cos, sin = (t[: x.shape[1]] for t in self.rope)
        return rotate_pairs(x, (cos, sin), self.first, overwrite=not torch.is_grad_enabled())

    def keys(self, k: Float[Tensor, "b l h d"]) -> Float[Tensor, "b l h d"]:
        """Rotated, and the padding's zero: the published mask multiplies keys, not logits."""
        k = self.rotate(k)
        if self.pad is not None:
            k[:, self.pad] = 0
        return k


class Attention(nn.Module):
    """One attention over all tokens; queries and keys are normed over the whole width.

    In a block with two streams the text has maps and norms of its own, named `…_t`.
    """

    def __init__(self, size: int, num_heads: int, *, two_streams: bool):
        super().__init__()
        self.head_dim = size // num_heads
        for suffix in ("", "_t") if two_streams else ("",):
            for name in ("to_q", "to_k", "to_v", "to_out"):
                self.add_module(name + suffix, nn.Linear(size, size))
            for name in ("q_rms_norm", "k_rms_norm"):
                self.add_module(name + suffix, RMSNorm(size))

    def forward(
        self, hidden: Float[Tensor, "b l d"], num_read: int, where: Where
    ) -> Float[Tensor, "b n d"]:
        """Of one stream: what its first `num_read` tokens read in all of them."""
        q, k, v = self._project(hidden, num_read)
        out = self._read(where.rotate(q), where.keys(k), v, where)
        return self._layer("to_out", out)

    def joint(
        self,
        image: Float[Tensor, "b i d"],
        text: Float[Tensor, "b t d"],
        num_read: tuple[int, int],
        where: Where,
    ) -> tuple[Tensor, Tensor]:
        """Of two streams: what the first tokens of each read in both; the text does not turn."""
        q, k, v = self._project(image, num_read[0])
        q_t, k_t, v_t = self._project(text, num_read[1], "_t")
        out = self._read(
            torch.cat([where.rotate(q), q_t], dim=1),
            torch.cat([where.keys(k), k_t], dim=1),
            torch.cat([v, v_t], dim=1),
            where,
        )
        of_image, of_text = out.split(list(num_read), dim=1)
        return self._layer("to_out", of_image), self._layer("to_out_t", of_text)

    def _project(
        self, hidden: Tensor, num_read: int, suffix: str = ""
    ) -> tuple[Tensor, Tensor, Tensor]:
        q = self._layer("q_rms_norm" + suffix, self._layer("to_q" + suffix, hidden[:, :num_read]))
        k = self._layer("k_rms_norm" + suffix, self._layer("to_k" + suffix, hidden))
        v = self._layer("to_v" + suffix, hidden)
        q, k, v = (rearrange(t, "b l (h d) -> b l h d", d=self.head_dim) for t in (q, k, v))
        return q, k, v

    def _layer(self, name: str, x: Tensor) -> Tensor:
        layer: nn.Module = getattr(self, name)
        return layer(x)

    def _read(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> Tensor:
        out = attention(q, k, v, bias=where.bias, backend=where.backend)
        return rearrange(out, "b l h d -> b l (h d)")


class RMSNorm(nn.Module):
    """x / rms(x) · weight; where no gradient is asked for, x itself may become it."""

    def __init__(self, size: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        if torch.is_grad_enabled() or x.dtype != torch.float32 or x.is_cuda:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        # PyTorch has no kernel for this on a CPU, and makes four tensors on the way.
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x.mul_((length.square() / x.shape[-1] + self.eps).rsqrt()).mul_(self.weight)


class DoubleBlock(nn.Module):
    """Picture and text each have weights of their own and meet in attention alone."""

    def __init__(self, config: I1Config):
        super().__init__()
        size = config.size
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(size, 12 * size))
        self.attn1 = Attention(size, config.num_heads, two_streams=True)
        self.ff_i = _feed_forward(config)
        self.ff_t = FeedForward(size, config.expert_size)

    def forward(
        self,
        image: Float[Tensor, "b i d"],
        text: Float[Tensor, "b t d"],
        caption: Float[Tensor, "b c d"],
        modulation: Float[Tensor, "b 12 d"],
        where: Where,
        num_needed: tuple[int, int],
    ) -> tuple[Tensor, Tensor, Routing | None]:
        """`caption` is read and goes; of the rest, the first `num_needed` of each are computed."""
        of_image, of_text = modulation[:, :, None].chunk(2, dim=1)
        shift, scale, gate, shift_ff, scale_ff, gate_ff = of_image.unbind(1)
        shift_t, scale_t, gate_t, shift_ff_t, scale_ff_t, gate_ff_t = of_text.unbind(1)
        read, read_t = self.attn1.joint(
            modulate(image, shift, scale),
            modulate(torch.cat([text, caption], dim=1), shift_t, scale_t),
            num_needed,
            where,
        )
        image = torch.addcmul(image[:, : num_needed[0]], gate, read)
        out, routing = _fed(self.ff_i, modulate(image, shift_ff, scale_ff))
        image = torch.addcmul(image, gate_ff, out)
        text = torch.addcmul(text[:, : num_needed[1]], gate_t, read_t)
        out_t = self.ff_t(modulate(text, shift_ff_t, scale_ff_t))
        text = torch.addcmul(text, gate_ff_t, out_t)
        return image, text, routing


class SingleBlock(nn.Module):
    """Picture and text are one sequence with one set of weights."""

    def __init__(self, config: I1Config):
        super().__init__()
        size = config.size
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(size, 6 * size))
        self.attn1 = Attention(size, config.num_heads, two_streams=False)
        self.ff_i = _feed_forward(config)

    def forward(
        self,
        hidden: Float[Tensor, "b l d"],
        caption: Float[Tensor, "b c d"],
        modulation: Float[Tensor, "b 6 d"],
        where: Where,
        num_needed: int,
    ) -> tuple[Tensor, Routing | None]:
        """`caption` is read and goes; of the rest, the first `num_needed` are computed."""
        shift, scale, gate, shift_ff, scale_ff, gate_ff = modulation[:, :, None].unbind(1)
        whole = modulate(torch.cat([hidden, caption], dim=1), shift, scale)
        read = self.attn1(whole, num_needed, where)
        hidden = torch.addcmul(hidden[:, :num_needed], gate, read)
        out, routing = _fed(self.ff_i, modulate(hidden, shift_ff, scale_ff))
        return torch.addcmul(hidden, gate_ff, out), routing


class Named(nn.Module):
    """The published names have a `block` around every block."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block


class TimestepEmbedder(nn.Module):
    """t in [0, 1000], 1000 is noise → 256 sinusoids, cosines first → two linear maps."""

    def __init__(self, size: int, num_frequencies: int = 256):
        super().__init__()
        self.num_frequencies = num_frequencies
        self.timestep_embedder = TwoMaps(num_frequencies, size)

    def forward(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b d"]:
        half = self.num_frequencies // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t.float()[..., None] * torch.exp(-math.log(10_000) * steps / half)
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.timestep_embedder(sinusoids.to(self.timestep_embedder.linear_1.weight.dtype))


class PooledEmbedder(nn.Module):
    """Both CLIPs' pooled text, side by side → the width."""

    def __init__(self, pooled_size: int, size: int):
        super().__init__()
        self.pooled_embedder = TwoMaps(pooled_size, size)

    def forward(self, pooled: Float[Tensor, "*b p"]) -> Float[Tensor, "*b d"]:
        return self.pooled_embedder(pooled)


class TwoMaps(nn.Module):
    """A linear map, SiLU, another one."""

    def __init__(self, in_size: int, size: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_size, size)
        self.linear_2 = nn.Linear(size, size)

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b d"]:
        return self.linear_2(F.silu(self.linear_1(x)))


class PatchEmbedder(nn.Module):
    def __init__(self, patch_dim: int, size: int):
        super().__init__()
        self.proj = nn.Linear(patch_dim, size)

    def forward(self, patches: Float[Tensor, "*b p"]) -> Float[Tensor, "*b d"]:
        return self.proj(patches)


class CaptionProjection(nn.Module):
    def __init__(self, feature_size: int, size: int):
        super().__init__()
        self.linear = nn.Linear(feature_size, size, bias=False)

    def forward(self, features: Float[Tensor, "*b f"]) -> Float[Tensor, "*b d"]:
        return self.linear(features)


class FinalLayer(nn.Module):
    """A token → its patch of data − noise."""

    def __init__(self, size: int, patch_dim: int):
        super().__init__()
        self.linear = nn.Linear(size, patch_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(size, 2 * size))

    def forward(
        self, hidden: Float[Tensor, "b l d"], modulation: Float[Tensor, "b 2 d"]
    ) -> Float[Tensor, "b l p"]:
        shift, scale = modulation[:, :, None].unbind(1)
        return self.linear(modulate(hidden, shift, scale))


def modulate(
    x: Float[Tensor, "b l d"], shift: Float[Tensor, "b 1 d"], scale: Float[Tensor, "b 1 d"]
) -> Float[Tensor, "b l d"]:
    """norm(x) · (1 + scale) + shift; the norm has no weights."""
    if len(x) == 1:  # then these are weights, and all is one pass over memory
        return F.layer_norm(x, x.shape[-1:], 1 + scale[0, 0], shift[0, 0], eps=1e-6)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def _feed_forward(config: I1Config) -> FeedForward | MixtureOfExperts:
    if config.num_experts == 0:
        return FeedForward(config.size, config.expert_size)
    return MixtureOfExperts(
        config.size,
        num_experts=config.num_experts,
        top_k=config.num_active_experts,
        expert_size=config.expert_size,
        shared_size=config.shared_size,
    )


def _fed(layer: nn.Module, x: Tensor) -> tuple[Tensor, Routing | None]:
    return layer(x) if isinstance(layer, MixtureOfExperts) else (layer(x), None)
