"""Datasets as tables: a row a picture, with its caption, in JSON lines or Parquet."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from hidream.data import listing
from hidream.data.dataset import Blob, Dataset, Item, make_item
from hidream.errors import InputError, UsageError

# What a column may be called; the first is ours, the others are those of the hub's image folders.
PICTURE = ("image", "file_name")
CAPTION = ("caption", "text", "prompt")
KNOWN = (*PICTURE, *CAPTION, "source", "target", "instruction", "references")
Row = tuple[str, Mapping[str, Any] | str]  # where it is; its values, or what is wrong with it


def read(place: Path, files: Sequence[Path]) -> Dataset:
    """The items of `.jsonl` or `.parquet` files, in their order; paths in one are relative to its
    folder."""
    items: list[Item] = []
    problems, others = [], set()
    for file in files:
        name = listing.name_of(file, place)
        rows = list(_parquet(file) if file.suffix.lower() == ".parquet" else _json_lines(file))
        for where, row in rows:
            where = f"{name}, {where}"
            if isinstance(row, str):
                problems.append(f"{where}: {row}.")
                continue
            others |= row.keys() - set(KNOWN)
            item, problem = _item(file, where, row)
            if problem:
                problems.append(problem)
            if item is not None and not problem:
                items.append(item)
        if not rows:
            problems.append(f"{name}: it has no rows.")
    notes = []
    if len(files) > 1:
        names = [listing.name_of(file, place) for file in files]
        notes.append(f"{len(files)} tables are read: {listing.some(names)}")
    if others:
        notes.append(f"other columns are left out: {', '.join(sorted(others))}")
    path = files[0] if len(files) == 1 else place
    return Dataset(path=path, items=tuple(items), problems=tuple(problems), notes=tuple(notes))


def _item(file: Path, where: str, row: Mapping[str, Any]) -> tuple[Item | None, str]:
    is_edit = "source" in row or "target" in row
    words = ("instruction", *CAPTION) if is_edit else CAPTION
    caption = next((row[name] for name in words if row.get(name) is not None), None)
    if caption is None:
        return None, f"{where}: it has no {words[0]}."
    if not isinstance(caption, str):
        return None, f"{where}: the {words[0]} is no text."
    caption = " ".join(caption.split())
    if not caption:
        return None, f"{where}: the {words[0]} is empty."
    given = {role: row[role] for role in ("source", "target") if row.get(role) is not None}
    if not is_edit:
        given = {"picture": next((row[n] for n in PICTURE if row.get(n) is not None), None)}
        if given["picture"] is None:
            return None, f"{where}: it has no image."
        references = row.get("references") or []
        if not isinstance(references, list):
            return None, f"{where}: references must be a list."
        given |= {f"ref{i}": value for i, value in enumerate(references)}
    parts = {}
    for role, value in given.items():
        blob = _blob(file, where, value)
        if isinstance(blob, str):
            return None, f"{where}: {blob}."
        parts[role] = blob
    return make_item(where, caption, parts)


def _blob(file: Path, where: str, value: Any) -> Blob | str:
    """A picture from a table's cell: a path, or bytes, as the hub's tables have them."""
    if callable(value):
        return Blob(where, value)
    if isinstance(value, Mapping):
        value = value.get("path")
    if not isinstance(value, str) or not value or "\0" in value:
        return "an image is no path"
    path = file.parent / Path(value).expanduser()
    return Blob(value, path.read_bytes, path) if path.is_file() else f"{value} does not exist"


def _json_lines(file: Path) -> Iterator[Row]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"the data {file} is not UTF-8.") from error
    for number, line in enumerate(lines, start=1):
        where = f"line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield where, f"no JSON ({error})"
            continue
        yield where, row if isinstance(row, dict) else "no JSON object"


def _parquet(file: Path) -> Iterator[Row]:
    """A row's values; those with bytes in them are functions that read them again."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UsageError(
            f"{file} needs pyarrow, which is not installed.", 'pip install "hidream[data]"'
        ) from error
    try:
        table = parquet.ParquetFile(file)
        kinds = {field.name: field.type for field in table.schema_arrow if field.name in KNOWN}
        heavy = {name for name, kind in kinds.items() if _holds_bytes(kind)}
        others = [name for name in table.schema_arrow.names if name not in heavy]
        groups = [
            table.read_row_group(i, columns=others).to_pylist() for i in range(table.num_row_groups)
        ]
    except ArrowException as error:
        raise InputError(f"the data {file} is damaged: {error}.", "Copy it again.") from error
    number = 0
    for group, rows in enumerate(groups):
        for place, row in enumerate(rows):
            number += 1
            stored: dict[str, Callable[[], bytes]] = {
                name: partial(_cell, file, group, place, name) for name in heavy
            }
            yield f"row {number}", {**row, **stored}


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return any(_holds_bytes(kind.field(i).type) for i in range(kind.num_fields))
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _cell(file: Path, group: int, place: int, name: str) -> bytes:
    value = _column(file, group, name)[place].as_py()
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None and isinstance(value, dict) and value.get("path"):
        return (file.parent / value["path"]).read_bytes()
    if not isinstance(data, bytes):
        raise InputError(f"{file}: {name} holds no picture.")
    return data


@lru_cache(maxsize=4)
def _column(file: Path, group: int, name: str) -> Any:
    from pyarrow import parquet

    return parquet.ParquetFile(file).read_row_group(group, columns=[name]).column(name)
