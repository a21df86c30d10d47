"""What a run minimises: the recipe's `[objective]`, which each stage may change, and its shift."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from hidream.errors import UsageError

TIMESTEPS = ("logit-normal", "uniform")
NETWORKS = ("published", "stand-in")
BASE_TOKENS = 256  # what shifts by the number of tokens are counted from: 256² in patches of 16


def flux_shift(num_tokens: int) -> float:
    """e^mu, mu linear in the tokens from 0.5 at 256 to 1.15 at 4,096.

    As FLUX.1's schedule has it (black-forest-labs/flux, `sampling.get_schedule`).
    """
    return math.exp(0.5 + (1.15 - 0.5) * (num_tokens - BASE_TOKENS) / (4096 - BASE_TOKENS))


def sd3_shift(num_tokens: int) -> float:
    """sqrt(n / 256): Stable Diffusion 3's (arXiv 2403.03206, equation 23)."""
    return math.sqrt(num_tokens / BASE_TOKENS)


SHIFTS: dict[str, Callable[[int], float]] = {"flux": flux_shift, "sd3": sd3_shift}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is minimised, and how the noise level is drawn. `t = 1 - sigma` (1 is data).

    `timesteps` "logit-normal": t = sigmoid(t_mean + t_std * n) with n standard normal; "uniform": t
    in 0 … 1. Both are stratified over the step's batch, then moved towards noise by
    t / (t + shift (1 - t)); `shift` is a number, or "flux" or "sd3": counted from the picture's
    tokens (`SHIFTS`). `noise_scale` multiplies the noise.

    `delta` bounds the weight 1/sigma^2 from above; `t_power` weights an error by t^t_power besides
    (see `losses.picture_losses`), and so makes it smaller beside those of text; `lm_weight` scales
    the cross-entropy of answers and `caption_weight` that of the captions inside picture samples.
    `lpips_weight` and `dino_weight` scale the perceptual losses (0: none is computed), in which
    samples count whose t is at least `lpips_onset` and `dino_onset`.
    Of I1 and E1: `balance_weight` scales the loss that spreads tokens over the experts, and an
    edit's error counts more where source and target differ (`weigh_changes`).
    """

    noise_scale: float = 1.0
    timesteps: str = "logit-normal"
    t_mean: float = -0.8
    t_std: float = 0.8
    shift: float | str = 1.0
    delta: float = 0.05
    t_power: float = 0.0
    lpips_weight: float = 0.0
    lpips_onset: float = 0.3
    dino_weight: float = 0.0
    dino_onset: float = 0.3
    caption_dropout: float = 0.1
    reference_dropout: float = 0.02
    lm_weight: float = 0.1
    caption_weight: float = 0.02
    balance_weight: float = 0.01
    weigh_changes: bool = True

    def shift_of(self, num_tokens: int) -> float:
        """The shift of a picture of so many tokens."""
        return self.shift if isinstance(self.shift, float) else SHIFTS[self.shift](num_tokens)

    @property
    def perceptual(self) -> bool:
        """Whether a perceptual loss has a weight."""
        return self.lpips_weight > 0 or self.dino_weight > 0


@dataclass(frozen=True, kw_only=True)
class Perceptual:
    """The frozen networks behind `lpips_weight` and `dino_weight`.

    `network` "published": `lpips` is a safetensors file, a folder or a repository in the hub's
    cache with VGG16 and LPIPS's linear weights; `dino` a folder with DINOv2 of the kind `encoder`,
    the hub's cache if empty. "stand-in": random networks, which need no files and teach little.
    LPIPS sees a random square of `crop` pixels of a larger picture.
    """

    network: str = "published"
    lpips: str = ""
    dino: str = ""
    encoder: str = "dinov2-vit-b"
    crop: int = 512

    def __post_init__(self) -> None:
        if self.network not in NETWORKS:
            raise UsageError(
                f'perceptual.network = "{self.network}" must be one of {", ".join(NETWORKS)}.'
            )
        if self.crop < 16:
            raise UsageError(f"perceptual.crop = {self.crop} must be 16 or more.")


def check_objective(objective: Objective, where: str) -> None:
    """Raise UsageError naming the value that is wrong; `where` is the table's name."""

    def require(holds: bool, key: str, rule: str) -> None:
        if not holds:
            value = getattr(objective, key)
            told = f'"{value}"' if isinstance(value, str) else value
            raise UsageError(f"{where}.{key} = {told} must be {rule}.")

    require(objective.timesteps in TIMESTEPS, "timesteps", f"one of {', '.join(TIMESTEPS)}")
    shift = objective.shift
    known = shift in SHIFTS if isinstance(shift, str) else shift > 0
    require(known, "shift", f"a positive number or one of {', '.join(SHIFTS)}")
    for key in ("noise_scale", "t_std", "delta"):
        require(getattr(objective, key) > 0, key, "positive")
    for key in ("lpips_weight", "dino_weight", "lm_weight", "caption_weight", "balance_weight"):
        require(getattr(objective, key) >= 0, key, "0 or more")
    for key in ("lpips_onset", "dino_onset", "caption_dropout", "reference_dropout"):
        require(0 <= getattr(objective, key) <= 1, key, "between 0 and 1")
