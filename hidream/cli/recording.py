"""What a command's pictures will say of themselves: the request, its pictures, the model."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hidream import __version__
from hidream.cli import console
from hidream.cli.again import PICTURES, Again, Slot, slots
from hidream.errors import InputError
from hidream.folder import Folder
from hidream.request import GenerateRequest

if TYPE_CHECKING:
    from hidream.pipelines import Pipeline

MAX_EMBEDDED = 32 * 2**20  # bytes of files carried inside; a PNG reader takes 64 MB of text


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The pictures of a request: SHA-256s by field, and files in base64 by SHA-256."""

    digests: Mapping[str, Sequence[str]] = field(default_factory=dict)
    embedded: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(map(len, self.embedded.values()))


def read_inputs(request: GenerateRequest, carried: Mapping[Slot, bytes], *, embed: bool) -> Inputs:
    """Hash every picture of a request, and keep its file to `embed` it.

    Raises:
        InputError: a file cannot be read, or together they are too large to be carried.
    """
    from hidream import digest
    from hidream.pictures import read_file

    digests: dict[str, list[str]] = {}
    embedded: dict[str, str] = {}
    num_bytes = 0
    for slot, label, path in slots({name: getattr(request, name) for name in PICTURES}):
        data = carried[slot] if slot in carried else read_file(path, label)
        key = digest.of_bytes(data)
        digests.setdefault(slot[0], []).append(key)
        if embed and key not in embedded:
            num_bytes += len(data)
            if num_bytes > MAX_EMBEDDED:
                raise InputError(
                    f"--embed-inputs carries files of up to {MAX_EMBEDDED // 2**20} MB together; "
                    "these are larger.",
                    "Scale them down, or leave --embed-inputs out.",
                )
            embedded[key] = base64.b64encode(data).decode()
    return Inputs(digests=digests, embedded=embedded)


def model_digest(folder: Folder) -> str:
    """The model's SHA-256; weights are hashed once, then known by size and time of change."""
    from hidream import digest

    cache = cache_folder() / "digests.json"
    num_bytes = sum(file.stat().st_size for file in folder.files)
    if num_bytes > 2e9 and not digest.is_known(folder.files, cache):
        console.say(f"hashing {console.size(num_bytes)} of weights, once")
    return digest.of_model(folder.path, folder.files, cache)


def cache_folder() -> Path:
    """Where hidream keeps what can be made again: beside the hub's cache, if that was moved."""
    place = os.environ.get("HF_HOME") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(place)) / "hidream"


def note_of(
    request: GenerateRequest, seed: int, pipe: Pipeline, digest: str | None, inputs: Inputs
) -> dict[str, Any]:
    """What one picture says of itself: enough to make it again. `request` names its pictures."""
    import torch

    from hidream.metadata import NOTE, VERSION

    spec = pipe.spec
    note: dict[str, Any] = {
        NOTE: VERSION,
        "request": replace(request, seed=seed, num_images=1).to_dict(),
        "model": {
            "name": spec.name,
            "repo": spec.repo,
            "variant": spec.variant,
            "patch_size": spec.patch_size,
            "digest": digest,
        },
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": pipe.device.type,
        "versions": {"hidream": __version__, "torch": torch.__version__},
    }
    if not pipe.memory.exact:
        note["weights"] = pipe.memory.weights  # 8-bit weights change pixels
    if inputs.digests:
        note["inputs"] = inputs.digests
    if inputs.embedded:
        note["embedded"] = inputs.embedded
    return note


def differences(again: Again, pipe: Pipeline) -> str | None:
    """What to tell where a picture is made again on another kind of machine."""
    import torch

    before = (again.device or pipe.device.type, again.torch or torch.__version__)
    now = (pipe.device.type, torch.__version__)
    if before == now:
        return None
    return (
        f"it was made on {before[0]} with torch {before[1]}, this is {now[0]} with torch {now[1]}: "
        "pixels may differ slightly."
    )
