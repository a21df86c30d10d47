"""O1 checkpoints: a folder in the published layout becomes a model, and back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hidream.errors import ModelError
from hidream.folder import Folder, open_folder
from hidream.memory import AUTO, Policy
from hidream.models.loading import check_tensors, load_weights, tensor_shapes
from hidream.models.o1.config import O1Config
from hidream.models.o1.memory import check_fit
from hidream.models.o1.model import O1
from hidream.models.o1.placing import load_placed
from hidream.models.o1.tokens import Tokenizer
from hidream.models.quantise import check_quantised
from hidream.nn.attention import Backend

WEIGHTS = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
)


def config_of(folder: Folder) -> O1Config:
    """The configuration; a checkpoint without lm_head is one of a model without it."""
    settings, size = dict(folder.settings), folder.preprocessor.get("size")
    if isinstance(size, Mapping) and "reference_budgets" not in settings:
        bounds = [size.get("shortest_edge"), size.get("longest_edge")]  # areas, for all their names
        settings.setdefault("vision_pixels", bounds)
    config = O1Config.from_dict(folder.config, settings)
    return replace(config, has_lm_head=folder.has_lm_head)


def shapes_of(config: O1Config) -> dict[str, list[int]]:
    """Every tensor of the model that `config` describes, built on the meta device."""
    with torch.device("meta"):
        return tensor_shapes(O1(config))


def verify_folder(path: str | Path) -> Folder:
    """Check a folder's configuration, headers, names and shapes; reads no weights."""
    folder = open_folder(path)
    check_tensors(folder, shapes_of(config_of(folder)))
    return folder


def load_o1(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    attention_backend: Backend = "auto",
    memory: Policy = AUTO,
) -> tuple[O1, Tokenizer]:
    """Model and tokenizer of a folder in the published layout, its weights kept as `memory` says.

    Raises ModelError, and MemoryExceeded where the weights cannot fit, before any is read.
    """
    folder, device = open_folder(path), torch.device(device)
    tokenizer = Tokenizer(folder.path)
    with torch.device("meta"):
        model = O1(config_of(folder), attention_backend)
    check_quantised(memory, device, dtype)
    check_fit(model.config, memory, device=device, dtype=dtype)
    if memory == AUTO:
        return load_weights(model, folder, device=device, dtype=dtype), tokenizer
    return load_placed(model, folder, memory, device=device, dtype=dtype), tokenizer


def save_o1(
    model: O1, path: str | Path, *, tokenizer: Tokenizer, settings: Mapping[str, Any] | None = None
) -> None:
    """Write `model` as a folder that `load_o1` reads: weights, config, tokenizer, hidream.json.

    Raises ModelError where the folder holds shards, which would be read beside or instead.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    others = sorted(f.name for f in path.glob("model*.safetensors*") if f.name != WEIGHTS)
    if others:
        raise ModelError(f"{path} holds other weights: {others[0]}.", "Save to another folder.")
    names = tensor_shapes(model)
    tensors = {name: t.contiguous() for name, t in model.state_dict().items() if name in names}
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    (path / WEIGHTS).chmod(0o644)  # safetensors writes for the owner alone
    _write_json(path / "config.json", model.config.to_dict(tokenizer.special))
    _write_json(path / "hidream.json", {**(settings or {}), **model.config.to_settings()})
    for name in TOKENIZER_FILES:
        source = tokenizer.folder / name
        if source.is_file() and source.resolve() != (path / name).resolve():
            shutil.copyfile(source, path / name)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
