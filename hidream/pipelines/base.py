"""What every pipeline shares: calls with a prompt or with many requests, batches, results."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from PIL import Image
from torch import nn

from hidream.cancel import CancelToken
from hidream.errors import ModelError, UsageError
from hidream.limits import batch_size
from hidream.lora_file import linear_layers, read_lora
from hidream.memory import Policy
from hidream.models.loading import tensor_shapes
from hidream.pictures import read_picture
from hidream.pipelines.devices import find_device, told_when_full
from hidream.pipelines.jobs import Job, Loras
from hidream.registry import Spec
from hidream.request import GenerateRequest, check_ability, resolve
from hidream.text_request import TextRequest

if TYPE_CHECKING:
    from hidream.pipelines.text import OnToken, TextOutput

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


@dataclass
class Counter:
    """Calls of the network, prefixes computed, and prefixes that were there already."""

    num_forwards: int = 0
    num_prefills: int = 0
    num_reused: int = 0

    def add(self, other: Counter) -> None:
        self.num_forwards += other.num_forwards
        self.num_prefills += other.num_prefills
        self.num_reused += other.num_reused


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What `load` was asked for, found; the last three are I1's and E1's."""

    device: torch.device
    dtype: torch.dtype
    policy: Policy
    prefix_bytes: int
    llama: str | Path | None
    refiner: str | Path
    text_encoders: bool


@dataclass(frozen=True)
class Plan:
    """A request as it will be run: resolved, one job a picture, and what its user is told."""

    request: GenerateRequest
    jobs: Sequence[Job]
    warnings: tuple[str, ...]


class Pipeline(ABC):
    """A loaded model. The same request and seed give the same picture, whatever came before.

    LoRAs belong to requests. They never change the model's weights, and files stay in memory
    (up to 2 GiB) so that switching between them reads nothing again.

    Threads may share a pipeline; where its memory policy brings weights in turn, their calls wait
    for each other.
    """

    spec: Spec
    _turn: AbstractContextManager[Any]  # held while the network is used

    @classmethod
    @abstractmethod
    def open(
        cls,
        spec: Spec,
        folder: Path,
        options: LoadOptions,
    ) -> Pipeline:
        """The pipeline of a model's folder."""

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype: ...

    @property
    @abstractmethod
    def memory(self) -> Policy:
        """How its weights are kept."""

    @abstractmethod
    def _move(self, device: torch.device) -> None: ...

    @abstractmethod
    def _plan(self, asked: GenerateRequest) -> Plan:
        """Read a request's pictures and LoRAs' headers, fill in its defaults."""

    @abstractmethod
    def _denoise(
        self,
        batch: Sequence[Any],
        counter: Counter,
        on_step: OnStep | None,
        cancel: CancelToken | None,
    ) -> list[Image.Image]:
        """The pictures of jobs whose `batch_key`s are equal."""

    def _resolved(
        self, asked: GenerateRequest
    ) -> tuple[GenerateRequest, list[Image.Image], Image.Image | None]:
        """The request with this model's defaults, its references and its initial picture."""
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
        check_ability(self.spec, request)
        return request, references, initial

    def _loras(self, request: GenerateRequest, model: nn.Module) -> tuple[Loras, tuple[str, ...]]:
        """The request's LoRAs, matched with the model, each with its scale; and warnings."""
        shapes = tensor_shapes(model) if request.loras else {}
        layers, name = linear_layers(shapes), request.model or ""
        loras = tuple(
            (read_lora(path, layers, name, shapes=shapes), scale) for path, scale in request.loras
        )
        return loras, tuple(warning for file, _ in loras for warning in file.warnings)

    def to(self, device: str | torch.device) -> Pipeline:
        """Compute on this device from now on; UsageError for another one under a memory policy."""
        place = find_device(str(device))
        if self.memory.name == "auto":
            self._move(place)
        elif place.type != self.device.type or place.index not in (None, self.device.index):
            raise UsageError(
                f'a pipeline under memory="{self.memory.name}" stays on its device, {self.device}.',
                f'Load it there: load or from_pretrained(…, device="{place}").',
            )
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
        prompt: Sequence[str | GenerateRequest],
        *,
        on_step: OnStep | None = None,
        cancel: CancelToken | None = None,
        **fields: Any,
    ) -> list[Output]: ...
    def __call__(
        self,
        prompt: str | GenerateRequest | Sequence[str | GenerateRequest],
        *,
        on_step: OnStep | None = None,
        cancel: CancelToken | None = None,
        **fields: Any,
    ) -> Output | list[Output]:
        """Pictures for a prompt (with a request's fields as keywords), a request, or several of
        either; several prompts share the fields.

        Requests that share size, sampling settings and LoRAs are denoised together, up to 16
        pictures at a time; the results come in the requests' order, each as if it had been alone,
        within fp32 rounding (`deterministic=True`: to the bit). `on_step(step, num_steps, preview)`
        is called after each step, `preview()` gives the pictures at that step, then or later; what
        `on_step` raises ends the call. So does `cancel.cancel()`, from any thread and within a
        step.

        Raises Cancelled after that; no picture is given then.
        """
        requests = [as_request(item, fields) for item in listed(prompt)]
        outputs = self._run(requests, on_step, cancel)
        return outputs[0] if isinstance(prompt, str | GenerateRequest) else outputs

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

    def _write(self, requests: list[TextRequest], on_token: OnToken | None) -> list[TextOutput]:
        raise ModelError(
            f"{self.spec.name} draws, but cannot write.", "Use an O1 model, such as o1-nano."
        )

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
                made = self._denoise(batch, counter, on_step, cancel)
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


def listed(prompt: Any) -> list[str | GenerateRequest]:
    """One prompt or request, or several, as a list; UsageError for anything else."""
    if isinstance(prompt, str | GenerateRequest):
        return [prompt]
    if not isinstance(prompt, Iterable) or isinstance(prompt, bytes | Mapping):
        raise UsageError(
            f"prompt is {type(prompt).__name__}; it must be text, a GenerateRequest or a list of "
            "these."
        )
    return list(prompt)


def as_request(prompt: str | GenerateRequest, fields: Mapping[str, Any]) -> GenerateRequest:
    """A prompt with these fields as a request; a request as it is, which takes none."""
    if not isinstance(prompt, GenerateRequest):
        return GenerateRequest.from_dict({"prompt": prompt, **fields})
    if fields:
        raise UsageError(
            f"{', '.join(fields)}: a GenerateRequest has its fields inside.",
            "Use dataclasses.replace(request, …) to change them.",
        )
    return prompt


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
        request.image_guidance_scale,
        request.clip_cfg_norm,
        request.refine_strength,
        request.tile,
        request.as_published,
        request.noise_scale,
        request.noise_clip_std,
        request.strength,
        request.sparsity,
        request.loras,
        request.embeddings,
    )


def _batches(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs that can be denoised together; a deterministic one is always alone."""
    groups: dict[Any, list[Job]] = {}
    for job in jobs:
        key = id(job) if job.request.deterministic else batch_key(job.request)
        groups.setdefault(key, []).append(job)
    batches = []
    for group in groups.values():
        request = group[0].request
        most = batch_size(request.width or 1, request.height or 1)
        batches += [group[i : i + most] for i in range(0, len(group), most)]
    return batches
