"""`load` a model by name, hub id or folder; call it with a prompt or with many requests."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from threading import RLock
from typing import Any, overload

import torch
from PIL import Image

from hidream.cancel import CancelToken
from hidream.errors import UsageError
from hidream.folder import locate
from hidream.limits import batch_size
from hidream.lora_file import linear_layers, read_lora
from hidream.memory import AUTO, Policy, find_policy
from hidream.models.loading import tensor_shapes
from hidream.models.loras import LoraWeights, with_loras
from hidream.models.o1.model import O1
from hidream.models.o1.tokens import Tokenizer, encode, with_prompt
from hidream.outpainting import extend
from hidream.pictures import read_mask, read_picture
from hidream.pipelines.denoise import Job, Source, batch_key, denoise_batch
from hidream.pipelines.devices import find_device, find_dtype, told_when_full
from hidream.pipelines.prefixes import MAX_KEPT, Counter, Prefixes
from hidream.pipelines.text import OnToken, TextOutput, write_texts
from hidream.registry import Spec
from hidream.request import GenerateRequest, resolve, warnings_of
from hidream.sampling import dev_sigmas
from hidream.sheet import blank
from hidream.text_request import TextRequest

log = logging.getLogger(__name__)

OnStep = Callable[[int, int, Callable[[], list[Image.Image]]], object]


@dataclass(frozen=True)
class Output:
    """Pictures, and how they were made.

    `request` is the request as it was run, nothing left out; `seeds` has one for each picture.
    `timings` are seconds. `num_forwards` counts calls of the network, also those whose batch held
    pictures of other requests. So do `num_prefills`, the prompts that had to be read (the
    unconditional branch's is one), and `num_reused`, those that an earlier batch or call had read.
    """

    images: list[Image.Image]
    request: GenerateRequest
    seeds: tuple[int, ...]
    timings: Mapping[str, float]
    num_forwards: int
    num_prefills: int = 0
    num_reused: int = 0
    warnings: tuple[str, ...] = ()


def load(
    model: str | Path,
    *,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    memory: str = "auto",
    variant: str | None = None,
    prefix_bytes: int = MAX_KEPT,
) -> Pipeline:
    """A model ready to be called.

    `model`: a name ("o1-nano"), a hub id, or a folder in the published layout. `device`: auto,
    cpu, cuda or mps. `dtype`: fp32 on a CPU and bf16 elsewhere unless given. `variant` ("full",
    "dev") is for published folders without a `hidream.json`. `prefix_bytes`: how much of the
    prompts and references that were read may stay in the device's memory for later calls; 0
    keeps nothing.

    `memory` is one of `hidream.memory.POLICIES`; "auto" keeps everything on the device.

    Raises ModelError where the model is not there or not whole, UsageError for unknown names,
    MemoryExceeded where the device cannot hold the weights.
    """
    policy = find_policy(memory)
    prefixes = Prefixes(prefix_bytes)
    chosen_device = find_device(device)
    chosen_dtype = find_dtype(dtype, chosen_device)
    spec, folder = locate(str(model), variant=variant)
    assert spec.loader is not None  # locate refuses the others
    module, function = spec.loader.split(":")
    load_weights = getattr(import_module(module), function)
    with told_when_full(chosen_device, policy, "the model's weights"):
        network, tokenizer = load_weights(
            folder, device=chosen_device, dtype=chosen_dtype, memory=policy
        )
    return Pipeline(spec, network, tokenizer, prefixes)


class Pipeline:
    """A loaded O1. The same request and seed give the same picture, whatever came before.

    LoRAs belong to requests. They never change the model's weights, and files stay in memory
    (up to 2 GiB) so that switching between them reads nothing again. `prefixes` keeps what was
    read of prompts and references; it changes no bit of any picture.

    Threads may share a pipeline; where its memory policy brings weights in turn, their calls wait
    for each other.
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

    @property
    def device(self) -> torch.device:
        return self.model.model.final_layer2.linear.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.model.final_layer2.linear.weight.dtype

    @property
    def memory(self) -> Policy:
        """How its weights are kept."""
        return AUTO if self.model.elsewhere is None else self.model.elsewhere.policy

    def to(self, device: str | torch.device) -> Pipeline:
        if self.model.elsewhere is not None:
            raise UsageError(
                f"a pipeline under --memory {self.memory.name} stays on its device.",
                "Load it again for the other one.",
            )
        self.model.to(find_device(str(device)))
        return self

    @overload
    def __call__(
        self,
        prompt: str | GenerateRequest,
        *,
        on_step: OnStep | None = None,
        cancel: CancelToken | None = None,
        **fields: Any,
    ) -> Output: ...
    @overload
    def __call__(
        self,
        prompt: Sequence[GenerateRequest],
        *,
        on_step: OnStep | None = None,
        cancel: CancelToken | None = None,
    ) -> list[Output]: ...
    def __call__(
        self,
        prompt: str | GenerateRequest | Sequence[GenerateRequest],
        *,
        on_step: OnStep | None = None,
        cancel: CancelToken | None = None,
        **fields: Any,
    ) -> Output | list[Output]:
        """Pictures for a prompt (with a request's fields as keywords), a request, or several.

        Requests that share size, sampling settings and LoRAs are denoised together, up to 16
        pictures at a time; the results come in the requests' order, each as if it had been alone,
        within fp32 rounding (`deterministic=True`: to the bit). `on_step(step, num_steps, preview)`
        is called after each step, `preview()` gives the pictures at that step, then or later; what
        `on_step` raises ends the call. So does `cancel.cancel()`, from any thread and within a
        step.

        Raises Cancelled after that; no picture is given then.
        """
        if isinstance(prompt, str):
            request = GenerateRequest.from_dict({"prompt": prompt, **fields})
            return self._run([request], on_step, cancel)[0]
        if fields:
            raise UsageError(
                f"{', '.join(fields)}: a GenerateRequest has its fields inside.",
                "Use dataclasses.replace(request, …) to change them.",
            )
        if isinstance(prompt, GenerateRequest):
            return self._run([prompt], on_step, cancel)[0]
        return self._run(list(prompt), on_step, cancel)

    @overload
    def generate_text(
        self,
        prompt: str | TextRequest,
        pictures: Sequence[str | Path | Image.Image] = (),
        *,
        on_token: OnToken | None = None,
        **fields: Any,
    ) -> TextOutput: ...
    @overload
    def generate_text(
        self, prompt: Sequence[TextRequest], *, on_token: OnToken | None = None
    ) -> list[TextOutput]: ...
    def generate_text(
        self,
        prompt: str | TextRequest | Sequence[TextRequest],
        pictures: Sequence[str | Path | Image.Image] = (),
        *,
        on_token: OnToken | None = None,
        **fields: Any,
    ) -> TextOutput | list[TextOutput]:
        """What the model answers: to a prompt about pictures or none, a TextRequest, or several.

        `fields` are a TextRequest's. Several requests are written together, each as if alone, to
        fp32 rounding. The model sees pictures as `models.o1.tokens.encode_text` says.
        `on_token(place, number, text)` is called for every token (1, 2, …) of the request at
        `place`; the texts of one request joined are its result's, and a text is empty where the
        token ends inside a character. What it raises ends the call.

        Raises ModelError where the checkpoint has no language head.
        """
        if isinstance(prompt, str):
            request = TextRequest(prompt=prompt, pictures=tuple(pictures), **fields)
            return self._write([request], on_token)[0]
        if fields or pictures:
            raise UsageError(
                f"{', '.join(fields) or 'pictures'}: a TextRequest has its fields inside.",
                "Use dataclasses.replace(request, …) to change them.",
            )
        if isinstance(prompt, TextRequest):
            return self._write([prompt], on_token)[0]
        return self._write(list(prompt), on_token)

    def describe(
        self,
        picture: str | Path | Image.Image,
        question: str | None = None,
        *,
        on_token: OnToken | None = None,
        **fields: Any,
    ) -> TextOutput:
        """A description of the picture, or the answer to a question about it.

        As `generate_text` in all else.
        """
        return self.generate_text(TextRequest.about(picture, question, **fields), on_token=on_token)

    @torch.inference_mode()
    def _write(self, requests: list[TextRequest], on_token: OnToken | None) -> list[TextOutput]:
        with self._turn, told_when_full(self.device, self.memory, "the prompts and pictures"):
            return write_texts(self.model, self.tokenizer, requests, on_token)

    @torch.inference_mode()
    def _run(
        self,
        requests: list[GenerateRequest],
        on_step: OnStep | None,
        cancel: CancelToken | None,
    ) -> list[Output]:
        start = time.perf_counter()
        plans = []
        for request in requests:
            if cancel is not None:
                cancel.check()
            plans.append(self._plan(request))
        encoded = time.perf_counter()
        jobs = [job for plan in plans for job in plan.jobs]
        pictures: dict[int, Image.Image] = {}
        counts = {id(plan.request): Counter() for plan in plans}
        for batch in _batches(jobs):
            counter = Counter()
            what = f"{len(batch)} pictures of {batch[0].request.width}x{batch[0].request.height}"
            with self._turn, told_when_full(self.device, self.memory, what):
                model = with_loras(
                    self.model, batch[0].loras, self._lora_weights, self.model.elsewhere
                )
                made = denoise_batch(
                    model,
                    batch,
                    counter=counter,
                    on_step=on_step,
                    prefixes=self.prefixes,
                    cancel=cancel,
                )
            for job, picture in zip(batch, made, strict=True):
                pictures[id(job)] = picture
            for plan in {id(job.request) for job in batch}:
                counts[plan].add(counter)
        end = time.perf_counter()
        timings = {"encode": encoded - start, "denoise": end - encoded, "total": end - start}
        return [
            Output(
                images=[pictures[id(job)] for job in plan.jobs],
                request=plan.request,
                seeds=tuple(job.seed for job in plan.jobs),
                timings=timings,
                **vars(counts[id(plan.request)]),
                warnings=plan.warnings,
            )
            for plan in plans
        ]

    def _plan(self, asked: GenerateRequest) -> _Plan:
        """Read a request's pictures and LoRAs' headers, fill in its defaults, tokenise."""
        references = [read_picture(picture) for picture in asked.references]
        initial = read_picture(asked.init_image) if asked.init_image is not None else None
        aspect_of = references[0] if len(references) == 1 else initial
        request = resolve(
            asked,
            self.spec.defaults_for(asked.task),
            self.spec.patch_size,
            source_size=aspect_of.size if aspect_of else None,
        )
        if request.model is None:
            request = replace(request, model=self.spec.name)
        if self.spec.variant == "dev" and request.sigmas is None and request.shift == 1:
            # Dev knows one curve; other numbers of steps read it at even distances.
            curve = dev_sigmas(request.num_inference_steps)
            request = replace(request, sigmas=tuple(curve.tolist()[:-1]))

        references, kept = _source(request, references, initial)
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
        layers = linear_layers(tensor_shapes(self.model)) if request.loras else {}
        loras = tuple(
            (read_lora(path, layers, request.model), scale) for path, scale in request.loras
        )
        jobs = [
            Job(request, seed, conditional, unconditional, kept, loras) for seed in request.seeds
        ]
        warnings = (*warnings_of(asked, request), *(w for file, _ in loras for w in file.warnings))
        return _Plan(request, jobs, warnings)


@dataclass(frozen=True)
class _Plan:
    request: GenerateRequest
    jobs: list[Job]
    warnings: tuple[str, ...]


def _batches(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs that can be denoised together; a deterministic one is always alone."""
    groups: dict[Any, list[Job]] = {}
    for job in jobs:
        key = id(job) if job.request.deterministic else batch_key(job.request)
        groups.setdefault(key, []).append(job)
    batches = []
    for group in groups.values():
        most = batch_size(group[0].request.width, group[0].request.height)
        batches += [group[i : i + most] for i in range(0, len(group), most)]
    return batches


def _source(
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
    return references, Source(_resized(source, request), mask and _resized(mask, request))


def _resized(picture: Image.Image, request: GenerateRequest) -> Image.Image:
    size = (request.width, request.height)
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)
