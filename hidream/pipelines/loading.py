"""`load`: a model by name, hub id or folder, as a pipeline."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import torch

from hidream.locating import REFINER, check_parts, locate
from hidream.memory import find_policy
from hidream.pipelines.base import LoadOptions, Pipeline
from hidream.pipelines.devices import find_device, find_dtype, told_when_full
from hidream.pipelines.prefixes import MAX_KEPT


def load(
    model: str | Path,
    *,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    memory: str = "auto",
    variant: str | None = None,
    prefix_bytes: int = MAX_KEPT,
    llama: str | Path | None = None,
    refiner: str | Path | None = None,
    components: str | Path | None = None,
    text_encoders: bool = True,
) -> Pipeline:
    """A model ready to be called.

    `model`: a name ("o1-nano"), a hub id, a folder in the published layout, or a single file of an
    I1's or E1's transformer (diffusers' or ComfyUI's names) with `components`, the model by name,
    hub id or folder whose configuration, text encoders and VAE go with it. `device`: auto,
    cpu, cuda or mps. `dtype`: fp32 on a CPU and bf16 elsewhere unless given. `variant` ("full",
    "dev", "fast") is for published folders that do not say theirs. `prefix_bytes`: how much of
    the prompts and references that were read may stay in memory for later calls; 0 keeps nothing.

    Of I1 and E1: `llama` is the folder or hub id of Llama-3.1-8B-Instruct, where it is not in the
    hub's cache or named by the environment's HIDREAM_LLAMA; without `text_encoders` only requests
    with `embeddings` can be drawn. Of E1: `refiner` is the I1, i1-full unless given, that takes the
    last steps of an edit with `refine_strength`, loaded when it is first needed.

    `memory` is one of `hidream.memory.POLICIES`; "auto" keeps everything on the device.

    Raises ModelError where the model is not there or not whole, UsageError for unknown names and
    for parts that the model does not have,
    MemoryExceeded where the device cannot hold the weights.
    """
    policy = find_policy(memory)
    chosen_device = find_device(device)
    chosen_dtype = find_dtype(dtype, chosen_device)
    spec, folder = locate(str(model), variant=variant, components=components)
    check_parts(spec, llama=llama, refiner=refiner, text_encoders=text_encoders)
    module, name = spec.pipeline.split(":")
    pipeline: type[Pipeline] = getattr(import_module(module), name)
    options = LoadOptions(
        device=chosen_device,
        dtype=chosen_dtype,
        policy=policy,
        prefix_bytes=prefix_bytes,
        llama=llama,
        refiner=refiner or REFINER,
        text_encoders=text_encoders,
    )
    with told_when_full(chosen_device, policy, "the model's weights"):
        return pipeline.open(spec, folder, options)
