"""I1 checkpoints: a transformer folder, a whole repository or a single file becomes a model."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from hidream.errors import ModelError
from hidream.folder import DIFFUSERS_STEM, Folder, open_file, open_folder, transformer_folder
from hidream.lora_file import LoraFile
from hidream.memory import AUTO, Policy
from hidream.models.i1.config import E1_FULL, I1_FULL, I1Config
from hidream.models.i1.memory import check_fit
from hidream.models.i1.model import I1
from hidream.models.i1.placing import load_placed
from hidream.models.loading import check_tensors, load_weights, tensor_shapes
from hidream.models.loras import LoraWeights, with_loras
from hidream.models.quantise import check_quantised
from hidream.nn.attention import Backend
from hidream.nn.moe import pack

MAX_SHARD = 10_000_000_000  # bytes


def shapes_of(config: I1Config) -> dict[str, list[int]]:
    """Every tensor of the model that `config` describes, built on the meta device."""
    with torch.device("meta"):
        return tensor_shapes(I1(config))


def open_i1(path: str | Path, config: I1Config | None = None) -> tuple[Folder, I1Config]:
    """Headers and configuration of a checkpoint; no weights are read.

    `path`: a repository's folder, the `transformer` in it, or a single file, whose names may have
    ComfyUI's prefix. A file holds no configuration: it is `config`, or I1's.

    Raises ModelError where it is not there, not whole, or no I1.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        return open_file(path), config or I1_FULL
    folder = open_folder(transformer_folder(path) or path, stem=DIFFUSERS_STEM)
    return folder, config or I1Config.from_dict(folder.config)


def verify_i1(path: str | Path, config: I1Config | None = None) -> Folder:
    """Check a checkpoint's headers, names and shapes against its configuration, or `config`.

    No weights are read.
    """
    folder, config = open_i1(path, config)
    check_tensors(folder, shapes_of(config))
    return folder


def load_i1(
    path: str | Path,
    *,
    config: I1Config | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    attention_backend: Backend = "auto",
    memory: Policy = AUTO,
) -> I1:
    """The model of a checkpoint (see `open_i1`), ready for inference, kept as `memory` says.

    Raises ModelError, and MemoryExceeded where the weights cannot fit, before any is read.
    """
    folder, config = open_i1(path, config)
    device = torch.device(device)
    with torch.device("meta"):
        model = I1(config, attention_backend)
    check_tensors(folder, tensor_shapes(model))
    check_quantised(memory, device, dtype)
    check_fit(config, memory, device=device, dtype=dtype)
    if memory == AUTO:
        load_weights(model, folder, device=device, dtype=dtype)
    else:
        load_placed(model, folder, memory, device=device, dtype=dtype)
    if device.type == "cuda":
        pack(model)
    return model


def edits(model: I1, patch: LoraFile, weights: LoraWeights, config: I1Config = E1_FULL) -> I1:
    """E1-Full out of I1-Full and HiDream-E1-Full.safetensors, as a view: I1 stays as it is.

    The view shares all of I1's weights but those that the file brings whole; its limit on the
    number of patches is that of `config`.
    """
    view = copy.copy(with_loras(model, [(patch, 1.0)], weights, model.elsewhere))
    view.config = replace(view.config, max_resolution=config.max_resolution)
    return view


def save_i1(model: I1, path: str | Path, *, max_shard_bytes: int = MAX_SHARD) -> None:
    """Write `model` as a transformer folder in diffusers' layout, in shards where it is large.

    Raises ModelError where the folder holds other weights, which would be read beside or instead.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    split = split_torch_state_dict_into_shards(
        tensors,
        filename_pattern=DIFFUSERS_STEM + "{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    index = f"{DIFFUSERS_STEM}.safetensors.index.json"
    written = {*split.filename_to_tensors, *([index] if split.is_sharded else [])}
    others = sorted({f.name for f in path.glob("*.safetensors*")} - written)
    if others:
        raise ModelError(f"{path} holds other weights: {others[0]}.", "Save to another folder.")
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, path / file, metadata={"format": "pt"})
        (path / file).chmod(0o644)  # safetensors writes for the owner alone
    if split.is_sharded:
        placed = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (path / index).write_text(json.dumps(placed, indent=2) + "\n")
    content = json.dumps(model.config.to_dict(), indent=2)
    (path / "config.json").write_text(content + "\n")
