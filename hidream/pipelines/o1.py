"""O1's pipeline: a request becomes tokens, a batch of them pictures; and questions, answers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from threading import RLock

import torch
from PIL import Image

from hidream.cancel import CancelToken
from hidream.memory import AUTO, Policy
from hidream.models.loras import LoraWeights, with_loras
from hidream.models.o1.model import O1
from hidream.models.o1.tokens import Tokenizer, encode, with_prompt
from hidream.models.o1.weights import load_o1
from hidream.pipelines.base import Counter, LoadOptions, OnStep, Pipeline, Plan
from hidream.pipelines.denoise import O1Job, denoise_batch
from hidream.pipelines.devices import told_when_full
from hidream.pipelines.jobs import find_source
from hidream.pipelines.prefixes import Prefixes
from hidream.pipelines.text import OnToken, TextOutput, write_texts
from hidream.registry import Spec
from hidream.request import GenerateRequest, warnings_of
from hidream.sampling import dev_sigmas
from hidream.text_request import TextRequest


class O1Pipeline(Pipeline):
    """A loaded O1, which also writes.

    `prefixes` keeps what was read of prompts and references; it changes no bit of any picture.
    """

    def __init__(
        self, spec: Spec, model: O1, tokenizer: Tokenizer, prefixes: Prefixes | None = None
    ):
        self.spec = spec
        self.model = model
        self.tokenizer = tokenizer
        self.prefixes = prefixes if prefixes is not None else Prefixes()
        self._lora_weights = LoraWeights()
        self._turn = nullcontext() if model.elsewhere is None else RLock()

    @classmethod
    def open(
        cls,
        spec: Spec,
        folder: Path,
        options: LoadOptions,
    ) -> O1Pipeline:
        model, tokenizer = load_o1(
            folder, device=options.device, dtype=options.dtype, memory=options.policy
        )
        return cls(spec, model, tokenizer, Prefixes(options.prefix_bytes))

    @property
    def device(self) -> torch.device:
        return self.model.model.final_layer2.linear.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.model.final_layer2.linear.weight.dtype

    @property
    def memory(self) -> Policy:
        return AUTO if self.model.elsewhere is None else self.model.elsewhere.policy

    @torch.inference_mode()
    def _write(self, requests: list[TextRequest], on_token: OnToken | None) -> list[TextOutput]:
        with self._turn, told_when_full(self.device, self.memory, "the prompts and pictures"):
            return write_texts(self.model, self.tokenizer, requests, on_token)

    def _move(self, device: torch.device) -> None:
        self.model.to(device)

    def _denoise(
        self,
        batch: Sequence[O1Job],
        counter: Counter,
        on_step: OnStep | None,
        cancel: CancelToken | None,
    ) -> list[Image.Image]:
        model = with_loras(self.model, batch[0].loras, self._lora_weights, self.model.elsewhere)
        return denoise_batch(
            model,
            batch,
            counter=counter,
            on_step=on_step,
            prefixes=self.prefixes,
            cancel=cancel,
        )

    def _plan(self, asked: GenerateRequest) -> Plan:
        request, references, initial = self._resolved(asked)
        if self.spec.variant == "dev" and request.sigmas is None and request.shift == 1:
            # Dev knows one curve; other numbers of steps read it at even distances.
            curve = dev_sigmas(request.num_inference_steps)
            request = replace(request, sigmas=tuple(curve.tolist()[:-1]))

        references, kept = find_source(request, references, initial)
        tokenizer, config = self.tokenizer, self.model.config
        conditional = encode(
            tokenizer,
            config,
            request.full_prompt,
            width=request.width,
            height=request.height,
            references=references,
            layout=request.layout or (),
        )
        unconditional = with_prompt(conditional, tokenizer, config, request.negative_prompt)
        loras, told = self._loras(request, self.model)
        jobs = [
            O1Job(request, seed, conditional, unconditional, source=kept, loras=loras)
            for seed in request.seeds
        ]
        return Plan(request, jobs, (*warnings_of(asked, request, self.spec), *told))
