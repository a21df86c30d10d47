"""A folder of drawn pictures: its name, what it was drawn with, what is missing, how it is written.

A folder holds pictures of one set of options only. They stand in its `options.json`; drawing with
others into it is refused. So a run that was stopped goes on where it was, by what is not there.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from hidream.errors import InputError
from hidream.pictures import write_picture

OPTIONS = "options.json"
_STALE_SECONDS = 3600  # a half-written file of this age is nobody's


def folder_name(
    exp_name: str,
    train_steps: int,
    cfg_scale: float,
    guidance_low: float,
    guidance_high: float,
    label_sampling: str,
) -> str:
    """As published: `NAME_0450000_cfg2.4-0.0-1.0-labelsampling-equal`."""
    interval = f"{float(cfg_scale)}-{float(guidance_low)}-{float(guidance_high)}"
    return f"{exp_name}_{train_steps:07d}_cfg{interval}-labelsampling-{label_sampling}"


def picture_path(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.png"


def check_options(folder: Path, options: Mapping[str, Any]) -> None:
    """InputError where the folder's pictures were, or may have been, drawn with other options."""
    if not drawn(folder):
        return
    file = folder / OPTIONS
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder} holds pictures, but no {OPTIONS} that says how they were drawn.",
            "Move it away, or choose another --sample-dir.",
        ) from error
    names = [n for n in {**found, **options} if found.get(n) != options.get(n)]
    if names:
        differences = ", ".join(
            f"{n.replace('_', '-')} {found.get(n)}, not {options.get(n)}" for n in names[:3]
        )
        raise InputError(
            f"the pictures in {folder} were drawn with {differences}"
            f"{' and more' if len(names) > 3 else ''}.",
            "Draw with the same options, move the folder, or choose another --sample-dir.",
        )


def prepare(folder: Path, options: Mapping[str, Any]) -> None:
    """Make the folder, note the options, remove what a killed run left half-written.

    Raises:
        InputError: it cannot be written to.
    """
    with _told(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.glob(".hidream-*.tmp"):
            with suppress(FileNotFoundError):
                if time.time() - file.stat().st_mtime > _STALE_SECONDS:
                    file.unlink()
        with _replacing(folder / OPTIONS) as temporary:
            temporary.write_text(json.dumps(options, indent=1) + "\n", encoding="utf-8")


def drawn(folder: Path) -> set[int]:
    """The indices of the pictures that are there. An empty file is none: a crash can leave it."""
    try:
        with os.scandir(folder) as entries:
            found = [(re.fullmatch(r"(\d{6,})\.png", entry.name), entry) for entry in entries]
            return {int(match[1]) for match, entry in found if match and entry.stat().st_size}
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}.") from error


def batches_to_draw(
    num_samples: int, batch_size: int, there: set[int], rank: int = 0, world: int = 1
) -> list[range]:
    """This process's share of the batches of which a picture is missing.

    Batches are cut from 0, 1, ... whatever is there already, and each is drawn by one process:
    so a picture has the same neighbours for any number of processes and after any stop, and its
    bits do not hang on how a network rounds batches of other sizes.
    """
    starts = range(0, num_samples, batch_size)
    batches = [range(start, min(start + batch_size, num_samples)) for start in starts]
    return [batch for batch in batches if not there.issuperset(batch)][rank::world]


class Writer:
    """Writes PNG files in threads, `most_waiting` pictures at the most in their queue.

    An error of a thread is raised by the next `put`, or at the end of the `with` block.
    """

    def __init__(self, num_threads: int = 4, most_waiting: int = 64) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="hidream-png")
        self._room = threading.BoundedSemaphore(most_waiting)
        self._error: BaseException | None = None

    def __enter__(self) -> Writer:
        return self

    def put(self, path: Path, picture: UInt8[np.ndarray, "height width 3"]) -> None:
        """Have it written, after waiting for room. Raises InputError of an earlier one."""
        self._room.acquire()
        if self._error is not None:
            self._room.release()
            raise self._error
        self._pool.submit(self._write, path, picture)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=True)
        if self._error is not None and kind is None:
            raise self._error

    def _write(self, path: Path, picture: np.ndarray) -> None:
        try:
            if self._error is None:
                write_picture(Image.fromarray(picture), path, overwrite=True)
        except BaseException as error:  # handed to whoever puts or closes
            self._error = self._error or error
        finally:
            self._room.release()


def write_npz(folder: Path, num_samples: int) -> Path:
    """`FOLDER.npz`: the pictures as `arr_0` (n, height, width, 3), as ADM's evaluation reads them.

    One picture at a time: 50,000 of 256x256 are 9.8 GB.

    Raises:
        InputError: a picture is missing, damaged or of another size; the file cannot be written.
    """
    path = folder.with_name(folder.name + ".npz")
    first = _read(picture_path(folder, 0))
    header = {"descr": "|u1", "fortran_order": False, "shape": (num_samples, *first.shape)}
    with (
        _told(path),
        _replacing(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        for index in range(num_samples):
            picture = _read(picture_path(folder, index))
            if picture.shape != first.shape:
                raise InputError(
                    f"{picture_path(folder, index)} is of another size than the first."
                )
            file.write(picture.tobytes())
    return path


def npz_is_whole(folder: Path, num_samples: int) -> bool:
    """Whether the .npz beside the folder holds this many pictures and is younger than them all."""
    path = folder.with_name(folder.name + ".npz")
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            np.lib.format.read_magic(file)
            shape, *_ = np.lib.format.read_array_header_1_0(file)
        written = path.stat().st_mtime_ns
        paths: Sequence[Path] = [picture_path(folder, index) for index in range(num_samples)]
        return shape[0] == num_samples and all(p.stat().st_mtime_ns <= written for p in paths)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return False


def _read(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{path} cannot be read.", "Delete it and draw again.") from error


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name beside `path`, renamed to it when the block ends well, removed otherwise."""
    temporary = path.with_name(f".hidream-{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}.") from error
