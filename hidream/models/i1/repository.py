"""A whole repository of I1 or E1, checked part by part: transformer, text encoders, VAE."""

from __future__ import annotations

from pathlib import Path

from hidream.errors import ModelError
from hidream.folder import Folder, is_alone, transformer_config, transformer_folder
from hidream.models.i1.config import I1Config
from hidream.models.i1.text import verify_encoders
from hidream.models.i1.weights import verify_i1
from hidream.models.vae import verify_vae


def verify_repository(
    path: Path, file: Path | None = None, *, edits: bool = False
) -> dict[str, Folder]:
    """Check every part's configuration, headers, names and shapes; reads no weights.

    `file` is the transformer's, where it is not in the repository. Returns the parts by their
    folders' names. Llama is one of them only if it lies inside, since it is gated and published
    elsewhere. A transformer's own folder has no other part, nor has a repository of E1 (`edits`)
    that was published without.

    Raises ModelError that names all parts that are missing or not whole.
    """
    given = I1Config.from_dict(transformer_config(path)) if file else None
    parts = {"transformer": verify_i1(file or path, given)}
    if transformer_folder(path) == path or (edits and is_alone(path)):
        return parts
    config = given or I1Config.from_dict(parts["transformer"].config)
    encoders, faults = verify_encoders(path, config)
    parts |= encoders
    try:
        parts["vae"] = verify_vae(path / "vae", config.in_channels)
    except ModelError as error:
        faults.append(error)
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise ModelError(
            f"{path} is not whole.",
            "Download the folder again.",
            tuple(f"{fault.problem} {fault.remedy}".strip() for fault in faults),
        )
    return parts
