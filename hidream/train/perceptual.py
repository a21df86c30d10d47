"""The perceptual losses of a run: which samples count, what is seen of them, what the log says."""

from __future__ import annotations

import logging

import torch
from jaxtyping import Float
from torch import Tensor

from hidream.models.hidit.encoder import STAND_IN
from hidream.models.perceptual import Distance, open_dino, open_lpips
from hidream.train.config import Recipe
from hidream.train.objective import Objective

logger = logging.getLogger(__name__)


class PerceptualLosses:
    """LPIPS and perceptual DINO, as far as a stage of the recipe has a weight for them.

    Raises ModelError for networks that are not there. A stand-in is announced, and in the log the
    names of its losses end in `_stand_in`.
    """

    def __init__(self, recipe: Recipe):
        options = recipe.perceptual
        stages = [recipe.objective_of(number) for number in range(len(recipe.stages))]
        stand_in = options.network == STAND_IN
        self.crop = options.crop
        self.suffix = "_stand_in" if stand_in else ""
        self.lpips: Distance | None = None
        self.dino: Distance | None = None
        if any(stage.lpips_weight for stage in stages):
            self.lpips = open_lpips(STAND_IN if stand_in else options.lpips, recipe.device)
        if any(stage.dino_weight for stage in stages):
            kind = STAND_IN if stand_in else options.encoder
            self.dino = open_dino(kind, options.dino, recipe.device)
        for loss, network in (("LPIPS", self.lpips), ("perceptual DINO", self.dino)):
            if network is not None:
                say = logger.warning if stand_in else logger.info
                say("%s asks %s", loss, network.name)

    def __call__(
        self,
        predicted: Float[Tensor, "b 3 h w"],
        x0: Float[Tensor, "b 3 h w"],
        sigma: Float[Tensor, " b"],
        places: Float[Tensor, "b 2"],
        objective: Objective,
        levels: Float[Tensor, " n"],
    ) -> list[tuple[str, float, Tensor]]:
        """(name in the log, weight, loss) of each that has a weight.

        `places` in 0 … 1 say where LPIPS's square lies. A loss is the sum over these samples, over
        the number of all processes' that count, whose sigmas are `levels`: sums over the processes
        are means over the samples.
        """
        t = 1 - sigma
        found = []
        for name, weight, onset, distance in (
            ("lpips", objective.lpips_weight, objective.lpips_onset, self.lpips),
            ("dino", objective.dino_weight, objective.dino_onset, self.dino),
        ):
            if weight == 0 or distance is None:
                continue
            late = (t >= onset).nonzero()[:, 0]
            count = (1 - levels >= onset).sum().clamp(min=1)
            loss = predicted.new_zeros(())
            if len(late):
                a, b = predicted[late].float(), x0[late].float()
                if name == "lpips":
                    a, b = (squares(t, places[late], self.crop) for t in (a, b))
                loss = distance(a, b).sum() / count
            found.append((f"loss_{name}{self.suffix}", weight, loss))
        return found


def squares(
    pictures: Float[Tensor, "b 3 h w"], places: Float[Tensor, "b 2"], side: int
) -> Float[Tensor, "b 3 _ _"]:
    """A square of `side` pixels, or of the shorter side, at a place of its own in each picture.

    It begins at any pixel, so that the borders of patches lie anywhere in it: a network that saw
    them always in the same places would learn to overlook them.
    """
    height, width = pictures.shape[-2:]
    side = min(side, height, width)
    if (height, width) == (side, side):
        return pictures
    room = torch.tensor([height - side + 1, width - side + 1], device=places.device)
    starts = (places * room).long().clamp(max=room - 1).tolist()
    return torch.stack(
        [
            picture[:, top : top + side, left : left + side]
            for picture, (top, left) in zip(pictures, starts, strict=True)
        ]
    )
