"""Datasets as tables: a row a picture, with its caption, in JSON lines or Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from hidream.data import listing
from hidream.data.dataset import Blob, Dataset, Item, make_item
from hidream.errors import InputError, UsageError

# What a column may be called; the first is ours, the others are those of the hub's image folders.
PICTURE = ("image", "file_name")
CAPTION = ("caption", "text", "prompt")
EDIT = ("source", "target")
# Of a task, the columns that are read.
COLUMNS = {
    "text_to_image": (*PICTURE, *CAPTION),
    "edit": (*EDIT, "instruction", *CAPTION),
    "subject": (*PICTURE, *CAPTION, "references"),
    "language": ("text",),
    "understanding": (*PICTURE, "question", "answer"),
}
PICTURES = (*PICTURE, *EDIT, "references")  # whose cells may be bytes
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
            row = {key: cell for key, cell in row.items() if cell is not None and cell != []}
            item, problem = _item(file, where, row)
            if problem:
                problems.append(problem)
            elif item is not None:
                others |= row.keys() - set(COLUMNS[item.task])
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
    """The item of a row without empty cells, and what is wrong with it, if something is."""
    is_edit = _is_edit(file, row)
    is_question = not is_edit and _is_question(row)
    words = COLUMNS["edit"][2:] if is_edit else ("question",) if is_question else CAPTION
    caption, problem = _words(where, row, words)
    answer = ""
    if is_question and not problem:
        answer, problem = _words(where, row, ("answer",))
    if problem:
        return None, problem
    if row.keys() == {"text"}:
        return Item(name=where, task="language", caption=caption, picture=None), ""
    given = {role: row[role] for role in EDIT if role in row}
    if not is_edit:
        given = {"picture": next((row[name] for name in PICTURE if name in row), None)}
        if given["picture"] is None:
            alone = " (as language, text stands alone)" if "text" in row else ""
            return None, f"{where}: it has no image{alone}."
        references = row.get("references", [])
        if not isinstance(references, list):
            return None, f"{where}: references must be a list."
        given |= {f"ref{i}": value for i, value in enumerate(references, start=1)}
    parts = {}
    for role, value in given.items():
        blob = _blob(file, where if role == "picture" else f"{where}, {role}", value)
        if isinstance(blob, str):
            return None, f"{where}: {blob}.{_hint(row) if is_edit else ''}"
        parts[role] = blob
    if is_question:
        item = Item(
            name=where,
            task="understanding",
            caption=caption,
            picture=parts["picture"],
            answer=answer,
        )
        return item, ""
    made, problem = make_item(where, caption, parts)
    return made, problem + (_hint(row) if problem and is_edit else "")


def _words(where: str, row: Mapping[str, Any], names: Sequence[str]) -> tuple[str, str]:
    """The text in the first of some columns that a row has, and what is wrong with it. What is read
    or said word for word keeps its lines."""
    text = next((row[name] for name in names if name in row), None)
    if text is None:
        return "", f"{where}: it has no {names[0]}."
    if not isinstance(text, str):
        return "", f"{where}: the {names[0]} is no text."
    exact = row.keys() == {"text"} or names[0] == "answer"
    text = text.strip() if exact else " ".join(text.split())
    return text, "" if text else f"{where}: the {names[0]} is empty."


def _is_question(row: Mapping[str, Any]) -> bool:
    """Whether a row has a question or an answer, and no caption: beside one they are others'."""
    return bool({"question", "answer"} & row.keys()) and not any(name in row for name in CAPTION)


def _is_edit(file: Path, row: Mapping[str, Any]) -> bool:
    """Whether a row has a source or a target. Beside an image, one of them must be a picture:
    other tables have such columns, too."""
    given = [row[role] for role in EDIT if role in row]
    if any(name in row for name in PICTURE):
        return any(isinstance(_blob(file, "", value), Blob) for value in given)
    return bool(given)


def _hint(row: Mapping[str, Any]) -> str:
    """What to do where a row may have been taken for an edit."""
    if not any(name in row for name in PICTURE):
        return ""
    return " A row whose source or target is a picture is an edit: rename them if it is none."


def _blob(file: Path, where: str, value: Any) -> Blob | str:
    """A picture from a table's cell: a path, or bytes, as the hub's tables have them."""
    if callable(value):
        return Blob(where, value)
    if isinstance(value, Mapping):
        value = value.get("path")
    if not isinstance(value, str) or not value or "\0" in value:
        return "an image is no path"
    try:
        path = file.parent / Path(value).expanduser()
        found = path.is_file()
    except (OSError, RuntimeError):  # a name that is too long, or ~ of an unknown user
        found = False
    return Blob(value, path.read_bytes, path) if found else f"{value} does not exist"


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
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError(
            f"{file} needs pyarrow, which is not installed.", 'pip install "hidream[data]"'
        ) from error
    with _one_line(file):
        table = parquet.ParquetFile(file)
        fields = [field for field in table.schema_arrow if field.name in PICTURES]
        heavy = {field.name: field.type for field in fields if _holds_bytes(field.type)}
        light = [name for name in table.schema_arrow.names if name not in heavy]
        groups = []
        for number in range(table.num_row_groups):
            metadata = table.metadata.row_group(number)
            rows = table.read_row_group(number, columns=light).to_pylist()
            groups.append(rows if light else [{} for _ in range(metadata.num_rows)])
            for name, kind in heavy.items():
                cells = _cells(file, number, name, kind, metadata)
                for row, cell in zip(groups[-1], cells, strict=True):
                    row[name] = cell
    number = 0
    for group in groups:
        for row in group:
            number += 1
            yield f"row {number}", row


@contextmanager
def _one_line(file: Path) -> Iterator[None]:
    """pyarrow's errors as one of ours, whose message is a single line."""
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        if getattr(error, "errno", None):  # the system's own, as of a file that may not be read
            raise
        told = " ".join(str(error).split()).rstrip(".")
        raise InputError(f"the data {file} is damaged: {told}.", "Copy it again.") from error


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return any(_holds_bytes(kind.field(i).type) for i in range(kind.num_fields))
    if _is_list(kind):
        return _holds_bytes(kind.value_type)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _cells(file: Path, group: int, name: str, kind: Any, metadata: Any) -> list[Any]:
    """What stands for each cell of a column with bytes: a function that reads them, a list of
    such functions, or None for an empty cell."""
    from pyarrow import compute

    rows = range(metadata.num_rows)
    if _is_list(kind):
        counts = compute.list_value_length(_column(file, group, name)).to_pylist()
        return [
            [partial(_cell, file, group, row, name, place) for place in range(count or 0)]
            for row, count in zip(rows, counts, strict=True)
        ]
    there = [True for _ in rows]
    if not _is_full(metadata, name):
        column = _column(file, group, name)
        parts = [column]
        if kind.num_fields:
            names = {kind.field(i).name for i in range(kind.num_fields)} & {"bytes", "path"}
            parts = [compute.struct_field(column, part) for part in sorted(names)]
        valid = [part.is_valid().to_pylist() for part in parts]
        there = [any(cells) for cells in zip(*valid, strict=True)]
    return [
        partial(_cell, file, group, row, name) if full else None
        for row, full in zip(rows, there, strict=True)
    ]


def _is_full(metadata: Any, name: str) -> bool:
    """Whether a row group's statistics say that no cell of a column is empty."""
    columns = (metadata.column(i) for i in range(metadata.num_columns))
    own = [c.statistics for c in columns if c.path_in_schema.split(".")[0] == name]
    return any(s is not None and s.has_null_count and s.null_count == 0 for s in own)


def _cell(file: Path, group: int, row: int, name: str, place: int | None = None) -> bytes:
    value = _column(file, group, name)[row].as_py()
    if place is not None:
        value = value[place]
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None and isinstance(value, dict) and value.get("path"):
        return (file.parent / value["path"]).read_bytes()
    if not isinstance(data, bytes):
        raise InputError(f"{name} holds no picture.")
    return data


@lru_cache(maxsize=4)
def _column(file: Path, group: int, name: str) -> Any:
    from pyarrow import parquet

    with _one_line(file):
        return parquet.ParquetFile(file).read_row_group(group, columns=[name]).column(name)
