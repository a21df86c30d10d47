"""What a request will need: memory and time by arithmetic from the model's configuration."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from hidream.folder import Folder
from hidream.models.o1.config import O1_8B, O1_NANO, O1Config
from hidream.registry import Spec
from hidream.request import GenerateRequest

if TYPE_CHECKING:
    import torch

_RUNTIME_BYTES = 400_000_000  # Python and torch themselves
_SECONDS_A_LAYER = 1.5e-4  # starting a layer's operations, whatever their size


def estimate(
    request: GenerateRequest,
    folder: Folder | None,
    spec: Spec,
    device: str,
    dtype: str,
    batch_size: int,
) -> dict[str, Any]:
    """Bytes of memory at the peak, floating-point operations and seconds of a resolved request.

    The operations are those of the decoder's linear layers and attention; the time takes a speed
    that a short matrix product of about the model's shape has on this machine. The model's load
    time is not in it.
    """
    import torch

    config = _config(folder, spec)
    place = _device(device)
    half = dtype in ("bf16", "fp16") or (dtype == "auto" and place.type != "cpu")
    width_bytes = 2 if half else 4
    text = config.text
    num_params = folder.num_params if folder else _num_params(config)
    per_layer = text.head_dim * text.hidden_size * (2 * text.num_heads + 2 * text.num_kv_heads)
    per_layer += 3 * text.hidden_size * text.intermediate_size
    target, references, prefix = _tokens(config, request)
    generated = target + references
    per_token = 2 * per_layer * text.num_layers
    attention = 4 * generated * (generated + prefix) * text.num_heads * text.head_dim
    forward_flops = generated * per_token + attention * text.num_layers
    branches = 2 if (request.guidance_scale or 0) > 1 else 1
    evaluations = (request.num_inference_steps or 1) * (2 if request.sampler == "heun" else 1)
    evaluations = max(1, round(evaluations * (request.strength or 1)))
    num_images = len(request.seeds)
    flops = forward_flops * branches * evaluations * num_images
    rows = batch_size * branches * generated
    kv_bytes = prefix * text.num_layers * 2 * text.num_kv_heads * text.head_dim
    activations = rows * (8 * text.hidden_size + 3 * text.intermediate_size)
    memory = width_bytes * (num_params + activations + kv_bytes * branches) + _RUNTIME_BYTES
    speed = _flops_a_second((rows, text.hidden_size, text.intermediate_size), place, half, torch)
    rounds = -(-num_images // batch_size)
    seconds = flops / speed + evaluations * rounds * text.num_layers * _SECONDS_A_LAYER
    return {
        "memory_bytes": int(memory),
        "available_bytes": _available(place),
        "flops": int(flops),
        "seconds": round(seconds, 2),
        "device": str(place),
        "num_tokens": {"text": prefix, "picture": target, "references": references},
    }


def _config(folder: Folder | None, spec: Spec) -> O1Config:
    if folder is not None:
        return O1Config.from_dict(folder.config, folder.settings)
    return O1_NANO if spec.name == "o1-nano" else O1_8B


def _num_params(config: O1Config) -> int:
    text, vision = config.text, config.vision
    layer = text.head_dim * text.hidden_size * (2 * text.num_heads + 2 * text.num_kv_heads)
    layer += 3 * text.hidden_size * text.intermediate_size
    block = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    heads = (1 + config.has_lm_head) * text.vocab_size * text.hidden_size
    return layer * text.num_layers + block * vision.num_layers + heads


def _tokens(config: O1Config, request: GenerateRequest) -> tuple[int, int, int]:
    """Tokens of the picture, of the references' patches, and before them."""
    width, height = request.width or 1, request.height or 1
    patch = config.patch_size
    count = len(request.references) + (request.layout is not None)
    side = config.budgets.side(max(count, 1), max(width, height)) // patch
    vision = config.budgets.vision_side(max(count, 1)) // config.vision.stride
    prompt = 16 + len(request.full_prompt.encode()) // 4
    return width * height // patch**2, count * side**2, prompt + count * (vision**2 + 2)


def _device(name: str) -> torch.device:
    import torch

    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _flops_a_second(
    sides: tuple[int, int, int], device: torch.device, half: bool, torch: Any
) -> float:
    rows, inner, columns = (min(side, 2048) for side in sides)
    dtype = torch.bfloat16 if half else torch.float32
    left = torch.ones(rows, inner, device=device, dtype=dtype)
    right = torch.ones(inner, columns, device=device, dtype=dtype)

    def finished() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    left @ right
    start, count = finished(), 0
    while count < 1 or (finished() - start < 0.05 and count < 1000):
        left @ right
        count += 1
    return 2.0 * rows * inner * columns * count / (finished() - start)


def _available(device: torch.device) -> int:
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
