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

from hidream.errors import ModelError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_HEADER = 100_000_000  # bytes, as in safetensors itself
# What a model folder is made of; nothing else is downloaded.
DOWNLOADED = ("*.safetensors", "*.json", "*.txt", "*.jinja")
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
AGAIN = "Download or copy the folder again."


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
                    f"tensor {name} is both in {tensors[name].file.name} and {file.name}.", AGAIN
                )
            tensors[name] = info
    if placed is not None:
        _check_index(index, placed, tensors)
    return Folder(
        path=path,
        config=config,
        settings=settings,
        tensors=tensors,
        preprocessor=optional_json(path / "preprocessor_config.json"),
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
    return replace(opened, path=path, settings=read_settings(path), components=tuple(components))


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
            if optional_json(place / "config.json").get("_class_name") == TRANSFORMER:
                return place
        except ModelError:  # of something else, which says more itself
            continue
    return None


def read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A folder's `config.json` and `hidream.json` ({} without one); ModelError if not readable."""
    return _read_json(path / "config.json"), read_settings(path)


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
            raise ModelError(f"{file} is not a safetensors file.", AGAIN)
        text = stream.read(length)
    if len(text) < length:
        raise ModelError(f"{file} is truncated inside its header.", AGAIN)
    try:
        header = json.loads(text)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        tensors = {name: _tensor(file, entry) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelError(f"the header of {file} is damaged.", AGAIN) from error
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: item[1].offsets):
        length_told = info.offsets[1] - info.offsets[0]
        if info.offsets[0] != end or length_told != math.prod(info.shape) * _BYTES[info.dtype]:
            raise ModelError(
                f"the header of {file} is damaged: {name} overlaps another tensor, leaves a gap, "
                "or is not of its shape's length.",
                AGAIN,
            )
        end = info.offsets[1]
    if size != 8 + length + end:
        what = "truncated" if size < 8 + length + end else "longer than its header says"
        raise ModelError(f"{file} is {what}: {size} bytes instead of {8 + length + end}.", AGAIN)
    return tensors


def transformer_config(path: Path) -> dict[str, Any]:
    """The configuration of an I1's or E1's transformer, {} where there is none."""
    place = transformer_folder(path)
    return optional_json(place / "config.json") if place is not None else {}


def is_alone(folder: Path) -> bool:
    """Whether a transformer was published without text encoders and VAE, as E1's."""
    return not (folder / "vae").is_dir() and not (folder / "text_encoder").is_dir()


def read_settings(path: Path) -> dict[str, Any]:
    return optional_json(path / "hidream.json")


def optional_json(file: Path) -> dict[str, Any]:
    return _read_json(file) if file.is_file() else {}


def _weight_files(path: Path, stem: str) -> list[Path]:
    """`stem`.safetensors, or all of a numbered set that has lost its index."""
    files = sorted(path.glob(f"{stem}*.safetensors"))
    if not files:
        pickles = sorted(file for file in path.iterdir() if file.suffix in PICKLES)
        if pickles:
            raise _pickle(pickles[0])
        raise ModelError(f"{path} holds no {stem}.safetensors.", AGAIN)
    for file in files:
        numbered = re.fullmatch(stem + r"-(\d+)-of-(\d+)\.safetensors", file.name)
        if numbered:
            width, count = len(numbered[2]), int(numbered[2])
            for number in range(1, count + 1):
                name = f"{stem}-{number:0{width}d}-of-{numbered[2]}.safetensors"
                if not (path / name).is_file():
                    raise ModelError(f"shard {name} is missing from {path}.", AGAIN)
    return files


def _read_index(index: Path) -> dict[str, Path]:
    placed = _read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(v, str) for v in placed.values()):
        raise ModelError(f"{index} has no weight_map.", AGAIN)
    for name in sorted(set(placed.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            what = "a pickle" if Path(name).suffix in PICKLES else "no file of this folder"
            raise ModelError(f"{index} names {name!r}, which is {what}.", AGAIN)
        if not (index.parent / name).is_file():
            raise ModelError(f"shard {name} is missing from {index.parent}.", AGAIN)
    return {tensor: index.parent / name for tensor, name in placed.items()}


def _check_index(index: Path, placed: dict[str, Path], tensors: dict[str, TensorInfo]) -> None:
    for name, file in placed.items():
        if name not in tensors or tensors[name].file != file:
            raise ModelError(f"{index.name} places {name} in {file.name}, it is not there.", AGAIN)
    for name, info in tensors.items():
        if name not in placed:
            raise ModelError(f"{info.file.name} holds {name}, which {index.name} omits.", AGAIN)


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
        raise ModelError(f"{file.name} is missing from {file.parent}.", AGAIN) from error
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{file} is not readable JSON.", AGAIN) from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} does not hold a JSON object.", AGAIN)
    return content


def _pickle(file: Path) -> ModelError:
    return ModelError(
        f"{file} is a pickle, which can run any code and is never loaded.",
        "Use the model's safetensors, or make them once: hidream models convert IN OUT.",
    )
