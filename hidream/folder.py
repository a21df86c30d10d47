"""A model's folder in the published layout, read without its weights: config and headers only."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hidream import registry
from hidream.errors import ModelError, UsageError
from hidream.registry import Spec

SHIPPED = Path(__file__).parent / "models"  # checkpoints inside the package
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_HEADER = 100_000_000  # bytes, as in safetensors itself
# What a model folder is made of; nothing else is downloaded.
DOWNLOADED = ("*.safetensors", "*.json", "*.txt", "*.jinja")
# Of these also what is not read as it is (hidream models convert), and statistics.
ALSO_DOWNLOADED = {"shenhen/hi-dit": ("*.pt", "*.pth", "*.npz")}
# Beside the weights, what a model's pictures depend on.
_DECIDING = (
    *("config.json", "hidream.json", "tokenizer.json", "tokenizer_config.json"),
    *("chat_template.jinja", "chat_template.json"),
)
_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}
DIFFUSERS_STEM = "diffusion_pytorch_model"  # diffusers' name for the weights
COMFY_PREFIX = "model.diffusion_model."
TRANSFORMER = "HiDreamImageTransformer2DModel"  # the class that I1's published config names
_DISTILLED = ("FlowMatchLCMScheduler", "FlashFlowMatchEulerDiscreteScheduler")  # Dev's, Fast's
_GUIDED = ("UniPCMultistepScheduler", "FlowUniPCMultistepScheduler")  # Full's
REFINER = "i1-full"  # what E1 is refined with, unless another is named
LATENT_AREA = 64  # pixels of a picture that one of its latents stands for
_AGAIN = "Download or copy the folder again."


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where a tensor lies: file, dtype as safetensors names it, shape, first and last byte + 1
    counted from the end of the header."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A model folder: its `config.json`, its `hidream.json` ({} without one), its tensors, and
    how it says that pictures are prepared (`preprocessor_config.json`, {} without one). In the
    files, `prefix` stands before the tensors' names. `components`: the files of what stands beside
    the network in a repository of I1 or E1: text encoders, tokenizers, VAE."""

    path: Path
    config: Mapping[str, Any]
    settings: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    preprocessor: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""
    components: tuple[Path, ...] = ()

    @property
    def num_params(self) -> int:
        return sum(math.prod(info.shape) for info in self.tensors.values())

    @property
    def has_lm_head(self) -> bool:
        """Whether the model can write: a head of its own, or its embeddings used as one."""
        return bool(self.config.get("tie_word_embeddings")) or "lm_head.weight" in self.tensors

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that this model's pictures depend on: weights, configuration, tokenizer."""
        weights = {info.file for info in self.tensors.values()}
        others = {self.path / name for name in _DECIDING if (self.path / name).is_file()}
        return tuple(sorted(weights | others | set(self.components)))


def open_folder(path: str | Path, *, stem: str = "model") -> Folder:
    """Read a folder's configuration and the headers of its safetensors files.

    These are `stem`.safetensors, or a numbered set of that name with an index.

    Raises:
        ModelError: the folder, its configuration or a shard is missing, a header is damaged, a
            file is truncated, index and files disagree, or the weights are only there as a pickle.
    """
    path = Path(path).expanduser()
    if path.suffix in PICKLES and path.is_file():
        raise _pickle(path)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise ModelError(f"the model folder {path} {what}.", "Name a folder with a config.json.")
    config, settings = read_config(path)
    index = path / f"{stem}.safetensors.index.json"
    placed = _read_index(index) if index.exists() else None
    files = sorted(set(placed.values())) if placed is not None else _weight_files(path, stem)
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(file).items():
            if name in tensors:
                raise ModelError(
                    f"tensor {name} is both in {tensors[name].file.name} and {file.name}.", _AGAIN
                )
            tensors[name] = info
    if placed is not None:
        _check_index(index, placed, tensors)
    return Folder(
        path=path,
        config=config,
        settings=settings,
        tensors=tensors,
        preprocessor=_optional_json(path / "preprocessor_config.json"),
    )


def open_model(path: str | Path, file: Path | None = None) -> Folder:
    """A model's folder as `open_folder` reads it, or a whole repository of I1 or E1.

    A repository's tensors and configuration are its transformer's; the tensors are those of `file`,
    if given. Raises ModelError as there.
    """
    path = Path(path).expanduser()
    place = transformer_folder(path)
    if place is None:
        return open_folder(path)
    if file is None:
        opened = open_folder(place, stem=DIFFUSERS_STEM)
    else:
        opened = replace(open_file(file), path=path, config=transformer_config(path))
    if place == path:
        return opened
    parts = [part for part in path.iterdir() if part.is_dir() and part != place]
    components = [
        file
        for part in (path, *parts)
        for file in part.iterdir()
        if file.is_file() and any(file.match(pattern) for pattern in DOWNLOADED)
    ]
    return replace(opened, path=path, settings=_settings(path), components=tuple(components))


def open_file(path: str | Path) -> Folder:
    """A single safetensors file as a folder without configuration.

    ComfyUI's prefix is taken off the names that have it.

    Raises:
        ModelError: there is no such file, it is a pickle, or it is damaged.
    """
    path = Path(path).expanduser()
    if path.suffix in PICKLES:
        raise _pickle(path)
    if not path.is_file():
        raise ModelError(f"the model file {path} does not exist.", "Check its path.")
    found = read_header(path)
    prefix = COMFY_PREFIX if any(name.startswith(COMFY_PREFIX) for name in found) else ""
    tensors = {name.removeprefix(prefix): info for name, info in found.items()}
    return Folder(path=path, config={}, settings={}, tensors=tensors, prefix=prefix)


def holds_transformer(file: Folder) -> bool:
    """Whether a single file's tensors are those of an I1's or E1's transformer, by one of them."""
    return "x_embedder.proj.weight" in file.tensors


def transformer_folder(path: Path) -> Path | None:
    """The folder of I1's or E1's transformer, which is `path` or its `transformer`; or None."""
    for place in (path / "transformer", path):
        try:
            if _optional_json(place / "config.json").get("_class_name") == TRANSFORMER:
                return place
        except ModelError:  # of something else, which says more itself
            continue
    return None


def read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A folder's `config.json` and `hidream.json` ({} without one); ModelError if not readable."""
    return _read_json(path / "config.json"), _settings(path)


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors that a safetensors file announces, with their places checked against its size.

    Raises:
        ModelError: no safetensors file, truncated, or its header contradicts itself.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start == b"version " and size < 1000:
            raise ModelError(
                f"{file} is a Git LFS pointer, not the weights.", 'Fetch them with "git lfs pull".'
            )
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if len(start) < 8 or length > MAX_HEADER:
            raise ModelError(f"{file} is not a safetensors file.", _AGAIN)
        text = stream.read(length)
    if len(text) < length:
        raise ModelError(f"{file} is truncated inside its header.", _AGAIN)
    try:
        header = json.loads(text)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        tensors = {name: _tensor(file, entry) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelError(f"the header of {file} is damaged.", _AGAIN) from error
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: item[1].offsets):
        length_told = info.offsets[1] - info.offsets[0]
        if info.offsets[0] != end or length_told != math.prod(info.shape) * _BYTES[info.dtype]:
            raise ModelError(
                f"the header of {file} is damaged: {name} overlaps another tensor, leaves a gap, "
                "or is not of its shape's length.",
                _AGAIN,
            )
        end = info.offsets[1]
    if size != 8 + length + end:
        what = "truncated" if size < 8 + length + end else "longer than its header says"
        raise ModelError(f"{file} is {what}: {size} bytes instead of {8 + length + end}.", _AGAIN)
    return tensors


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
    found = _settings(path).get("variant")
    if found is not None or transformer_folder(path) is None:
        return found
    scheduler = _optional_json(path / "scheduler" / "scheduler_config.json")
    kind = str(scheduler.get("_class_name", ""))
    if kind in _DISTILLED:
        fast = scheduler.get("shift") == registry.SPECS["i1-fast"].defaults.shift
        return "fast" if fast else "dev"
    return "full" if kind in _GUIDED else None


def _spec_of(path: Path, *, name: str, base: Spec | None, variant: str | None) -> Spec:
    """The Spec of a folder, by its `hidream.json` and, for I1 and E1, by its transformer's size.

    E1's grid is twice as wide as high, since the source stands beside the picture.
    """
    settings, place = _settings(path), transformer_folder(path)
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


def transformer_config(path: Path) -> dict[str, Any]:
    """The configuration of an I1's or E1's transformer, {} where there is none."""
    place = transformer_folder(path)
    return _optional_json(place / "config.json") if place is not None else {}


def _resolution(config: Mapping[str, Any]) -> tuple[int, int]:
    """Latent height and width of the largest picture that a transformer's config names."""
    found = config.get("max_resolution")
    if not (isinstance(found, list) and len(found) == 2 and all(type(n) is int for n in found)):
        raise ModelError(
            f"config.json: max_resolution={found!r} is not a height and a width.", _AGAIN
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


def is_alone(folder: Path) -> bool:
    """Whether a transformer was published without text encoders and VAE, as E1's."""
    return not (folder / "vae").is_dir() and not (folder / "text_encoder").is_dir()


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


def _settings(path: Path) -> dict[str, Any]:
    return _optional_json(path / "hidream.json")


def _optional_json(file: Path) -> dict[str, Any]:
    return _read_json(file) if file.is_file() else {}


def _weight_files(path: Path, stem: str) -> list[Path]:
    """`stem`.safetensors, or all of a numbered set that has lost its index."""
    files = sorted(path.glob(f"{stem}*.safetensors"))
    if not files:
        pickles = sorted(file for file in path.iterdir() if file.suffix in PICKLES)
        if pickles:
            raise _pickle(pickles[0])
        raise ModelError(f"{path} holds no {stem}.safetensors.", _AGAIN)
    for file in files:
        numbered = re.fullmatch(stem + r"-(\d+)-of-(\d+)\.safetensors", file.name)
        if numbered:
            width, count = len(numbered[2]), int(numbered[2])
            for number in range(1, count + 1):
                name = f"{stem}-{number:0{width}d}-of-{numbered[2]}.safetensors"
                if not (path / name).is_file():
                    raise ModelError(f"shard {name} is missing from {path}.", _AGAIN)
    return files


def _read_index(index: Path) -> dict[str, Path]:
    placed = _read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(v, str) for v in placed.values()):
        raise ModelError(f"{index} has no weight_map.", _AGAIN)
    for name in sorted(set(placed.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            what = "a pickle" if Path(name).suffix in PICKLES else "no file of this folder"
            raise ModelError(f"{index} names {name!r}, which is {what}.", _AGAIN)
        if not (index.parent / name).is_file():
            raise ModelError(f"shard {name} is missing from {index.parent}.", _AGAIN)
    return {tensor: index.parent / name for tensor, name in placed.items()}


def _check_index(index: Path, placed: dict[str, Path], tensors: dict[str, TensorInfo]) -> None:
    for name, file in placed.items():
        if name not in tensors or tensors[name].file != file:
            raise ModelError(f"{index.name} places {name} in {file.name}, it is not there.", _AGAIN)
    for name, info in tensors.items():
        if name not in placed:
            raise ModelError(f"{info.file.name} holds {name}, which {index.name} omits.", _AGAIN)


def _tensor(file: Path, entry: Mapping[str, Any]) -> TensorInfo:
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    numbers = (*shape, begin, end)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("not a size")
    _BYTES[entry["dtype"]]
    return TensorInfo(file=file, dtype=entry["dtype"], shape=shape, offsets=(begin, end))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{file.name} is missing from {file.parent}.", _AGAIN) from error
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{file} is not readable JSON.", _AGAIN) from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} does not hold a JSON object.", _AGAIN)
    return content


def _pickle(file: Path) -> ModelError:
    return ModelError(
        f"{file} is a pickle, which can run any code and is never loaded.",
        "Use the model's safetensors, or make them once: hidream models convert IN OUT.",
    )
