"""Floating-point operations of a training step, from configurations and token counts alone.

Counted is what the mathematics asks for: every product of matrices, forward and backward, two
operations for a multiplication with its addition. A layer costs its forward pass three times: once
for itself, once for the gradient of its weight, once for that of its input, which the first layers
do not need. Attention counts every pair of a sample's tokens, also those that a causal mask hides
(as in PaLM, arXiv 2204.02311, appendix B). Padding, recomputed activations, element-wise work,
frozen encoders and optimizers count nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from hidream.models.hidit.config import HiDiTConfig
from hidream.models.hidit.pixels import first_width, prime_factors
from hidream.models.i1.config import I1Config
from hidream.models.o1.batch import Lengths
from hidream.models.o1.config import O1Config, VisionConfig

NUM_FREQUENCIES = 256  # sinusoids of the noise level, in every model
INNER, FIRST = 3, 2  # a layer's forward passes in a step; of one whose input needs no gradient


def linear(rows: int, *sizes: int) -> int:
    """A chain of linear maps over `rows` tokens, forward."""
    return 2 * rows * sum(a * b for a, b in pairwise(sizes))


def attention(pairs: int, width: int) -> int:
    """The two products of attention, forward; `width` is that of all query heads together."""
    return 4 * pairs * width


def o1_step(
    config: O1Config,
    samples: Sequence[Lengths],
    *,
    vision_grids: Sequence[tuple[int, int]] = (),
    num_logits: int = 0,
) -> int:
    """A step of O1: decoder, vision tower, embedders, both heads.

    `vision_grids` are those that the tower reads; `num_logits` counts the positions that have a
    text loss or are asked for logits.
    """
    text, size = config.text, config.text.hidden_size
    lengths, targets = [n.total for n in samples], sum(n.target for n in samples)
    width, kv_width = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    layer = linear(sum(lengths), size, width + 2 * kv_width) + linear(sum(lengths), width, size)
    layer += 3 * linear(sum(lengths), size, text.intermediate_size)
    layer += attention(sum(n * n for n in lengths), width)
    total = INNER * text.num_layers * layer
    total += INNER * linear(num_logits, size, text.vocab_size)
    if targets:
        patches = targets + sum(n.references for n in samples)
        pictures = sum(n.target > 0 for n in samples)
        total += FIRST * linear(patches, config.patch_dim, config.bottleneck_dim)
        total += INNER * linear(patches, config.bottleneck_dim, size)
        total += INNER * linear(targets, size, config.patch_dim)
        total += FIRST * linear(pictures, NUM_FREQUENCIES, size)
        total += INNER * linear(pictures, size, size)
    return total + _vision_step(config.vision, size, vision_grids)


def _vision_step(config: VisionConfig, out_size: int, grids: Iterable[tuple[int, int]]) -> int:
    lengths = [rows * columns for rows, columns in grids]
    patches, size = sum(lengths), config.hidden_size
    block = linear(patches, size, 3 * size) + linear(patches, size, size)
    block += linear(patches, size, config.intermediate_size, size)
    block += attention(sum(n * n for n in lengths), size)
    merged, mergers = size * config.merge_size**2, 1 + len(config.deepstack_layers)
    merger = linear(patches // config.merge_size**2, merged, merged, out_size)
    first = linear(patches, config.patch_dim, size)
    return FIRST * first + INNER * (config.num_layers * block + mergers * merger)


def i1_step(
    config: I1Config,
    *,
    samples: int,
    patches: int,
    t5: int,
    llama: int,
    source: int = 0,
) -> int:
    """A step of I1 or E1, whose samples have so many tokens each; `source`: an edit's patches.

    A picture that is not square has a token more for its padding, which is left out.
    """
    size, image, text = config.size, patches + source, t5 + llama
    layers, features = config.num_blocks, (*[config.llama_size] * config.num_blocks, config.t5_size)
    total = (
        FIRST
        * samples
        * sum(linear(llama if i < layers else t5, width, size) for i, width in enumerate(features))
    )
    total += FIRST * linear(samples, NUM_FREQUENCIES, size) + INNER * linear(samples, size, size)
    total += FIRST * linear(samples, config.pooled_size, size) + INNER * linear(samples, size, size)
    total += FIRST * linear(samples * (patches + source), config.patch_dim, size)
    total += INNER * linear(samples * patches, size, config.out_patch_dim)
    total += INNER * linear(samples, size, 2 * size)  # of the final layer's modulation
    for i in range(layers):
        last = i == layers - 1
        of_image = patches if last else image
        if i < config.num_layers:
            kept = (of_image, 0 if last else text)
            block = _two_streams(config, image, text + llama, kept)
        else:
            block = _one_stream(config, image + text + llama, of_image if last else image + text)
        num_modulations = 12 if i < config.num_layers else 6
        total += INNER * (samples * block + linear(samples, size, num_modulations * size))
    return total


def _two_streams(config: I1Config, image: int, text: int, kept: tuple[int, int]) -> int:
    """A sample's block of two streams: all tokens are read, `kept` of each are computed."""
    size, rows = config.size, image + text
    block = linear(rows, size, 2 * size) + 2 * linear(sum(kept), size, size)
    block += attention(sum(kept) * rows, size)
    return block + _experts(config, kept[0]) + 3 * linear(kept[1], size, config.expert_size)


def _one_stream(config: I1Config, rows: int, kept: int) -> int:
    size = config.size
    block = linear(rows, size, 2 * size) + 2 * linear(kept, size, size)
    return block + attention(kept * rows, size) + _experts(config, kept)


def _experts(config: I1Config, rows: int) -> int:
    if config.num_experts == 0:
        return 3 * linear(rows, config.size, config.expert_size)
    hidden = config.num_active_experts * config.expert_size + config.shared_size
    return 3 * linear(rows, config.size, hidden) + linear(rows, config.size, config.num_experts)


def hidit_step(config: HiDiTConfig, *, samples: int, gated: int, with_features: bool) -> int:
    """A step of Hi-DiT: `samples` latents, of which `gated` have their pixels seen."""
    size, n = config.hidden_size, config.num_tokens
    adds = config.attention == "add"
    pixels = 0 if adds else gated
    mlp = int(size * config.mlp_ratio)
    rows = n * (samples + pixels)
    block = linear(rows, size, 3 * size) + linear(rows, size, size) + linear(rows, size, mlp, size)
    block += linear(samples + pixels, size, 6 * size)
    more = 3 if config.attention == "full" else 2  # pairs of tokens for a latent's one
    block += attention(n * n * (samples + more * pixels), size)
    total = INNER * config.num_layers * block
    levels = samples + gated
    total += FIRST * linear(levels, NUM_FREQUENCIES, size) + INNER * linear(levels, size, size)
    total += FIRST * linear(samples * n, config.in_channels * config.patch_size**2, size)
    total += INNER * linear(samples * n, size, config.in_channels * config.patch_size**2)
    total += INNER * linear(samples, size, 2 * size)
    if with_features:
        for width in config.projector_dims:
            hidden = config.projector_width
            total += INNER * linear(samples * n, size, hidden, hidden, width)
    if gated:
        total += FIRST * linear(gated * n, 3 * config.pixel_patch**2, size)
        total += INNER * (linear(gated, size, 2 * size) + gated * _pixel_head(config))
    return total


def _pixel_head(config: HiDiTConfig) -> int:
    """One picture's convolutions: see `models.hidit.pixels.PixelHead`."""
    factors = prime_factors(config.pixel_patch) or [1]
    widths = [max(first_width(config.hidden_size) >> i, 8) for i in range(len(factors) - 1)]
    total, side, inside = 0, config.grid, config.hidden_size
    for i, (after, factor) in enumerate(zip([*widths, 3], factors, strict=True)):
        window = 1 if i == 0 else 9
        total += linear(side * side, inside * window, after * factor**2)
        side, inside = side * factor, after
    return total
