"""A set of pictures with words, as a user has it: a folder, a table, or WebDataset shards.

Whatever it is, it becomes a list of items in a fixed order, and a list of what is wrong with it.
Pictures stay on the disk until they are asked for.
"""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from PIL import Image

from hidream.data import listing
from hidream.errors import InputError, UsageError
from hidream.pictures import open_picture, read_file, read_picture, read_size

logger = logging.getLogger(__name__)

KINDS = ("auto", "folder", "table", "webdataset")
MAX_CAPTION_BYTES = 1 << 20
MAX_TOLD = 50  # problems; more are counted
# What may stand before a picture's suffix: a part of an edit, or a subject's reference.
_ROLE = re.compile(r"(.+)\.(source|target|ref\d{1,3})")


@dataclass(frozen=True)
class Blob:
    """A picture's file, wherever it lies: `read` gives its bytes, `name` is for messages.

    `path` is set where it is a file of its own.
    """

    name: str
    read: Callable[[], bytes]
    path: Path | None = None

    def picture(self) -> Image.Image:
        """The picture, upright and RGB; of several frames the first. Raises InputError where it
        cannot be had."""
        return read_picture(self._opened(), "it")

    def size(self) -> tuple[int, int]:
        """Upright width and height, from the header. Raises InputError alike."""
        return read_size(self._opened(), "it")

    def _opened(self) -> Image.Image:
        data = self.read() if self.path is None else read_file(self.path, "it")
        image = open_picture(data, "it", listing.FORMATS)
        if image.mode in ("F", "LAB"):
            raise InputError(f"its colours ({image.mode}) are not read.", "Save it as RGB.")
        return image


@dataclass(frozen=True, kw_only=True)
class Item:
    """A picture and what is said of it.

    `references`: an edit's source, or the subjects that the picture shows; `task` says which. Of
    understanding, `caption` is the question and `answer` its answer; of language, `caption` is the
    text and there is no picture.
    """

    name: str
    task: str
    caption: str
    picture: Blob | None
    references: tuple[Blob, ...] = ()
    answer: str = ""

    @property
    def blobs(self) -> tuple[Blob, ...]:
        """Its pictures, the one that it is of first."""
        return (*([self.picture] if self.picture else []), *self.references)

    @property
    def words(self) -> str:
        """All that is said."""
        return f"{self.caption} {self.answer}".strip()


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What was found at `path`. `notes` are worth telling, `problems` stand in a run's way."""

    path: Path
    items: tuple[Item, ...]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def open_dataset(path: str | Path, kind: str = "auto") -> Dataset:
    """The items of a folder, table or shards; `kind` one of `KINDS`.

    No picture is unpacked. Raises UsageError for an unknown kind, InputError where nothing is to be
    had at `path`.
    """
    if kind not in KINDS:
        raise UsageError(f'data.kind = "{kind}" must be one of {", ".join(KINDS)}.')
    place = Path(path).expanduser()
    if not place.exists():
        raise InputError(f"the data {place} does not exist.", "Check its path.")
    try:
        return _open(place, kind)
    except OSError as error:
        raise InputError(f"the data {place} cannot be read: {error.strerror or error}.") from error


def _open(place: Path, kind: str) -> Dataset:
    from hidream.data import shards, tables

    files = listing.files_in(place)
    if kind == "auto":
        kind = listing.kind_of(place, files)
    if kind == "table":
        read = listing.tables_in(place, files)
        found = tables.read(place, read)
    elif kind == "webdataset":
        read = listing.shards_in(place, files)
        found = shards.read(place, read)
    elif place.is_dir():
        return _folder(place, files)
    else:
        raise InputError(
            f"the data {place} is neither a folder nor a file that is known.",
            "Tables end in .jsonl or .parquet, shards in .tar.",
        )
    used = {os.path.normpath(b.path) for item in found.items for b in item.blobs if b.path}
    used |= {os.path.normpath(path) for path in read}
    others = [listing.name_of(p, place) for p in files if os.path.normpath(p) not in used]
    return replace(found, notes=(*found.notes, *listing.left_out(others)))


def _folder(place: Path, files: Sequence[Path]) -> Dataset:
    """Every picture below `place`, with the text of its name beside it."""
    pictures, captions, others, problems = [], {}, [], []
    for path in files:
        name = listing.name_of(path, place)
        if path.suffix.lower() in listing.PICTURES:
            pictures.append(Blob(name, path.read_bytes, path))
        elif path.suffix.lower() in listing.CAPTIONS:
            try:
                captions[name] = caption_of(path.read_bytes()[: MAX_CAPTION_BYTES + 1])
            except ValueError as error:
                problems.append(f"{name}: {error}.")
                captions[name] = "?"  # told already
        else:
            others.append(name)
    items, found = grouped(pictures, captions, others)
    if not pictures and not found:
        found.append(f"{place.name}: there is no picture in it.")
    notes = listing.left_out(others)
    return Dataset(path=place, items=items, problems=(*problems, *found), notes=notes)


def caption_of(data: bytes) -> str:
    """A caption from a file's bytes, its lines as one; ValueError says what is wrong with it."""
    if len(data) > MAX_CAPTION_BYTES:
        raise ValueError("it is too long for a caption")
    try:
        return " ".join(data.decode("utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8") from error


def grouped(
    pictures: Sequence[Blob], captions: dict[str, str], others: Sequence[str] = (), where: str = ""
) -> tuple[tuple[Item, ...], list[str]]:
    """Items of files that belong together by their names, and what is wrong.

    NAME.png and NAME.txt are one; with NAME.source.png and NAME.target.png it is an edit; with
    NAME.png and NAME.ref1.png … a picture of subjects. `captions` by their files' names; `others`
    are the names of files that are neither. `where` stands before names in messages.
    """
    roles: dict[str, dict[str, Blob]] = defaultdict(dict)
    files: dict[str, str] = {}  # of captions, by what they are captions of
    problems = []
    for file in captions:
        key = _stem(file)
        if file.endswith(".json") and key in files:
            continue
        if key in files and not files[key].endswith(".json"):
            problems.append(f"{where}{files[key]} and {file}: two captions of one name.")
        files[key] = file
    for blob in pictures:
        stem = _stem(blob.name.removeprefix(where))
        part = _ROLE.fullmatch(stem)
        key, role = (part[1], part[2]) if part else (stem, "picture")
        if role in roles[key]:
            problems.append(f"{roles[key][role].name} and {blob.name}: two pictures of one name.")
        else:
            roles[key][role] = blob
    items = []
    for key, parts in roles.items():
        file = files.pop(key, "")
        caption, first = captions.get(file), next(iter(parts.values()))
        if caption is None:
            problems.append(f"{first.name}: it has no caption ({where}{key}.txt is not there).")
        elif not caption:
            problems.append(f"{where}{file}: the caption is empty.")
        item, problem = make_item(f"{where}{key}", caption or "", parts)
        if problem:
            problems.append(problem)
        if item is not None and caption:
            items.append(item)
    near = {_stem(name): f" ({name} is not read)" for name in others}
    for key, file in files.items():
        problems.append(f"{where}{file}: no picture has this name{near.get(key, '')}.")
    return tuple(items), problems


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def make_item(name: str, caption: str, parts: dict[str, Blob]) -> tuple[Item | None, str]:
    """An item of its pictures by role, and what is wrong with them, if something is."""
    references = tuple(
        parts[role]
        for role in sorted((r for r in parts if r.startswith("ref")), key=lambda r: int(r[3:]))
    )
    if "source" in parts or "target" in parts:
        for role in ("source", "target"):
            if role not in parts:
                return None, f"{name}: an edit has a source and a target; the {role} is missing."
        if "picture" in parts or references:
            return None, f"{name}: an edit has a source and a target, and no other picture."
        made = Item(
            name=name,
            task="edit",
            caption=caption,
            picture=parts["target"],
            references=(parts["source"],),
        )
        return made, ""
    if "picture" not in parts:
        return None, f"{name}: references, but no picture that shows them."
    task = "subject" if references else "text_to_image"
    item = Item(
        name=name, task=task, caption=caption, picture=parts["picture"], references=references
    )
    return item, ""


def complain(path: Path, problems: Sequence[str], notes: Sequence[str] = ()) -> InputError:
    """One error that tells all problems, and after them the notes."""
    told = tuple(problems[:MAX_TOLD])
    if len(problems) > MAX_TOLD:
        told += (f"and {len(problems) - MAX_TOLD} more.",)
    many = "one thing is" if len(problems) == 1 else f"{len(problems)} things are"
    told += tuple(f"{note}." for note in notes)
    return InputError(
        f"{many} wrong with the data {path}.", "Mend or remove what is named here.", told
    )
