"""An embedding file: what the text encoders said of a prompt, once, for use without them.

It is a safetensors file of `t5` (1, t, f), `llama` (layers, 1, l, g) and `pooled` (1, p), and the
same after `negative.`; its header holds the prompts.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from hidream.errors import InputError, ModelError
from hidream.folder import PICKLES, read_header
from hidream.models.i1.config import I1Config
from hidream.models.i1.model import Features
from hidream.models.i1.text import NAMES, Texts, texts_of
from hidream.request import GenerateRequest

VERSION = 1  # of the header: readers refuse what is newer
_KEY = "hidream.embeddings"
_PARTS = ("t5", "llama", "pooled")
_DTYPES = ("F32", "F16", "BF16")
_AGAIN = "Make it again."


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """A prompt's features, and its negative prompt's where there is one.

    `encoders`: what made them, as the one who saved them put it: names and digests.
    """

    features: Features
    texts: Texts
    negative: Features | None = None
    negative_texts: Texts | None = None
    encoders: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.negative is None) != (self.negative_texts is None):
            raise ValueError("a negative prompt has features and texts, or neither")


def save_embeddings(path: str | Path, embeddings: Embeddings, *, overwrite: bool = False) -> None:
    """Write the file whole or not at all.

    Raises InputError where it is there already, or cannot be written.
    """
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise InputError(f"{path} is no name of an embedding file.", "End it in .safetensors.")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already.", "Choose another name, or say --overwrite.")
    note: dict[str, Any] = {
        "version": VERSION,
        "texts": asdict(embeddings.texts),
        "encoders": dict(embeddings.encoders),
    }
    tensors = _tensors(embeddings.features)
    if embeddings.negative is not None and embeddings.negative_texts is not None:
        note["negative"] = asdict(embeddings.negative_texts)
        tensors |= {f"negative.{n}": t for n, t in _tensors(embeddings.negative).items()}
    temporary = path.with_name(f".hidream-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(save(tensors, metadata={"format": "pt", _KEY: json.dumps(note)}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_texts(path: str | Path) -> tuple[Texts, Texts | None]:
    """A file's prompt and negative prompt; no tensors are read. InputError as `load_embeddings`."""
    path = _checked(path)
    with safe_open(path, framework="pt") as file:
        return _note(path, file.metadata() or {})[:2]


def check_embeddings(
    request: GenerateRequest, config: I1Config | None = None, *, alone: bool = True
) -> None:
    """Raise InputError unless a resolved request's file holds what is read of its prompts.

    No tensors are read. With `config` also: unless it is of that model. Not `alone`: encoders are
    there for a negative prompt that it does not hold.
    """
    assert request.embeddings is not None
    path = _checked(request.embeddings)
    found, found_negative = read_texts(path)
    texts, negative = texts_of(request)
    if found != texts:
        raise InputError(
            f'{path} was made of another prompt: "{found.t5[:80]}".',
            "Leave prompts, shot, angle and view out, or make the file again: hidream embed.",
        )
    guided = (request.guidance_scale or 0) > 1
    if alone and guided and found_negative != negative:
        holds = f'holds the negative prompt "{found_negative.t5[:80]}"' if found_negative else None
        raise InputError(
            f"{path} {holds or 'holds no negative prompt'}, not this request's "
            f'"{negative.t5[:80]}".',
            "Leave it out, or make the file again: hidream embed PROMPT -n NEGATIVE.",
        )
    if config is not None:
        shapes = {name: (info.shape, info.dtype) for name, info in read_header(path).items()}
        _check(path, shapes, config)


def load_embeddings(path: str | Path, config: I1Config) -> Embeddings:
    """Read a file and check it against the model that `config` describes.

    Raises InputError where it is not there, is damaged, something else, or of another model.
    """
    path = _checked(path)
    shapes = {name: (info.shape, info.dtype) for name, info in read_header(path).items()}
    with safe_open(path, framework="pt") as file:
        texts, negative_texts, encoders = _note(path, file.metadata() or {})
        prefixes = ("", "negative.") if negative_texts else ("",)
        if shapes.keys() != {prefix + name for prefix in prefixes for name in _PARTS}:
            raise InputError(f"{path} does not hold the tensors of an embedding file.", _AGAIN)
        _check(path, shapes, config)
        tensors = {name: file.get_tensor(name) for name in shapes}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(f"{name} in {path} holds values that are not finite.", _AGAIN)
    features, *negative = (
        Features(**{name: tensors[prefix + name] for name in _PARTS}) for prefix in prefixes
    )
    return Embeddings(
        features=features,
        texts=texts,
        negative=negative[0] if negative else None,
        negative_texts=negative_texts,
        encoders=encoders,
    )


def _checked(path: str | Path) -> Path:
    """The path of a whole safetensors file; InputError where it is none."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"the embedding file {path} does not exist.", "Check its path.")
    if path.suffix in PICKLES:
        raise InputError(f"{path} is a pickle, which is never loaded.", _AGAIN)
    try:
        read_header(path)
    except (ModelError, OSError) as error:
        problem = error.problem if isinstance(error, ModelError) else f"{path} cannot be read."
        raise InputError(problem, _AGAIN) from error
    return path


def _tensors(features: Features) -> dict[str, Tensor]:
    if len(features.pooled) != 1:
        raise ValueError("an embedding file holds one prompt")
    return {name: getattr(features, name).cpu().contiguous().clone() for name in _PARTS}


def _note(path: Path, metadata: Mapping[str, str]) -> tuple[Texts, Texts | None, Mapping[str, str]]:
    foreign = InputError(f"{path} is no embedding file.", "Give one that hidream has made.")
    try:
        note = json.loads(metadata[_KEY])
        version = note["version"]
        found = [_texts(note["texts"])]
        found += [_texts(note["negative"])] if "negative" in note else []
        encoders = {str(name): str(value) for name, value in note.get("encoders", {}).items()}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise foreign from error
    if type(version) is not int:
        raise foreign
    if version > VERSION:
        raise InputError(f"{path} is of a later version of hidream.", "Update hidream.")
    return found[0], (found[1] if len(found) > 1 else None), encoders


def _texts(found: Any) -> Texts:
    if found.keys() != set(NAMES) or not all(isinstance(text, str) for text in found.values()):
        raise ValueError("not the texts of the four encoders")
    return Texts(**found)


def _check(path: Path, shapes: Mapping[str, tuple[tuple[int, ...], str]], config: I1Config) -> None:
    """Raise InputError unless the tensors are what the model reads."""
    for name, (shape, dtype) in shapes.items():
        part = name.removeprefix("negative.")
        if part == "llama":
            needed = max(config.llama_layers) + 1
            good = len(shape) == 4 and shape[0] >= needed and shape[1] == 1
            good = good and shape[2] > 0 and shape[3] == config.llama_size
            wanted = f"[{needed}, 1, tokens, {config.llama_size}]"
        elif part == "t5":
            good = len(shape) == 3 and shape[0] == 1 and shape[1] > 0
            good = good and shape[2] == config.t5_size
            wanted = f"[1, tokens, {config.t5_size}]"
        else:
            good, wanted = shape == (1, config.pooled_size), f"[1, {config.pooled_size}]"
        if not good:
            raise InputError(
                f"{path} is for another model: {name} is {list(shape)}; here it is {wanted}.",
                "Make it with this model's text encoders.",
            )
        if dtype not in _DTYPES:
            raise InputError(f"{name} in {path} is {dtype}; it is one of {', '.join(_DTYPES)}.")
