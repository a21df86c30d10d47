"""Schedules: which sigmas a sampler visits, as functions that return them.

A schedule of n steps is n + 1 sigmas, fp32 on the CPU, falling strictly and ending at 0.
They are worked out in float64 and rounded at the end. `full_sigmas` and `dev_sigmas` are O1's,
those whose names begin with `i1` are I1's and E1's.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hidream.errors import UsageError
from hidream.registry import DEV_TIMESTEPS
from hidream.sampling.flow import Denoise

SIGMA_MAX = 0.999
"""Where the published O1 schedules begin: the first of 1000 training timesteps, not pure noise."""

I1_OFFICIAL_SHIFT = math.exp(1.15)
"""What I1-Full's own code shifts by: diffusers' mu of 4,096 patches, whatever the picture has."""

S = TypeVar("S", float, np.ndarray, Tensor)


def shift_sigma(sigma: S, shift: float) -> S:
    """Move sigma towards noise: `shift * sigma / (1 + (shift - 1) * sigma)`, at shift = 1 nothing.

    It is the change of sigma that keeps the signal-to-noise ratio of a picture whose side grew by
    `shift` (Esser et al. 2024, arXiv 2403.03206, equation 23). 0 and 1 stay where they are.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def full_sigmas(num_steps: int, shift: float = 3.0) -> Float[Tensor, " num_steps_plus_1"]:
    """The published schedule of O1-Image: `f(linspace(f(0.999), 0, n + 1)[:-1])`, then 0.

    `f` is `shift_sigma`. The first sigma is shifted twice, and the first time in fp32, as the
    published code does: with it all sigmas are equal to the bit.
    """
    _check_steps(num_steps)
    first = float(shift_sigma(torch.tensor(SIGMA_MAX, dtype=torch.float32), shift))
    evenly = np.linspace(first, 0.0, num_steps + 1)
    return _schedule(shift_sigma(evenly, shift))


def dev_sigmas(num_steps: int = len(DEV_TIMESTEPS)) -> Float[Tensor, " num_steps_plus_1"]:
    """The published schedule of O1-Image-Dev: its 28 timesteps over 1000, then 0.

    Dev knows no other. For another number of steps the same curve is read at even distances
    between its points, which is ours: Dev was not distilled for it.
    """
    _check_steps(num_steps)
    published = np.array([*DEV_TIMESTEPS, 0]) / 1000
    last = len(DEV_TIMESTEPS)
    return _schedule(np.interp(np.linspace(0, last, num_steps + 1), range(last + 1), published))


def i1_sigmas(
    num_steps: int, shift: float = 3.0, *, official: bool = False
) -> Float[Tensor, " num_steps_plus_1"]:
    """The schedule of I1-Full, E1-Full and E1.1: diffusers' UniPC with flow sigmas, to the bit.

    `n + 1` even steps from 1 to 0.001, shifted, of which the last is 0 instead; the first is a
    millionth below 1. `official` gives that of I1-Full's own repository: from 0.999, shifted by
    `shift`, evenly to 0, all of it shifted by e^1.15 = 3.158.
    """
    return _schedule(np.append(_i1_evenly(num_steps, shift, official), 0.0))


def i1_timesteps(
    num_steps: int, shift: float = 3.0, *, official: bool = False
) -> Int[Tensor, " num_steps"]:
    """The whole timesteps, out of 1000, that published code shows the network for `i1_sigmas`.

    It cuts off what follows the point; our networks see `1000 * sigma` unless one asks for
    `at_timesteps`.
    """
    evenly = _i1_evenly(num_steps, shift, official)
    return torch.from_numpy((1000 * evenly).astype(np.int64))


def at_timesteps(
    denoise: Denoise,
    sigmas: Float[Tensor, " num_steps_plus_1"],
    timesteps: Int[Tensor, " num_steps"],
) -> Denoise:
    """`denoise`, told a step's `timestep / 1000` (fp32) instead of its sigma.

    A solver goes on with the sigmas themselves. Where they are the end of a schedule (`truncate`),
    so are the timesteps.
    """
    told = timesteps.cpu()[len(timesteps) - len(sigmas) + 1 :] / 1000
    shown = dict(zip(sigmas[:-1].tolist(), told, strict=True))
    return lambda x_t, sigma: denoise(x_t, shown[float(sigma)])


def i1_distilled_sigmas(num_steps: int, shift: float) -> Float[Tensor, " num_steps_plus_1"]:
    """The schedule of I1-Dev (28 steps, shift 6) and I1-Fast (16 steps, shift 3), then 0.

    `f(linspace(1, f(0.001), n))` for `f` = `shift_sigma`: the least sigma is shifted twice, and
    the first time in fp32. diffusers (FlowMatchLCM) and the official code (FlashFlowMatch) agree;
    the latter stops at the last sigma above 0: see `samplers.flash`.
    """
    _check_steps(num_steps)
    lowest = float(shift_sigma(torch.tensor(0.001, dtype=torch.float32), shift))
    evenly = np.linspace(1000.0, 1000 * lowest, num_steps) / 1000
    return _schedule(np.append(shift_sigma(evenly, shift), 0.0))


def linear_sigmas(num_steps: int, shift: float = 1.0) -> Float[Tensor, " num_steps_plus_1"]:
    """Even steps from pure noise (1) to data (0), shifted once."""
    _check_steps(num_steps)
    return _schedule(shift_sigma(np.linspace(1.0, 0.0, num_steps + 1), shift))


def custom_sigmas(values: Sequence[float]) -> Float[Tensor, " num_steps_plus_1"]:
    """A schedule from a user's own sigmas; the final 0 may be left out.

    Raises UsageError unless there is one at least and they are finite, in [0, 1] and falling.
    """
    values = [float(value) for value in values]
    for value in values:
        if not (math.isfinite(value) and 0 <= value <= 1):
            raise UsageError(f"sigma {value} is not between 0 and 1.", "1 is noise, 0 is data.")
    if not values or values[-1] != 0:
        values.append(0.0)
    if len(values) < 2:
        raise UsageError("sigmas holds no step.", "Give one sigma above 0 at least.")
    sigmas = _schedule(np.array(values))
    for before, after in pairwise(sigmas.tolist()):
        if after >= before:
            raise UsageError(
                f"sigmas must fall, but {before:g} is followed by {after:g}.",
                "Sort them from noise (1) to data (0) and give each one once.",
            )
    return sigmas


def truncate(
    sigmas: Float[Tensor, " num_steps_plus_1"], strength: float
) -> Float[Tensor, " kept_plus_1"]:
    """The end of a schedule, for image-to-image: the last `strength` of its n steps, rounded.

    The start is then `add_noise(x0, noise, sigmas[0], noise_scale)`. Strength 1 keeps all steps;
    above 0 one step is kept at least; 0 keeps none (the 0 alone), and the picture as it is.
    """
    if not 0 <= strength <= 1:
        raise UsageError(
            f"strength={strength} is not between 0 and 1.",
            "0 keeps the given picture, 1 makes a new one.",
        )
    num_steps = len(sigmas) - 1
    kept = max(round(strength * num_steps), 1 if strength > 0 else 0)
    return sigmas[num_steps - kept :]


def _i1_evenly(num_steps: int, shift: float, official: bool) -> np.ndarray:
    """The sigmas above 0 of `i1_sigmas`, float64."""
    _check_steps(num_steps)
    if official:
        first = float(shift_sigma(torch.tensor(SIGMA_MAX, dtype=torch.float32), shift))
        return shift_sigma(np.linspace(first, 0.0, num_steps + 1)[:-1], I1_OFFICIAL_SHIFT)
    sigmas = shift_sigma(np.linspace(1.0, 0.001, num_steps + 1)[:-1], shift)
    sigmas[0] -= 1e-6
    return sigmas


def _check_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise UsageError(f"num_inference_steps={num_steps} is below 1.", "Ask for one at least.")


def _schedule(sigmas: np.ndarray) -> Float[Tensor, " num_steps_plus_1"]:
    return torch.from_numpy(sigmas.astype(np.float32))
