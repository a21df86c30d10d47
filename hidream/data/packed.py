"""The h5 files as plain arrays: a training batch is one read an item, no lookup and no decoding.

In `<data_dir>/packed-<latents>` (`packed` without latents), one item after the other in the order
of their names:

    images.uint8   (n, 3, height, width)
    moments.fp16   (n, 2c, h, w), mean then deviation; .fp32 where that was asked for
    labels.int64   (n,)
    meta.json      shapes, and the h5 files that it was made from; written last

Items are read with `pread`, not mapped: a worker's memory does not grow by what it has read, a
forked one shares no position in a file, and a cut-off file is an error instead of a crash.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import shutil
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from hidream.data import h5, part
from hidream.data.workers import run_tasks
from hidream.errors import InputError, UsageError

logger = logging.getLogger(__name__)

CHUNK = 256  # items that one worker packs at a time
AGAIN = "Make room, then run it again."
CACHE_AGAIN = "Cache the latents again: hidream hidit cache-latents --overwrite."
Progress = Callable[[int, int], None]  # items done, items in all
DTYPES = {"float16": "fp16", "float32": "fp32"}  # and the ends of the files' names


class Packed:
    """A packed folder, its files opened when they are first read, in each process anew.

    Pickled, it is its path. `len()` is the number of items, `labels` all their classes,
    `resolution` a picture's side in pixels, `moments_shape` (n, 2c, h, w), None without latents.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        meta = _read_meta(self.folder)
        if meta is None:
            raise InputError(f"{self.folder} is no packed folder.", "Make it: hidream hidit pack.")
        self.meta = meta
        shape = meta["moments_shape"]
        self.moments_shape = None if shape is None else (len(self), *map(int, shape))
        self.resolution = int(self.meta["image_shape"][-1])
        self.num_classes = int(self.meta["num_classes"])
        self._files: dict[str, int] = {}

    def __len__(self) -> int:
        return int(self.meta["num_items"])

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.folder, self.meta)

    @cached_property
    def labels(self) -> Int[np.ndarray, " n"]:
        """The class of every item."""
        return self._read("labels.int64", range(1), np.dtype("<i8"), (len(self),))[0]

    def images(
        self, indices: Int[np.ndarray, " b"] | Sequence[int]
    ) -> UInt8[np.ndarray, "b 3 height width"]:
        """Pictures by index, in the order asked for. IndexError beyond the last."""
        return self._read("images.uint8", indices, np.dtype("u1"), self.meta["image_shape"])

    def moments(
        self, indices: Int[np.ndarray, " b"] | Sequence[int]
    ) -> Float[np.ndarray, "b c2 h w"]:
        """Means and deviations of latents by index, in float32. UsageError without latents."""
        if self.moments_shape is None:
            raise UsageError(f"{self.folder} has no latents.", "Pack them: hidream hidit pack.")
        kind = np.dtype(self.meta["dtype"])
        name = f"moments.{DTYPES[self.meta['dtype']]}"
        return self._read(name, indices, kind, self.moments_shape[1:]).astype(np.float32)

    def _read(self, name: str, indices: Any, kind: np.dtype, shape: Sequence[int]) -> np.ndarray:
        found = np.empty((len(indices), *shape), kind)
        file, size = self._file(name), found[:1].nbytes
        for index, row in zip(indices, found, strict=True):
            if not 0 <= index < len(self):
                raise IndexError(f"item {index} of {len(self)} in {self.folder}")
            place, rest = int(index) * size, memoryview(row).cast("B")
            while rest:
                num_read = os.preadv(file, [rest], place)
                if num_read == 0:
                    raise InputError(f"{self.folder / name} is cut off.", "Remove the folder.")
                place, rest = place + num_read, rest[num_read:]
        return found

    def _file(self, name: str) -> int:
        if name not in self._files:
            try:
                file = os.open(self.folder / name, os.O_RDONLY)
            except OSError as error:
                raise InputError(f"{self.folder / name}: {error.strerror}.") from error
            weakref.finalize(self, os.close, file)
            self._files[name] = file
        return self._files[name]


def open_packed(
    data_dir: str | Path,
    latents_name: str | None,
    *,
    dtype: str = "float16",
    num_workers: int = 1,
    on_progress: Progress | None = None,
) -> Packed:
    """The packed folder of a data folder, made first where it is missing or older than its h5
    files. Raises as `pack`."""
    folder = packed_folder(Path(data_dir), latents_name)
    if _is_fresh(folder, Path(data_dir), latents_name, dtype):
        return Packed(folder)
    return pack(
        data_dir, latents_name, dtype=dtype, num_workers=num_workers, on_progress=on_progress
    )


def pack(
    data_dir: str | Path,
    latents_name: str | None,
    *,
    dtype: str = "float16",
    num_workers: int = 1,
    on_progress: Progress | None = None,
) -> Packed:
    """Make the packed folder, unless a process that was waited for just did.

    Each picture's latents are found by name. The folder appears whole or not at all.

    Args:
        latents_name: the stem of the latents' h5 file in `data_dir`; None packs pictures alone.
        dtype: of the latents, "float16" or "float32".
        num_workers: processes that read the h5 files.
        on_progress: called with items done and items in all.

    Raises:
        UsageError: an unknown dtype.
        InputError: an h5 file is missing or damaged, names or classes of pictures and latents
            differ, the latents are of other pictures, or the disk is full.
    """
    data_dir = Path(data_dir).expanduser()
    if dtype not in DTYPES:
        raise UsageError(f'dtype "{dtype}" must be {" or ".join(DTYPES)}.')
    folder = packed_folder(data_dir, latents_name)
    if not data_dir.is_dir():
        raise InputError(f"{data_dir} is no folder.", "Name the folder that holds images.h5.")
    with part.lock(data_dir / f".{folder.name}.lock", wait=True):
        if not _is_fresh(folder, data_dir, latents_name, dtype):
            for left in data_dir.glob(f".{escape(folder.name)}.draft-*"):  # of a killed run
                shutil.rmtree(left, ignore_errors=True)
            _build(folder, data_dir, latents_name, dtype, num_workers, on_progress)
    return Packed(folder)


def packed_folder(data_dir: Path, latents_name: str | None) -> Path:
    """Where the packed files are."""
    return data_dir.expanduser() / ("packed" if latents_name is None else f"packed-{latents_name}")


def check_pairs(images: h5.Listing, latents: h5.Listing) -> None:
    """InputError that lists the first names or classes in which the two differ, if any."""
    expected = [h5.latents_name(name) for name in images.names]
    missing = sorted(set(expected) - set(latents.names))
    over = sorted(set(latents.names) - set(expected))
    problems = [
        f"{len(names)} {what} (first {', '.join(names[:3])})"
        for names, what in ((missing, "latents are missing"), (over, "have no picture"))
        if names
    ]
    if problems:
        raise InputError(
            f"{latents.path} does not fit {images.path}: {'; '.join(problems)}.",
            CACHE_AGAIN,
        )
    differ = np.flatnonzero(images.labels != latents.labels)
    if len(differ):
        raise InputError(
            f"{latents.path} and {images.path} disagree on {len(differ)} classes, first on that of "
            f"{images.names[differ[0]]}.",
            CACHE_AGAIN,
        )


def _build(
    folder: Path,
    data_dir: Path,
    latents_name: str | None,
    dtype: str,
    num_workers: int,
    on_progress: Progress | None,
) -> None:
    sources = {"images": h5.h5_file(data_dir, h5.IMAGES)}
    images = h5.read_listing(data_dir, h5.IMAGES)
    if latents_name is not None:
        latents = h5.read_listing(data_dir, latents_name)
        check_pairs(images, latents)
        sources["latents"] = latents.path
        made_from = h5.read_note(latents.path).get("images")
        if made_from not in (None, h5.fingerprint(images)):
            raise InputError(
                f"{latents.path} was made from another images.h5 than {images.path}.",
                CACHE_AGAIN,
            )
    with h5.opened(images.path) as file:
        image_shape = h5.read_image(file, images.names[0]).shape
    moments_shape = None
    if latents_name is not None:
        with h5.opened(latents.path) as file:
            moments_shape = h5.read_latents(file, h5.latents_name(images.names[0])).shape
    meta = {
        "format": 1,
        "num_items": len(images.names),
        "num_classes": images.num_classes,
        "image_shape": list(image_shape),
        "moments_shape": None if moments_shape is None else list(moments_shape),
        "dtype": dtype,
        "sources": {name: _state(path, data_dir) for name, path in sources.items()},
    }
    draft = folder.with_name(f".{folder.name}.draft-{secrets.token_hex(8)}")
    logger.warning("packing %d items of %s into %s, once", len(images.names), data_dir, folder)
    with part.told(folder, AGAIN):
        draft.mkdir()
    try:
        _fill(draft, data_dir, meta, images, sources, num_workers, on_progress)
        with part.told(folder, AGAIN):
            images.labels.astype("<i8").tofile(draft / "labels.int64")
            h5.write_whole(draft / "meta.json", json.dumps(meta, indent=1) + "\n")
            _put(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _fill(
    draft: Path,
    data_dir: Path,
    meta: dict[str, Any],
    images: h5.Listing,
    sources: dict[str, Path],
    num_workers: int,
    on_progress: Progress | None,
) -> None:
    linked = _link_images(draft, data_dir, meta)
    task = {
        "draft": str(draft),
        "image_shape": None if linked else meta["image_shape"],
        "moments_shape": meta["moments_shape"],
        "dtype": meta["dtype"],
        "sources": {name: str(path) for name, path in sources.items()},
    }
    num_bytes = 0 if linked else math.prod(meta["image_shape"])
    num_bytes += math.prod(meta["moments_shape"] or [0]) * np.dtype(meta["dtype"]).itemsize
    part.check_room(draft, num_bytes * len(images.names))
    tasks = [
        {**task, "first": first, "names": images.names[first : first + CHUNK]}
        for first in range(0, len(images.names), CHUNK)
    ]
    num_done = 0
    for num in run_tasks(_do_chunk, tasks, num_workers):
        num_done += num
        if on_progress is not None:
            on_progress(num_done, len(images.names))


def _link_images(draft: Path, data_dir: Path, meta: dict[str, Any]) -> bool:
    """Share the pictures with a packed folder of other latents, where there is one: they are the
    larger part by far, and never changed in place."""
    for other in data_dir.glob("packed*"):
        theirs = _read_meta(other)
        if theirs is not None and theirs["sources"]["images"] == meta["sources"]["images"]:
            with suppress(OSError):  # a disk without links
                os.link(other / "images.uint8", draft / "images.uint8")
                return True
    return False


def _do_chunk(task: dict[str, Any]) -> int:
    """Pack some items, in whatever process; how many."""
    draft, first, names = Path(task["draft"]), task["first"], task["names"]
    if task["image_shape"] is not None:
        with h5.opened(Path(task["sources"]["images"])) as file:
            images = [h5.read_image(file, name) for name in names]
        rows = _stacked(images, task["image_shape"], names, "u1")
        _write_rows(draft / "images.uint8", first, rows)
    if task["moments_shape"] is None:
        return len(names)
    with h5.opened(Path(task["sources"]["latents"])) as file:
        found = [h5.read_latents(file, h5.latents_name(name)) for name in names]
    with np.errstate(over="ignore"):
        moments = _stacked(found, task["moments_shape"], names, task["dtype"])
    finite = np.isfinite(moments).all((1, 2, 3))
    if not finite.all():
        name = h5.latents_name(names[int(np.argmin(finite))])
        raise InputError(
            f"{name} holds values that {task['dtype']} has no room for.", "Pack as float32."
        )
    _write_rows(draft / f"moments.{DTYPES[task['dtype']]}", first, moments)
    return len(names)


def _stacked(items: list[np.ndarray], shape: list[int], names: list[str], kind: str) -> np.ndarray:
    for item, name in zip(items, names, strict=True):
        if list(item.shape) != shape:
            raise InputError(f"{name} is {list(item.shape)} where others are {shape}.")
    return np.stack(items).astype(kind, copy=False)


def _write_rows(path: Path, first: int, rows: np.ndarray) -> None:
    rest, place = (
        memoryview(np.ascontiguousarray(rows).view(np.uint8).data).cast("B"),
        first * rows[:1].nbytes,
    )
    with part.told(path, AGAIN):
        file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            while rest:
                num_written = os.pwrite(file, rest, place)
                place, rest = place + num_written, rest[num_written:]
            os.fsync(file)
        finally:
            os.close(file)


def _put(draft: Path, folder: Path) -> None:
    """Move a finished draft to its place; what it replaces stays readable for who has it open."""
    old = folder.with_name(f".{folder.name}.draft-{secrets.token_hex(8)}")
    if folder.exists():
        folder.rename(old)
    try:
        draft.rename(folder)
    except OSError:
        if _read_meta(folder) is None:  # else another machine was first: as good
            raise
    shutil.rmtree(old, ignore_errors=True)


def _is_fresh(folder: Path, data_dir: Path, latents_name: str | None, dtype: str) -> bool:
    """Whether the folder is of these h5 files as they are now."""
    data_dir = data_dir.expanduser()
    meta = _read_meta(folder)
    if meta is None:
        return False
    stems = {"images": h5.IMAGES} | ({} if latents_name is None else {"latents": latents_name})
    if meta["dtype"] != dtype or meta["sources"].keys() != stems.keys():
        return False
    for name, stem in stems.items():
        path = h5.h5_file(data_dir, stem)
        if not path.is_file():  # packed is enough to train on
            continue
        noted, status = meta["sources"][name], path.stat()
        if noted["size"] == status.st_size and noted["mtime_ns"] == status.st_mtime_ns:
            continue
        now = _state(path, data_dir)  # perhaps it was only copied, or touched
        if noted["fingerprint"] != now["fingerprint"]:
            logger.warning("%s has changed since %s was packed", path, folder)
            return False
        meta["sources"][name] = now
        with suppress(InputError):  # so that the next one need not look so closely
            h5.write_whole(folder / "meta.json", json.dumps(meta, indent=1) + "\n")
    return True


def _state(path: Path, data_dir: Path) -> dict[str, Any]:
    status = path.stat()
    fingerprint = h5.fingerprint(h5.read_listing(data_dir, path.stem))
    return {
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "fingerprint": fingerprint,
    }


def _essence(meta: dict[str, Any]) -> dict[str, Any]:
    """What the arrays depend on: not when the h5 files were last touched."""
    return {**meta, "sources": {k: v["fingerprint"] for k, v in meta["sources"].items()}}


def _read_meta(folder: Path) -> dict[str, Any] | None:
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        return meta if meta["format"] == 1 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _reopen(folder: Path, meta: dict[str, Any]) -> Packed:
    """What a pickle becomes: the folder as it was, or InputError."""
    packed = Packed(folder)
    if _essence(packed.meta) != _essence(meta):
        raise InputError(f"{folder} was packed anew while it was in use.", "Start again.")
    return packed
