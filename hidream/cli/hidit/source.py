"""A trained Hi-DiT on disk: a run's checkpoint or a saved model, its configuration, its VAE."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hidream import digest
from hidream.cli.recording import cache_folder
from hidream.errors import ModelError, UsageError
from hidream.folder import open_file
from hidream.models.hidit.config import HiDiTConfig


@dataclass(frozen=True)
class Source:
    """A trained Hi-DiT on disk: which weights, of which run and step, and what the run was told."""

    name: str
    step: int
    weights: Path
    config: HiDiTConfig
    args: Mapping[str, Any]
    has_pixels: bool

    @property
    def draws_pixels(self) -> bool:
        """Whether the pixel branch was trained."""
        return self.has_pixels and not self.args.get("ldm_only", False)


def find_source(folder: Path, train_steps: int | None = None) -> Source:
    """The weights in a run's folder (its last checkpoint unless said), or in a saved model's.

    Raises:
        ModelError: there are none, or not of that step.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder.", "Name a run of hidream hidit train.")
    checkpoints = {
        int(file.parent.name[5:]): file
        for file in (folder / "checkpoints").glob("step-*/ema.safetensors")
        if file.parent.name[5:].isdecimal()
    }
    saved = folder / "model.safetensors"
    if checkpoints:
        step = max(checkpoints) if train_steps is None else train_steps
        if step not in checkpoints:
            steps = _listed(sorted(checkpoints))
            raise ModelError(
                f"{folder} has no checkpoint of step {step}; it has {steps}.",
                "Name one of them by --train-steps.",
            )
        weights = checkpoints[step]
    elif saved.is_file():
        step, weights = train_steps or 0, saved
    else:
        raise ModelError(
            f"{folder} holds neither checkpoints/step-N/ema.safetensors nor model.safetensors.",
            "Name a run of hidream hidit train, or what hidream models convert wrote.",
        )
    args = _read_json(folder / "args.json") if (folder / "args.json").exists() else {}
    config = HiDiTConfig.from_dict(_read_json(folder / "config.json"))
    has_pixels = any(name.startswith("pixel_") for name in open_file(weights).tensors)
    return Source(folder.resolve().name, step, weights, config, args, has_pixels)


def _listed(steps: list[int]) -> str:
    shown = steps if len(steps) <= 8 else [*steps[:3], *steps[-4:]]
    texts = [str(step) for step in shown]
    if len(steps) > 8:
        texts.insert(3, "…")
    return ", ".join(texts)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError
        return content
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a JSON object"
        raise ModelError(
            f"{file} cannot be read: {reason}.", "A run of hidream hidit train writes it."
        ) from error


def find_vae(source: Source, given: str | None) -> Path:
    """The VAE's file or folder: what `--vae` gives, else the run's own. Its weights stay unread.

    Raises:
        UsageError: neither says which.
        ModelError: it is not there, no VAE, or one of other latents.
    """
    from hidream.models.hidit.vae import check_latents

    path = given or source.args.get("vae_ckpt")
    if not path:
        raise UsageError(f"{source.name} does not say which VAE it was trained with.", "Add --vae.")
    found = Path(path).expanduser()
    if not found.exists():
        named = "--vae" if given else "the VAE of the run's args.json,"
        raise ModelError(f"{named} {found} does not exist.", "Say where it is: --vae PATH.")
    check_latents(found, source.config)
    return found


def digest_of(path: Path) -> str:
    """Of the weights in a file or folder; remembered, so that a restart need not read them."""
    folder, files = (
        (path, sorted(path.glob("*.safetensors"))) if path.is_dir() else (path.parent, [path])
    )
    return digest.of_model(folder, files, cache_folder() / "digests.json")[:16]
