"""The h5 files that REPA-E and Hi-DiT share: what is called how, and reading them.

    images.h5        00000/img00000000.png           a PNG's bytes, one string a picture
    <latents>.h5     00000/img-mean-std-00000000.npy float32 (2c, h, w), mean then deviation
    both             dataset.json                    {"labels": [[name, class], ...]}
    <stem>_h5.json   a list of the names in <stem>.h5

A group holds 1000 pictures. In what hidream writes, the file has an attribute `hidream`, JSON that
says what it was made from; readers of the published format do not see it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from hidream.errors import InputError

IMAGES = "images"  # the stem of the pictures' file
LABELS = "dataset.json"  # the name of the labels, inside
NOTE = "hidream"  # the attribute
NUM_SAMPLED = 64  # pictures that a fingerprint reads where no digest of all is noted
_SUFFIXES = {IMAGES: ".png"}  # of the items by stem; any other stem has latents


@dataclass(frozen=True, kw_only=True, eq=False)
class Listing:
    """What an h5 file holds: its items' names in order, and the class of each."""

    path: Path
    names: list[str]
    labels: Int[np.ndarray, " n"]

    @property
    def num_classes(self) -> int:
        """One more than the highest class."""
        return int(self.labels.max()) + 1


def image_name(index: int) -> str:
    """Where picture `index` is in images.h5: `00001/img00001234.png`."""
    number = f"{index:08d}"
    return f"{number[:5]}/img{number}.png"


def latents_name(image: str) -> str:
    """Where the latents of the picture of this name are: `00001/img-mean-std-00001234.npy`."""
    group, _, name = image.rpartition("/")
    number = name.removeprefix("img").removesuffix(".png")
    return f"{group}/img-mean-std-{number}.npy".lstrip("/")


def h5_file(folder: Path, stem: str) -> Path:
    return folder / f"{stem}.h5"


def names_file(folder: Path, stem: str) -> Path:
    return folder / f"{stem}_h5.json"


def import_h5py() -> Any:
    """The package h5py; InputError that names the extra where it is missing."""
    try:
        import h5py
    except ImportError as error:
        raise InputError(
            "Hi-DiT's data are h5 files, for which h5py is needed and not installed.",
            'Install it with: pip install "hidream[data]".',
        ) from error
    return h5py


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """An h5py.File to read from. InputError where it is missing or damaged."""
    h5py = import_h5py()
    if not path.is_file():
        raise InputError(f"{path} does not exist.", "Check the folder, or make it first.")
    try:
        file = h5py.File(path, "r", locking="best-effort")  # some network disks know no locks
    except OSError as error:
        raise InputError(f"{path} is no whole h5 file: {error}.", "Make it again.") from error
    with file:
        yield file


def read_bytes(file: Any, name: str) -> bytes:
    """A string item, whole: h5py's own value of it would end before zero bytes at its end.

    Raises InputError where the file does not hold it.
    """
    return _item(file, name).tobytes()


def read_image(file: Any, name: str) -> UInt8[np.ndarray, "3 height width"]:
    """The picture of this name. InputError where it is missing or no picture."""
    data = read_bytes(file, name)
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{name} in {file.filename} is no whole PNG: {error}.") from error
    return pixels.transpose(2, 0, 1)


def read_latents(file: Any, name: str) -> np.ndarray:
    """Mean and deviation, (2c, h, w). InputError where they are missing or of another kind."""
    found = _item(file, name)
    if found.dtype.kind != "f" or found.ndim != 3 or len(found) % 2:
        raise InputError(
            f"{name} in {file.filename} is {found.dtype} {list(found.shape)}, not the mean and "
            "deviation of latents."
        )
    return found


def read_listing(folder: Path, stem: str) -> Listing:
    """The names of `<stem>_h5.json`, sorted, and their classes from inside `<stem>.h5`.

    Where nothing is labelled, everything is of class 0.

    Raises:
        InputError: a file is missing or damaged, or some items have a class and some have none.
    """
    path = h5_file(folder, stem)
    with opened(path) as file:
        if LABELS not in file:
            raise InputError(f"{path} has no {LABELS}: it was never finished.", "Make it again.")
        text = read_bytes(file, LABELS)
    suffix = _SUFFIXES.get(stem, ".npy")
    listed = _json(names_file(folder, stem), names_file(folder, stem).name, list)
    names = sorted({name for name in listed if isinstance(name, str) and name.endswith(suffix)})
    if not names:
        raise InputError(f"{names_file(folder, stem)} names no item that ends in {suffix}.")
    labels = _parsed(text, f"{LABELS} in {path}", dict).get("labels")
    return Listing(path=path, names=names, labels=_classes(names, labels or [], path))


def read_note(path: Path) -> dict[str, Any]:
    """What hidream noted in the file that it made; {} for a file of another make."""
    with opened(path) as file:
        text = file.attrs.get(NOTE)
    if text is None:
        return {}
    return _parsed(bytes(text), f"the note in {path}", dict)


def fingerprint(listing: Listing) -> str:
    """A digest of names, classes and content, the same wherever the file is copied.

    The content is the digest of all pictures that hidream notes when it makes the file; of a file
    of another make it is that of 64 items, evenly spread.
    """
    digest = hashlib.sha256("\n".join(listing.names).encode())
    digest.update(listing.labels.astype("<i8").tobytes())
    content = read_note(listing.path).get("content_sha256")
    if content is not None:
        digest.update(str(content).encode())
        return digest.hexdigest()
    places = np.linspace(0, len(listing.names) - 1, min(NUM_SAMPLED, len(listing.names)))
    with opened(listing.path) as file:
        for place in places.round().astype(int):
            digest.update(read_bytes(file, listing.names[place]))
    return digest.hexdigest()


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a small file whole or not at all. InputError where that is not possible."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def _item(file: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(file[name])
    except KeyError as error:
        raise InputError(
            f"{file.filename} does not hold {name}, which is listed beside it.", "Make it again."
        ) from error
    except (OSError, TypeError) as error:
        raise InputError(f"{name} in {file.filename} cannot be read: {error}.") from error


def _classes(names: Sequence[str], labels: Any, path: Path) -> Int[np.ndarray, " n"]:
    if labels == []:
        return np.zeros(len(names), np.int64)
    try:
        by_name = {str(name).replace("\\", "/"): label for name, label in labels}
    except (TypeError, ValueError) as error:
        raise InputError(f"{LABELS} in {path} is no list of [name, class].") from error
    without = [name for name in names if name not in by_name]
    if without:
        raise InputError(
            f"{path} names no class for {len(without)} of its {len(names)} items, "
            f"first {without[0]}."
        )
    found = [by_name[name] for name in names]
    odd = next((x for x in found if not isinstance(x, int) or isinstance(x, bool) or x < 0), None)
    if odd is not None:
        raise InputError(f"{LABELS} in {path} has {odd!r} for a class; classes are 0, 1, 2, ...")
    return np.array(found, np.int64)


def _json(path: Path, label: str, kind: type) -> Any:
    try:
        return _parsed(path.read_bytes(), str(path), kind)
    except FileNotFoundError as error:
        raise InputError(f"{path.parent} has no {label}.", "Make the h5 file again.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error


def _parsed(text: bytes, label: str, kind: type) -> Any:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{label} is no JSON.", "Make the h5 file again.") from error
    if not isinstance(found, kind):
        raise InputError(f"{label} holds no {kind.__name__}.", "Make the h5 file again.")
    return found
