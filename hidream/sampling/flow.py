"""The convention, stated once: what sigma, x_t, x0 and velocity mean, and how one becomes another.

`sigma` lies in [0, 1]: 0 is data, 1 is noise. Between a picture `x0` and standard normal `noise`
runs the straight line (rectified flow: Liu et al. 2022, arXiv 2209.03003; Lipman et al. 2022,
arXiv 2210.02747), with the noise made larger by `noise_scale` as O1 does in pixel space

    x_t = (1 - sigma) * x0 + sigma * noise_scale * noise

and its slope is the velocity

    velocity = dx_t / dsigma = noise_scale * noise - x0 = (x_t - x0) / sigma.

`noise_scale` is not in the last form: a solver never needs to know it. Each model converts from
what its network predicts to this velocity at its own door and nowhere else.

`sigma` is a number, a tensor without axes, or one value for each picture of the batch (axis 0).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Sigma = float | Float[Tensor, ""] | Float[Tensor, " b"]

Denoise = Callable[[Tensor, Tensor], Tensor]
"""`(x_t, sigma) -> velocity`: all that a sampler knows of a model."""


def add_noise(
    x0: Float[Tensor, "*shape"],
    noise: Float[Tensor, "*shape"],
    sigma: Sigma,
    noise_scale: float = 1.0,
) -> Float[Tensor, "*shape"]:
    """The point `(1 - sigma) * x0 + sigma * noise_scale * noise` of the line from data to noise."""
    sigma = _per_picture(sigma, x0)
    return (1 - sigma) * x0 + (sigma * noise_scale) * noise


def to_velocity(
    x_t: Float[Tensor, "*shape"],
    x0: Float[Tensor, "*shape"],
    sigma: Sigma,
    min_sigma: float = 0.0,
) -> Float[Tensor, "*shape"]:
    """The velocity `(x_t - x0) / max(sigma, min_sigma)` that leads from `x0` through `x_t`.

    `min_sigma` bounds the division for models that are asked close to sigma = 0 (O1: 0.001).
    """
    sigma = _per_picture(sigma, x_t)
    divisor = sigma.clamp(min=min_sigma) if isinstance(sigma, Tensor) else max(sigma, min_sigma)
    return (x_t - x0) / divisor


def to_x0(
    x_t: Float[Tensor, "*shape"], velocity: Float[Tensor, "*shape"], sigma: Sigma
) -> Float[Tensor, "*shape"]:
    """The picture `x_t - sigma * velocity` at which the line through `x_t` reaches sigma = 0."""
    return x_t - _per_picture(sigma, x_t) * velocity


def at_least_fp32(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`x` in fp32, in which solvers work whatever the network's dtype; fp64 stays fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _per_picture(sigma: Sigma, x_t: Tensor) -> float | Tensor:
    """`sigma` shaped to multiply `x_t`. Without axes it stays so: it may then be on the CPU."""
    if isinstance(sigma, Tensor) and sigma.ndim == 1:
        return sigma.reshape(-1, *[1] * (x_t.ndim - 1))
    return sigma
