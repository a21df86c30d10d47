"""One batch: pictures of one size and one schedule, from their requests' tokens to pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from hidream import sampling
from hidream.cancel import CancelToken
from hidream.models.o1.model import O1, Prefix
from hidream.models.o1.patches import patchify, to_levels, to_picture, unpatchify
from hidream.models.o1.tokens import Tokens
from hidream.pipelines.base import Counter
from hidream.pipelines.jobs import Job, keeping, sampler_of, sigmas_of, source_pixels, with_kept
from hidream.pipelines.prefixes import Prefixes


@dataclass(frozen=True)
class O1Job(Job):
    """Jobs that share `tokens` share its prefix."""

    tokens: Tokens
    unconditional: Tokens


def denoise_batch(
    model: O1,
    jobs: Sequence[O1Job],
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
    sigmas = sigmas_of(request, sampling.full_sigmas)

    def step_noise(step: int) -> Tensor:
        return patchify(sampling.step_noise(seeds, step, shape), patch_size).to(device)

    noise = patchify(sampling.initial_noise(seeds, shape), patch_size).to(device)
    denoise = _guided(model, jobs, counter, prefixes or Prefixes(0), cancel)
    x_t = request.noise_scale * noise
    if any(job.source for job in jobs):
        sources, changeable = (
            patchify(pixels, patch_size).to(device) for pixels in source_pixels(jobs)
        )
        if request.strength is not None:
            x_t = sampling.add_noise(sources, noise, sigmas[0], request.noise_scale)
        denoise = keeping(denoise, sources, changeable)

    def report(step: int, x_t: Tensor, x0: Tensor) -> None:
        if on_step is not None:
            on_step(step + 1, len(sigmas) - 1, lambda: _pictures(x0, jobs, grid, patch_size))

    sampler = sampler_of(request)
    x0 = sampler(denoise, x_t, sigmas, noise=step_noise, on_step=report)
    if cancel is not None:
        cancel.check()
    return _pictures(x0, jobs, grid, patch_size)


def _guided(
    model: O1,
    jobs: Sequence[O1Job],
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
        sparsity=request.sparsity,
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


def _pictures(
    x0: Float[Tensor, "b n p"], jobs: Sequence[O1Job], grid: tuple[int, int], patch_size: int
) -> list[Image.Image]:
    return with_kept(map(to_picture, unpatchify(to_levels(x0), grid, patch_size)), jobs)
