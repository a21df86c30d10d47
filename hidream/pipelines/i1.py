"""I1's and E1's pipeline: four text encoders, the network, the latents' codec."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import RLock

import torch
from PIL import Image

from hidream.cancel import CancelToken
from hidream.errors import UsageError
from hidream.folder import locate
from hidream.memory import AUTO, Policy
from hidream.models.e1 import target_description
from hidream.models.i1.model import I1
from hidream.models.i1.text import TextEncoders, Texts
from hidream.models.i1.weights import load_i1
from hidream.models.loras import LoraWeights, with_loras
from hidream.models.vae import LatentCodec
from hidream.pipelines.base import REFINER, Counter, OnStep, Pipeline, Plan
from hidream.pipelines.jobs import find_source, resized
from hidream.pipelines.latent import LatentJob, denoise_latents
from hidream.pipelines.prefixes import MAX_KEPT
from hidream.registry import Spec
from hidream.request import GenerateRequest, warnings_of


def locate_refiner(name: str | Path) -> Path:
    """The folder of the I1 that finishes edits. UsageError where the model is none."""
    spec, folder = locate(str(name))
    if spec.family != "i1":
        raise UsageError(f"{spec.name} cannot refine E1's edits.", f"Use an I1, such as {REFINER}.")
    return folder


class I1Pipeline(Pipeline):
    """A loaded I1 or E1."""

    def __init__(
        self,
        spec: Spec,
        model: I1,
        encoders: TextEncoders,
        codec: LatentCodec,
        refiner: str | Path = REFINER,
    ):
        self._refiner_name = refiner
        self._refiner: I1 | None = None
        self.spec = spec
        self.model = model
        self.encoders = encoders
        self.codec = codec
        self._lora_weights = LoraWeights()
        self._turn = RLock()  # the encoders are not to be shared

    @classmethod
    def open(
        cls,
        spec: Spec,
        folder: Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        policy: Policy,
        prefix_bytes: int = MAX_KEPT,
        llama: str | Path | None = None,
        refiner: str | Path = REFINER,
    ) -> I1Pipeline:
        encoders = TextEncoders.open(
            folder,
            llama=llama,
            device=device,
            dtype=dtype,
            keep=policy is AUTO,
            max_kept=prefix_bytes,
        )
        codec = LatentCodec.open(folder / "vae", device=device, dtype=dtype)
        model = load_i1(folder, device=device, dtype=dtype)
        return cls(spec, model, encoders, codec, refiner)

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
        if self._refiner is not None:
            self._refiner.to(device)
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
            model,
            self.encoders,
            self.codec,
            batch,
            refiner=self._refining() if batch[0].request.refine_strength else None,
            counter=counter,
            on_step=on_step,
            cancel=cancel,
        )

    def _refining(self) -> I1:
        """The I1 that finishes edits. Its own weights: the LoRAs are the editor's."""
        if self._refiner is None:
            self._refiner = load_i1(
                locate_refiner(self._refiner_name), device=self.device, dtype=self.dtype
            )
        return self._refiner

    def _plan(self, asked: GenerateRequest) -> Plan:
        request, references, initial = self._resolved(asked)
        references, source = find_source(request, references, initial)
        texts = Texts.of(request.full_prompt, dict(request.encoder_prompts))
        negative = Texts.of((request.negative_prompt or "").strip())
        edited = target = None
        if self.spec.family == "e1":
            edited = resized(references[0], request)
        if request.refine_strength:
            locate_refiner(self._refiner_name)
            target = Texts.of(target_description(request.full_prompt) or request.full_prompt)
        loras, told = self._loras(request, self.model)
        jobs = [
            LatentJob(request, seed, texts, negative, edited, target, source=source, loras=loras)
            for seed in request.seeds
        ]
        return Plan(request, jobs, (*warnings_of(asked, request), *told, *self.encoders.cut(texts)))
