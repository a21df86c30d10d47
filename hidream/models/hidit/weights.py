"""Hi-DiT checkpoints: a folder or a single file becomes a model; latent statistics beside them.

A folder has `config.json` and `model.safetensors`. A file holds no configuration: it is told, or
read off the tensors' shapes. REPA-E's checkpoints, once they are safetensors, fit as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from hidream.errors import ModelError
from hidream.folder import Folder, open_file, open_folder
from hidream.models.hidit.config import WIDTHS, HiDiTConfig
from hidream.models.hidit.files import write_folder
from hidream.models.hidit.init import PIXEL_PREFIX
from hidream.models.hidit.model import HiDiT
from hidream.models.loading import Reader, check_tensors, tensor_shapes
from hidream.nn.attention import Backend

logger = logging.getLogger(__name__)

STATISTICS = "bn."  # kept in fp32, whatever the weights are in
SCALE, BIAS = "latents_scale", "latents_bias"


def shapes_of(config: HiDiTConfig) -> dict[str, list[int]]:
    """Every tensor of the model that `config` describes, built on the meta device."""
    with torch.device("meta"):
        return tensor_shapes(HiDiT(config))


def num_params(config: HiDiTConfig) -> int:
    """Values of the model but its latents' statistics; SiT's positions count."""
    shapes = {n: s for n, s in shapes_of(config).items() if not n.startswith(STATISTICS)}
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def open_hidit(path: str | Path, config: HiDiTConfig | None = None) -> tuple[Folder, HiDiTConfig]:
    """Headers and configuration of a checkpoint; no weights are read.

    `config` wins over the folder's. Raises ModelError where it is not there, not whole, or no
    Hi-DiT.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        folder = open_folder(path)
        return folder, config or HiDiTConfig.from_dict(folder.config)
    folder = open_file(path)
    shapes = {name: list(info.shape) for name, info in folder.tensors.items()}
    return folder, config or config_of(shapes)


def load_hidit(
    path: str | Path,
    config: HiDiTConfig | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    allow_no_pixels: bool = False,
    attention_backend: Backend = "auto",
) -> HiDiT:
    """The model of a checkpoint (see `open_hidit`), without gradients and in eval mode.

    With `allow_no_pixels`, a checkpoint without any tensor of the pixel branch, as REPA-E's are,
    gets a fresh one from seed 0, and a warning says so.

    Raises ModelError for tensors too many or too few, wrong shapes and values that are not finite.
    """
    folder, config = open_hidit(path, config)
    with torch.device("meta"):
        model = HiDiT(config, attention_backend)
    expected = tensor_shapes(model)
    pixels = [name for name in expected if name.startswith(PIXEL_PREFIX)]
    plain = allow_no_pixels and not any(name in folder.tensors for name in pixels)
    wanted = {n: shape for n, shape in expected.items() if not (plain and n in pixels)}
    check_tensors(folder, wanted)
    tensors = _read(folder, wanted, device, dtype)
    if plain:
        tensors |= _fresh(config, device, dtype)
        logger.warning(
            "%s has no pixel branch: a fresh one takes its place, which predicts grey until it is "
            "trained",
            folder.path,
        )
    model.requires_grad_(False)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def save_hidit(model: HiDiT, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors`; ModelError where other weights are there."""
    write_folder(Path(folder), model.config.to_dict(), model.state_dict())


def config_of(
    shapes: Mapping[str, Sequence[int]], told: Mapping[str, object] | None = None
) -> HiDiTConfig:
    """The configuration that tensors of these shapes have.

    What shapes do not tell is taken from `told` (`num_heads`, `encoder_depth`, `image_size`,
    `gate`, `attention`, `pixel_clock`), or is that of SiT's sizes and of 256² pixels.

    Raises ModelError where they are no Hi-DiT.
    """
    try:
        size, channels, patch_size, _ = shapes["x_embedder.proj.weight"]
        grid = round(shapes["pos_embed"][1] ** 0.5)
        depths = {int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")}
        heads = {width: num for width, _, num in WIDTHS.values()}
        projectors = sum(n.startswith("projectors.") and n.endswith(".4.weight") for n in shapes)
        config = HiDiTConfig(
            hidden_size=size,
            num_layers=len(depths),
            num_heads=heads.get(size) or _heads(size),
            patch_size=patch_size,
            in_channels=channels,
            latent_size=grid * patch_size,
            mlp_ratio=shapes["blocks.0.mlp.fc1.weight"][0] / size,
            num_classes=shapes["y_embedder.embedding_table.weight"][0] - 1,
            qk_norm="blocks.0.attn.q_norm.weight" in shapes,
            encoder_depth=min(8, len(depths)),
            projector_width=shapes["projectors.0.0.weight"][0] if projectors else 2048,
            projector_dims=tuple(shapes[f"projectors.{i}.4.weight"][0] for i in range(projectors)),
            image_size=grid * shapes.get("pixel_embedder.proj.weight", (0, 0, 256 // grid))[2],
            attention=(
                "add"
                if "pixel_embedder.proj.weight" in shapes and "pixel_type" not in shapes
                else "readonly"
            ),
            pixel_clock="rescaled" if "pixel_t_embedder.mlp.0.weight" in shapes else "shared",
        )
        return replace(config, **dict(told or {}))  # type: ignore[arg-type]
    except (KeyError, IndexError, ValueError, TypeError, ZeroDivisionError) as error:
        raise ModelError(
            f"these tensors are not those of a Hi-DiT or SiT ({type(error).__name__}: {error}).",
            "It has x_embedder.proj, pos_embed, blocks.0.attn.qkv and so on.",
        ) from error


def read_stats(path: str | Path) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
    """Mean and deviation of every channel of a VAE's latents, fp32.

    The file has REPA-E's names and shapes: `latents_scale` = 1 / deviation and `latents_bias` =
    mean, (1, c, 1, 1) each. Raises ModelError for anything else, and for values of no use.
    """
    folder = open_file(path)
    if folder.tensors.keys() != {SCALE, BIAS}:
        found = ", ".join(sorted(folder.tensors)[:3]) or "nothing"
        raise ModelError(
            f"{folder.path} holds {found}, not {SCALE} and {BIAS}.",
            "hidream hidit cache-latents writes such statistics beside the latents.",
        )
    with safe_open(folder.path, framework="pt") as file:
        scale, bias = (file.get_tensor(name).float().flatten() for name in (SCALE, BIAS))
    if scale.shape != bias.shape or not scale.numel():
        raise ModelError(f"{folder.path}: {SCALE} and {BIAS} are of different lengths.")
    if not (scale.isfinite().all() and bias.isfinite().all() and (scale > 0).all()):
        raise ModelError(
            f"{folder.path} holds values that no latents can have.", "Measure them again."
        )
    return bias, 1 / scale


def _heads(size: int) -> int:
    """The most of 64 channels or more."""
    return max(n for n in range(1, max(size // 64, 1) + 1) if size % n == 0)


def _read(
    folder: Folder, names: Mapping[str, list[int]], device: torch.device | str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """As they are kept: weights in `dtype`, the latents' statistics in fp32, counts as they are."""
    reader, found = Reader(folder), {}
    for name in names:
        tensor = reader.read(name, device=device)
        wide = torch.float32 if name.startswith(STATISTICS) else dtype
        found[name] = tensor.to(wide) if tensor.is_floating_point() else tensor
    return found


def _fresh(
    config: HiDiTConfig, device: torch.device | str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of a new pixel branch."""
    with torch.device("meta"):
        model = HiDiT(replace(config, num_layers=1, encoder_depth=1))
    model.to_empty(device="cpu")
    model.init_pixels(torch.Generator().manual_seed(0))
    return {
        name: tensor.to(device, dtype)
        for name, tensor in model.state_dict().items()
        if name.startswith(PIXEL_PREFIX)
    }
