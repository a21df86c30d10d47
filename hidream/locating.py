"""A model by its name, hub id, folder or file: where it is, and what it is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hidream import registry
from hidream.errors import ModelError, UsageError
from hidream.folder import (
    AGAIN,
    DOWNLOADED,
    holds_transformer,
    is_alone,
    open_file,
    optional_json,
    read_settings,
    transformer_config,
    transformer_folder,
)
from hidream.registry import Spec

SHIPPED = Path(__file__).parent / "models"  # checkpoints inside the package
# Of these also what is not read as it is (hidream models convert), and statistics.
ALSO_DOWNLOADED = {"shenhen/hi-dit": ("*.pt", "*.pth", "*.npz")}
_DISTILLED = ("FlowMatchLCMScheduler", "FlashFlowMatchEulerDiscreteScheduler")  # Dev's, Fast's
_GUIDED = ("UniPCMultistepScheduler", "FlowUniPCMultistepScheduler")  # Full's
REFINER = "i1-full"  # what E1 is refined with, unless another is named
LATENT_AREA = 64  # pixels of a picture that one of its latents stands for


def locate(
    model: str | Path,
    *,
    variant: str | None = None,
    download: bool = False,
    components: str | Path | None = None,
) -> tuple[Spec, Path]:
    """The Spec and the folder of a model that is given by name, hub id or folder.

    Of an I1's or E1's transformer in a single file, the folder is that of `components`, an I1 or E1
    whose configuration, text encoders and VAE go with it; the Spec is theirs, and has the `file`.

    A folder's `hidream.json` is laid over the Spec; `variant` ("full", "dev" or "fast") wins over
    both. An I1 that says nothing of its variant is that of its scheduler. Names go before folders:
    write ./o1-nano for a folder of that name. With `download`, what is not on this machine is
    fetched from the hub.

    Raises:
        UsageError: no such name, or no such variant of this model; a single file without
            `components`, or these without a single file.
        ModelError: it is known but not on this machine, or could not be downloaded.
    """
    model = str(model)
    if variant not in (None, *registry.VARIANTS):
        raise UsageError(f'variant "{variant}" is unknown; it can be "full", "dev" or "fast".')
    spec = registry.known(model)
    path = Path(model).expanduser()
    if spec is None and path.is_file():
        return _locate_file(path, model, components, variant)
    if components is not None:
        raise UsageError(
            f"--components is for a single file; {model} has its own.", "Leave --components out."
        )
    if spec is None and (path.exists() or _looks_like_path(model)):
        if not path.exists():
            raise ModelError(f"the model folder {model} does not exist.", "Check its path.")
        return _spec_of(path, name=model, base=None, variant=variant), path
    if spec is None and not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        registry.find(model)  # says which names there are
    if spec is not None and spec.repo is None:
        path = SHIPPED / spec.name.replace("-", "_")
        if not (path / "config.json").is_file():
            raise ModelError(
                f"the weights of {spec.name} are missing from this installation ({path}).",
                "Install hidream again.",
            )
    else:
        if spec is not None:
            published(spec, variant)
        try:
            path = fetch(spec.repo if spec and spec.repo else model, local_only=not download)
        except ModelError:
            if spec is None and registry.near(model):
                registry.find(model)  # a misspelt name, most likely
            raise
    name = spec.name if spec else model
    return _spec_of(path, name=name, base=spec, variant=variant), path


def _locate_file(
    path: Path, name: str, components: str | Path | None, variant: str | None
) -> tuple[Spec, Path]:
    """The Spec of a single file's transformer, and the folder of what goes with it."""
    if not holds_transformer(open_file(path)):
        raise ModelError(
            f"{name} is a single file that holds no I1 or E1.",
            "Name a model's folder, with its config.json.",
        )
    if components is None:
        raise UsageError(
            f"{name} holds an I1's or E1's transformer alone.",
            "Name the model whose configuration, text encoders and VAE go with it: --components "
            "i1-full, or its folder.",
        )
    spec, folder = locate(components, variant=variant)
    if transformer_folder(folder) is None:
        raise UsageError(
            f"--components {components} is no I1 or E1: it has no transformer/config.json.",
            "Name one, such as i1-full; of its transformer that file is enough.",
        )
    return replace(spec, name=name, repo=None, description="", file=path), folder


def published(spec: Spec, variant: str | None) -> Spec:
    """A published model's Spec under another `variant`, its folder unseen; UsageError as above."""
    return registry.of_folder({}, name=spec.name, base=spec, variant=variant)


def told_variant(path: Path) -> str | None:
    """The variant that a folder itself names: in `hidream.json`, or by an I1's scheduler.

    Dev and Fast are published with a scheduler of consistency steps, which differ by their shift.
    """
    found = read_settings(path).get("variant")
    if found is not None or transformer_folder(path) is None:
        return found
    scheduler = optional_json(path / "scheduler" / "scheduler_config.json")
    kind = str(scheduler.get("_class_name", ""))
    if kind in _DISTILLED:
        fast = scheduler.get("shift") == registry.SPECS["i1-fast"].defaults.shift
        return "fast" if fast else "dev"
    return "full" if kind in _GUIDED else None


def _spec_of(path: Path, *, name: str, base: Spec | None, variant: str | None) -> Spec:
    """The Spec of a folder, by its `hidream.json` and, for I1 and E1, by its transformer's size.

    E1's grid is twice as wide as high, since the source stands beside the picture.
    """
    settings, place = read_settings(path), transformer_folder(path)
    if place is None:
        return registry.of_folder(settings, name=name, base=base, variant=variant)
    height, width = _resolution(transformer_config(path))
    family = "e1" if width == 2 * height else "i1"
    if base is None and (height, width) == (96, 192):
        base = replace(registry.find("e1-full"), repo=None, description="")
    assumed = (told_variant(path) if family == "i1" else None) or "full"
    spec = registry.of_folder(
        settings, name=name, base=base, variant=variant, family=family, assumed=assumed
    )
    area = height * width * LATENT_AREA // (2 if family == "e1" else 1)
    return registry.limited(spec, area)


def _resolution(config: Mapping[str, Any]) -> tuple[int, int]:
    """Latent height and width of the largest picture that a transformer's config names."""
    found = config.get("max_resolution")
    if not (isinstance(found, list) and len(found) == 2 and all(type(n) is int for n in found)):
        raise ModelError(
            f"config.json: max_resolution={found!r} is not a height and a width.", AGAIN
        )
    return found[0], found[1]


def check_parts(
    spec: Spec,
    *,
    llama: str | Path | None = None,
    refiner: str | Path | None = None,
    text_encoders: bool = True,
) -> None:
    """UsageError where a part is named that a model does not have."""
    if llama is not None and spec.family == "o1":
        raise UsageError(f"{spec.name} has no Llama.", "Leave it out.")
    if refiner is not None and spec.family != "e1":
        raise UsageError(f"{spec.name} has no refiner: only E1's edits have one.", "Leave it out.")
    if not text_encoders and spec.family == "o1":
        raise UsageError(
            f"{spec.name} has no text encoders that text_encoders=False could leave out.",
            "Leave it at its default.",
        )


def find_refiner(name: str | Path | None = None, editor: Path | None = None) -> Path:
    """The folder of the I1, `REFINER` unless another is named, that finishes E1's edits: those of
    the E1 in `editor`, if given.

    Raises UsageError where the model is none or reads other latents or texts, and as `locate` does.
    """
    spec, folder = locate(name or REFINER)
    if spec.family != "i1":
        raise UsageError(f"{spec.name} cannot refine E1's edits.", f"Use an I1, such as {REFINER}.")
    if editor is None:
        return folder
    for part in ("in_channels", "caption_channels", "text_emb_dim"):
        there, here = (transformer_config(place).get(part) for place in (folder, editor))
        if there != here:
            raise UsageError(
                f"{spec.name} cannot refine this E1's edits: its {part} is {there}, not {here}.",
                "Use the I1 that it was tuned from.",
            )
    return folder


def components_folder(spec: Spec, folder: Path, refiner: str | Path | None = None) -> Path:
    """Where a model's text encoders and VAE are: beside an I1's or E1's transformer.

    An E1 that was published without them has those of I1, the `refiner`; ModelError as `locate`.
    """
    return find_refiner(refiner) if spec.family == "e1" and is_alone(folder) else folder


def fetch(repo: str, *, local_only: bool = False, folder: Path | None = None) -> Path:
    """The snapshot of a hub repository on this machine, downloaded first unless `local_only`.

    Only weights in safetensors, configuration and tokenizer files are fetched; of Hi-DiT's also
    pickles, which `hidream models convert` takes, and statistics.

    Raises:
        ModelError: not here, not reachable, gated or unknown; the message says what to do.
    """
    import huggingface_hub
    from huggingface_hub import errors

    pull = f"hidream models pull {repo}"
    try:
        found = huggingface_hub.snapshot_download(
            repo,
            allow_patterns=[*DOWNLOADED, *ALSO_DOWNLOADED.get(repo.lower(), ())],
            local_files_only=local_only,
            local_dir=folder,
        )
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{repo} is gated.",
            'Accept its licence on its model page, then run "hf auth login".',
        ) from error
    except errors.RepositoryNotFoundError as error:
        known = [spec.repo for spec in registry.SPECS.values() if spec.repo]
        raise ModelError(
            f'the hub has no model "{repo}", or you may not see it; {registry.nearest(repo, known)}'
        ) from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError, ValueError) as error:
        if local_only:
            raise ModelError(f"{repo} is not on this machine.", f'Get it with "{pull}".') from error
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(
            f"{repo} could not be downloaded: {reason}",
            f'Check the connection and try "{pull}" again; what has come is kept.',
        ) from error
    return Path(found)


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) or "\\" in model or model.count("/") > 1
