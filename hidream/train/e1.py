"""E1 in training: I1 with an edit's source beside the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from hidream.models.i1.model import I1
from hidream.train.datasets import Pictured, Size
from hidream.train.draws import draw_sample
from hidream.train.grids import montage
from hidream.train.i1 import I1Learner, LatentBatch
from hidream.train.losses import weight_of_changes
from hidream.world.sample import Sample

FIRST_SHOWN = 1 << 40  # samples that no run reaches
NUM_SHOWN = 16


class E1Learner(I1Learner):
    """The loss is the target half's alone, and counts more where source and target differ.

    Where the source is dropped, zeros stand in its place, as in the branch of guidance without it.
    """

    task = "edit"

    def _with_sources(
        self,
        batch: LatentBatch,
        samples: Sequence[Sample | Pictured],
        size: Size,
        dropped: Sequence[float],
    ) -> LatentBatch:
        source = self._latents([s.reference_pictures(*size)[0] for s in samples])
        weight = None
        if batch.objective.weigh_changes:
            weight = weight_of_changes(batch.x0, source)
        keeps = [drop >= batch.objective.reference_dropout for drop in dropped]
        kept = torch.tensor(keeps)[:, None, None, None]
        return replace(batch, source=source * kept, weight=weight)

    def grid(self, model: I1, step: int) -> Image.Image:
        """Sources, and to the right of each what becomes of it."""
        number, _ = self.recipe.locate(step - 1)
        stage = self.recipe.stages[number]
        sources, jobs = [], []
        for i in range(NUM_SHOWN):
            sample = draw_sample(self.recipe, stage, "edit", FIRST_SHOWN + i)
            (source,) = sample.reference_pictures(stage.size, stage.size)
            sources.append(Image.fromarray(source))
            request = self._resolved(sample.prompt, i, stage.size, references=(sources[-1],))
            jobs.append(self._job(request, edited=sources[-1]))
        pairs = zip(sources, self._drawn(model, jobs), strict=True)
        return montage([picture for pair in pairs for picture in pair], stage.size)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "guidance_scale": 1.5, "image_guidance_scale": 1.8}
