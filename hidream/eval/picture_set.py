"""A set of pictures, read in threads batch by batch, and what a network says of it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Protocol

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from hidream.errors import InputError
from hidream.eval.fid import NUM_SPLITS, Score, ScoreSums, Stats
from hidream.eval.inception import Seen
from hidream.pictures import FORMATS, SUFFIXES, open_picture, read_file, read_picture

AHEAD = 3  # batches that are read while the network works


class Network(Protocol):
    """Inception, or what stands in for it."""

    name: str
    num_features: int

    def __call__(self, pictures: UInt8[Tensor, "b 3 height width"]) -> Seen: ...


@dataclass(frozen=True)
class PictureSet:
    """Pictures in their order: where they are, their names, and what reads the file of one.

    All must be 8-bit RGB of one size, which is checked as they are read.
    """

    place: Path
    names: Sequence[str]
    read: Callable[[str], bytes]

    def __len__(self) -> int:
        return len(self.names)


def open_pictures(folder: str | Path) -> PictureSet:
    """The PNG, JPEG and WebP files of a folder by name, subfolders aside; headers are checked.

    Raises InputError: no folder, no picture in it, a file that is none, or pictures of several
    sizes or not RGB.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist"
        raise InputError(f"the folder of pictures {folder} {what}.", "Check its path.")
    with os.scandir(folder) as entries:
        names = sorted(
            entry.name
            for entry in entries
            if os.path.splitext(entry.name)[1].lower() in SUFFIXES
            and not entry.name.startswith(".")
            and entry.is_file()
        )
    if not names:
        raise InputError(
            f"{folder} holds no PNG, JPEG or WebP picture.", "Subfolders are not searched."
        )
    with ThreadPoolExecutor(_num_threads()) as pool:
        kinds = list(pool.map(lambda name: _kind(folder / name), names))
    (width, height), _ = kinds[0]
    for name, (size, mode) in zip(names, kinds, strict=True):
        if mode != "RGB":
            raise _wrong_mode(f"{name} in {folder}", mode)
        if size != (width, height):
            other = f"{names[0]} {width}x{height}"
            raise _unlike(f"{name} is {size[0]}x{size[1]}", other, folder)
    return PictureSet(folder, names, lambda name: read_file(folder / name))


@contextmanager
def open_h5(folder: str | Path) -> Iterator[PictureSet]:
    """The pictures of the `images.h5` in a folder, as hidream hidit preprocess writes it.

    Raises InputError: it or `images_h5.json` is missing, not whole or empty, or h5py is.
    """
    from hidream.data.h5 import IMAGES, opened, read_bytes, read_listing

    listing = read_listing(Path(folder).expanduser(), IMAGES)
    lock = Lock()  # the library reads for one thread at a time
    with opened(listing.path) as file:

        def read(name: str) -> bytes:
            with lock:
                return read_bytes(file, name)

        yield PictureSet(listing.path, listing.names, read)


def batches(pictures: PictureSet, size: int) -> Iterator[UInt8[Tensor, "b 3 height width"]]:
    """All pictures in order, `size` at a time, decoded in threads a few batches ahead.

    Raises InputError for a picture that is damaged, not RGB or of another size than the first.
    """
    names = pictures.names
    starts = range(0, len(names), size)
    coming, waiting = iter(starts), deque[list[Future[np.ndarray]]]()
    pool = ThreadPoolExecutor(_num_threads())
    shape: tuple[int, ...] | None = None
    try:
        for start in starts:
            while len(waiting) <= AHEAD and (following := next(coming, None)) is not None:
                chunk = names[following : following + size]
                waiting.append([pool.submit(_decoded, pictures, name) for name in chunk])
            arrays = [future.result() for future in waiting.popleft()]
            shape = shape or arrays[0].shape
            for name, array in zip(names[start : start + size], arrays, strict=True):
                if array.shape != shape:
                    raise _unlike(
                        f"{name} is {array.shape[1]}x{array.shape[0]}",
                        f"{names[0]} {shape[1]}x{shape[0]}",
                        pictures.place,
                    )
            yield torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Measured:
    """Of a set of pictures: sums of the features, and the Inception Score unless left out."""

    stats: Stats
    score: Score | None


@torch.inference_mode()
def measure(
    pictures: PictureSet,
    network: Network,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    with_score: bool = True,
    on_batch: Callable[[int, int], None] | None = None,
) -> Measured:
    """Show every picture to `network`, which is on `device`.

    `on_batch(done, all)` is called after each batch, 1 … all.
    Convolutions keep all of float32, also where a GPU would round them to TF32.

    Raises InputError as `batches`, for fewer than 2 pictures, and fewer than 10 with a score.
    """
    check_number(pictures, with_score=with_score)
    stats = Stats(network.num_features)
    sums = ScoreSums(len(pictures)) if with_score else None
    num_batches = -(-len(pictures) // batch_size)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for number, batch in enumerate(batches(pictures, batch_size), 1):
            seen = network(batch.to(device))
            stats.add(seen.features)
            if sums is not None:
                sums.add(seen.logits)
            if on_batch is not None:
                on_batch(number, num_batches)
    return Measured(stats, sums.score() if sums is not None else None)


def check_number(pictures: PictureSet, *, with_score: bool) -> None:
    """InputError where they are too few for a covariance, or for the parts of a score."""
    if len(pictures) < 2:
        raise InputError(
            f"{pictures.place} holds 1 picture; statistics need at least 2.", "Add more pictures."
        )
    if with_score and len(pictures) < NUM_SPLITS:
        raise InputError(
            f"{pictures.place} holds {len(pictures)} pictures; an Inception Score of {NUM_SPLITS} "
            "parts needs as many.",
            "Add more pictures, or leave the score out with --no-isc.",
        )


def _decoded(pictures: PictureSet, name: str) -> np.ndarray:
    """One picture as (height, width, 3) bytes."""
    label = f"{name} in {pictures.place}"
    image = open_picture(pictures.read(name), label)
    if image.mode != "RGB":
        raise _wrong_mode(label, image.mode)
    return np.asarray(read_picture(image, label))


def _kind(path: Path) -> tuple[tuple[int, int], str]:
    """Size and mode of a picture by its header."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.size, image.mode
    except Exception as error:
        read_picture(path)  # says what is wrong
        raise InputError(f"picture ({path}) cannot be read: {error}.") from error


def _wrong_mode(label: str, mode: str) -> InputError:
    return InputError(
        f"{label} has pixels of mode {mode}, not 8-bit RGB.", "Convert all pictures to RGB first."
    )


def _unlike(one: str, other: str, place: Path) -> InputError:
    return InputError(
        f"the pictures in {place} are of several sizes: {one}, {other}.",
        "Evaluate one size at a time.",
    )


def _num_threads() -> int:
    return min(16, os.cpu_count() or 1)
