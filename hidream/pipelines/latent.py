"""One batch of I1's: pictures of one size and one schedule, from prompts to latents to pixels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from hidream import sampling
from hidream.cancel import CancelToken
from hidream.models.e1 import edit_steps
from hidream.models.i1.model import I1, Features, Prefix
from hidream.models.i1.text import TextEncoders, Texts
from hidream.models.o1.patches import to_picture, to_tensor
from hidream.models.vae import LatentCodec
from hidream.pipelines.base import Counter, OnStep
from hidream.pipelines.jobs import Job, keeping, sampler_of, sigmas_of, source_pixels, with_kept
from hidream.tiling import Tile, join, seamless, split, wrap

MARGIN = 8  # latents, beyond which a decoder's borders are not seen


@dataclass(frozen=True)
class LatentJob(Job):
    """`texts` and `negative`: what the encoders read for the two branches.

    `edited`: the picture that an E1 changes, at the result's size; `target`: what an I1 then reads
    to refine the result; `given`: what an embedding file says of some of these texts; `final_size`:
    the (width, height) that the picture is stretched to at last.
    """

    texts: Texts
    negative: Texts
    edited: Image.Image | None = None
    target: Texts | None = None
    given: Mapping[Texts, Features] = field(default_factory=dict)
    final_size: tuple[int, int] | None = None


def denoise_latents(
    model: I1,
    encoders: TextEncoders,
    codec: LatentCodec,
    jobs: Sequence[LatentJob],
    *,
    distilled: bool = False,
    refiner: I1 | None = None,
    counter: Counter,
    on_step: OnStep | None = None,
    cancel: CancelToken | None = None,
) -> list[Image.Image]:
    """The pictures of `jobs`, whose `batch_key`s are equal.

    Latents are fp32 from the first noise to the decoder, whatever the network's dtype (with
    `as_published` they are rounded to it between steps, as published code keeps them). More of them
    than the network takes are drawn in tiles that overlap: their velocities are blended in every
    step, so that they agree where they meet. `distilled`: by the schedule of I1-Dev and I1-Fast.
    `refiner` takes the last `refine_strength` of the steps, with the jobs' targets for prompts and
    no source. `on_step` and `cancel` are as in `Pipeline.__call__`; a preview costs a decoding.
    """
    request, seeds = jobs[0].request, [job.seed for job in jobs]
    height, width = ((side or 0) // codec.factor for side in (request.height, request.width))
    dtype = model.x_embedder.proj.weight.dtype
    device, shape = model.x_embedder.proj.weight.device, (codec.channels, height, width)
    schedule = sampling.i1_distilled_sigmas if distilled else sampling.i1_sigmas
    sigmas = sigmas_of(request, schedule)
    timesteps = None
    if request.as_published and not distilled and request.sigmas is None:
        timesteps = sampling.i1_timesteps(request.num_inference_steps or 1, request.shift or 1.0)
    shown = sigmas[:-1] if timesteps is None else timesteps[-len(sigmas) + 1 :] / 1000
    whole = _Work(encoders, jobs, (height, width), shown, counter, cancel)

    def step_noise(step: int) -> Tensor:
        if request.as_published:
            return torch.randn(len(jobs), *shape).to(device)
        return sampling.step_noise(seeds, step, shape).to(device)

    def told(denoise: sampling.Denoise) -> sampling.Denoise:
        if timesteps is None:
            return denoise
        return sampling.at_timesteps(denoise, sigmas, timesteps)

    noise = sampling.initial_noise(seeds, shape).to(device)
    edited = None
    if jobs[0].edited is not None:
        coded = {
            id(job.edited): codec.encode(to_tensor(job.edited)[None].to(device))
            for job in {id(job.edited): job for job in jobs}.values()
            if job.edited is not None
        }
        edited = torch.cat([coded[id(job.edited)] for job in jobs])
    denoise = told(_velocity(model, whole, edited))
    if refiner is not None:
        finals = [replace(job, texts=job.target or job.texts) for job in jobs]
        num_first = edit_steps(len(sigmas) - 1, request.refine_strength or 0.0)
        finish = _velocity(refiner, replace(whole, jobs=finals), None)
        denoise = sampling.in_two_phases(denoise, told(finish), sigmas, num_first)
    if request.tile:
        denoise = seamless(denoise, sigmas.tolist(), model.config.patch_size)
    x_t = (request.noise_scale or 1.0) * noise
    if any(job.source for job in jobs):
        pixels, changeable = source_pixels(jobs)
        sources = codec.encode(pixels.to(device))
        if request.strength is not None:
            x_t = sampling.add_noise(sources, noise, sigmas[0], request.noise_scale or 1.0)
        # A latent may change as far as any of its pixels may.
        changeable = F.max_pool2d(changeable[:, :1].to(device), codec.factor)
        denoise = keeping(denoise, sources, changeable)

    def decoded(latents: Tensor) -> list[Image.Image]:
        if request.tile:  # so that the decoder sees no border either
            pixels = codec.decode(wrap(latents, MARGIN))
            edge = MARGIN * codec.factor
            pixels = pixels[..., edge:-edge, edge:-edge]
        else:
            pixels = codec.decode(latents)
        pictures = with_kept(map(to_picture, pixels), jobs)
        return [
            picture.resize(job.final_size, Image.Resampling.BICUBIC) if job.final_size else picture
            for picture, job in zip(pictures, jobs, strict=True)
        ]

    def report(step: int, x_t: Tensor, x0: Tensor) -> None:
        if on_step is not None:
            on_step(step + 1, len(sigmas) - 1, lambda: decoded(x0))

    sampler = sampler_of(request)
    store = (lambda x_t: x_t.to(dtype)) if request.as_published else None
    x0 = sampler(denoise, x_t, sigmas, noise=step_noise, on_step=report, store=store)
    if cancel is not None:
        cancel.check()
    return decoded(x0)


@dataclass(frozen=True)
class _Work:
    """What a network is asked for: `size` is (height, width) in latents, `shown` the noise levels
    that it is told."""

    encoders: TextEncoders
    jobs: Sequence[LatentJob]
    size: tuple[int, int]
    shown: Tensor
    counter: Counter
    cancel: CancelToken | None


def _velocity(model: I1, work: _Work, sources: Tensor | None) -> sampling.Denoise:
    """The jobs' velocity; an edit's `sources` stand beside the picture.

    What is larger than the network takes comes in tiles as large as it can. They are squares, but
    where the picture is narrower: there they are as wide as it is. An edit's tile sees its own part
    of the source.
    """
    request = work.jobs[0].request
    scale, norm = request.guidance_scale or 0.0, request.clip_cfg_norm is not False
    rows = sampling.edit_rows(scale, norm) if sources is not None else text_rows(scale)
    unit = model.config.patch_size
    most = model.config.max_patches // (1 if sources is None else 2)
    if math.prod(work.size) // unit**2 <= most:
        return _guided(model, work, _read(model, work, rows, sources), edits=sources is not None)
    side = math.isqrt(most) * unit
    tiles = split(work.size, side, side // 4 // unit * unit, unit)
    part = replace(work, size=(tiles[0].rows.stop, tiles[0].columns.stop))
    if sources is None:
        same = _guided(model, part, _read(model, part, rows, None))
        return _blended([same] * len(tiles), tiles, work.size)
    first = _read(model, part, rows, tiles[0].of(sources))
    beside = _beside(rows, work.jobs, sources)
    prefixes = [model.with_source(first, tile.of(beside)) for tile in tiles]
    denoises = [_guided(model, part, prefix, edits=True) for prefix in prefixes]
    return _blended(denoises, tiles, work.size)


def _guided(model: I1, work: _Work, together: Prefix, *, edits: bool = False) -> sampling.Denoise:
    """The jobs' velocity, all branches at once: two of a prompt, three of an edit."""
    request, num_jobs = work.jobs[0].request, len(work.jobs)
    scale, interval = request.guidance_scale or 0.0, request.guidance_interval or (0.0, 1.0)
    alone = together.take(range(len(together) - num_jobs, len(together)))  # the last row

    def velocity(x_t: Tensor, sigma: Tensor, prefix: Prefix) -> Tensor:
        work.counter.num_forwards += 1
        on_layer = work.cancel.check if work.cancel else None
        return model.velocity(x_t, sigma, prefix, on_layer=on_layer)

    def full(x_t: Tensor, sigma: Tensor) -> Tensor:
        return velocity(x_t, sigma, alone)

    def both(x_t: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        v_uncond, v_cond = velocity(torch.cat([x_t, x_t]), sigma, together).chunk(2)
        return v_cond, v_uncond

    def all_three(x_t: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        v_none, v_source, v_both = velocity(torch.cat([x_t] * 3), sigma, together).chunk(3)
        return v_none, v_source, v_both

    if not edits:
        return sampling.cfg_batched(full, both, scale, interval)
    return sampling.edit_cfg(
        full,
        all_three,
        scale,
        request.image_guidance_scale or 0.0,
        clip_cfg_norm=request.clip_cfg_norm is not False,
        interval=interval,
    )


def _blended(
    denoises: Sequence[sampling.Denoise], tiles: Sequence[Tile], size: tuple[int, int]
) -> sampling.Denoise:
    """The velocity of a picture of `size` (height, width) from that of each of its tiles."""

    def blended(x_t: Tensor, sigma: Tensor) -> Tensor:
        parts = [
            denoise(tile.of(x_t), sigma) for denoise, tile in zip(denoises, tiles, strict=True)
        ]
        return join(parts, tiles, size)

    return blended


def text_rows(guidance_scale: float) -> tuple[sampling.Row, ...]:
    """The branches of a prompt without a source: negative, positive; at or below 1 the last."""
    positive = sampling.Row(False, "positive")
    return (sampling.Row(False, "negative"), positive) if guidance_scale > 1 else (positive,)


def _read(model: I1, work: _Work, rows: Sequence[sampling.Row], sources: Tensor | None) -> Prefix:
    """The prefix of every job in every row, row by row; what several share is read once."""
    jobs = work.jobs
    places = [_place_of_edited(jobs, i) for i in range(len(jobs))]
    asked = [
        (job.texts if row.text == "positive" else job.negative, place if row.source else None)
        for row in rows
        for job, place in zip(jobs, places, strict=True)
    ]
    distinct = list(dict.fromkeys(asked))
    source = None
    if sources is not None:
        none = torch.zeros_like(sources[0])
        source = torch.stack([none if i is None else sources[i] for _, i in distinct])
    work.counter.num_prefills += len(distinct)
    prefix = model.prefill(
        work.encoders.encode([texts for texts, _ in distinct], jobs[0].given),
        height=work.size[0],
        width=work.size[1],
        source=source,
        sigmas=work.shown,
        sparsity=jobs[0].request.sparsity or 0.0,
    )
    return prefix.take([distinct.index(item) for item in asked])


def _beside(
    rows: Sequence[sampling.Row], jobs: Sequence[LatentJob], sources: Tensor
) -> Float[Tensor, "b c h w"]:
    """What stands beside every job's picture in every row, row by row: its source, or nothing."""
    own = torch.stack([sources[_place_of_edited(jobs, i)] for i in range(len(jobs))])
    return torch.cat([own if row.source else torch.zeros_like(own) for row in rows])


def _place_of_edited(jobs: Sequence[LatentJob], i: int) -> int:
    """The first of the jobs that edits the same picture as job `i`."""
    return next(k for k, job in enumerate(jobs) if job.edited is jobs[i].edited)
