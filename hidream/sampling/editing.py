"""Guidance of E1: three branches of a network that edits a picture become one velocity.

What a branch sees is a `Row`: the source beside the picture, or zero latents in its place, and the
prompt or the negative prompt. Two scales lead away from two of them (InstructPix2Pix: Brooks et al.
2022, arXiv 2211.09800, equation 3): `image_guidance_scale` (ig) towards the source and
`guidance_scale` (g) towards the text,

    v = v_none + ig * (v_source - v_none) + g * (v_both - v_source).

E1's code has a second way, with which it is published since July 2025 and which is the default
here. The guided velocity becomes, in each latent pixel, no longer than that of the full branch:

    p = v_source + g * (v_both - v_source),    p <- p * min(1, |v_both| / |p|),
    v = v_none + ig * (p - v_none).

The branch without the source then reads the prompt, not the negative prompt.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from hidream.sampling.flow import Denoise, at_least_fp32
from hidream.sampling.guidance import guide


@dataclass(frozen=True)
class Row:
    """What one branch sees: the source or, where False, zero latents beside the picture; a text."""

    source: bool
    text: Literal["positive", "negative"]


FULL = Row(True, "positive")
"""The branch that stands alone where guidance is off."""


def edit_rows(guidance_scale: float, clip_cfg_norm: bool = True) -> tuple[Row, ...]:
    """The branches in `edit_guide`'s order: none, source, both; at or below 1 `FULL` alone."""
    if guidance_scale <= 1:
        return (FULL,)
    return (
        Row(False, "positive" if clip_cfg_norm else "negative"),
        Row(True, "negative"),
        FULL,
    )


def edit_guide(
    v_none: Float[Tensor, "b c h w"],
    v_source: Float[Tensor, "b c h w"],
    v_both: Float[Tensor, "b c h w"],
    guidance_scale: float,
    image_guidance_scale: float,
    clip_cfg_norm: bool = True,
) -> Float[Tensor, "b c h w"]:
    """The three branches as one velocity, in fp32 at least; norms are over the channels."""
    v_none, v_source, v_both = map(at_least_fp32, (v_none, v_source, v_both))
    if not clip_cfg_norm:
        towards_source = guide(v_source, v_none, image_guidance_scale)
        return towards_source + guidance_scale * (v_both - v_source)
    text = guide(v_both, v_source, guidance_scale)
    norm, limit = (v.norm(dim=1, keepdim=True) for v in (text, v_both))
    text = text * (limit / (norm + 1e-8)).clamp(max=1)
    return guide(text, v_none, image_guidance_scale)


def edit_cfg(
    full: Denoise,
    all_three: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
    guidance_scale: float,
    image_guidance_scale: float,
    *,
    clip_cfg_norm: bool = True,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Denoise:
    """Guidance over a model that answers all rows of `edit_rows` at once.

    `full` is asked, alone, where guidance is off: at a scale of 1 or less, and outside `interval`,
    the `(lowest, highest)` sigma at which it is on.
    """
    if guidance_scale <= 1:
        return full
    lowest, highest = interval

    def denoise(x_t: Tensor, sigma: Tensor) -> Tensor:
        if not lowest <= float(sigma) <= highest:
            return full(x_t, sigma)
        branches = all_three(x_t, sigma)
        return edit_guide(*branches, guidance_scale, image_guidance_scale, clip_cfg_norm)

    return denoise


def in_two_phases(
    first: Denoise, second: Denoise, sigmas: Float[Tensor, " num_steps_plus_1"], num_first: int
) -> Denoise:
    """`first` for the first steps of a schedule, `second` from there on: E1's edit and refinement.

    It is one field for the sampler, whose memory of earlier steps (`unipc`) goes on across.
    """
    last = float(sigmas[num_first])
    return lambda x_t, sigma: (first if float(sigma) > last else second)(x_t, sigma)
