"""Validation: pictures of fixed evaluation scenes from the averaged weights, and what the judge
finds of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from hidream.judges.world import judge
from hidream.pipelines.base import Pipeline
from hidream.train.config import Recipe
from hidream.train.grids import montage
from hidream.world.asking import request_of
from hidream.world.tasks import Sample, eval_seed, sample

SEED = 1_000_000  # of evaluation; none that anybody picks for `hidream eval`, whose seed is 0


def scenes(recipe: Recipe) -> list[Sample]:
    """The same for all runs with these options: `scenes` of each category, category by category."""
    options = recipe.validation
    return [
        sample("text_to_image", eval_seed(SEED), index, category=category)
        for category in options.categories
        for index in range(options.scenes)
    ]


@torch.no_grad()
def validate(recipe: Recipe, pipe: Pipeline, step: int) -> dict[str, Any]:
    """Draw and judge; the sheet is written to `RUN/validation/STEP.png`.

    Returns a record for the log: `right_CATEGORY`, the share that is right, `right_all`, the
    seconds it took, and the sheet's file.
    """
    started, options = time.monotonic(), recipe.validation
    number, _ = recipe.locate(step - 1)
    size, items = recipe.stages[number].size, scenes(recipe)
    steps = options.steps or None
    requests = [
        replace(
            request_of(item, index, side=size),
            width=size,
            height=size,
            num_inference_steps=steps,
        )
        for index, item in enumerate(items)
    ]
    pictures = [output.images[0] for output in pipe(requests)]
    rights = [judge(picture, item).right for picture, item in zip(pictures, items, strict=True)]
    file = recipe.run_dir / "validation" / f"{step:07d}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    montage(pictures, size).save(file)
    shares = {
        f"right_{category}": _share(rights[i * options.scenes :][: options.scenes])
        for i, category in enumerate(options.categories)
    }
    told = ", ".join(f"{name.removeprefix('right_')} {s:.2f}" for name, s in shares.items())
    seconds = time.monotonic() - started
    return {
        "step": step,
        "right_all": _share(rights),
        **shares,
        "validation_seconds": seconds,
        "picture": str(file),
        "message": f"step {step}: {_share(rights):.2f} right ({told}), {seconds:.0f} s: {file}",
    }


def _share(rights: Sequence[bool]) -> float:
    return sum(rights) / len(rights)
