"""Random weights for I1, none of them neutral, so that each one shows in the output."""

from __future__ import annotations

import torch
from torch import Tensor

from hidream.models.i1.config import I1Config
from hidream.models.i1.weights import shapes_of


def random_state(config: I1Config, generator: torch.Generator) -> dict[str, Tensor]:
    state = {}
    for name, shape in shapes_of(config).items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            state[name] = 0.2 * noise + ("norm" in name)
        else:
            state[name] = noise / shape[1] ** 0.5
    return state
