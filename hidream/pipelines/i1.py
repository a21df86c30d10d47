"""I1's and E1's pipeline: four text encoders, the network, the latents' codec."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from PIL import Image

from hidream.cancel import CancelToken
from hidream.memory import AUTO, Policy
from hidream.models.i1.model import I1
from hidream.models.i1.text import TextEncoders, Texts
from hidream.models.i1.weights import load_i1
from hidream.models.loras import LoraWeights, with_loras
from hidream.models.vae import LatentCodec
from hidream.pipelines.base import Counter, OnStep, Pipeline, Plan
from hidream.pipelines.jobs import find_source
from hidream.pipelines.latent import LatentJob, denoise_latents
from hidream.registry import Spec
from hidream.request import GenerateRequest, warnings_of


class I1Pipeline(Pipeline):
    """A loaded I1 or E1."""

    def __init__(self, spec: Spec, model: I1, encoders: TextEncoders, codec: LatentCodec):
        self.spec = spec
        self.model = model
        self.encoders = encoders
        self.codec = codec
        self._lora_weights = LoraWeights()
        self._turn = nullcontext()

    @classmethod
    def open(
        cls,
        spec: Spec,
        folder: Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        policy: Policy,
        prefix_bytes: int = 0,
    ) -> I1Pipeline:
        encoders = TextEncoders.open(folder, device=device, dtype=dtype, keep=policy is AUTO)
        codec = LatentCodec.open(folder / "vae", device=device, dtype=dtype)
        return cls(spec, load_i1(folder, device=device, dtype=dtype), encoders, codec)

    @property
    def device(self) -> torch.device:
        return self.model.x_embedder.proj.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.x_embedder.proj.weight.dtype

    @property
    def memory(self) -> Policy:
        return AUTO

    def _move(self, device: torch.device) -> None:
        self.model.to(device)
        self.encoders.to(device)
        self.codec.to(device)

    def _denoise(
        self,
        batch: Sequence[LatentJob],
        counter: Counter,
        on_step: OnStep | None,
        cancel: CancelToken | None,
    ) -> list[Image.Image]:
        model = with_loras(self.model, batch[0].loras, self._lora_weights)
        return denoise_latents(
            model, self.encoders, self.codec, batch, counter=counter, on_step=on_step, cancel=cancel
        )

    def _plan(self, asked: GenerateRequest) -> Plan:
        request, references, initial = self._resolved(asked)
        _, source = find_source(request, references, initial)
        texts = Texts.of(request.full_prompt)
        negative = Texts.of((request.negative_prompt or "").strip())
        loras, told = self._loras(request, self.model)
        jobs = [
            LatentJob(request, seed, texts, negative, source=source, loras=loras)
            for seed in request.seeds
        ]
        return Plan(request, jobs, (*warnings_of(asked, request), *told, *self.encoders.cut(texts)))
