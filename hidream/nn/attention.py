"""The one door for attention: every model calls `attention`, the backend is an argument."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from hidream.nn.sparse import Sparse, sparse_attention

Backend = Literal["auto", "sdpa", "math"]


def attention(
    q: Float[Tensor, "b l h d"],
    k: Float[Tensor, "b s g d"],
    v: Float[Tensor, "b s g d"],
    *,
    mask: Bool[Tensor, "#b #l s"] | None = None,
    bias: Float[Tensor, " s"] | None = None,
    causal: bool = False,
    sparse: Sparse | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "b l h d"]:
    """Softmax attention of `h` query heads over `g` key/value heads (`g` divides `h`).

    `mask` is True where a query may read a key. `bias` is added to every logit of its key: a key
    that stands for n equal ones has ln n. `causal` needs as many queries as keys. `sparse` leaves
    out blocks of keys that seem to matter least to a block of queries: `hidream.nn.sparse`.
    Backends: "sdpa" is PyTorch's fused kernel; "math" writes the two products and the softmax
    out, which torch.compile fuses better than the fused kernel runs below some 200 tokens on a
    CPU in training (a backward in bf16 is 2–4 times faster). "auto" is "sdpa".
    """
    if sum((mask is not None, bias is not None, causal)) > 1:
        raise ValueError("give attention() one of mask, bias and causal=True")
    if sparse is not None:
        if mask is not None or causal:
            raise ValueError("sparse attention takes neither mask nor causal=True")
        return sparse_attention(
            q,
            k,
            v,
            sparse,
            bias=bias,
            read=lambda q, k, v, bias: attention(q, k, v, bias=bias, backend=backend),
        )
    if backend == "math":
        return _math(q, k, v, mask, bias, causal)
    if backend not in ("auto", "sdpa"):
        raise ValueError(f'unknown attention backend "{backend}"; use auto, sdpa or math')
    if mask is not None and q.is_cuda and q.shape[2] != k.shape[2]:
        # of the fused kernels those that take a mask take no groups
        k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for t in (k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (b, heads, tokens, d)
    added = bias.to(q.dtype)[None, None, None] if bias is not None else None
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=added if mask is None else mask[:, None],
        is_causal=causal,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.transpose(1, 2)


def _math(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, causal: bool
) -> Tensor:
    groups = q.shape[2] // k.shape[2]
    if groups > 1:
        k, v = (t.repeat_interleave(groups, dim=2) for t in (k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])  # (b, h, l, s)
    if bias is not None:
        scores = scores + bias
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()[None]
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], float("-inf"))
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)
