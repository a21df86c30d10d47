"""One picture to make, and what it starts from or keeps: image-to-image, masks, growing, sheets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from hidream import sampling
from hidream.lora_file import LoraFile
from hidream.models.o1.patches import to_tensor
from hidream.outpainting import extend
from hidream.pictures import read_mask
from hidream.request import GenerateRequest
from hidream.sheet import blank

Loras = tuple[tuple[LoraFile, float], ...]


@dataclass(frozen=True)
class Source:
    """A picture that the result starts from or keeps, at the result's size.

    `mask` is an "L" picture, white where the result may change; None lets all of it.
    """

    picture: Image.Image
    mask: Image.Image | None = None


@dataclass(frozen=True)
class Job:
    """One picture to make, of a resolved request.

    `loras` are the request's, found and matched with the model, each with its scale.
    """

    request: GenerateRequest
    seed: int
    source: Source | None = field(default=None, kw_only=True)
    loras: Loras = field(default=(), kw_only=True)


def find_source(
    request: GenerateRequest, references: list[Image.Image], initial: Image.Image | None
) -> tuple[list[Image.Image], Source | None]:
    """The references as the model sees them, and what the result starts from or keeps."""
    if request.sheet is not None:
        return references, None if request.sheet.is_covered else Source(*blank(request.sheet))
    source = initial
    if source is None and (request.mask is not None or request.expand is not None):
        source = references[0]
    if source is None:
        return references, None
    mask = read_mask(request.mask, source.size) if request.mask is not None else None
    if request.expand is not None:
        source, mask = extend(source, request.expand, mask)
        references = [source]
    return references, Source(resized(source, request), mask and resized(mask, request))


def source_pixels(
    jobs: Sequence[Job],
) -> tuple[Float[Tensor, "b 3 h w"], Float[Tensor, "b 3 h w"]]:
    """Source pictures in [−1, 1], and how far (0 to 1) each of their values may change."""
    pictures, changeable = [], []
    for job in jobs:
        size = (job.request.width or 1, job.request.height or 1)
        source = job.source or Source(Image.new("RGB", size))
        mask = source.mask or Image.new("L", size, 255)
        pictures.append(to_tensor(source.picture))
        changeable.append((to_tensor(mask.convert("RGB")) + 1) / 2)
    return torch.stack(pictures), torch.stack(changeable)


def sigmas_of(
    request: GenerateRequest, schedule: Callable[[int, float], Tensor]
) -> Float[Tensor, " num_steps_plus_1"]:
    """The sigmas that a resolved request visits, its own or its model's, cut to its strength."""
    if request.sigmas is not None:
        sigmas = sampling.custom_sigmas(request.sigmas)
    else:
        sigmas = schedule(request.num_inference_steps or 1, request.shift or 1.0)
    return sigmas if request.strength is None else sampling.truncate(sigmas, request.strength)


def sampler_of(request: GenerateRequest) -> sampling.Sampler:
    """The sampler that a resolved request asks for; those that add noise know how much."""
    name, scale = request.sampler or "unipc", request.noise_scale or 1.0
    sampler = sampling.SAMPLERS[name]
    if not name.startswith("flash"):
        return sampler
    settings: dict[str, Any] = {
        "noise_scale": (scale, scale),
        "noise_clip_std": request.noise_clip_std or 0.0,
    }
    return partial(sampler, **settings)


def keeping(denoise: sampling.Denoise, sources: Tensor, changeable: Tensor) -> sampling.Denoise:
    """A velocity that heads for the source's own values wherever the mask forbids a change."""
    if bool((changeable == 1).all()):
        return denoise

    def kept(x_t: Tensor, sigma: Tensor) -> Tensor:
        x0 = sampling.to_x0(x_t, denoise(x_t, sigma), sigma)
        return sampling.to_velocity(x_t, torch.lerp(sources, x0, changeable), sigma, 1e-3)

    return kept


def with_kept(pictures: Iterable[Image.Image], jobs: Sequence[Job]) -> list[Image.Image]:
    """The pictures with the source's pixels, to the last bit, where its mask is black.

    Where it is grey the steps have blended already; see `keeping`.
    """
    return [
        Image.composite(picture, job.source.picture, job.source.mask.point(_not_black))
        if job.source and job.source.mask
        else picture
        for picture, job in zip(pictures, jobs, strict=True)
    ]


def resized(picture: Image.Image, request: GenerateRequest) -> Image.Image:
    """The picture at the size of a resolved request's result."""
    size = (request.width or 1, request.height or 1)
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


def _not_black(level: int) -> int:
    return 255 if level else 0
