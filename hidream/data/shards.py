"""Datasets as WebDataset shards: tar files whose members belong together by their names.

Nothing is unpacked onto the disk: a member is bytes at a place in its shard.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from hidream.data import listing
from hidream.data.dataset import (
    MAX_CAPTION_BYTES,
    Blob,
    Dataset,
    Item,
    caption_of,
    grouped,
)
from hidream.data.tables import CAPTION
from hidream.errors import InputError
from hidream.pictures import MAX_BYTES


def read(place: Path, tars: Sequence[Path]) -> Dataset:
    """The items of shards, in their order."""
    items: list[Item] = []
    problems: list[str] = []
    others: list[str] = []
    shard_of: dict[str, str] = {}
    for tar in tars:
        shard = listing.name_of(tar, place)
        pictures, captions, left = _members(tar, shard, problems)
        others += left
        found, wrong = grouped(pictures, captions, left, f"{shard}: ")
        problems += wrong
        for item in found:
            key = item.name.removeprefix(f"{shard}: ")
            if key in shard_of:
                problems.append(f"{item.name}: {shard_of[key]} has a sample of this name, too.")
            shard_of[key] = shard
            items.append(item)
    if not items and not problems:
        problems.append(f"{place.name}: there is no picture in it.")
    notes = (f"{len(others)} members are left out, as {others[0]}",) if others else ()
    return Dataset(path=place, items=tuple(items), problems=tuple(problems), notes=notes)


def _members(
    tar: Path, shard: str, problems: list[str]
) -> tuple[list[Blob], dict[str, str], list[str]]:
    """A shard's pictures, its captions by name, and the names of what is neither."""
    pictures: list[Blob] = []
    captions: dict[str, str] = {}
    others = []
    seen: set[str] = set()
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                wrong = _refused(member, seen)
                where = f"{shard}: {member.name}"
                if member.isdir():
                    continue
                if wrong:
                    problems.append(f"{where}: {wrong}.")
                    continue
                seen.add(member.name)
                kind = PurePosixPath(member.name).suffix.lower()
                span = partial(_span, tar, member.offset_data, member.size)
                if kind in listing.PICTURES:
                    pictures.append(Blob(where, span))
                elif kind in (*listing.CAPTIONS, ".json"):
                    try:
                        text = _said(span(), kind)
                    except ValueError as error:
                        problems.append(f"{where}: {error}.")
                        text = "?"  # told already
                    if text is not None:
                        captions[member.name] = text
                else:
                    others.append(member.name)
    except (tarfile.TarError, EOFError) as error:
        problems.append(f"{shard}: damaged, or no tar file ({error}).")
    return pictures, captions, others


def _refused(member: tarfile.TarInfo, seen: set[str]) -> str:
    """Why a member is not read; empty where it is."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\\" in member.name or "\0" in member.name:
        return "its name leads out of the shard"
    if not member.isfile() or member.issparse():
        return "it is a link, a device or something else that is no plain file"
    if member.name in seen:
        return "the shard holds another member of this name"
    kind = path.suffix.lower()
    most = MAX_BYTES if kind in listing.PICTURES else MAX_CAPTION_BYTES
    read = (*listing.PICTURES, *listing.CAPTIONS, ".json")
    if kind in read and member.size > most:
        return f"it has {member.size} bytes; at most {most} are read"
    return ""


def _said(data: bytes, kind: str) -> str | None:
    """The caption in a member; a JSON object may have none. Raises ValueError alike."""
    if kind != ".json":
        return caption_of(data)
    try:
        row = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError("it is no JSON") from error
    if not isinstance(row, dict):
        raise ValueError("it is no JSON object")
    caption = next((row[n] for n in ("instruction", *CAPTION) if row.get(n) is not None), None)
    if caption is None:
        return None
    if not isinstance(caption, str):
        raise ValueError("its caption is no text")
    return " ".join(caption.split())


def _span(tar: Path, offset: int, size: int) -> bytes:
    with tar.open("rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) < size:
        raise InputError(f"{tar} ends in the middle of a member.", "Copy it again.")
    return data
