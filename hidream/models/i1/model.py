"""I1's network: noisy latents and four encoders' features of a text become a velocity.

                        velocity = −(data − noise)
                                  ↑
                             final_layer
    ┌─────────────────────────────┴──────────────────────────────┐
    │ single_stream_blocks   [ picture, pad, text, caption_k ]   │←─ modulations:
    ├────────────────────────────────────────────────────────────┤   adaLN of the noise
    │ double_stream_blocks   [ picture, pad ] · [ text, capt_k ] │   level and the pooled
    └───────↑────────────────────────↑──────────────↑────────────┘   text, of all steps
        x_embedder          caption_projection   caption_projection   at once
            ↑                        ↑              ↑                    ↑
    noisy patches (source)   T5, last Llama    Llama layer k      sigma, CLIP-L and CLIP-G
                             └───────────────── prefix ──────────────────┘

Block k is shown the features of one Llama layer, which it reads and which then go: nothing of them
is computed but keys and values. `prefill` does once what does not change from step to step: the
projected features, the angles, an editing source's patches, and, for the sigmas that are to come,
every modulation. After it the weights of `prefill_modules` are not needed. `velocity` is a step.
`forward` is both, with what training needs of the experts.

A picture that is not square was trained with padding: up to `max_patches`, with zero patches whose
keys are multiplied by 0, so that they are read with the logit 0. They are all equal, and stay so
from block to block: one of them, with the log of their number on its logit, is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from hidream.errors import UsageError
from hidream.models.i1.config import I1Config
from hidream.models.i1.layers import (
    CaptionProjection,
    DoubleBlock,
    FinalLayer,
    Named,
    PatchEmbedder,
    PooledEmbedder,
    RMSNorm,
    SingleBlock,
    TimestepEmbedder,
    Where,
)
from hidream.models.placement import Elsewhere
from hidream.nn.attention import Backend
from hidream.nn.moe import Routing, balance_loss, expert_loads
from hidream.nn.rope import Rope, axial_angles
from hidream.nn.sparse import Blocks

THETA = 10_000.0


@dataclass(frozen=True)
class Features:
    """What the text encoders say of a batch of prompts.

    `t5`: (b, t, f). `llama`: (layers, b, l, g), all hidden layers from the first block's output,
    the last one after the final norm. `pooled`: (b, p), CLIP-L's and CLIP-G's side by side.
    """

    t5: Float[Tensor, "b t f"]
    llama: Float[Tensor, "layers b l g"]
    pooled: Float[Tensor, "b p"]

    def take(self, rows: Sequence[int]) -> Features:
        """These rows, in this order."""
        rows = list(rows)
        return Features(self.t5[rows], self.llama[:, rows], self.pooled[rows])


@dataclass(frozen=True)
class Modulations:
    """Shifts, scales, gates: of each block (…, b, 12 or 6, d), of the final layer (…, b, 2, d)."""

    blocks: tuple[Tensor, ...]
    final: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> Modulations:
        return Modulations(tuple(map(change, self.blocks)), change(self.final))


@dataclass(frozen=True)
class Prefix:
    """All that does not change from step to step, for a batch of requests of one size.

    `text`: T5's and the last Llama layer's tokens; `captions[k]`: those that block k reads;
    `source`: embedded patches to edit, or none of them (s = 0). `rope`: angles of the target's
    patches, then the source's; `grid`: the target's rows and columns. `num_pads`: how many padding
    tokens the one that is computed stands for; 0 leaves it out. `modulations`, where they are
    known, have the `sigmas` in front: (steps, b, …). `blocks`: with sparse attention, the order of
    the target's patches, and of the source's, in which `source` and `rope` are.
    """

    text: Float[Tensor, "b t d"]
    captions: tuple[Float[Tensor, "b l d"], ...]
    pooled: Float[Tensor, "b d"]
    source: Float[Tensor, "b s d"]
    rope: Rope
    grid: tuple[int, int]
    num_pads: int
    sigmas: tuple[float, ...] = ()
    modulations: Modulations | None = None
    blocks: Blocks | None = None

    def __len__(self) -> int:
        return len(self.pooled)

    @staticmethod
    def join(prefixes: Sequence[Prefix]) -> Prefix:
        """All rows of several prefixes as one, in their order; they are of one size and length."""
        first, tables = prefixes[0], [p.modulations for p in prefixes]
        if any(
            (p.grid, p.num_pads, p.sigmas, p.blocks)
            != (first.grid, first.num_pads, first.sigmas, first.blocks)
            for p in prefixes
        ):
            raise ValueError("prefixes of different sizes, sigmas or sparsities cannot be joined")
        joined = None
        if first.modulations is not None:
            blocks = zip(*(t.blocks for t in tables if t is not None), strict=True)
            joined = Modulations(
                tuple(torch.cat(rows, dim=1) for rows in blocks),
                torch.cat([t.final for t in tables if t is not None], dim=1),
            )
        return replace(
            first,
            text=torch.cat([p.text for p in prefixes]),
            captions=tuple(
                torch.cat(rows) for rows in zip(*(p.captions for p in prefixes), strict=True)
            ),
            pooled=torch.cat([p.pooled for p in prefixes]),
            source=torch.cat([p.source for p in prefixes]),
            modulations=joined,
        )

    def take(self, rows: Sequence[int]) -> Prefix:
        """These rows, in this order; a row may be taken often (one prompt, many seeds)."""
        rows = list(rows)
        table = self.modulations
        return replace(
            self,
            text=self.text[rows],
            captions=tuple(caption[rows] for caption in self.captions),
            pooled=self.pooled[rows],
            source=self.source[rows],
            modulations=table and table.map(lambda t: t[:, rows]),
        )


@dataclass(frozen=True)
class Prediction:
    """What `forward` returns: the velocity, and how the experts were used.

    `balance_loss`: mean over blocks, 1 where tokens are spread evenly (see `nn.moe`);
    `expert_loads`: (blocks, experts), each expert's share. None without experts.
    """

    velocity: Float[Tensor, "b c height width"]
    balance_loss: Float[Tensor, ""] | None
    expert_loads: Float[Tensor, "blocks e"] | None


class I1(nn.Module):
    """HiDream-I1 (arXiv 2505.22705, fig. 3), with the published checkpoints' names."""

    def __init__(self, config: I1Config, attention_backend: Backend = "auto"):
        super().__init__()
        self.config = config
        self.attention_backend: Backend = attention_backend
        self.elsewhere: Elsewhere | None = None  # weights that are not always on the device
        size = config.size
        self.t_embedder = TimestepEmbedder(size)
        self.p_embedder = PooledEmbedder(config.pooled_size, size)
        self.x_embedder = PatchEmbedder(config.patch_dim, size)
        self.double_stream_blocks = nn.ModuleList(
            Named(DoubleBlock(config)) for _ in range(config.num_layers)
        )
        self.single_stream_blocks = nn.ModuleList(
            Named(SingleBlock(config)) for _ in range(config.num_single_layers)
        )
        self.final_layer = FinalLayer(size, config.out_patch_dim)
        feature_sizes = [config.llama_size] * config.num_blocks + [config.t5_size]
        self.caption_projection = nn.ModuleList(CaptionProjection(n, size) for n in feature_sizes)

    def forward(
        self,
        x_t: Float[Tensor, "b c height width"],
        sigma: Float[Tensor, " b"],
        features: Features,
        *,
        source: Float[Tensor, "b c height width"] | None = None,
        pads: bool = True,
    ) -> Prediction:
        """A training step's forward, every row with a sigma of its own."""
        height, width = x_t.shape[-2:]
        prefix = self.prefill(features, height=height, width=width, source=source, pads=pads)
        velocity, routings = self.step(x_t, self.modulations(sigma, prefix.pooled), prefix)
        loss = loads = None
        if routings:
            loss = torch.stack([balance_loss(routing) for routing in routings]).mean()
            loads = torch.stack([expert_loads(routing) for routing in routings])
        return Prediction(velocity, loss, loads)

    def prefill(
        self,
        features: Features,
        *,
        height: int,
        width: int,
        source: Float[Tensor, "b c h w"] | None = None,
        sigmas: Float[Tensor, " steps"] | None = None,
        pads: bool = True,
        sparsity: float = 0.0,
    ) -> Prefix:
        """What does not change from step to step, for latents of `height` × `width`.

        `source`: clean latents to edit, of the same size; they stand to the right of the picture.
        `sigmas`: those that `velocity` will be called with; without them it computes the
        modulation of each itself. `pads` False leaves the padding out of pictures that are not
        square, as ComfyUI does, and lifts the limit on their size. `sparsity` is the share of the
        attention between patches, the source's included, that steps skip: see `hidream.nn.sparse`.

        Raises UsageError for more patches than the checkpoint takes.
        """
        config, like = self.config, self.x_embedder.proj.weight
        rows, columns = height // config.patch_size, width // config.patch_size
        if (rows * config.patch_size, columns * config.patch_size) != (height, width):
            raise ValueError(f"{height}×{width} latents are not whole patches")
        across = 2 * columns if source is not None else columns
        num_pads = self._num_pads(rows, across) if pads else 0
        t5, llama, pooled = (
            t.to(device=like.device, dtype=like.dtype)
            for t in (features.t5, features.llama, features.pooled)
        )
        projections = self.caption_projection
        captions = tuple(
            projection(llama[layer])
            for projection, layer in zip(projections, config.llama_layers, strict=False)
        )
        prefix = Prefix(
            text=torch.cat([projections[-1](t5), captions[-1]], dim=1),
            captions=captions,
            pooled=self.p_embedder(pooled),
            source=pooled.new_zeros(len(pooled), 0, config.size),
            rope=self._rope(rows, columns, across, like.device),
            grid=(rows, columns),
            num_pads=num_pads,
        )
        blocks = Blocks.of(
            (rows, columns), sparsity, num_grids=1 + (source is not None), device=like.device
        )
        if blocks is not None:
            order, (cos, sin) = blocks.order, prefix.rope
            both = torch.cat([order + i * len(order) for i in range(blocks.num_grids)])
            prefix = replace(prefix, rope=(cos[both], sin[both]), blocks=blocks)
        if source is not None:
            prefix = self.with_source(prefix, source)
        if sigmas is not None:
            time = sigmas.to(like.device)[:, None]  # (steps, 1) beside (b, d)
            prefix = replace(
                prefix,
                sigmas=tuple(sigmas.float().tolist()),
                modulations=self.modulations(time, prefix.pooled),
            )
        return prefix

    def with_source(self, prefix: Prefix, source: Float[Tensor, "b c h w"]) -> Prefix:
        """The prefix with other clean latents to edit, of the picture's size, in place of its own.

        Raises ValueError where they are of another size.
        """
        size = tuple(side * self.config.patch_size for side in prefix.grid)
        if source.shape[-2:] != size:
            raise ValueError("the source's latents must be of the picture's size")
        patches = self.x_embedder(self._patches(source.to(self.x_embedder.proj.weight)))
        kept = patches if prefix.blocks is None else patches[:, prefix.blocks.order]
        return replace(prefix, source=kept)

    def modulations(self, sigma: Float[Tensor, "*#b"], pooled: Float[Tensor, "b d"]) -> Modulations:
        """Every block's shifts, scales and gates: of one sigma, one a row, or (steps, 1) of them.

        Raises ValueError where their weights were evicted.
        """
        if self.final_layer.adaLN_modulation[1].weight.is_meta and self.elsewhere is None:
            raise ValueError("the weights that make modulations are not here: prefill with sigmas")
        embedded = self.t_embedder(1000 * sigma.float()) + pooled  # (…, b, d)

        def of(layer: nn.Module) -> Tensor:
            return rearrange(layer(embedded), "... (m d) -> ... m d", d=pooled.shape[-1])

        blocks = tuple(of(block.adaLN_modulation) for block in self.blocks)
        return Modulations(blocks, of(self.final_layer.adaLN_modulation))

    def velocity(
        self,
        x_t: Float[Tensor, "b c height width"],
        sigma: Float[Tensor, "*b"],
        prefix: Prefix,
        on_layer: Callable[[], object] | None = None,
    ) -> Float[Tensor, "b c height width"]:
        """dx_t/dsigma = noise − data, fp32; one sigma for all rows, or one for each.

        `on_layer()` is called before every layer; what it raises ends the work.
        """
        return self.step(x_t, self.modulations_at(sigma, prefix), prefix, on_layer)[0]

    def modulations_at(self, sigma: Float[Tensor, "*b"], prefix: Prefix) -> Modulations:
        """Those of a step: the prefix's own where it was prefilled with this sigma, which must lie
        on the CPU to be looked up without waiting for a device."""
        table = prefix.modulations
        if table is not None and sigma.ndim == 0 and float(sigma) in prefix.sigmas:
            index = prefix.sigmas.index(float(sigma))
            return table.map(lambda t: t[index])
        return self.modulations(sigma.to(prefix.pooled.device), prefix.pooled)

    def step(
        self,
        x_t: Float[Tensor, "b c height width"],
        modulations: Modulations,
        prefix: Prefix,
        on_layer: Callable[[], object] | None = None,
    ) -> tuple[Float[Tensor, "b c height width"], tuple[Routing, ...]]:
        """The velocity, and where every block's router sent its tokens.

        A graph without breaks: `torch.compile(model.step, fullgraph=True)`.
        """
        patches = self._patches(x_t.to(prefix.text.dtype))
        rows, columns = prefix.grid
        if (len(x_t), patches.shape[1]) != (len(prefix), rows * columns):
            raise ValueError(f"x_t of {tuple(x_t.shape)} is not what the prefix was made for")
        blocks = prefix.blocks
        tokens = [
            self.x_embedder(patches if blocks is None else patches[:, blocks.order]),
            prefix.source,
        ]
        if prefix.num_pads:
            pad = self.x_embedder.proj.bias  # of an empty patch
            tokens.append(pad.expand(len(x_t), 1, -1))
        hidden, text = torch.cat(tokens, dim=1), prefix.text
        where, num_image = self._where(prefix), hidden.shape[1]
        routings: list[Routing | None] = []
        for i, block in enumerate(self.blocks):
            if on_layer is not None:
                on_layer()
            last = i == self.config.num_blocks - 1
            caption, modulation = prefix.captions[i], modulations.blocks[i]
            num_read = patches.shape[1] if last else num_image
            if isinstance(block, DoubleBlock):
                needed = (num_read, 0 if last else text.shape[1])
                hidden, text, routing = block(hidden, text, caption, modulation, where, needed)
            else:
                if i == self.config.num_layers:
                    hidden = torch.cat([hidden, text], dim=1)
                num_read = num_read if last else hidden.shape[1]
                hidden, routing = block(hidden, caption, modulation, where, num_read)
            routings.append(routing)
        out = -self.final_layer(hidden, modulations.final).float()
        if blocks is not None:
            out = out[:, blocks.back]
        out = rearrange(
            out,
            "b (r k) (p q c) -> b c (r p) (k q)",
            r=rows,
            p=self.config.patch_size,
            q=self.config.patch_size,
        )
        return out, tuple(routing for routing in routings if routing is not None)

    @property
    def blocks(self) -> list[DoubleBlock | SingleBlock]:
        return [named.block for named in (*self.double_stream_blocks, *self.single_stream_blocks)]

    @property
    def prefill_modules(self) -> dict[str, nn.Module]:
        """The modules, by name, that no step needs after a prefill with its sigmas."""
        names = ["t_embedder", "p_embedder", "caption_projection", "final_layer.adaLN_modulation"]
        counts = (self.config.num_layers, self.config.num_single_layers)
        for stream, count in zip(("double", "single"), counts, strict=True):
            names += [f"{stream}_stream_blocks.{i}.block.adaLN_modulation" for i in range(count)]
        return {name: self.get_submodule(name) for name in names}

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fresh weights: Xavier; every gate and the final layer are 0, and so is the velocity."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if name.endswith("adaLN_modulation.1") or name == "final_layer.linear":
                    nn.init.zeros_(module.weight)
                elif name.endswith("ff_i.gate"):
                    nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=generator)
                elif name.endswith(("linear_1", "linear_2")):
                    nn.init.normal_(module.weight, std=0.02, generator=generator)
                else:
                    nn.init.xavier_uniform_(module.weight, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)

    def _num_pads(self, rows: int, columns: int) -> int:
        """How many empty patches the published code adds: none to a square."""
        if rows == columns:
            return 0
        missing = self.config.max_patches - rows * columns
        if missing < 0:
            raise UsageError(
                f"a picture of {rows}x{columns} patches has {rows * columns}; this checkpoint "
                f"takes {self.config.max_patches} unless it is square.",
                "Choose a smaller size.",
            )
        return missing

    def _rope(self, rows: int, columns: int, across: int, device: torch.device) -> Rope:
        """Angles of (row, column): the target's patches, then those of what stands beside it."""
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(across), indexing="ij")
        positions = torch.stack([row, column])
        halves = [positions[..., :columns].flatten(1), positions[..., columns:].flatten(1)]
        cos, sin = axial_angles(torch.cat(halves, dim=1), self.config.rope_dims[1:], THETA)
        return cos.to(device), sin.to(device)

    def _where(self, prefix: Prefix) -> Where:
        """Angles and bias of [picture, pad, text, caption]; what is no patch stands at 0."""
        num_patches = len(prefix.rope[0])
        pad = num_patches if prefix.num_pads else None
        still = (pad is not None) + prefix.text.shape[1] + prefix.captions[0].shape[1]
        cos, sin = (
            nn.functional.pad(t, (0, 0, 0, still), value=value)
            for t, value in zip(prefix.rope, (1.0, 0.0), strict=True)
        )
        bias = None
        if pad is not None:
            bias = torch.zeros(num_patches + still, device=cos.device)
            bias[pad] = math.log(prefix.num_pads)
        return Where(
            (cos, sin),
            self.config.rope_dims[0],
            pad,
            bias,
            prefix.blocks.at(0, 0) if prefix.blocks is not None else None,
            self.attention_backend,
        )

    def _patches(self, latents: Float[Tensor, "b c height width"]) -> Float[Tensor, "b n p"]:
        p = self.config.patch_size
        return rearrange(latents, "b c (r p) (k q) -> b (r k) (p q c)", p=p, q=p)
