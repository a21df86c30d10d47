"""One batch: pictures of one size and one schedule, from their requests' tokens to pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from hidream import sampling
from hidream.cancel import CancelToken
from hidream.lora_file import LoraFile
from hidream.models.o1.model import O1, Prefix
from hidream.models.o1.patches import patchify, to_picture, to_tensor, unpatchify
from hidream.models.o1.tokens import Tokens
from hidream.pipelines.prefixes import Counter, Prefixes
from hidream.request import GenerateRequest


@dataclass(frozen=True)
class Source:
    """A picture that the result starts from or keeps, at the result's size.

    `mask` is an "L" picture, white where the result may change; None lets all of it.
    """

    picture: Image.Image
    mask: Image.Image | None = None


@dataclass(frozen=True)
class Job:
    """One picture to make. Jobs that share `tokens` share its prefix.

    `loras` are the request's, found and matched with the model.
    """

    request: GenerateRequest
    seed: int
    tokens: Tokens
    unconditional: Tokens
    source: Source | None = None
    loras: tuple[tuple[LoraFile, float], ...] = ()


def batch_key(request: GenerateRequest) -> tuple:
    """Jobs whose keys are equal can be denoised together."""
    return (
        request.width,
        request.height,
        request.num_inference_steps,
        request.sigmas,
        request.shift,
        request.sampler,
        request.guidance_scale,
        request.guidance_interval,
        request.noise_scale,
        request.noise_clip_std,
        request.strength,
        request.loras,
    )


def sigmas_of(request: GenerateRequest) -> Float[Tensor, " num_steps_plus_1"]:
    """The schedule that a resolved request asks for, cut to its strength."""
    if request.sigmas is not None:
        sigmas = sampling.custom_sigmas(request.sigmas)
    else:
        sigmas = sampling.full_sigmas(request.num_inference_steps, request.shift)
    if request.strength is not None:
        sigmas = sampling.truncate(sigmas, request.strength)
    return sigmas


def denoise_batch(
    model: O1,
    jobs: Sequence[Job],
    *,
    counter: Counter,
    on_step: Callable[[int, int, Callable[[], list[Image.Image]]], object] | None = None,
    prefixes: Prefixes | None = None,
    cancel: CancelToken | None = None,
) -> list[Image.Image]:
    """The pictures of `jobs`, whose `batch_key`s are equal.

    `on_step(step, num_steps, preview)` is called after each step (1 … num_steps); `preview()`
    gives the pictures as the model expects them then, whenever it is asked. What `on_step` raises
    ends the work. `prefixes` holds those of earlier batches. `cancel` is looked at before every
    layer of every call of the network and after the last step; then Cancelled is raised.
    """
    request = jobs[0].request
    patch_size, grid = model.config.patch_size, jobs[0].tokens.grid
    device = model.model.final_layer2.linear.weight.device
    shape = (3, request.height, request.width)
    seeds = [job.seed for job in jobs]
    sigmas = sigmas_of(request)

    def step_noise(step: int) -> Tensor:
        return patchify(sampling.step_noise(seeds, step, shape), patch_size).to(device)

    noise = patchify(sampling.initial_noise(seeds, shape), patch_size).to(device)
    denoise = _guided(model, jobs, counter, prefixes or Prefixes(0), cancel)
    x_t = request.noise_scale * noise
    if any(job.source for job in jobs):
        sources, changeable = _sources(jobs, patch_size, device)
        if request.strength is not None:
            x_t = sampling.add_noise(sources, noise, sigmas[0], request.noise_scale)
        denoise = _keeping(denoise, sources, changeable)

    def report(step: int, x_t: Tensor, x0: Tensor) -> None:
        if on_step is not None:
            on_step(step + 1, len(sigmas) - 1, lambda: _pictures(x0, jobs, grid, patch_size))

    sampler = sampling.SAMPLERS[request.sampler]
    if sampler is sampling.flash:
        sampler = partial(
            sampling.flash,
            noise_scale=(request.noise_scale, request.noise_scale),
            noise_clip_std=request.noise_clip_std or 0.0,
        )
    x0 = sampler(denoise, x_t, sigmas, noise=step_noise, on_step=report)
    if cancel is not None:
        cancel.check()
    return _pictures(x0, jobs, grid, patch_size)


def _guided(
    model: O1,
    jobs: Sequence[Job],
    counter: Counter,
    prefixes: Prefixes,
    cancel: CancelToken | None,
) -> sampling.Denoise:
    """The jobs' velocity, both branches at once; each distinct prompt's prefix is read once."""
    request = jobs[0].request
    guided = request.guidance_scale > 1
    # Only where it is asked for: whoever stands in for the network need not know of it.
    on_layer: dict[str, Any] = {} if cancel is None else {"on_layer": cancel.check}

    def velocity(x_t: Tensor, sigma: Tensor, prefix: Prefix) -> Tensor:
        counter.num_forwards += 1
        return model.velocity(x_t, sigma, prefix, **on_layer)

    branches = [job.tokens for job in jobs]
    if guided:
        branches += [job.unconditional for job in jobs]
    distinct, rows = _distinct(branches)
    prefix = prefixes.read(
        model,
        distinct,
        loras=tuple((file.path, file.stamp, scale) for file, scale in jobs[0].loras),
        counter=counter,
        on_prefill=None if cancel is None else cancel.check,
    )
    alone = prefix.take(rows[: len(jobs)])
    if not guided:
        return lambda x_t, sigma: velocity(x_t, sigma, alone)
    together = prefix.take(rows)

    def both(x_t: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        v_cond, v_uncond = velocity(torch.cat([x_t, x_t]), sigma, together).chunk(2)
        return v_cond, v_uncond

    return sampling.cfg_batched(
        lambda x_t, sigma: velocity(x_t, sigma, alone),
        both,
        request.guidance_scale,
        request.guidance_interval,
    )


def _distinct(tokens: Sequence[Tokens]) -> tuple[list[Tokens], list[int]]:
    """Each of `tokens` once, and for every entry the place of its own."""
    places: dict[int, int] = {}
    kept: list[Tokens] = []
    for item in tokens:
        if id(item) not in places:
            places[id(item)] = len(kept)
            kept.append(item)
    return kept, [places[id(item)] for item in tokens]


def _sources(
    jobs: Sequence[Job], patch_size: int, device: torch.device
) -> tuple[Float[Tensor, "b n p"], Float[Tensor, "b n p"]]:
    """Source pictures as patches, and how far (0 to 1) each of their values may change."""
    pictures, changeable = [], []
    for job in jobs:
        size = (job.request.width, job.request.height)
        source = job.source or Source(Image.new("RGB", size))
        mask = source.mask or Image.new("L", size, 255)
        pictures.append(to_tensor(source.picture))
        changeable.append((to_tensor(mask.convert("RGB")) + 1) / 2)
    return (
        patchify(torch.stack(pictures), patch_size).to(device),
        patchify(torch.stack(changeable), patch_size).to(device),
    )


def _keeping(denoise: sampling.Denoise, sources: Tensor, changeable: Tensor) -> sampling.Denoise:
    """A velocity that heads for the source's own pixels wherever the mask forbids a change."""
    if bool((changeable == 1).all()):
        return denoise

    def kept(x_t: Tensor, sigma: Tensor) -> Tensor:
        x0 = sampling.to_x0(x_t, denoise(x_t, sigma), sigma)
        return sampling.to_velocity(x_t, torch.lerp(sources, x0, changeable), sigma, 1e-3)

    return kept


def _pictures(
    x0: Float[Tensor, "b n p"], jobs: Sequence[Job], grid: tuple[int, int], patch_size: int
) -> list[Image.Image]:
    """8-bit pictures; where a mask is black they are the source's, to the last bit.

    Where it is grey the steps have blended already; see `_keeping`.
    """
    return [
        Image.composite(picture, job.source.picture, job.source.mask.point(_not_black))
        if job.source and job.source.mask
        else picture
        for picture, job in zip(
            map(to_picture, unpatchify(x0, grid, patch_size)), jobs, strict=True
        )
    ]


def _not_black(level: int) -> int:
    return 255 if level else 0
