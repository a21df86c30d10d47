"""A VAE reads every picture of images.h5 once: latents' means and deviations become an h5 file."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors.numpy import save
from torch import Tensor

from hidream.data import h5, part
from hidream.errors import InputError, UsageError

logger = logging.getLogger(__name__)

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]  # pictures in [-1, 1] to mean and deviation
AHEAD = 4  # batches of pictures that are read while one is encoded
SMALLEST_STD = 1e-6  # of a latent channel, so that its scale is finite


@dataclass(frozen=True, kw_only=True)
class Cached:
    """A finished cache: its file, how many latents of which shape (2c, h, w), and whether it was
    there already."""

    path: Path
    num_latents: int
    shape: tuple[int, int, int]
    was_there: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class _Work:
    """What all processes have in common."""

    images: h5.Listing
    target: Path
    folder: Path
    plan: dict[str, Any]
    batches: list[range]  # indices of pictures


def cache_latents(
    data_dir: str | Path,
    out_dir: str | Path,
    name: str,
    encode: Encode,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    barrier: Callable[[], None] = lambda: None,
    made_by: str = "",
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Cached:
    """Write `<name>.h5`, `<name>_h5.json` and `<name>_stats.safetensors` into `out_dir`.

    Every process of the group calls this with the same arguments but `rank`. Batches are always
    the same `batch_size` neighbours, whichever process has them, so files do not depend on
    `world`; interrupted, all is continued by the next call. The statistics are those of sampled
    latents, mean + deviation · noise, in closed form: no noise is drawn for them.

    Args:
        encode: pictures "b 3 height width" in [-1, 1], float32 on the CPU, to the mean and the
            deviation of their latents, each "b c h w".
        barrier: waits until all processes have called it.
        made_by: what `encode` is, such as a digest of its weights; latents of two makes are not
            put into one file.
        overwrite: replace a finished file of this name.
        on_progress: called with this process's pictures done and in all.

    Raises:
        UsageError: an unusable name, or a number out of range.
        InputError: images.h5 is missing or damaged; the file exists and is of other pictures or of
            another make; latents that are not finite; the disk is full.
    """
    work = _work(Path(data_dir), Path(out_dir), name, batch_size, made_by)
    if work.target.exists() and not overwrite:
        return _whole(work)
    if rank == 0:
        _make_folder(work.target.parent)
    with part.lock(work.folder / "lock", wait=False) if rank == 0 else nullcontext():
        if rank == 0:
            _begin(work, encode)
        barrier()
        left = _left(work)
        barrier()  # all have seen what is left before one of them makes it less
        _encode(work, encode, rank, left[rank::world], on_progress)
        barrier()
        if rank == 0:
            _finish(work)
    if rank == 0:
        part.remove(work.folder)
    barrier()
    return _result(work)


def save_statistics(
    path: Path, mean: Float[np.ndarray, " c"], std: Float[np.ndarray, " c"], about: str
) -> None:
    """Write `latents_bias` = mean and `latents_scale` = 1 / std, each (1, c, 1, 1) in float32."""
    values = {"latents_bias": mean, "latents_scale": 1 / np.maximum(std, SMALLEST_STD)}
    shaped = {name: value.astype(np.float32).reshape(1, -1, 1, 1) for name, value in values.items()}
    h5.write_whole(path, save(shaped, {"about": about}))


def stats_file(folder: Path, name: str) -> Path:
    """Where the statistics of the latents of this name are."""
    return folder / f"{name}_stats.safetensors"


def _work(data_dir: Path, out_dir: Path, name: str, batch_size: int, made_by: str) -> _Work:
    if not name or name != Path(name).name or name.startswith(".") or name == h5.IMAGES:
        raise UsageError(
            f'"{name}" is no name for latents.', 'Give a plain name other than "images".'
        )
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size} must be 1 or more.")
    data_dir, out_dir = data_dir.expanduser(), out_dir.expanduser()
    images = h5.read_listing(data_dir, h5.IMAGES)
    num = len(images.names)
    return _Work(
        images=images,
        target=h5.h5_file(out_dir, name),
        folder=out_dir / f".{name}-part",
        plan={
            "format": 1,
            "images": h5.fingerprint(images),
            "num_latents": num,
            "made_by": made_by,
            "batch_size": batch_size,
        },
        batches=[range(first, min(first + batch_size, num)) for first in range(0, num, batch_size)],
    )


def _begin(work: _Work, encode: Encode) -> None:
    """Lay the file out. What a latent is like, the first picture tells."""
    first = next(_pictures(work, [range(1)]))
    shape = _encoded(work, encode, range(1), first).shape[1:]
    names = [h5.latents_name(name) for name in work.images.names]
    part.begin(work.folder, work.plan | {"shape": list(shape)}, names, np.dtype("<f4"), shape)


def _left(work: _Work) -> list[range]:
    """The batches that no process has noted."""
    done = {record["first"] for record in part.records(work.folder)}
    return [batch for batch in work.batches if batch.start not in done]


def _encode(
    work: _Work,
    encode: Encode,
    rank: int,
    mine: Sequence[range],
    on_progress: Callable[[int, int], None] | None,
) -> None:
    num_done, num_all = 0, sum(map(len, mine))
    with part.Part(work.folder, rank) as items:
        for batch, pictures in zip(mine, _pictures(work, mine), strict=True):
            latents = _encoded(work, encode, batch, pictures)
            for index, one in zip(batch, latents, strict=True):
                items.write(index, one.tobytes())
            items.sync()
            items.note({"first": batch.start, "sums": _sums(latents)})
            num_done += len(batch)
            if on_progress is not None:
                on_progress(num_done, num_all)


def _finish(work: _Work) -> None:
    """Labels, names and statistics beside the file, then the file's own name."""
    noted = {record["first"]: record["sums"] for record in part.records(work.folder)}
    missing = [batch.start for batch in work.batches if batch.start not in noted]
    if missing:
        raise InputError(
            f"{len(missing)} batches of latents are not there, from picture {missing[0]} on.",
            "Run it again: it goes on from here.",
        )
    folder, name = work.target.parent, work.target.stem
    names = [h5.latents_name(image) for image in work.images.names]
    work.target.unlink(missing_ok=True)
    text = json.dumps([*names, h5.LABELS], indent=2)
    h5.write_whole(h5.names_file(folder, name), text)
    mean, std = _statistics([noted[batch.start] for batch in work.batches])
    about = "sampled latents, mean + deviation · noise, in closed form"
    if std.min() < SMALLEST_STD:
        logger.warning("a channel of the latents is constant; its scale is set to a limit.")
    save_statistics(stats_file(folder, name), mean, std, about)
    labels = list(zip(names, work.images.labels.tolist(), strict=True))
    part.finish(work.folder, work.target, names, labels, work.plan)


def _pictures(
    work: _Work, batches: Sequence[range]
) -> Iterator[UInt8[np.ndarray, "b 3 height width"]]:
    """The pictures of each batch, read while those before are encoded."""
    with h5.opened(work.images.path) as file, ThreadPoolExecutor(AHEAD) as pool:

        def read(batch: range) -> np.ndarray:
            pictures = [h5.read_image(file, work.images.names[index]) for index in batch]
            if len({picture.shape for picture in pictures}) > 1:
                raise InputError(f"the pictures in {work.images.path} are of several sizes.")
            return np.stack(pictures)

        waiting = [pool.submit(read, batch) for batch in batches[:AHEAD]]
        for batch in [*batches[AHEAD:], *[None] * AHEAD]:
            if waiting:
                yield waiting.pop(0).result()
            if batch is not None:
                waiting.append(pool.submit(read, batch))


def _encoded(
    work: _Work, encode: Encode, batch: range, pictures: UInt8[np.ndarray, "b 3 height width"]
) -> Float[np.ndarray, "b c h w"]:
    """Mean and deviation of a batch, float32, one after the other along the channels."""
    with torch.inference_mode():
        mean, std = encode(torch.from_numpy(pictures).float() / 127.5 - 1)
        found = torch.cat([mean, std], dim=1).float().cpu().numpy()
    finite = np.isfinite(found).all((1, 2, 3))
    if not finite.all():
        index = batch[int(np.argmin(finite))]
        raise InputError(
            f"the latents of {work.images.names[index]} are not finite.",
            "Encode in fp32, or check the VAE's weights.",
        )
    return found.astype("<f4", copy=False)


def _sums(latents: Float[np.ndarray, "b c h w"]) -> list[list[float]]:
    """For each channel: how many values, the sum of samples and of their squares, as expected."""
    mean, std = np.split(latents.astype(np.float64), 2, axis=1)
    first, second = mean.sum((0, 2, 3)), (mean**2 + std**2).sum((0, 2, 3))
    return [[float(mean[:, 0].size)] * len(first), first.tolist(), second.tolist()]


def _statistics(sums: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each channel."""
    num, first, second = np.sum(np.array(sums, np.float64), axis=0)
    mean = first / num
    return mean, np.sqrt(np.maximum(second / num - mean**2, 0))


def _whole(work: _Work) -> Cached:
    """A cache that is there already. InputError if it is not of these pictures and this make."""
    noted = h5.read_note(work.target)
    again = "Give it another name, or replace it with --overwrite."
    if not noted:
        raise InputError(f"{work.target} exists, and is of another make.", again)
    if noted.get("images") != work.plan["images"]:
        raise InputError(f"{work.target} was made from another images.h5.", again)
    if noted.get("made_by") != work.plan["made_by"]:
        raise InputError(f"{work.target} was made with another VAE or dtype.", again)
    part.remove(work.folder)  # of a run that was killed after its last step but this
    return _result(work, was_there=True)


def _result(work: _Work, *, was_there: bool = False) -> Cached:
    name = h5.latents_name(work.images.names[0])
    with h5.opened(work.target) as file:
        shape = h5.read_latents(file, name).shape
    return Cached(
        path=work.target,
        num_latents=len(work.images.names),
        shape=(shape[0], shape[1], shape[2]),
        was_there=was_there,
    )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made: {error.strerror}.") from error
