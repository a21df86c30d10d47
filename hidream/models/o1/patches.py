"""Pictures as patches: O1's pixel patches, and the vision tower's, and back."""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor


def to_tensor(picture: Image.Image) -> Float[Tensor, "3 h w"]:
    """An RGB picture as fp32 in [−1, 1], rounded as the published code rounds."""
    pixels = torch.from_numpy(np.array(picture, dtype=np.float32)) * (1 / 127.5) - 1
    return rearrange(pixels, "h w c -> c h w")


def to_picture(pixels: Float[Tensor, "3 h w"]) -> Image.Image:
    """The nearest 8-bit RGB picture of values in [−1, 1]; what lies outside is clipped."""
    levels = ((pixels.float().cpu() + 1) / 2 * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(rearrange(levels, "c h w -> h w c").numpy())


def patchify(pixels: Float[Tensor, "*b c h w"], patch_size: int) -> Float[Tensor, "*b n p"]:
    """Rows of patches, each flattened channel first."""
    return rearrange(pixels, "... c (h p) (w q) -> ... (h w) (c p q)", p=patch_size, q=patch_size)


def unpatchify(
    patches: Float[Tensor, "*b n p"], grid: tuple[int, int], patch_size: int
) -> Float[Tensor, "*b c h w"]:
    return rearrange(
        patches,
        "... (h w) (c p q) -> ... c (h p) (w q)",
        h=grid[0],
        w=grid[1],
        p=patch_size,
        q=patch_size,
    )


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
