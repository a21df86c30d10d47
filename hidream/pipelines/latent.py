"""One batch of I1's: pictures of one size and one schedule, from prompts to latents to pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from hidream import sampling
from hidream.cancel import CancelToken
from hidream.models.i1.model import I1, Prefix
from hidream.models.i1.text import TextEncoders, Texts
from hidream.models.o1.patches import to_picture
from hidream.models.vae import LatentCodec
from hidream.pipelines.base import Counter, OnStep
from hidream.pipelines.jobs import Job, keeping, source_pixels, with_kept
from hidream.request import GenerateRequest


@dataclass(frozen=True)
class LatentJob(Job):
    """`texts` and `negative`: what the encoders read for the two branches."""

    texts: Texts
    negative: Texts


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
    counter: Counter,
    on_step: OnStep | None = None,
    cancel: CancelToken | None = None,
) -> list[Image.Image]:
    """The pictures of `jobs`, whose `batch_key`s are equal.

    Latents are fp32 from the first noise to the decoder, whatever the network's dtype. `on_step`
    and `cancel` are as in `Pipeline.__call__`; a preview costs a decoding.
    """
    request, seeds = jobs[0].request, [job.seed for job in jobs]
    device = model.x_embedder.proj.weight.device
    shape = (codec.channels, request.height // codec.factor, request.width // codec.factor)
    sigmas = sigmas_of(request)

    def step_noise(step: int) -> Tensor:
        return sampling.step_noise(seeds, step, shape).to(device)

    noise = sampling.initial_noise(seeds, shape).to(device)
    denoise = _guided(model, encoders, jobs, shape, sigmas, counter, cancel)
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
    shape: tuple[int, int, int],
    sigmas: Tensor,
    counter: Counter,
    cancel: CancelToken | None,
) -> sampling.Denoise:
    """The jobs' velocity, both branches at once; each distinct prompt is read once."""
    request = jobs[0].request
    guided = request.guidance_scale > 1
    asked = [job.texts for job in jobs] + ([job.negative for job in jobs] if guided else [])
    distinct = list(dict.fromkeys(asked))
    features = encoders.encode(distinct)
    counter.num_prefills += len(distinct)
    prefix = model.prefill(features, height=shape[1], width=shape[2], sigmas=sigmas[:-1])
    rows = [distinct.index(texts) for texts in asked]
    alone, together = prefix.take(rows[: len(jobs)]), prefix.take(rows)

    def velocity(x_t: Tensor, sigma: Tensor, prefix: Prefix) -> Tensor:
        counter.num_forwards += 1
        return model.velocity(x_t, sigma, prefix, on_layer=cancel.check if cancel else None)

    def both(x_t: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        v_cond, v_uncond = velocity(torch.cat([x_t, x_t]), sigma, together).chunk(2)
        return v_cond, v_uncond

    return sampling.cfg_batched(
        lambda x_t, sigma: velocity(x_t, sigma, alone),
        both,
        request.guidance_scale,
        request.guidance_interval or (0.0, 1.0),
    )
