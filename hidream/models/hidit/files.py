"""Folders and files of weights, written beside and then renamed: there is never half a one."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hidream.errors import InputError, ModelError

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, in place of one of that name; InputError where it cannot be written."""
    with _beside(file) as draft:
        save_file(_apart(tensors), draft, metadata={"format": "pt"})
        draft.chmod(0o644)  # safetensors writes for the owner alone


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """A JSON file, in place of one of that name; InputError where it cannot be written."""
    with _beside(file) as draft:
        draft.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """`config.json` and `model.safetensors`; the weights come last, so that they mean a whole one.

    Raises ModelError where the folder holds other weights, which would be read beside or instead.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made: {error.strerror or error}.") from error
    others = sorted({file.name for file in folder.glob("model*.safetensors*")} - {WEIGHTS})
    if others:
        raise ModelError(f"{folder} holds other weights: {others[0]}.", "Save to another folder.")
    write_json(folder / CONFIG, config)
    write_tensors(folder / WEIGHTS, tensors)


@contextmanager
def _beside(file: Path) -> Iterator[Path]:
    """Another name in the same folder, which becomes `file` where nothing went wrong."""
    draft = file.with_name(f".{file.name}-{secrets.token_hex(4)}.tmp")
    try:
        yield draft
        os.replace(draft, file)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{file} cannot be written: {reason}.") from error
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and none in another's memory, which safetensors refuses."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return found
