"""HiDreamPipeline: the shape that users of diffusers know, over the same pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from PIL import Image

from hidream.cancel import CancelToken
from hidream.errors import UsageError
from hidream.limits import MAX_SEED, check_in_range
from hidream.pipelines.base import OnStep, Output, Pipeline, as_request, listed
from hidream.pipelines.loading import load
from hidream.request import GenerateRequest

Generators = torch.Generator | Sequence[torch.Generator]


@dataclass(frozen=True)
class Outputs:
    """What became of several prompts: an `Output` each; `images`, `seeds` and `warnings` are those
    of all, prompt by prompt."""

    outputs: list[Output]

    @property
    def images(self) -> list[Image.Image]:
        return [image for output in self.outputs for image in output.images]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(seed for output in self.outputs for seed in output.seeds)

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(text for output in self.outputs for text in output.warnings))


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

    @overload
    def __call__(self, prompt: str | GenerateRequest, **options: Any) -> Output: ...
    @overload
    def __call__(self, prompt: Sequence[str | GenerateRequest], **options: Any) -> Outputs: ...
    def __call__(
        self,
        prompt: str | GenerateRequest | Sequence[str | GenerateRequest],
        *,
        image: Any = None,
        num_images_per_prompt: int | None = None,
        generator: Generators | None = None,
        on_step: OnStep | None = None,
        cancel: CancelToken | None = None,
        **fields: Any,
    ) -> Output | Outputs:
        """Pictures for a prompt, or for several, with a request's fields as keywords.

        `image` is the picture to edit; what a model that edits none starts from, and what any
        that draws does with `strength`. A `generator` stands for its initial seed, and the
        pictures after the first have those that follow; of several each is one picture's.

        Raises UsageError where the number of generators is not that of the pictures, or two
        keywords say the same.
        """
        prompts = listed(prompt)
        if image is not None:
            name, value = self._role(image, fields)
            _put(fields, name, value, "image")
        if num_images_per_prompt is not None:
            _put(fields, "num_images", num_images_per_prompt, "num_images_per_prompt")
        own: list[dict[str, Any]] = [{} for _ in prompts]
        if generator is not None:
            if "seed" in fields:
                raise _twice("generator", "seed")
            each = check_in_range("num_images", fields.get("num_images")) or 1
            seeds = seeds_of(generator, len(prompts) * each)
            own = [{"seed": seeds[i * each : (i + 1) * each]} for i in range(len(prompts))]
        requests = [
            as_request(item, {**fields, **more}) for item, more in zip(prompts, own, strict=True)
        ]
        outputs = self._pipeline(requests, on_step=on_step, cancel=cancel)
        return outputs[0] if isinstance(prompt, str | GenerateRequest) else Outputs(outputs)

    def _role(self, image: Any, fields: Mapping[str, Any]) -> tuple[str, Any]:
        """The field that `image` is. Where a part of it is kept as it is it is the reference."""
        tasks = self._pipeline.spec.tasks
        starts = fields.get("strength") is not None and "text_to_image" in tasks
        kept = any(fields.get(name) is not None for name in ("mask", "expand"))
        if starts or ("edit" not in tasks and not kept):
            return "init_image", image
        return "references", (image,)


def _put(fields: dict[str, Any], name: str, value: Any, keyword: str) -> None:
    """Set a field that a keyword of diffusers gives."""
    if name in fields:
        raise _twice(keyword, name)
    fields[name] = value


def _twice(keyword: str, name: str) -> UsageError:
    return UsageError(f"{keyword} and {name} say the same.", "Leave one out.")


def seeds_of(generator: Any, num_images: int) -> tuple[int, ...]:
    """A seed for each picture: of one generator its own and those after it, of several each one's.

    Raises UsageError where there are several, but not one for each picture.
    """
    several = isinstance(generator, list | tuple)
    generators = list(generator) if several else [generator]
    for item in generators:
        if not isinstance(item, torch.Generator):
            raise UsageError(
                f"generator holds {item!r}, which is no torch.Generator.",
                "Give one, a list of them, or seed=.",
            )
    if several and len(generators) != num_images:
        raise UsageError(
            f"{len(generators)} generators are given for {num_images} pictures.",
            "Give one for each picture, prompt by prompt, or one for all.",
        )
    firsts = [item.initial_seed() for item in generators]
    if not several:
        firsts = [firsts[0] + index for index in range(num_images)]
    return tuple(seed % (MAX_SEED + 1) for seed in firsts)
