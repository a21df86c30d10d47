"""A folder of labelled pictures becomes images.h5: cropped, in any number of processes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from hidream.data import h5, part
from hidream.data.crop import center_crop
from hidream.data.workers import run_tasks
from hidream.errors import InputError, UsageError
from hidream.pictures import open_picture, read_file, read_picture

CHUNK = 64  # pictures that are done and noted at once
MAX_PICTURES = 10**8  # what their names have digits for
MAX_RESOLUTION = 4096
REPORT = "images_report.json"
# A file with another suffix is no picture; one of these that cannot be read is reported.
SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
)


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A picture file that is not in images.h5: its path inside the source, and what it "is ..." or
    "has ..." that keeps it out."""

    file: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of a folder; the same is in `images_report.json`.

    `num_files` picture files were looked at, `written` of them are in images.h5, `turned` upright
    as their EXIF data say. `classes`: the folders' names where these are the classes. `ignored`:
    files that are no pictures, by suffix. `absent`: files that dataset.json names and that are not
    there.
    """

    source: str
    resolution: int
    as_published: bool
    max_images: int | None
    num_files: int
    written: int
    num_classes: int
    turned: int
    absent: int
    ignored: dict[str, int]
    classes: tuple[str, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True, kw_only=True)
class Source:
    """The picture files of a folder in the order of their numbers, and the class of each.

    `unlabelled` has the files without a class, by number, and why they have none.
    """

    files: list[str]
    labels: list[int]
    unlabelled: dict[int, str]
    classes: tuple[str, ...]
    absent: int
    ignored: dict[str, int]


def preprocess(
    source: str | Path,
    out_dir: str | Path,
    resolution: int,
    *,
    num_workers: int = 1,
    max_images: int | None = None,
    as_published: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Write `images.h5`, `images_h5.json` and `images_report.json` into `out_dir`.

    Every picture becomes upright RGB, transparency over white, and is cropped by `center_crop`.
    Files are numbered in the order of their paths; one that cannot be read keeps its number, is
    left out and reported. The result depends on neither `num_workers` nor interruptions: called
    again, this goes on where it was stopped, and does nothing where all is done.

    Args:
        resolution: pixels of a side.
        num_workers: processes that read pictures.
        max_images: only the first files, in order.
        as_published: as the published script does, leave the EXIF rotation undone and drop
            transparency.
        overwrite: replace an images.h5 that was made from something else.
        on_progress: called with pictures done and pictures in all.

    Raises:
        UsageError: a number out of range.
        InputError: the source has no pictures, or none that can be read; its dataset.json is
            damaged; the output exists or cannot be written.
    """
    _check_numbers(resolution, num_workers, max_images)
    h5.import_h5py()
    source, out_dir = Path(source).expanduser(), Path(out_dir).expanduser()
    found = find_pictures(source, max_images)
    target = h5.h5_file(out_dir, h5.IMAGES)
    folder = out_dir / f".{h5.IMAGES}-part"
    plan = _plan(found, resolution, as_published)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out_dir} cannot be made: {error.strerror}.") from error
    if target.exists() and not overwrite:
        return _whole(target, plan, folder)
    with part.lock(folder / "lock", wait=False):
        report = _make(source, found, out_dir, folder, plan, max_images, num_workers, on_progress)
    part.remove(folder)
    return report


def find_pictures(source: Path, max_images: int | None = None) -> Source:
    """All picture files under a folder, links followed, and their classes.

    Classes are those of `dataset.json` at the top ({"labels": [[path, class], ...]}), else the
    folders at the top, numbered in the order of their names.

    Raises InputError for a folder without pictures or with a damaged dataset.json.
    """
    files, ignored = [], Counter[str]()
    if not source.is_dir():
        raise InputError(f"{source} is no folder.", "Name the folder that holds the pictures.")
    for path in _walk(source, "", ()):
        suffix = os.path.splitext(path)[1].lower()
        if suffix in SUFFIXES:
            files.append(path)
        elif path != h5.LABELS:
            ignored[suffix] += 1
    if not files:
        raise InputError(
            f"{source} holds no pictures.", f"They are known by their ends: {_suffixes()}."
        )
    if len(files) > MAX_PICTURES:
        raise InputError(f"{source} holds {len(files)} pictures; the limit is {MAX_PICTURES}.")
    files.sort()  # whole paths, as text: the published order
    named = _named_labels(source)
    classes: tuple[str, ...] = ()
    if not named:
        tops = {path: path.rpartition("/")[0].split("/")[0] for path in files}
        classes = tuple(sorted(set(tops.values()) - {""})) or ("",)
        numbers = {name: number for number, name in enumerate(classes)}
        named = {path: numbers[top] for path, top in tops.items() if top in numbers}
        reason = "lies beside the folders that are the classes."
    else:
        reason = f"has no class in {h5.LABELS}."
    absent = len(named.keys() - set(files))
    files = files[:max_images]
    return Source(
        files=files,
        labels=[named.get(path, -1) for path in files],
        unlabelled={n: reason for n, path in enumerate(files) if path not in named},
        classes=classes,
        absent=absent,
        ignored=dict(sorted(ignored.items())),
    )


def read_upright(path: Path, name: str, *, as_published: bool = False) -> tuple[Image.Image, bool]:
    """The picture of a file as RGB, and whether it was turned.

    Raises InputError, in which `name` stands for the file.
    """
    data = read_file(path, name)
    if not data:
        raise InputError(f"{name} is empty.")
    image = open_picture(data, name)
    upright = read_picture(image, name)
    if as_published:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of palettes with transparency
            return image.convert("RGB"), False
    return upright, image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)


def png_bytes(image: Image.Image) -> bytes:
    """An unpacked PNG of the pixels alone: its size depends on theirs only."""
    file = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(file, "PNG", compress_level=0)
    return file.getvalue()


def _make(
    source: Path,
    found: Source,
    out_dir: Path,
    folder: Path,
    plan: dict[str, Any],
    max_images: int | None,
    num_workers: int,
    on_progress: Callable[[int, int], None] | None,
) -> Report:
    """Do what is not yet done, then give the files their names."""
    names = [h5.image_name(index) for index in range(len(found.files))]
    part.begin(folder, plan, names, np.dtype(f"S{plan['png_bytes']}"), ())
    # What could not be read is looked at again: it may have been mended since.
    done = {r["chunk"]: r for r in part.records(folder) if not r["skipped"]}
    tasks = [
        {
            "source": str(source),
            "folder": str(folder),
            "chunk": number,
            "files": {
                index: found.files[index]
                for index in range(first, min(first + CHUNK, len(names)))
                if index not in found.unlabelled
            },
            "resolution": plan["resolution"],
            "as_published": plan["as_published"],
        }
        for number, first in enumerate(range(0, len(names), CHUNK))
        if number not in done
    ]
    num_done = len(names) - sum(len(task["files"]) for task in tasks)
    with part.Part(folder) as noting:
        for record in run_tasks(_do_chunk, tasks, num_workers):
            noting.note(record)
            done[record["chunk"]] = record
            num_done += record["num_files"]
            if on_progress is not None:
                on_progress(num_done, len(names))
    return _finish(source, found, out_dir, folder, plan, max_images, done, names)


def _finish(
    source: Path,
    found: Source,
    out_dir: Path,
    folder: Path,
    plan: dict[str, Any],
    max_images: int | None,
    done: dict[int, dict[str, Any]],
    names: list[str],
) -> Report:
    chunks = [done[number] for number in sorted(done)]
    reasons = {**found.unlabelled, **{i: why for chunk in chunks for i, why in chunk["skipped"]}}
    labels = [
        (name, found.labels[index]) for index, name in enumerate(names) if index not in reasons
    ]
    if not labels:
        part.remove(folder)
        first = min(reasons)
        raise InputError(
            f"not one of {len(names)} pictures in {source} can be used; the first is "
            f"{found.files[first]}, which {reasons[first]}"
        )
    report = Report(
        source=str(source),
        resolution=plan["resolution"],
        as_published=plan["as_published"],
        max_images=max_images,
        num_files=len(names),
        written=len(labels),
        num_classes=1 + max(label for _, label in labels),
        turned=sum(chunk["turned"] for chunk in chunks),
        absent=found.absent,
        ignored=found.ignored,
        classes=found.classes,
        skipped=tuple(Skipped(file=found.files[i], reason=reasons[i]) for i in sorted(reasons)),
    )
    content = hashlib.sha256("".join(chunk["sha256"] for chunk in chunks).encode()).hexdigest()
    groups = {name.split("/")[0] for name, _ in labels}
    listed = [*sorted(groups | {name for name, _ in labels}), h5.LABELS]  # as HDF5 visits them
    target = h5.h5_file(out_dir, h5.IMAGES)
    target.unlink(missing_ok=True)  # an old one must not stand beside the new names
    h5.write_whole(h5.names_file(out_dir, h5.IMAGES), json.dumps(listed, indent=2))
    h5.write_whole(out_dir / REPORT, json.dumps(asdict(report), indent=1) + "\n")
    part.finish(folder, target, names, labels, {"plan": plan, "content_sha256": content})
    return report


def _do_chunk(task: dict[str, Any]) -> dict[str, Any]:
    """Read, crop and write some pictures, in whatever process; what is to be noted of them."""
    skipped, turned, digest = [], 0, hashlib.sha256()
    with part.Part(Path(task["folder"])) as items:
        for index, name in task["files"].items():
            try:
                image, was_turned = read_upright(
                    Path(task["source"], name), name, as_published=task["as_published"]
                )
            except InputError as error:
                skipped.append([index, error.problem.removeprefix(f"{name} ")])
                continue
            turned += was_turned
            data = png_bytes(center_crop(image, task["resolution"]))
            digest.update(data)
            items.write(index, data)
        items.sync()
    return {
        "chunk": task["chunk"],
        "num_files": len(task["files"]),
        "skipped": skipped,
        "turned": turned,
        "sha256": digest.hexdigest(),
    }


def _plan(found: Source, resolution: int, as_published: bool) -> dict[str, Any]:
    lines = [f"{path}\t{label}\n" for path, label in zip(found.files, found.labels, strict=True)]
    files = hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
    black = Image.new("RGB", (resolution, resolution))
    return {
        "format": 1,
        "resolution": resolution,
        "as_published": as_published,
        "num_files": len(found.files),
        "files": files,
        "png_bytes": len(png_bytes(black)),
    }


def _whole(target: Path, plan: dict[str, Any], folder: Path) -> Report:
    """The report of an images.h5 that is there already. InputError if it is not of this plan."""
    report = target.with_name(REPORT)
    if h5.read_note(target).get("plan") != plan or not report.is_file():
        raise InputError(
            f"{target} exists, and was made from other files or settings.",
            "Choose another folder, or replace it with --overwrite.",
        )
    part.remove(folder)  # of a run that was killed after its last step but this
    try:
        values = json.loads(report.read_bytes())
        skipped = tuple(Skipped(**one) for one in values["skipped"])
        return Report(**{**values, "skipped": skipped, "classes": tuple(values["classes"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{report} is damaged.", "Make it all again with --overwrite.") from error


def _walk(root: Path, inside: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Paths of all files under `root`, relative to it, with slashes. Links back up are left out."""
    folder = root / inside
    try:
        status = folder.stat()
        entries = list(os.scandir(folder))
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}.") from error
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for entry in entries:
        path = f"{inside}/{entry.name}" if inside else entry.name
        if entry.is_dir():
            yield from _walk(root, path, (*above, here))
        else:
            yield path


def _named_labels(source: Path) -> dict[str, int]:
    """Classes by path from the dataset.json of a folder; {} where there are none."""
    path = source / h5.LABELS
    if not path.is_file():
        return {}
    try:
        labels = json.loads(path.read_bytes())["labels"]
        found = {str(name).replace("\\", "/"): label for name, label in labels or []}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be used.", 'It must hold {"labels": [["folder/file.jpg", 0], ...]}.'
        ) from error
    for name, label in found.items():
        if not isinstance(label, int) or isinstance(label, bool) or label < 0:
            raise InputError(f"{path} gives {name} the class {label!r}; classes are 0, 1, 2, ...")
    return found


def _check_numbers(resolution: int, num_workers: int, max_images: int | None) -> None:
    if not 1 <= resolution <= MAX_RESOLUTION:
        raise UsageError(f"resolution={resolution} is not in 1 ... {MAX_RESOLUTION}.")
    if num_workers < 1:
        raise UsageError(f"num_workers={num_workers} must be 1 or more.")
    if max_images is not None and max_images < 1:
        raise UsageError(f"max_images={max_images} must be 1 or more.")


def _suffixes() -> str:
    return " ".join(sorted(SUFFIXES))
