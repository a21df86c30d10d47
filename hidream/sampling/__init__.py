"""Sampling: from noise to a picture along a velocity field, from scores to a word. It knows no
model.

flow       the convention: sigma, x_t, x0, velocity
schedules  which sigmas are visited
samplers   euler, heun, unipc, flash
sde        the stochastic sampler of SiT and REPA
device_noise  the numbers of noise, made on the device
guidance   two branches of a model as one velocity
editing    three branches (with and without the source and the text), for E1
noise      a counter-based generator: one picture, one seed, the same noise everywhere
words      the next token of a text, by its logits
"""

from hidream.sampling.editing import Row, edit_cfg, edit_guide, edit_rows, in_two_phases
from hidream.sampling.flow import Denoise, add_noise, to_velocity, to_x0
from hidream.sampling.guidance import Branches, cfg, cfg_batched, guide
from hidream.sampling.noise import initial_noise, picture_noise, step_noise, uniform
from hidream.sampling.samplers import (
    SAMPLERS,
    Noise,
    OnStep,
    Sampler,
    clip_noise,
    euler,
    flash,
    heun,
    unipc,
)
from hidream.sampling.schedules import (
    at_timesteps,
    custom_sigmas,
    dev_sigmas,
    full_sigmas,
    i1_distilled_sigmas,
    i1_sigmas,
    i1_timesteps,
    linear_sigmas,
    shift_sigma,
    truncate,
)
from hidream.sampling.words import choose_token

__all__ = [
    "SAMPLERS",
    "Branches",
    "Denoise",
    "Noise",
    "OnStep",
    "Row",
    "Sampler",
    "add_noise",
    "at_timesteps",
    "cfg",
    "cfg_batched",
    "choose_token",
    "clip_noise",
    "custom_sigmas",
    "dev_sigmas",
    "edit_cfg",
    "edit_guide",
    "edit_rows",
    "euler",
    "flash",
    "full_sigmas",
    "guide",
    "heun",
    "i1_distilled_sigmas",
    "i1_sigmas",
    "i1_timesteps",
    "in_two_phases",
    "initial_noise",
    "linear_sigmas",
    "picture_noise",
    "shift_sigma",
    "step_noise",
    "to_velocity",
    "to_x0",
    "truncate",
    "uniform",
    "unipc",
]
