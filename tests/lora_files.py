"""LoRA files for tests: random matrices for a model's layers, under the names of every trainer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hidream.sampling import picture_noise

Matrices = dict[str, tuple[Tensor, Tensor]]  # layer -> (rank, in), (out, rank)


def matrices(
    model: nn.Module, seed: int = 0, rank: int = 3, layers: Iterable[str] = ()
) -> Matrices:
    """Random matrices for these linear layers (default all), strong enough to change a picture."""
    found = {}
    for stream, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, nn.Linear | nn.Conv3d) and (not layers or name in layers):
            out, inner = module.weight.flatten(1).shape
            down = picture_noise(seed, 2 * stream, (rank, inner)) / inner**0.5
            up = 0.3 * picture_noise(seed, 2 * stream + 1, (out, rank))
            found[name] = (down, up)
    return found


# style -> how it writes the matrices' names, and whether it writes alphas
STYLES = {
    "published": ("{}.lora_A.weight", "{}.lora_B.weight", False),
    "peft": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight", False),
    "diffusers": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight", False),
    "diffusers down up": ("transformer.{}.lora.down.weight", "transformer.{}.lora.up.weight", True),
    "diffsynth": ("{}.lora_A.default.weight", "{}.lora_B.default.weight", False),
    "ai-toolkit": ("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight", False),
    "musubi": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", True),
    "comfyui": ("diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight", True),
    "comfyui short": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", True),
}


def write(
    file: Path,
    lora: Mapping[str, tuple[Tensor, Tensor]],
    style: str = "published",
    *,
    alpha: float | None = None,
    dtype: torch.dtype = torch.float32,
    extra: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, object] | None = None,
) -> str:
    """Save `lora`; `alpha` None is the rank. Returns the path as text."""
    down_name, up_name, has_alpha = STYLES[style]
    tensors = dict(extra or {})
    for layer, (down, up) in lora.items():
        name = layer.removeprefix("model.") if style.startswith("comfyui") else layer
        if down_name.startswith("lora_unet_"):
            name = name.replace(".", "_")
        tensors[down_name.format(name)] = down.to(dtype).contiguous()
        tensors[up_name.format(name)] = up.to(dtype).contiguous()
        if has_alpha:
            value = float(len(down) if alpha is None else alpha)
            tensors[down_name.format(name).split(".lora")[0] + ".alpha"] = torch.tensor(value)
    header = {"lora_adapter_metadata": json.dumps(metadata)} if metadata else None
    save_file(tensors, file, metadata=header)
    return str(file)
