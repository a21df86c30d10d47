"""O1-Image's network: text, reference pictures and noisy pixel patches in one token sequence.

                      logits                       x0, the clean patches
                        ↑                              ↑
                     lm_head                     final_layer2
    ┌───────────────────┴──────────────────────────────┴───────────────────────┐
    │  language_model: Decoder – text reads what is before it, generated all  │
    └──────↑───────────────↑──────────────────↑─────────↑───────────────↑──────┘
      visual (ViT)   embed_tokens        t_embedder1  x_embedder    x_embedder
           ↑               ↑                  ↑         ↑               ↑
      references        caption             time   noisy patches   references
    └─────────── prefix, causal ───────┘└───────────── generated ──────────────┘

The prefix depends on neither time nor noise nor any later token: `prefill` computes its keys and
values once, and each denoising step (`velocity`) runs the generated tokens alone.
`forward` runs whole sequences at once, as many as there are, packed: that is training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hidream.errors import ModelError
from hidream.models.o1.batch import Batch
from hidream.models.o1.config import O1Config
from hidream.models.o1.decoder import Decoder
from hidream.models.o1.patches import cosine_basis
from hidream.models.o1.tokens import Tokens
from hidream.models.o1.vision import VisionTokens, VisionTower
from hidream.models.placement import Elsewhere
from hidream.nn.attention import Backend, attention
from hidream.nn.rope import Rope
from hidream.nn.sparse import Blocks

CONSTANT = 1.25  # of a fresh patch token, as a root mean square over its channels


@dataclass(frozen=True)
class Prediction:
    """What `forward` returns: clean patches, packed as the batch is, and logits of the tokens that
    follow the text positions asked for."""

    x0: Float[Tensor, "n p"] | None
    logits: Float[Tensor, "m vocab"] | None


@dataclass(frozen=True)
class Prefix:
    """All that does not change from step to step, for a batch of requests of one size.

    `keys[layer][row]`, `values[layer][row]`: (a, kv_heads, head_dim) of a request's causal tokens.
    `references[row]`: (r, d), embedded patches. `ropes[row]`: angles of its generated tokens.
    `last[row]`: the last causal token's hidden state, from which an answer's first token is read.
    `blocks`: with sparse attention, the order of the target's patches, in which their `ropes` are.
    """

    keys: tuple[tuple[Tensor, ...], ...]
    values: tuple[tuple[Tensor, ...], ...]
    references: tuple[Float[Tensor, "_ d"], ...]
    ropes: tuple[Rope, ...]
    last: Float[Tensor, "b d"]
    blocks: Blocks | None = None

    def __len__(self) -> int:
        return len(self.last)

    @staticmethod
    def join(prefixes: Sequence[Prefix]) -> Prefix:
        """All rows of several prefixes as one, in their order."""
        if any(p.blocks != prefixes[0].blocks for p in prefixes):
            raise ValueError("prefixes of different sizes or sparsities cannot be joined")
        keys, values = (
            tuple(
                tuple(row for rows in layer for row in rows) for layer in zip(*parts, strict=True)
            )
            for parts in ([p.keys for p in prefixes], [p.values for p in prefixes])
        )
        return Prefix(
            keys=keys,
            values=values,
            references=tuple(row for p in prefixes for row in p.references),
            ropes=tuple(row for p in prefixes for row in p.ropes),
            last=torch.cat([p.last for p in prefixes]),
            blocks=prefixes[0].blocks,
        )

    def take(self, rows: Sequence[int]) -> Prefix:
        """These rows, in this order; a row may be taken often (one prompt, many seeds)."""
        return Prefix(
            keys=tuple(tuple(layer[row] for row in rows) for layer in self.keys),
            values=tuple(tuple(layer[row] for row in rows) for layer in self.values),
            references=tuple(self.references[row] for row in rows),
            ropes=tuple(self.ropes[row] for row in rows),
            last=self.last[list(rows)],
            blocks=self.blocks,
        )


class O1(nn.Module):
    """HiDream-O1-Image (arXiv 2605.11061, fig. 7), with the published checkpoints' names."""

    def __init__(self, config: O1Config, attention_backend: Backend = "auto"):
        super().__init__()
        self.config = config
        self.attention_backend: Backend = attention_backend
        self.elsewhere: Elsewhere | None = None  # weights that are not always on the device
        self.model = UiT(config)
        self.lm_head = None
        if config.has_lm_head:
            size = config.text.hidden_size
            self.lm_head = nn.Linear(size, config.text.vocab_size, bias=False)
            if config.tie_word_embeddings:
                self.lm_head.weight = self.model.language_model.embed_tokens.weight

    def forward(
        self,
        batch: Batch,
        x_t: Float[Tensor, "n p"] | None = None,
        sigma: Float[Tensor, " s"] | None = None,
        asked: Int[Tensor, " m"] | None = None,
    ) -> Prediction:
        """All tokens of all samples at once.

        `x_t` are the target patches of those samples that have some, one after the other, and
        `sigma` their noise levels; no `x_t` where none has. `asked`: of which text positions logits
        are wanted, in place of all.
        """
        if (x_t is None or sigma is None) and (batch.targets or x_t is not None):
            raise ValueError("what is drawn needs x_t and its sigma")
        uit = self.model
        hidden, vision = uit.language_model.embed_tokens(batch.input_ids), None
        num_text = len(hidden)
        if batch.pixel_values is not None:
            vision = uit.visual(batch.pixel_values.to(hidden), list(batch.image_grids))
        hidden, deepstack = _place(hidden, batch.image_slots, vision)
        if x_t is not None and sigma is not None:
            generated = torch.cat([x_t.to(batch.references), batch.references])
            time = uit.t_embedder1(1 - sigma)
            hidden = torch.cat([hidden, time, uit.x_embedder(generated)])
            after = len(hidden) - num_text
            deepstack = tuple(nn.functional.pad(d, (0, 0, 0, after)) for d in deepstack)
        rope = uit.language_model.rope(batch.position_ids)
        read = partial(batch.packing.read, backend=self.attention_backend)
        hidden = uit.language_model(hidden, rope, lambda layer: read, deepstack)
        x0 = None
        if x_t is not None and sigma is not None:
            first = num_text + len(sigma)  # behind the timesteps
            x0 = uit.final_layer2(hidden[first : first + len(x_t)])
        logits = None
        if self.lm_head is not None:
            logits = self.lm_head(hidden[:num_text] if asked is None else hidden[asked])
        return Prediction(x0, logits)

    def embed_causal(
        self, requests: Sequence[Tokens], seen: VisionTokens | None = None
    ) -> tuple[Float[Tensor, "a d"], tuple[Float[Tensor, "a d"], ...]]:
        """The causal tokens of all requests, one after the other, and what deepstack adds.

        `seen` is what `see` gives for them, where that is known already.
        """
        table = self.model.language_model.embed_tokens
        hidden = table(torch.cat([r.input_ids for r in requests]).to(table.weight.device))
        slots = torch.cat([r.image_slots for r in requests]).nonzero()[:, 0].to(hidden.device)
        return _place(hidden, slots, self.see(requests) if seen is None else seen)

    def prefill(
        self,
        requests: Sequence[Tokens],
        seen: VisionTokens | None = None,
        sparsity: float = 0.0,
    ) -> Prefix:
        """Keys and values of every request's causal tokens, embedded references, angles.

        `seen` is what `see` gives for them, where that is known already. `sparsity` is the share
        of the target's own attention that steps skip: see `hidream.nn.sparse`.
        """
        uit, backend = self.model, self.attention_backend
        hidden, deepstack = self.embed_causal(requests, seen)
        requests = [tokens.to(hidden.device) for tokens in requests]
        lengths = [len(r.input_ids) for r in requests]
        keys: list[tuple[Tensor, ...]] = []
        values: list[tuple[Tensor, ...]] = []

        def read(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            rows = [t.split(lengths) for t in (q, k, v)]
            keys.append(rows[1])
            values.append(rows[2])
            out = (
                attention(*(t[None] for t in row), causal=True, backend=backend)
                for row in zip(*rows, strict=True)
            )
            return torch.cat([row[0] for row in out])

        causal = [r.position_ids[:, :n] for n, r in zip(lengths, requests, strict=True)]
        rope = uit.language_model.rope(torch.cat(causal, dim=1))
        hidden = uit.language_model(hidden, rope, lambda layer: partial(read, layer), deepstack)
        prefix = Prefix(
            keys=tuple(keys),
            values=tuple(values),
            references=(),
            ropes=(),
            last=torch.stack([row[-1] for row in hidden.split(lengths)]),
        )
        return self.with_generated(prefix, requests, sparsity)

    def with_generated(
        self, prefix: Prefix, requests: Sequence[Tokens], sparsity: float = 0.0
    ) -> Prefix:
        """The prefix with what the requests' generated tokens need: references and angles.

        The prefix may come from other requests, whose causal tokens were the same.
        """
        embed, rope = self.model.x_embedder, self.model.language_model.rope
        device = prefix.last.device
        requests = [tokens.to(device) for tokens in requests]
        positions = [r.position_ids[:, len(r.input_ids) :] for r in requests]
        blocks = Blocks.of(requests[0].grid, sparsity, device=device)
        if blocks is not None:
            time, target, rest = 1, blocks.order, 1 + blocks.num_patches
            positions = [
                torch.cat([p[:, :time], p[:, time + target], p[:, rest:]], dim=1) for p in positions
            ]
        return replace(
            prefix,
            references=tuple(embed(r.references.to(prefix.last)) for r in requests),
            ropes=tuple(map(rope, positions)),
            blocks=blocks,
        )

    def logits(self, hidden: Float[Tensor, "*b d"]) -> Float[Tensor, "*b vocab"]:
        """How likely each token is to come next. Raises ModelError without a language head."""
        if self.lm_head is None:
            raise ModelError(
                "this checkpoint has no lm_head: it can draw, but not write.",
                "Use a folder that holds lm_head.weight.",
            )
        return self.lm_head(hidden)

    def predict_x0(
        self,
        x_t: Float[Tensor, "b n p"],
        sigma: Float[Tensor, ""],
        prefix: Prefix,
        on_layer: Callable[[], object] | None = None,
    ) -> Float[Tensor, "b n p"]:
        """The clean patches, from the generated tokens alone: they read prefix and each other.

        `on_layer()` is called before every layer; what it raises ends the work.
        """
        uit, backend, (b, n, _) = self.model, self.attention_backend, x_t.shape
        dtype = uit.x_embedder.proj1.weight.dtype
        time = uit.t_embedder1((1 - sigma).reshape(1).to(x_t.device))
        blocks = prefix.blocks
        patches = x_t.to(dtype)
        targets = uit.x_embedder(patches if blocks is None else patches[:, blocks.order])
        rows = [torch.cat([time, targets[i], prefix.references[i]]) for i in range(b)]
        lengths = [len(row) for row in rows]

        def read(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = []
            for i, (q_i, k_i, v_i) in enumerate(
                zip(*(t.split(lengths) for t in (q, k, v)), strict=True)
            ):
                keys = torch.cat([prefix.keys[layer][i], k_i])
                values = torch.cat([prefix.values[layer][i], v_i])
                first = len(keys) - len(k_i) + 1  # after the timestep
                sparse = blocks.at(1, first) if blocks is not None else None
                row = attention(q_i[None], keys[None], values[None], sparse=sparse, backend=backend)
                out.append(row[0])
            return torch.cat(out)

        def attend(layer: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
            if on_layer is not None:
                on_layer()
            return partial(read, layer)

        cos, sin = zip(*prefix.ropes, strict=True)
        rope = (torch.cat(cos), torch.cat(sin))
        hidden = uit.language_model(torch.cat(rows), rope, attend)
        targets = torch.stack([row[1 : 1 + n] for row in hidden.split(lengths)])
        x0 = uit.final_layer2(targets).float()
        return x0 if blocks is None else x0[:, blocks.back]

    def velocity(
        self,
        x_t: Float[Tensor, "b n p"],
        sigma: Float[Tensor, ""],
        prefix: Prefix,
        on_layer: Callable[[], object] | None = None,
    ) -> Float[Tensor, "b n p"]:
        """dx_t/dsigma = (x_t − x0) / tau, fp32, with tau the sigma that the network is shown.

        The published models were sampled with timesteps cut to whole thousandths; the solver
        keeps the exact sigma. The hair is just above what fp32 loses: 0.987, stored as
        0.98699999, is cut to 987, and 0.9869999 to 986.
        """
        tau = (torch.floor(1000 * sigma.double() + 4e-5) / 1000).float()
        x0 = self.predict_x0(x_t, tau, prefix, on_layer)
        return (x_t.float() - x0) / tau.clamp(min=1e-3).to(x_t.device)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fresh weights: variance 1/fan_in, smaller where added to the residual.

        Patches come in and leave as their smoothest patterns, so that the network starts as half
        of a low-pass filter: after 300 steps of nano the error in little noise is half of what it
        is from random maps. The finest of them shares its channel with a large constant, which
        keeps the norms from hiding how much there is of the others (a fifth less error).
        """
        depth = 2 * self.config.text.num_layers
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                std = module.weight[0].numel() ** -0.5
                if name.endswith(("o_proj", "down_proj")):
                    std /= depth**0.5
                nn.init.normal_(module.weight, std=std, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.5, generator=generator)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        embedder, head = self.model.x_embedder, self.model.final_layer2.linear
        basis = cosine_basis(self.config.patch_size, len(embedder.proj1.weight))
        with torch.no_grad():
            embedder.proj1.weight.copy_(basis)
            nn.init.eye_(embedder.proj2.weight)
            embedder.proj2.bias[len(basis) - 1] = CONSTANT * len(basis) ** 0.5
            head.weight.zero_()
            head.weight[:, : len(basis)] = 0.5 * basis.T

    def see(self, requests: Sequence[Tokens]) -> VisionTokens | None:
        """The vision tower's tokens of all requests; pictures that some share are seen once."""
        like = self.model.final_layer2.linear.weight
        seeing = [r for r in requests if r.image_grids]
        distinct = {id(r.pixel_values): r for r in seeing}
        if not distinct:
            return None
        pixels = torch.cat([r.pixel_values for r in distinct.values()])
        pixels = pixels.to(device=like.device, dtype=like.dtype)
        vision = self.model.visual(pixels, [g for r in distinct.values() for g in r.image_grids])
        lengths = [int(r.image_slots.sum()) for r in distinct.values()]

        def for_each(packed: Tensor) -> Tensor:
            pieces = dict(zip(distinct, packed.split(lengths), strict=True))
            return torch.cat([pieces[id(r.pixel_values)] for r in seeing])

        return VisionTokens(for_each(vision.tokens), tuple(map(for_each, vision.deepstack)))


def _place(
    hidden: Float[Tensor, "a d"], slots: Int[Tensor, " v"], vision: VisionTokens | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Vision tokens take the placeholders' places, `slots`; their deepstack companions start from
    zero."""
    if vision is None:
        return hidden, ()
    zero = torch.zeros_like(hidden)
    placed = hidden.index_copy(0, slots, vision.tokens.to(hidden.dtype))
    deepstack = (zero.index_copy(0, slots, d.to(hidden.dtype)) for d in vision.deepstack)
    return placed, tuple(deepstack)


class UiT(nn.Module):
    """The unified transformer: a vision-language model that also reads and writes pixel patches."""

    def __init__(self, config: O1Config):
        super().__init__()
        size = config.text.hidden_size
        self.visual = VisionTower(config.vision, out_size=size)
        self.language_model = Decoder(config.text)
        self.t_embedder1 = TimestepEmbedder(size)
        self.x_embedder = BottleneckPatchEmbedding(config.patch_dim, config.bottleneck_dim, size)
        self.final_layer2 = PixelHead(size, config.patch_dim)


class TimestepEmbedder(nn.Module):
    """t in [0, 1], 0 is noise → 256 sinusoids of 1000·t, cosines first → two linear maps."""

    def __init__(self, size: int, num_frequencies: int = 256):
        super().__init__()
        self.num_frequencies = num_frequencies
        self.mlp = nn.Sequential(nn.Linear(num_frequencies, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, t: Float[Tensor, " b"]) -> Float[Tensor, "b d"]:
        half = self.num_frequencies // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        frequencies = torch.exp(-math.log(10_000) * steps / half)
        angles = 1000 * t.float()[:, None] * frequencies
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(sinusoids.to(next(self.mlp.parameters()).dtype))


class BottleneckPatchEmbedding(nn.Module):
    """A patch's pixels → a few values (published: width / 4) → the width; linear throughout."""

    def __init__(self, patch_dim: int, bottleneck_dim: int, size: int):
        super().__init__()
        self.proj1 = nn.Linear(patch_dim, bottleneck_dim, bias=False)
        self.proj2 = nn.Linear(bottleneck_dim, size)

    def forward(self, patches: Float[Tensor, "*b n p"]) -> Float[Tensor, "*b n d"]:
        return self.proj2(self.proj1(patches))


class PixelHead(nn.Module):
    """A token → its clean patch in [−1, 1]; linear, no modulation."""

    def __init__(self, size: int, patch_dim: int):
        super().__init__()
        self.linear = nn.Linear(size, patch_dim)

    def forward(self, hidden: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n p"]:
        return self.linear(hidden)
