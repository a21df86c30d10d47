"""O1's configuration: one dataclass a part, and the sizes as named instances."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from hidream.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The decoder: a Qwen3 language model with three-axis rotary positions."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 5e6
    mrope_sections: tuple[int, int, int]

    def __post_init__(self) -> None:
        _check_counts(self)
        if sum(self.mrope_sections) != self.head_dim // 2:
            raise ModelError(
                f"mrope_section {list(self.mrope_sections)} must add up to head_dim / 2 = "
                f"{self.head_dim // 2}.",
                "Check rope_scaling in config.json.",
            )
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"num_attention_heads={self.num_heads} is not a multiple of "
                f"num_key_value_heads={self.num_kv_heads}.",
                "Check text_config in config.json.",
            )


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The vision tower that reads reference pictures into the text part."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_positions: int  # a square table of learned positions, interpolated to a picture's grid
    deepstack_layers: tuple[int, ...]  # blocks whose output is also added inside the decoder
    patch_size: int = 16
    merge_size: int = 2  # merge_size² patches become one token
    temporal_patch_size: int = 2  # a picture is a film of this many equal frames

    def __post_init__(self) -> None:
        _check_counts(self)

    @property
    def patch_dim(self) -> int:
        return 3 * self.temporal_patch_size * self.patch_size**2

    @property
    def stride(self) -> int:
        """Pixels a side of one token; the sides of a vision copy are multiples of it."""
        return self.patch_size * self.merge_size


@dataclass(frozen=True, kw_only=True)
class ReferenceBudgets:
    """How large references become, by their number K: rows of (largest K, size).

    `sides`: share of the picture's longer side; a reference is scaled to that side squared.
    `vision_sides`: pixels; its copy for the vision tower is scaled to that side squared.
    The last row holds for every larger K.
    """

    sides: tuple[tuple[int, float], ...] = (
        (1, 1),
        (2, 48 / 64),
        (4, 1 / 2),
        (8, 24 / 64),
        (9, 1 / 4),
    )
    vision_sides: tuple[tuple[int, int], ...] = ((4, 384), (8, 288), (9, 192))

    def side(self, num_references: int, longer_side: int) -> int:
        return int(_row(self.sides, num_references) * longer_side)

    def vision_side(self, num_references: int) -> int:
        return int(_row(self.vision_sides, num_references))


def _row(table: tuple[tuple[int, float], ...], count: int) -> float:
    return next((size for most, size in table if count <= most), table[-1][1])


VISION_PIXELS = (256 * 256, 4096 * 4096)  # Qwen3-VL's published bounds


@dataclass(frozen=True, kw_only=True)
class O1Config:
    """HiDream-O1-Image.

    `patch_size`: side of a generated pixel patch. `bottleneck_size`: values that a patch is
    squeezed to on its way in; None is a quarter of the width, as published. `vision_pixels`: the
    least and the most pixels of a picture to write about; None: as many as `budgets` gives a
    reference's copy.
    """

    text: TextConfig
    vision: VisionConfig
    patch_size: int = 32
    bottleneck_size: int | None = None
    has_lm_head: bool = True
    tie_word_embeddings: bool = False
    budgets: ReferenceBudgets = field(default_factory=ReferenceBudgets)
    vision_pixels: tuple[int, int] | None = VISION_PIXELS

    def __post_init__(self) -> None:
        _check_counts(self)
        bounds = self.vision_pixels
        if bounds and not (all(type(n) is int for n in bounds) and 0 < bounds[0] <= bounds[1]):
            raise ValueError(f"vision_pixels={bounds} are not two rising whole numbers")

    @property
    def patch_dim(self) -> int:
        return 3 * self.patch_size**2

    @property
    def bottleneck_dim(self) -> int:
        return self.bottleneck_size or self.text.hidden_size // 4

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], settings: Mapping[str, Any] = {}) -> O1Config:
        """From a published `config.json` and, where there is one, `hidream.json`."""
        try:
            return cls._from_dict(config, settings)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"config.json is not an O1 configuration ({type(error).__name__}: {error}).",
                "It must hold text_config and vision_config as in Qwen3-VL.",
            ) from error

    @classmethod
    def _from_dict(cls, config: Mapping[str, Any], settings: Mapping[str, Any]) -> O1Config:
        text, vision = config["text_config"], config["vision_config"]
        rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
        budgets = {
            key: tuple(tuple(row) for row in rows)
            for key, rows in settings.get("reference_budgets", {}).items()
        }
        # A folder with its own budgets was trained on nothing else, unless it says so.
        pixels = settings.get("vision_pixels", None if budgets else VISION_PIXELS)
        return cls(
            text=TextConfig(
                hidden_size=text["hidden_size"],
                intermediate_size=text["intermediate_size"],
                num_layers=text["num_hidden_layers"],
                num_heads=text["num_attention_heads"],
                num_kv_heads=text["num_key_value_heads"],
                head_dim=text["head_dim"],
                vocab_size=text["vocab_size"],
                rms_norm_eps=text["rms_norm_eps"],
                rope_theta=text.get("rope_theta") or rope["rope_theta"],
                mrope_sections=tuple(rope["mrope_section"]),
            ),
            vision=VisionConfig(
                hidden_size=vision["hidden_size"],
                intermediate_size=vision["intermediate_size"],
                num_layers=vision["depth"],
                num_heads=vision["num_heads"],
                num_positions=vision["num_position_embeddings"],
                deepstack_layers=tuple(vision["deepstack_visual_indexes"]),
                patch_size=vision["patch_size"],
                merge_size=vision["spatial_merge_size"],
                temporal_patch_size=vision["temporal_patch_size"],
            ),
            patch_size=settings.get("patch_size", 32),
            bottleneck_size=settings.get("bottleneck_size"),
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            budgets=ReferenceBudgets(**budgets),
            vision_pixels=None if pixels is None else (pixels[0], pixels[1]),
        )

    def to_settings(self) -> dict[str, Any]:
        """What `hidream.json` must say beside `config.json` to give this configuration again."""
        return {
            "patch_size": self.patch_size,
            "bottleneck_size": self.bottleneck_size,
            "reference_budgets": {
                "sides": [list(row) for row in self.budgets.sides],
                "vision_sides": [list(row) for row in self.budgets.vision_sides],
            },
            "vision_pixels": list(self.vision_pixels) if self.vision_pixels else None,
        }

    def to_dict(self, special_tokens: Mapping[str, int]) -> dict[str, Any]:
        """The published `config.json`; `special_tokens` maps a token's text to its id."""
        text, vision = self.text, self.vision
        return {
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "model_type": "qwen3_vl",
            "image_token_id": special_tokens["<|image_pad|>"],
            "video_token_id": special_tokens["<|video_pad|>"],
            "vision_start_token_id": special_tokens["<|vision_start|>"],
            "vision_end_token_id": special_tokens["<|vision_end|>"],
            "tie_word_embeddings": self.tie_word_embeddings,
            "text_config": {
                "model_type": "qwen3_vl_text",
                "attention_bias": False,
                "attention_dropout": 0.0,
                "head_dim": text.head_dim,
                "hidden_act": "silu",
                "hidden_size": text.hidden_size,
                "initializer_range": 0.02,
                "intermediate_size": text.intermediate_size,
                "max_position_embeddings": 262144,
                "num_attention_heads": text.num_heads,
                "num_hidden_layers": text.num_layers,
                "num_key_value_heads": text.num_kv_heads,
                "rms_norm_eps": text.rms_norm_eps,
                "rope_scaling": {
                    "mrope_interleaved": True,
                    "mrope_section": list(text.mrope_sections),
                    "rope_type": "default",
                },
                "rope_theta": text.rope_theta,
                "use_cache": True,
                "vocab_size": text.vocab_size,
            },
            "vision_config": {
                "model_type": "qwen3_vl",
                "deepstack_visual_indexes": list(vision.deepstack_layers),
                "depth": vision.num_layers,
                "hidden_act": "gelu_pytorch_tanh",
                "hidden_size": vision.hidden_size,
                "in_channels": 3,
                "initializer_range": 0.02,
                "intermediate_size": vision.intermediate_size,
                "num_heads": vision.num_heads,
                "num_position_embeddings": vision.num_positions,
                "out_hidden_size": text.hidden_size,
                "patch_size": vision.patch_size,
                "spatial_merge_size": vision.merge_size,
                "temporal_patch_size": vision.temporal_patch_size,
            },
        }


def _check_counts(part: Any) -> None:
    """Raise ValueError unless every int of a configuration is one, above 0."""
    for item in fields(part):
        value = getattr(part, item.name)
        counts = item.type == "int" or (item.type == "int | None" and value is not None)
        if counts and not (type(value) is int and value > 0):
            raise ValueError(f"{item.name}={value!r} is not a whole number above 0")


O1_8B = O1Config(
    text=TextConfig(
        hidden_size=4096,
        intermediate_size=12288,
        num_layers=36,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=151936,
        mrope_sections=(24, 20, 20),
    ),
    vision=VisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_layers=27,
        num_heads=16,
        num_positions=2304,
        deepstack_layers=(8, 16, 24),
    ),
)

# Between the published size and the largest, ours, for docs/scale.md: about twice the width and the
# depth of 8B's, as Qwen and Llama grow.
O1_56B = replace(
    O1_8B,
    text=replace(
        O1_8B.text, hidden_size=8192, intermediate_size=24576, num_layers=70, num_heads=64
    ),
)

# The paper names "200B+" and no sizes. These are ours: depth and width in the proportions of
# published dense models of that class, the vision tower as at 8B.
O1_PRO = replace(
    O1_8B,
    text=TextConfig(
        hidden_size=14336,
        intermediate_size=43008,
        num_layers=88,
        num_heads=112,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=151936,
        mrope_sections=(24, 20, 20),
    ),
)

# The checkpoint that this project trains and ships: pictures of 128×128 are 64 tokens. On grids so
# small, rope_theta 100 tells neighbours apart: after 250 steps it had a lower loss than 10,000
# after 3,250 (0.062 against 0.072). A quarter of this width would let 64 of a patch's 768 values
# through, and edges stay blurred in little noise: nothing is squeezed.
O1_NANO = O1Config(
    text=TextConfig(
        hidden_size=256,
        intermediate_size=704,
        num_layers=8,
        num_heads=4,
        num_kv_heads=4,
        head_dim=64,
        vocab_size=768,
        rope_theta=100.0,
        mrope_sections=(12, 10, 10),
    ),
    vision=VisionConfig(
        hidden_size=96,
        intermediate_size=256,
        num_layers=4,
        num_heads=3,
        num_positions=64,
        deepstack_layers=(0, 2),
    ),
    patch_size=16,
    bottleneck_size=256,
    budgets=ReferenceBudgets(vision_sides=((1, 128), (4, 64), (5, 32))),
    vision_pixels=None,
)

# For tests: every part is there, nothing is large.
O1_TINY = replace(
    O1_NANO,
    bottleneck_size=None,
    text=replace(
        O1_NANO.text,
        hidden_size=64,
        intermediate_size=160,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        mrope_sections=(6, 5, 5),
    ),
    vision=replace(O1_NANO.vision, hidden_size=48, intermediate_size=96),
)

SIZES = {"o1-8b": O1_8B, "o1-56b": O1_56B, "o1-pro": O1_PRO, "o1-nano": O1_NANO, "o1-tiny": O1_TINY}
