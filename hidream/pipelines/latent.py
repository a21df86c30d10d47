"""One batch of I1's: pictures of one size and one schedule, from prompts to latents to pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from hidream import sampling
from hidream.cancel import CancelToken
from hidream.models.e1 import edit_steps
from hidream.models.i1.model import I1, Prefix
from hidream.models.i1.text import TextEncoders, Texts
from hidream.models.o1.patches import to_picture, to_tensor
from hidream.models.vae import LatentCodec
from hidream.pipelines.base import Counter, OnStep
from hidream.pipelines.jobs import Job, keeping, source_pixels, with_kept
from hidream.request import GenerateRequest
from hidream.sampling.editing import Row, edit_cfg, edit_rows, in_two_phases


@dataclass(frozen=True)
class LatentJob(Job):
    """`texts` and `negative`: what the encoders read for the two branches.

    `edited`: the picture that an E1 changes, at the result's size; `target`: what an I1 then reads
    to refine the result.
    """

    texts: Texts
    negative: Texts
    edited: Image.Image | None = None
    target: Texts | None = None


def sigmas_of(request: GenerateRequest) -> Float[Tensor, " num_steps_plus_1"]:
    """The schedule that a resolved request asks for, cut to its strength."""
    if request.sigmas is not None:
        sigmas = sampling.custom_sigmas(request.sigmas)
    else:
        sigmas = sampling.linear_sigmas(request.num_inference_steps, request.shift)
    if request.strength is not None:
        sigmas = sampling.truncate(sigmas, request.strength)
    return sigmas


def denoise_latents(
    model: I1,
    encoders: TextEncoders,
    codec: LatentCodec,
    jobs: Sequence[LatentJob],
    *,
    refiner: I1 | None = None,
    counter: Counter,
    on_step: OnStep | None = None,
    cancel: CancelToken | None = None,
) -> list[Image.Image]:
    """The pictures of `jobs`, whose `batch_key`s are equal.

    Latents are fp32 from the first noise to the decoder, whatever the network's dtype. `on_step`
    and `cancel` are as in `Pipeline.__call__`; a preview costs a decoding. `refiner` takes the last
    `refine_strength` of the steps, with the jobs' targets for prompts and no source.
    """
    request, seeds = jobs[0].request, [job.seed for job in jobs]
    device = model.x_embedder.proj.weight.device
    shape = (codec.channels, request.height // codec.factor, request.width // codec.factor)
    sigmas = sigmas_of(request)

    def step_noise(step: int) -> Tensor:
        return sampling.step_noise(seeds, step, shape).to(device)

    noise = sampling.initial_noise(seeds, shape).to(device)
    edited = None
    if jobs[0].edited is not None:
        edited = codec.encode(torch.stack([to_tensor(job.edited) for job in jobs]).to(device))
    denoise = _guided(model, encoders, jobs, edited, shape, sigmas, counter, cancel)
    if refiner is not None:
        finals = [replace(job, texts=job.target) for job in jobs]
        finish = _guided(refiner, encoders, finals, None, shape, sigmas, counter, cancel)
        num_first = edit_steps(len(sigmas) - 1, request.refine_strength or 0.0)
        denoise = in_two_phases(denoise, finish, sigmas, num_first)
    x_t = request.noise_scale * noise
    if any(job.source for job in jobs):
        pixels, changeable = source_pixels(jobs)
        sources = codec.encode(pixels.to(device))
        if request.strength is not None:
            x_t = sampling.add_noise(sources, noise, sigmas[0], request.noise_scale)
        # A latent may change as far as any of its pixels may.
        denoise = keeping(
            denoise, sources, F.max_pool2d(changeable[:, :1].to(device), codec.factor)
        )

    def pictures(latents: Tensor) -> list[Image.Image]:
        return with_kept(map(to_picture, codec.decode(latents)), jobs)

    def report(step: int, x_t: Tensor, x0: Tensor) -> None:
        if on_step is not None:
            on_step(step + 1, len(sigmas) - 1, lambda: pictures(x0))

    sampler = sampling.SAMPLERS[request.sampler]
    x0 = sampler(denoise, x_t, sigmas, noise=step_noise, on_step=report)
    if cancel is not None:
        cancel.check()
    return pictures(x0)


def _guided(
    model: I1,
    encoders: TextEncoders,
    jobs: Sequence[LatentJob],
    sources: Tensor | None,
    shape: tuple[int, int, int],
    sigmas: Tensor,
    counter: Counter,
    cancel: CancelToken | None,
) -> sampling.Denoise:
    """The jobs' velocity, all branches at once: two of a prompt, three of an edit (`sources`)."""
    request = jobs[0].request
    scale, interval = request.guidance_scale or 0.0, request.guidance_interval or (0.0, 1.0)
    norm = request.clip_cfg_norm is not False
    rows = edit_rows(scale, norm) if sources is not None else text_rows(scale)
    together = _read(model, encoders, jobs, rows, sources, shape, sigmas, counter)
    alone = together.take(range(len(together) - len(jobs), len(together)))  # FULL is the last row

    def velocity(x_t: Tensor, sigma: Tensor, prefix: Prefix) -> Tensor:
        counter.num_forwards += 1
        return model.velocity(x_t, sigma, prefix, on_layer=cancel.check if cancel else None)

    def full(x_t: Tensor, sigma: Tensor) -> Tensor:
        return velocity(x_t, sigma, alone)

    def branches(x_t: Tensor, sigma: Tensor) -> tuple[Tensor, ...]:
        return velocity(x_t.repeat(len(rows), 1, 1, 1), sigma, together).chunk(len(rows))

    if sources is None:
        return sampling.cfg_batched(full, lambda x, s: branches(x, s)[::-1], scale, interval)
    image_scale = request.image_guidance_scale or 0.0
    return edit_cfg(full, branches, scale, image_scale, clip_cfg_norm=norm, interval=interval)


def text_rows(guidance_scale: float) -> tuple[Row, ...]:
    """The branches of a prompt without a source: negative, positive; at or below 1 the last."""
    positive = Row(False, "positive")
    return (Row(False, "negative"), positive) if guidance_scale > 1 else (positive,)


def _read(
    model: I1,
    encoders: TextEncoders,
    jobs: Sequence[LatentJob],
    rows: Sequence[Row],
    sources: Tensor | None,
    shape: tuple[int, int, int],
    sigmas: Tensor,
    counter: Counter,
) -> Prefix:
    """The prefix of every job in every row, row by row; what several share is read once."""
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
    counter.num_prefills += len(distinct)
    prefix = model.prefill(
        encoders.encode([texts for texts, _ in distinct]),
        height=shape[1],
        width=shape[2],
        source=source,
        sigmas=sigmas[:-1],
    )
    return prefix.take([distinct.index(item) for item in asked])


def _place_of_edited(jobs: Sequence[LatentJob], i: int) -> int:
    """The first of the jobs that edits the same picture as job `i`."""
    return next(k for k, job in enumerate(jobs) if job.edited is jobs[i].edited)
