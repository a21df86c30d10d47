"""An h5 file on its way: made by several processes in any order, and continued after a kill.

All items of such a file are of one kind and size. So the file is laid out first, with room for
every item and nothing in it, and HDF5 closes it: from then on an item is bytes at a known place,
which any process writes there without HDF5. Neither the order nor the number of processes is seen
in the result, a killed run leaves nothing that its successor could not write over, and no second
copy of hundreds of gigabytes is needed to put pieces together.

In the part's folder, beside the file that is made:

    plan.json      what is made, from what, and how many bytes an item has; written last, so a
                   folder without it is worth nothing
    items.h5       the file
    places.npy     where each item's bytes begin
    done-N.jsonl   what process N has finished, a line a chunk, after its bytes are on the disk
    closing        from here on HDF5 changes the file again; the indices of items it drops
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from hidream.data import h5
from hidream.errors import InputError

logger = logging.getLogger(__name__)

ALIGNED = 4096  # items from this size on begin at a page: no two processes write into one page
AGAIN = "Make room, then run it again: it goes on from here."


@contextmanager
def lock(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold the file `path` against other processes that lock it; a process that ends lets go.

    Without `wait`, InputError where another holds it. Where the system has no such locks, nothing
    is held.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}.") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise InputError(
                f"another process is at work in {path.parent}.", "Let it end first."
            ) from error
        except OSError as error:
            logger.info("%s cannot be locked: %s", path, error)
        yield
    finally:
        os.close(descriptor)


def check_room(folder: Path, num_bytes: int) -> None:
    """InputError where the disk of `folder` has no `num_bytes` free."""
    with told(folder):
        free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise InputError(
            f"the disk of {folder} is too full: {free / 1e9:.1f} GB are free and "
            f"{num_bytes / 1e9:.1f} GB are needed.",
            "Make room, or choose another place.",
        )


@contextmanager
def told(folder: Path, remedy: str = AGAIN) -> Iterator[None]:
    """What the system says of a disk, as an InputError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot write in {folder}: {reason}.", remedy) from error


def begin(
    folder: Path,
    plan: Mapping[str, Any],
    names: Sequence[str],
    kind: np.dtype,
    shape: tuple[int, ...],
) -> None:
    """Lay out `folder/items.h5`, or take up what an earlier run of the same plan left there.

    Items are arrays of `kind` and `shape`. What was left of another plan is removed, and said.

    Raises:
        InputError: the disk is full or cannot be written to.
    """
    earlier = _read_plan(folder)
    if earlier is not None and earlier != plan:
        changed = [key for key in {**earlier, **plan} if earlier.get(key) != plan.get(key)]
        logger.warning(
            "what was begun in %s was to become something else (another %s); it starts anew.",
            folder,
            ", ".join(changed),
        )
        earlier = None
    with told(folder):
        if earlier is not None:
            num_done = len(list(records(folder)))
            logger.info("going on in %s, where %d chunks are done", folder, num_done)
            if (folder / "closing").exists():
                _lay_out_again(folder, names, kind, shape)
            return
        for old in folder.iterdir():
            if old.name != "lock":
                old.unlink()
        check_room(folder, len(names) * _num_bytes(kind, shape))
        logger.info("making room for %d items in %s", len(names), folder)
        places = _lay_out(folder / "items.h5", names, kind, shape)
        np.save(folder / "places.npy", places)
        _sync(folder / "items.h5")
        _sync(folder / "places.npy")
        plan_text = json.dumps({"item_bytes": _num_bytes(kind, shape), "plan": plan}, indent=1)
        h5.write_whole(folder / "plan.json", plan_text)


class Part:
    """The items of a part that `begin` has laid out, to be written by process `number`."""

    def __init__(self, folder: Path, number: int = 0):
        self.folder = folder
        self.places = np.load(folder / "places.npy", mmap_mode="r")
        self.log = folder / f"done-{number}.jsonl"
        self.item_bytes = json.loads((folder / "plan.json").read_bytes())["item_bytes"]
        self.file = os.open(folder / "items.h5", os.O_RDWR)

    def __enter__(self) -> Part:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.file)

    def write(self, index: int, data: bytes) -> None:
        """Put an item's bytes in their place. InputError where the disk does not take them.

        ValueError for more or fewer bytes than an item has: they would be its neighbour's.
        """
        if len(data) != self.item_bytes:
            raise ValueError(f"item {index} has {len(data)} bytes, not {self.item_bytes}")
        place, rest = int(self.places[index]), memoryview(data)
        with told(self.folder):
            while rest:
                num_written = os.pwrite(self.file, rest, place)
                place, rest = place + num_written, rest[num_written:]

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        with told(self.folder):
            getattr(os, "fdatasync", os.fsync)(self.file)

    def note(self, record: Mapping[str, Any]) -> None:
        """Note a chunk whose items are synced; `records` finds it after whatever happens."""
        with told(self.folder), open(self.log, "ab") as file:
            if file.tell() and not _ends_a_line(self.log):
                file.write(b"\n")
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def records(folder: Path) -> Iterator[dict[str, Any]]:
    """What all processes noted, in no order; a line that a kill cut off is none."""
    for log in sorted(folder.glob("done-*.jsonl")):
        for line in log.read_bytes().splitlines():
            with suppress(ValueError):
                yield json.loads(line)


def finish(
    folder: Path,
    target: Path,
    names: Sequence[str],
    labels: Sequence[tuple[str, int]],
    note: Mapping[str, Any],
) -> None:
    """Give the file its labels and its note, drop the items that have no label, and move it.

    `names` are all that were laid out. `target` appears whole or not at all.
    """
    h5py = h5.import_h5py()
    items = folder / "items.h5"
    kept = {name for name, _ in labels}
    with told(folder):
        dropped = [index for index, name in enumerate(names) if name not in kept]
        h5.write_whole(folder / "closing", json.dumps(dropped))
        _sync(folder)
        with h5py.File(items, "r+", locking="best-effort") as file:
            text = json.dumps({"labels": [list(label) for label in labels]})
            file.create_dataset(h5.LABELS, data=np.array(text.encode(), dtype="S"))
            file.attrs[h5.NOTE] = np.bytes_(json.dumps(note).encode())
            for index in dropped:
                del file[names[index]]
            for group in [key for key in file if key != h5.LABELS and not len(file[key])]:
                del file[group]
        _sync(items)
        os.replace(items, target)
        _sync(target.parent)


def remove(folder: Path) -> None:
    """Remove a part's folder, if there is one."""
    shutil.rmtree(folder, ignore_errors=True)


def _lay_out(
    path: Path, names: Sequence[str], kind: np.dtype, shape: tuple[int, ...]
) -> np.ndarray:
    """A new file with room for every item; where each begins."""
    h5py = h5.import_h5py()
    create, low = h5py.h5d.create, h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    low.set_layout(h5py.h5d.CONTIGUOUS)
    low.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)  # so that the place is known now
    low.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    low.set_obj_track_times(False)  # the same bytes whenever it is made
    stored = h5py.h5t.py_create(kind, logical=True)
    space = h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)
    places = np.empty(len(names), np.int64)
    group: Any = None
    group_name = None
    with h5py.File(
        path, "w", alignment_threshold=ALIGNED, alignment_interval=ALIGNED, meta_block_size=2**16
    ) as file:
        for index, name in enumerate(names):
            folder, _, last = name.rpartition("/")
            if folder != group_name:
                group_name, group = folder, file.require_group(folder or "/")
            item = create(group.id, last.encode(), stored, space, low)
            places[index] = item.get_offset()
    return places


def _lay_out_again(
    folder: Path, names: Sequence[str], kind: np.dtype, shape: tuple[int, ...]
) -> None:
    """Items from a file whose closing was broken off, in a new file that is open to all of them."""
    size = _num_bytes(kind, shape)
    old, new = folder / "items.h5", folder / "again.h5"
    dropped = set(json.loads((folder / "closing").read_bytes()))  # HDF5 may have used their room
    check_room(folder, size * len(names))
    places = _lay_out(new, names, kind, shape)  # as before: a function of names, kind and shape
    with open(old, "rb") as source, open(new, "r+b") as target:
        for index, place in enumerate(places.tolist()):
            if index not in dropped:
                target.seek(place)
                target.write(os.pread(source.fileno(), size, place))
    _sync(new)
    os.replace(new, old)
    (folder / "closing").unlink()
    _sync(folder)


def _read_plan(folder: Path) -> dict[str, Any] | None:
    if not (folder / "items.h5").is_file() or not (folder / "places.npy").is_file():
        return None
    try:
        return json.loads((folder / "plan.json").read_bytes())["plan"]
    except (OSError, ValueError, KeyError):
        return None


def _num_bytes(kind: np.dtype, shape: tuple[int, ...]) -> int:
    return kind.itemsize * int(np.prod(shape, dtype=np.int64))


def _ends_a_line(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
