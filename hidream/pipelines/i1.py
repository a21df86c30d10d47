"""I1's and E1's pipeline: four text encoders, the network, the latents' codec."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from threading import RLock

import torch
from PIL import Image

from hidream.cancel import CancelToken
from hidream.folder import transformer_config
from hidream.locating import REFINER, components_folder, find_refiner
from hidream.memory import AUTO, Policy
from hidream.models.e1 import published_source, refining_warnings, target_description
from hidream.models.i1.config import I1Config
from hidream.models.i1.embeddings import check_embeddings, load_embeddings
from hidream.models.i1.model import I1, Features
from hidream.models.i1.text import TextEncoders, Texts, texts_of
from hidream.models.i1.weights import load_i1, open_i1
from hidream.models.loras import LoraWeights, with_loras
from hidream.models.vae import LatentCodec, check_channels
from hidream.pipelines.base import Counter, LoadOptions, OnStep, Pipeline, Plan
from hidream.pipelines.jobs import find_source, resized
from hidream.pipelines.latent import LatentJob, denoise_latents
from hidream.registry import Spec
from hidream.request import GenerateRequest, warnings_of


class I1Pipeline(Pipeline):
    """A loaded I1 or E1."""

    def __init__(
        self,
        spec: Spec,
        model: I1,
        encoders: TextEncoders,
        codec: LatentCodec,
        refiner: str | Path = REFINER,
        folder: Path | None = None,
    ):
        self._refiner_name = refiner
        self._folder = folder
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
        options: LoadOptions,
    ) -> I1Pipeline:
        weights = spec.file or folder
        given = I1Config.from_dict(transformer_config(folder)) if spec.file else None
        config = open_i1(weights, given)[1]
        parts = components_folder(spec, folder, options.refiner)
        device, dtype, policy = options.device, options.dtype, options.policy
        encoders = TextEncoders({}, device=device, dtype=dtype)
        if options.text_encoders:
            encoders = TextEncoders.open(
                parts,
                llama=options.llama,
                device=device,
                dtype=dtype,
                keep=not policy.lends,
                piecewise=policy.piecewise,
                max_kept=options.prefix_bytes,
            )
            encoders.check(config)
        codec = LatentCodec.open(parts / "vae", device=device, dtype=dtype, keep=not policy.lends)
        check_channels(parts, codec.channels, config.in_channels)
        model = load_i1(weights, config=config, device=device, dtype=dtype, memory=policy)
        return cls(spec, model, encoders, codec, options.refiner, folder)

    @property
    def device(self) -> torch.device:
        return self.model.x_embedder.proj.weight.device  # never lent

    @property
    def dtype(self) -> torch.dtype:
        return self.model.x_embedder.proj.weight.dtype

    @property
    def memory(self) -> Policy:
        return AUTO if self.model.elsewhere is None else self.model.elsewhere.policy

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
        model = with_loras(self.model, batch[0].loras, self._lora_weights, self.model.elsewhere)
        return denoise_latents(
            model,
            self.encoders,
            self.codec,
            batch,
            distilled=self.spec.variant != "full",
            refiner=self._refining() if batch[0].request.refine_strength else None,
            counter=counter,
            on_step=on_step,
            cancel=cancel,
        )

    def _given(self, request: GenerateRequest) -> dict[Texts, Features]:
        """What the request's embedding file says of its prompt, and of a negative prompt."""
        if request.embeddings is None:
            return {}
        check_embeddings(request, self.model.config, alone=not self.encoders.num_params)
        found = load_embeddings(request.embeddings, self.model.config)
        given = {found.texts: found.features}
        if found.negative_texts is not None and found.negative is not None:
            given[found.negative_texts] = found.negative
        return given

    def _edited(
        self, request: GenerateRequest, source: Image.Image
    ) -> tuple[Image.Image, tuple[int, int] | None]:
        """The source at the size at which it is edited, and what the result is stretched to."""
        defaults = self.spec.defaults_for(request.task)
        how = defaults.published_edit if request.as_published else None
        if how is None:
            return resized(source, request), None
        size = (request.width or 1, request.height or 1)
        side = math.isqrt(defaults.width * defaults.height)
        return published_source(source, size, how, side), source.size

    def _refining(self) -> I1:
        """The I1 that finishes edits. Its own weights: the LoRAs are the editor's."""
        if self._refiner is None:
            self._refiner = load_i1(
                find_refiner(self._refiner_name),
                device=self.device,
                dtype=self.dtype,
                memory=self.memory,
            )
        return self._refiner

    def _plan(self, asked: GenerateRequest) -> Plan:
        request, references, initial = self._resolved(asked)
        references, source = find_source(request, references, initial)
        texts, negative = texts_of(request)
        given = self._given(request)
        edited = target = final_size = None
        if self.spec.family == "e1":
            edited, final_size = self._edited(request, references[0])
        if request.refine_strength:
            find_refiner(self._refiner_name, self._folder)
            described = target_description(request.full_prompt)
            target = texts if described is None else Texts.of(described)
        loras, told = self._loras(request, self.model)
        jobs = [
            LatentJob(
                *(request, seed, texts, negative, edited, target, given, final_size),
                source=source,
                loras=loras,
            )
            for seed in request.seeds
        ]
        with self._turn:  # the tokenizers are not to be shared either
            cut = () if texts in given else self.encoders.cut(texts)
        warnings = (*warnings_of(asked, request, self.spec), *refining_warnings(request))
        return Plan(request, jobs, (*warnings, *told, *cut))
