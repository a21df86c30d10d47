"""Guidance: two branches of a model become one velocity. Samplers never know.

Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598) moves the velocity away from what
the model would do without the prompt:

    v = v_uncond + guidance_scale * (v_cond - v_uncond).

It is off at or below a scale of 1, and outside its interval of sigma: there the conditional branch
is asked alone, which costs half. (Dev and Fast publish a scale of 0 and mean "off" by it.)
"""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from hidream.sampling.flow import Denoise, at_least_fp32

Branches = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""`(x_t, sigma) -> (v_cond, v_uncond)`: both branches of a model, from one call of its network."""


def cfg(
    conditional: Denoise,
    unconditional: Denoise,
    guidance_scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Denoise:
    """Guidance over two branches that are asked one after the other; see `cfg_batched`."""

    def both(x_t: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return conditional(x_t, sigma), unconditional(x_t, sigma)

    return cfg_batched(conditional, both, guidance_scale, interval)


def cfg_batched(
    conditional: Denoise,
    both: Branches,
    guidance_scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Denoise:
    """Guidance over a model that answers both branches at once; `conditional` for where it is off.

    `interval` is `(lowest, highest)` sigma at which guidance is on, both ends included: leaving it
    off in much noise keeps variety, in little noise it saves time (Kynkäänniemi et al. 2024,
    arXiv 2404.07724). The default is everywhere.
    """
    if guidance_scale <= 1:
        return conditional
    lowest, highest = interval

    def denoise(x_t: Tensor, sigma: Tensor) -> Tensor:
        if not lowest <= float(sigma) <= highest:
            return conditional(x_t, sigma)
        return guide(*both(x_t, sigma), guidance_scale)

    return denoise


def guide(
    v_cond: Float[Tensor, "*shape"], v_uncond: Float[Tensor, "*shape"], guidance_scale: float
) -> Float[Tensor, "*shape"]:
    """`v_uncond + guidance_scale * (v_cond - v_uncond)`, in fp32 at least."""
    v_cond, v_uncond = at_least_fp32(v_cond), at_least_fp32(v_uncond)
    return v_uncond + guidance_scale * (v_cond - v_uncond)
