"""The stochastic sampler of SiT and REPA: a reverse SDE by Euler and Maruyama.

The flow's velocity v(x, sigma) has the same marginals as the SDE that runs from sigma = 1 down

    dx = (v - g**2 / 2 * score) dsigma + g dw,    score = -n / sigma,    n = x + (1 - sigma) * v

for any g (Song et al. 2021, arXiv 2011.13456; Ma et al. 2024, SiT, arXiv 2401.08740); n is
the noise that the network sees in x. SiT takes g**2 = 2 * sigma, for which the drift is v + n: no
division is left, so nothing grows without bound near the data.

The last step, from `last` (SiT: 0.04) to 0, adds no noise. SiT's is "mean": one more step of the
drift, which lands on x0 - last * n, short of the picture by a bit of noise. Data with a deviation
much above `last` do not notice. Finer detail comes out wrong, however many steps there are: of a
deviation of 0.1 some 0.77 is left, of 0.02 it makes up to 1.8 times as much. "x0" lands on x0.
"""

from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hidream.sampling.flow import Denoise, Sigma, at_least_fp32, to_x0
from hidream.sampling.samplers import Noise, OnStep

LAST_SIGMA = 0.04
LastStep = Literal["mean", "x0"]


def sde_sigmas(num_steps: int, last: float = LAST_SIGMA) -> Float[Tensor, " num_steps_plus_1"]:
    """`num_steps` noise levels evenly from 1 to `last`, then 0, in fp64: as many evaluations.

    Raises ValueError for less than two steps: one is at sigma = 1 alone, where no picture is.
    """
    if num_steps < 2:
        raise ValueError(f"num_steps={num_steps}: the SDE needs 2 or more.")
    evenly = torch.linspace(1.0, last, num_steps, dtype=torch.float64)
    return torch.cat([evenly, evenly.new_zeros(1)])


def euler_maruyama(
    denoise: Denoise,
    x_t: Float[Tensor, "*shape"],
    sigmas: Float[Tensor, " num_steps_plus_1"],
    *,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
    last: LastStep = "mean",
) -> Float[Tensor, "*shape"]:
    """Noisy steps: `sde_step`, and at sigma = 0 `sde_last_step`. Weak order 1, one call a step.

    A `Sampler`. `noise(step)` is asked once for every step but the one to sigma = 0.
    """
    if noise is None:
        raise ValueError("euler_maruyama needs `noise`, a function from the step to normal noise.")
    x_t = at_least_fp32(x_t)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.cpu())):
        velocity = denoise(x_t, sigma).to(x_t.dtype)
        x0 = to_x0(x_t, velocity, sigma)
        if sigma_next > 0:
            x_t = sde_step(x_t, velocity, sigma, sigma_next, noise(step).to(x_t))
        else:
            x_t = sde_last_step(x_t, velocity, sigma, last)
        if on_step:
            on_step(step, x_t, x0)
    return x_t


def sde_step(
    x_t: Float[Tensor, "*shape"],
    velocity: Float[Tensor, "*shape"],
    sigma: Sigma,
    sigma_next: Sigma,
    noise: Float[Tensor, "*shape"],
) -> Float[Tensor, "*shape"]:
    """`x + (sigma' - sigma) * (v + n) + sqrt(2 * sigma * (sigma - sigma')) * noise`."""
    amount = (2 * sigma * (sigma - sigma_next)) ** 0.5
    return x_t + (sigma_next - sigma) * _drift(x_t, velocity, sigma) + amount * noise


def sde_last_step(
    x_t: Float[Tensor, "*shape"],
    velocity: Float[Tensor, "*shape"],
    sigma: Sigma,
    last: LastStep = "mean",
) -> Float[Tensor, "*shape"]:
    """The step to sigma = 0: without noise ("mean", as published), or to the data ("x0")."""
    if last == "x0":
        return to_x0(x_t, velocity, sigma)
    return x_t - sigma * _drift(x_t, velocity, sigma)


def _drift(x_t: Tensor, velocity: Tensor, sigma: Sigma) -> Tensor:
    """v - g**2 / 2 * score for g**2 = 2 * sigma: the velocity and the noise that is in x_t."""
    return velocity + x_t + (1 - sigma) * velocity
