"""I1's configuration: one dataclass, and the sizes as named instances."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from hidream.errors import ModelError
from hidream.folder import TRANSFORMER


@dataclass(frozen=True, kw_only=True)
class I1Config:
    """HiDream-I1's network.

    `num_layers` blocks keep pictures and text apart, `num_single_layers` more run them as one
    sequence; block i reads Llama's hidden layer `llama_layers[i]`. `rope_dims`: dimensions of a
    head that turn with a token's index (0 in every picture), row and column; they make up a whole
    head, or its first half. `max_resolution`: latent height and width whose patches are the most
    that a picture may have. `num_experts` 0 makes every feed-forward layer a plain one.
    """

    num_layers: int
    num_single_layers: int
    num_heads: int
    head_dim: int
    num_experts: int = 4
    num_active_experts: int = 2
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int = 16
    t5_size: int = 4096
    llama_size: int = 4096
    pooled_size: int = 2048  # CLIP-L's and CLIP-G's, side by side
    rope_dims: tuple[int, int, int]
    max_resolution: tuple[int, int] = (128, 128)
    llama_layers: tuple[int, ...]

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            for number in value if isinstance(value, tuple) else (value,):
                lowest = 0 if item.name in _MAY_BE_ZERO else 1
                if type(number) is not int or number < lowest:
                    raise ValueError(f"{item.name}={value!r} is not made of whole numbers")
        if self.num_blocks == 0:
            raise ValueError("num_layers and num_single_layers are both 0")
        if len(self.llama_layers) != self.num_blocks:
            raise ValueError(
                f"llama_layers has {len(self.llama_layers)} entries for {self.num_blocks} blocks"
            )
        if any(dim % 2 for dim in self.rope_dims) or sum(self.rope_dims) not in (
            self.head_dim,
            self.head_dim / 2,
        ):
            raise ValueError(
                f"rope_dims={self.rope_dims} must be even and add up to head_dim={self.head_dim} "
                "or half of it"
            )
        if self.num_experts and not 1 <= self.num_active_experts <= self.num_experts:
            raise ValueError(
                f"num_active_experts={self.num_active_experts} of num_experts={self.num_experts}"
            )

    @property
    def size(self) -> int:
        """The width of the residual stream."""
        return self.num_heads * self.head_dim

    @property
    def num_blocks(self) -> int:
        return self.num_layers + self.num_single_layers

    @property
    def patch_dim(self) -> int:
        return self.in_channels * self.patch_size**2

    @property
    def out_patch_dim(self) -> int:
        return self.out_channels * self.patch_size**2

    @property
    def max_patches(self) -> int:
        """The most patches of a picture, and how many one that is not square is padded to."""
        return self.max_resolution[0] * self.max_resolution[1] // self.patch_size**2

    @property
    def expert_size(self) -> int:
        """Hidden width of a routed expert, and of the text's feed-forward layer."""
        return _swiglu_size(4 * self.size)

    @property
    def shared_size(self) -> int:
        """Hidden width of the shared expert."""
        return _swiglu_size(2 * self.size)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> I1Config:
        """From a published transformer's `config.json`."""
        try:
            num_layers, num_single = config["num_layers"], config["num_single_layers"]
            t5_size, llama_size = config["caption_channels"]
            rope_dims, most = config["axes_dims_rope"], config["max_resolution"]
            return cls(
                num_layers=num_layers,
                num_single_layers=num_single,
                num_heads=config["num_attention_heads"],
                head_dim=config["attention_head_dim"],
                num_experts=config["num_routed_experts"],
                num_active_experts=config["num_activated_experts"],
                patch_size=config["patch_size"],
                in_channels=config["in_channels"],
                out_channels=config.get("out_channels") or config["in_channels"],
                t5_size=t5_size,
                llama_size=llama_size,
                pooled_size=config["text_emb_dim"],
                rope_dims=(rope_dims[0], rope_dims[1], rope_dims[2]),
                max_resolution=(most[0], most[1]),
                llama_layers=tuple(config["llama_layers"]),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ModelError(
                f"config.json is not an I1 configuration ({type(error).__name__}: {error}).",
                "It must be that of HiDream-I1's or HiDream-E1's transformer.",
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """The published transformer's `config.json`."""
        return {
            "_class_name": TRANSFORMER,
            "attention_head_dim": self.head_dim,
            "axes_dims_rope": list(self.rope_dims),
            "caption_channels": [self.t5_size, self.llama_size],
            "in_channels": self.in_channels,
            "llama_layers": list(self.llama_layers),
            "max_resolution": list(self.max_resolution),
            "num_activated_experts": self.num_active_experts,
            "num_attention_heads": self.num_heads,
            "num_layers": self.num_layers,
            "num_routed_experts": self.num_experts,
            "num_single_layers": self.num_single_layers,
            "out_channels": self.out_channels,
            "patch_size": self.patch_size,
            "text_emb_dim": self.pooled_size,
        }


_MAY_BE_ZERO = ("num_layers", "num_single_layers", "num_experts", "rope_dims", "llama_layers")


def _swiglu_size(hidden_size: int) -> int:
    """Two thirds, since there are three maps instead of two, in whole multiples of 256."""
    return -(-(2 * hidden_size // 3) // 256) * 256


I1_FULL = I1Config(
    num_layers=16,
    num_single_layers=32,
    num_heads=20,
    head_dim=128,
    rope_dims=(64, 32, 32),
    llama_layers=(*range(32), *(31,) * 16),
)
# Distilled from Full: the same network.
I1_DEV = I1_FAST = I1_FULL
# The source stands to the right of the picture, so that the grid is twice as wide.
E1_FULL = replace(I1_FULL, max_resolution=(96, 192))
E1_1 = replace(I1_FULL, max_resolution=(128, 256))

# Trained by this project's recipes: pictures of 64×64 in latents of 8 channels.
I1_NANO = I1Config(
    num_layers=2,
    num_single_layers=4,
    num_heads=4,
    head_dim=32,
    in_channels=8,
    out_channels=8,
    t5_size=64,
    llama_size=64,
    pooled_size=128,
    rope_dims=(16, 8, 8),
    max_resolution=(8, 8),
    llama_layers=(0, 1, 1, 1, 1, 1),
)
E1_NANO = replace(I1_NANO, max_resolution=(8, 16))

# For tests: every part is there, nothing is large.
I1_TINY = I1Config(
    num_layers=2,
    num_single_layers=2,
    num_heads=4,
    head_dim=16,
    in_channels=4,
    out_channels=4,
    t5_size=24,
    llama_size=40,
    pooled_size=20,
    rope_dims=(8, 4, 4),
    max_resolution=(16, 16),
    llama_layers=(0, 1, 2, 2),
)
E1_TINY = replace(I1_TINY, max_resolution=(16, 32))

SIZES = {
    "i1-full": I1_FULL,
    "i1-dev": I1_DEV,
    "i1-fast": I1_FAST,
    "e1-full": E1_FULL,
    "e1-1": E1_1,
    "i1-nano": I1_NANO,
    "e1-nano": E1_NANO,
    "i1-tiny": I1_TINY,
    "e1-tiny": E1_TINY,
}
