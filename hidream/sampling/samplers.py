"""Samplers: how a picture comes out of a velocity field, one function each.

All have one signature. They start from `x_t` at `sigmas[0]`, visit the sigmas in turn and return
the state at the last one:

    sampler(denoise, x_t, sigmas, *, noise=None, on_step=None) -> x_t

- `denoise(x_t, sigma) -> velocity` is asked with `sigma` a tensor without axes, on the CPU, so
  that reading it makes no device wait. Its answer may have any dtype.
- `x_t` is a batch of anything: axis 0 counts pictures, and none of them ever sees another. The
  arithmetic is fp32 (fp64 if `x_t` is).
- `sigmas` is a schedule: n + 1 falling values for n steps.
- `noise(step)` gives fresh standard normal noise for step 0, 1, ...; only `flash` asks for it.
- `store(x_t)` is what is kept of the state after each step but the last; rounding it is what
  published code does that keeps latents in bf16.
- `on_step(step, x_t, x0)` is called after each step with the new state and with the picture that
  the step aimed at, for progress and previews. What it raises ends the sampling: so one cancels.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from hidream.sampling.flow import Denoise, add_noise, at_least_fp32, to_x0

Noise = Callable[[int], Tensor]
OnStep = Callable[[int, Tensor, Tensor], object]
Store = Callable[[Tensor], Tensor]


@runtime_checkable
class Sampler(Protocol):
    """What every function of `SAMPLERS` can be called with."""

    def __call__(
        self,
        denoise: Denoise,
        x_t: Tensor,
        sigmas: Tensor,
        *,
        noise: Noise | None = None,
        on_step: OnStep | None = None,
        store: Store | None = None,
    ) -> Tensor: ...


def euler(
    denoise: Denoise,
    x_t: Float[Tensor, "*shape"],
    sigmas: Float[Tensor, " num_steps_plus_1"],
    *,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
    store: Store | None = None,
) -> Float[Tensor, "*shape"]:
    """Straight steps: `x_t + (sigma' - sigma) * v`. Order 1, one call of `denoise` a step."""
    x_t = at_least_fp32(x_t)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.cpu())):
        velocity = denoise(x_t, sigma).to(x_t.dtype)
        x0 = to_x0(x_t, velocity, sigma)
        x_t = _stored(x_t + (sigma_next - sigma) * velocity, sigma_next, store)
        if on_step:
            on_step(step, x_t, x0)
    return x_t


def heun(
    denoise: Denoise,
    x_t: Float[Tensor, "*shape"],
    sigmas: Float[Tensor, " num_steps_plus_1"],
    *,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
    store: Store | None = None,
) -> Float[Tensor, "*shape"]:
    """Euler steps, each corrected by the velocity where it arrives. Order 2, two calls a step.

    The step to sigma = 0 stays an Euler step, as in Karras et al. 2022 (arXiv 2206.00364,
    algorithm 1): a network knows no velocity there. So n steps make 2n - 1 calls.
    """
    x_t = at_least_fp32(x_t)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.cpu())):
        velocity = denoise(x_t, sigma).to(x_t.dtype)
        x0 = to_x0(x_t, velocity, sigma)
        x_next = x_t + (sigma_next - sigma) * velocity
        if sigma_next > 0:
            velocity_next = denoise(x_next, sigma_next).to(x_t.dtype)
            x_next = x_t + (sigma_next - sigma) * (velocity + velocity_next) / 2
        x_t = _stored(x_next, sigma_next, store)
        if on_step:
            on_step(step, x_t, x0)
    return x_t


def unipc(
    denoise: Denoise,
    x_t: Float[Tensor, "*shape"],
    sigmas: Float[Tensor, " num_steps_plus_1"],
    *,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
    store: Store | None = None,
) -> Float[Tensor, "*shape"]:
    """UniPC of order 2, B2(h), data prediction: one call a step, and what earlier steps have seen.

    Zhao et al. 2023, arXiv 2302.04867, algorithms 1 and 2 in lambda = log((1 - sigma) / sigma). On
    this path its step is an Euler step towards a better `mean` of x0 than the last answer,

        x' = sigma'/sigma * x + (1 - sigma'/sigma) * mean,

    since (1 - sigma') * (exp(-h) - 1) = sigma'/sigma - 1 for h = lambda' - lambda. The mean is
    predicted from the last two x0. When `denoise` has answered at x', the step that led there is
    made again with a mean corrected by that answer (no new call). The first and the last
    prediction have order 1, as published; the step to sigma = 0 lands on x0.
    """
    x_t = at_least_fp32(x_t)
    num_steps = len(sigmas) - 1
    start = x_t
    seen: list[tuple[float, Tensor]] = []  # the last two (sigma, x0), newest first
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.cpu())):
        x0 = to_x0(x_t, denoise(x_t, sigma).to(x_t.dtype), sigma)
        here, there = float(sigma), float(sigma_next)
        if seen:
            before = seen[0][0]
            x_t = _towards(start, _corrected_mean(seen, here, x0), here / before)
        start, seen = x_t, [(here, x0), *seen[:1]]
        is_last = step == num_steps - 1
        mean = x0 if is_last else _predicted_mean(seen, there)
        x_t = _stored(_towards(start, mean, there / here), sigma_next, store)
        if on_step:
            on_step(step, x_t, x0)
    return x_t


def _stored(x_t: Tensor, sigma: Tensor, store: Store | None) -> Tensor:
    """What is kept of the state at `sigma`."""
    return x_t if store is None or sigma == 0 else store(x_t).to(x_t.dtype)


def _towards(x_t: Tensor, x0: Tensor, ratio: float) -> Tensor:
    """The Euler step from sigma to `ratio * sigma` on the line through `x_t` and `x0`."""
    return ratio * x_t + (1 - ratio) * x0


def _predicted_mean(seen: list[tuple[float, Tensor]], sigma_next: float) -> Tensor:
    """UniP: x0 half a step ahead, on the line (in lambda) through the last two."""
    if len(seen) == 1:
        return seen[0][1]
    (sigma, x0), (sigma_before, x0_before) = seen
    h = _log_snr(sigma_next) - _log_snr(sigma)
    r = (_log_snr(sigma_before) - _log_snr(sigma)) / h
    return x0 + 0.5 * (x0_before - x0) / r


def _corrected_mean(seen: list[tuple[float, Tensor]], sigma_next: float, x0_next: Tensor) -> Tensor:
    """UniC: the mean over the step to `sigma_next`, of which `x0_next` is the end."""
    if len(seen) == 1:
        return 0.5 * (seen[0][1] + x0_next)
    (sigma, x0), (sigma_before, x0_before) = seen
    h = _log_snr(sigma_next) - _log_snr(sigma)
    r = (_log_snr(sigma_before) - _log_snr(sigma)) / h
    # The parabola through three x0, integrated: weights w of the two slopes solve
    # w_before + w_next = b1 and r * w_before + w_next = b2. B, b1, b2 of the paper's section 3.1.
    b = math.expm1(-h)
    phi_2 = b / -h - 1
    phi_3 = phi_2 / -h - 0.5
    b1, b2 = phi_2 / b, 2 * phi_3 / b
    w_before = (b1 - b2) / (1 - r)
    w_next = b1 - w_before
    return x0 + w_before * (x0_before - x0) / r + w_next * (x0_next - x0)


def _log_snr(sigma: float) -> float:
    """lambda = log((1 - sigma) / sigma). At 1 there is none: it counts as 1 - 1e-6."""
    sigma = min(sigma, 1 - 1e-6)
    return math.log1p(-sigma) - math.log(sigma)


def flash(
    denoise: Denoise,
    x_t: Float[Tensor, "*shape"],
    sigmas: Float[Tensor, " num_steps_plus_1"],
    *,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
    store: Store | None = None,
    noise_scale: tuple[float, float] = (1.0, 1.0),
    noise_clip_std: float = 0.0,
    last_step: bool = True,
) -> Float[Tensor, "*shape"]:
    """Jump to x0 and noise it again with fresh noise: how distilled models (O1-Image-Dev,
    I1-Dev, I1-Fast) sample.

        x0 = x_t - sigma * v,    x' = (1 - sigma') * x0 + sigma' * s * clip(noise)

    `s` goes evenly from `noise_scale[0]` at the first step to `noise_scale[1]` at the last;
    `noise_clip_std` is the clip's limit in standard deviations (0: no clip). The step to
    sigma = 0 takes x0 and asks for no noise.

    Without `last_step` it is not made: the state keeps the noise of the last sigma above 0, as in
    the code that I1-Dev and I1-Fast were published with, which calls the network there and drops
    its answer. `on_step` still sees it, with the state as its x0.
    """
    if noise is None:
        raise ValueError("flash needs `noise`, a function from the step to standard normal noise.")
    x_t = at_least_fp32(x_t)
    scales = torch.linspace(*noise_scale, len(sigmas) - 1, dtype=torch.float64).tolist()
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.cpu())):
        if last_step or sigma_next > 0:
            x0 = to_x0(x_t, denoise(x_t, sigma).to(x_t.dtype), sigma)
        else:
            x0 = x_t
        if sigma_next > 0:
            fresh = clip_noise(noise(step), noise_clip_std).to(x_t)
            x_t = _stored(add_noise(x0, fresh, sigma_next, scales[step]), sigma_next, store)
        else:
            x_t = x0
        if on_step:
            on_step(step, x_t, x0)
    return x_t


def clip_noise(noise: Float[Tensor, " b *shape"], num_std: float) -> Float[Tensor, " b *shape"]:
    """Each picture's noise, held within `num_std` of its own standard deviations (0: untouched).

    Row by row, so that neither the values nor their rounding depend on the rest of the batch.
    """
    if num_std <= 0:
        return noise
    limits = [num_std * float(row.std()) for row in noise]
    return torch.stack([row.clamp(-limit, limit) for row, limit in zip(noise, limits, strict=True)])


SAMPLERS: dict[str, Sampler] = {
    "euler": euler,
    "heun": heun,
    "unipc": unipc,
    "flash": flash,
    "flash-official": partial(flash, last_step=False),
}
"""The names that requests use."""
