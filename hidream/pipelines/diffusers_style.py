"""HiDreamPipeline: the shape that users of diffusers know, over the same pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hidream.pipelines.base import Output, Pipeline
from hidream.pipelines.loading import load


class HiDreamPipeline:
    """`from_pretrained`, `.to`, and a call that returns an object with `.images`."""

    def __init__(self, pipeline: Pipeline):
        self._pipeline = pipeline

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        torch_dtype: torch.dtype | str | None = None,
        device: str = "cpu",
        **options: Any,
    ) -> HiDreamPipeline:
        """As `hidream.load`, whose other options it takes; the model stays on the CPU until
        `.to(device)`. Under a `memory` policy it stays on `device`, which is then to be given."""
        return cls(load(model, device=device, dtype=torch_dtype, **options))

    def to(self, device: str | torch.device) -> HiDreamPipeline:
        self._pipeline.to(device)
        return self

    def __call__(
        self,
        prompt: str,
        *,
        image: Any = None,
        num_images_per_prompt: int | None = None,
        generator: torch.Generator | None = None,
        **fields: Any,
    ) -> Output:
        """A request's fields as keywords; `image` is the picture to edit, a `generator` stands for
        its initial seed."""
        if image is not None:
            fields.setdefault("references", (image,))
        if generator is not None:
            fields.setdefault("seed", generator.initial_seed() % 2**63)
        if num_images_per_prompt is not None:
            fields.setdefault("num_images", num_images_per_prompt)
        return self._pipeline(prompt, **fields)
