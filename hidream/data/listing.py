"""What is in a folder of data: which of its files are read, and what is said of all others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hidream.errors import InputError
from hidream.pictures import SUFFIXES

PICTURES = SUFFIXES | {".gif": "GIF", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"}
FORMATS = tuple(dict.fromkeys(PICTURES.values()))
CAPTIONS = (".txt", ".caption")
TABLES = (".jsonl", ".parquet")
METADATA = ("metadata.jsonl", "metadata.parquet")
KIND_OF = dict.fromkeys(TABLES, "table") | {".tar": "webdataset"}
MAX_NAMED = 3  # files in a note; more are counted
# Why a file that looks like data is not read, by how its name ends.
_UNREAD = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd", ".svg", ".tga", ".exr", ".dng")
_REASONS = {
    _UNREAD: "pictures are read as PNG, JPEG, WebP, GIF, BMP or TIFF",
    tuple(PICTURES): "no row and no shard has it",
    TABLES: "beside pictures a table is read as metadata.jsonl or metadata.parquet, or by its path",
    (".tar",): "shards are read where they are alone, or by their path",
    (".csv", ".tsv", ".json", ".arrow"): "tables are read as .jsonl or .parquet",
    (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar"): (
        "archives are read as .tar, not compressed"
    ),
}


def files_in(place: Path) -> list[Path]:
    """All files below a folder, sorted; of a file itself. What begins with a dot is left alone."""
    if not place.is_dir():
        return [place]
    return [
        path
        for path in sorted(place.rglob("*"))
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(place).parts)
    ]


def kind_of(place: Path, files: Sequence[Path]) -> str:
    """The layout of a dataset's files. Raises InputError where there is more than one."""
    suffixes = {path.suffix.lower() for path in files}
    if _metadata(files):
        return "table"
    if place.is_dir() and suffixes & PICTURES.keys():
        return "folder"
    kinds = {KIND_OF[suffix] for suffix in suffixes if suffix in KIND_OF}
    if len(kinds) > 1:
        raise _mixed(place, [p for p in files if p.suffix.lower() in KIND_OF])
    return next(iter(kinds), "folder")


def tables_in(place: Path, files: Sequence[Path]) -> list[Path]:
    """The tables that are read: the metadata nearest to the top, or all there are.

    Raises InputError where they are of two kinds, or where there is none.
    """
    if not place.is_dir():
        return [place]
    tables = _metadata(files) or [p for p in files if p.suffix.lower() in TABLES]
    if not tables:
        raise InputError(f"the data {place} holds no table.", "Tables end in .jsonl or .parquet.")
    if len({path.suffix.lower() for path in tables}) > 1:
        raise _mixed(place, tables)
    return tables


def shards_in(place: Path, files: Sequence[Path]) -> list[Path]:
    """The shards that are read."""
    return [p for p in files if p.suffix.lower() == ".tar"] if place.is_dir() else [place]


def name_of(path: Path, place: Path) -> str:
    """What messages call a file of a dataset: its path from the dataset's folder."""
    return path.relative_to(place).as_posix() if place.is_dir() else path.name


def left_out(names: Sequence[str]) -> tuple[str, ...]:
    """Notes on files that are not read: with the reason, where they look like data."""
    notes, rest = [], list(names)
    for suffixes, reason in _REASONS.items():
        own = [name for name in rest if name.lower().endswith(suffixes)]
        rest = [name for name in rest if not name.lower().endswith(suffixes)]
        if own:
            verb = "is" if len(own) == 1 else "are"
            notes.append(f"{some(own)} {verb} left out: {reason}")
    if rest:
        notes.insert(0, f"{len(rest)} other files are left out: {some(rest)}")
    return tuple(notes)


def some(names: Sequence[str]) -> str:
    """The first few of many names, and how many more there are."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def _metadata(files: Sequence[Path]) -> list[Path]:
    found = [path for path in files if path.name.lower() in METADATA]
    top = min((len(path.parts) for path in found), default=0)
    return [path for path in found if len(path.parts) == top]


def _mixed(place: Path, files: Sequence[Path]) -> InputError:
    """One of each kind is named."""
    of_kind = {path.suffix.lower(): name_of(path, place) for path in reversed(files)}
    named = " and ".join(sorted(of_kind.values()))
    return InputError(
        f"the data {place} is of more than one kind: {named}.",
        "Name the one to be read by its path, or keep them in folders of their own.",
    )
