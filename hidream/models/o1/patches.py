"""Pictures as patches: O1's pixel patches, and the vision tower's, and back."""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Shaped, UInt8
from PIL import Image
from torch import Tensor


def to_tensor(picture: Image.Image) -> Float[Tensor, "3 h w"]:
    """An RGB picture as fp32 in [−1, 1], rounded as the published code rounds."""
    pixels = torch.from_numpy(np.array(picture, dtype=np.float32)) * (1 / 127.5) - 1
    return rearrange(pixels, "h w c -> c h w")


def to_levels(values: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Values in [−1, 1] as the nearest levels of 8 bits; what lies outside is clipped."""
    return (values.float() + 1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def to_picture(pixels: Shaped[Tensor, "3 h w"]) -> Image.Image:
    """An RGB picture of values in [−1, 1], or of `to_levels`."""
    levels = pixels if pixels.dtype == torch.uint8 else to_levels(pixels)
    return Image.merge("RGB", [Image.fromarray(channel) for channel in levels.cpu().numpy()])


def patchify(pixels: Float[Tensor, "*b c h w"], patch_size: int) -> Float[Tensor, "*b n p"]:
    """Rows of patches, each flattened channel first."""
    return rearrange(pixels, "... c (h p) (w q) -> ... (h w) (c p q)", p=patch_size, q=patch_size)


def unpatchify(
    patches: Shaped[Tensor, "*b n p"], grid: tuple[int, int], patch_size: int
) -> Shaped[Tensor, "*b c h w"]:
    return rearrange(
        patches,
        "... (h w) (c p q) -> ... c (h p) (w q)",
        h=grid[0],
        w=grid[1],
        p=patch_size,
        q=patch_size,
    )


def cosine_basis(patch_size: int, count: int) -> Float[Tensor, "count p"]:
    """The `count` smoothest patterns of a patch, orthonormal rows: cosines × three colour axes.

    A two-dimensional cosine transform from its lowest frequency up; grey, red–green and
    blue–yellow for each. Where the network starts from (`O1.init_weights`).
    """
    n = torch.arange(patch_size, dtype=torch.float64)
    cosines = torch.cos(torch.pi * n[:, None] * (2 * n + 1) / (2 * patch_size))
    cosines /= cosines.norm(dim=1, keepdim=True)
    axes = torch.tensor([[1, 1, 1], [1, -1, 0], [1, 1, -2]], dtype=torch.float64)
    axes /= axes.norm(dim=1, keepdim=True)
    order = sorted(
        ((v, u) for v in range(patch_size) for u in range(patch_size)),
        key=lambda frequency: (frequency[0] ** 2 + frequency[1] ** 2, frequency),
    )
    rows = [
        torch.einsum("c,p,q->cpq", axis, cosines[v], cosines[u]).flatten()
        for v, u in order[: -(-count // 3)]
        for axis in axes
    ]
    return torch.stack(rows[:count]).float()


def vision_patches(
    picture: Image.Image, patch_size: int, merge_size: int, temporal_patch_size: int
) -> Float[Tensor, "v c"]:
    """What Qwen's image processor gives: patches in merge order, each frame repeated in time."""
    levels = (np.array(picture).astype(np.float64) * (1 / 255)).astype(np.float32)
    pixels = torch.from_numpy((levels - np.float32(0.5)) / np.float32(0.5))
    patches = rearrange(
        pixels,
        "(h mh p) (w mw q) c -> (h w mh mw) c 1 (p q)",
        mh=merge_size,
        mw=merge_size,
        p=patch_size,
        q=patch_size,
    )
    return patches.expand(-1, -1, temporal_patch_size, -1).flatten(1)
