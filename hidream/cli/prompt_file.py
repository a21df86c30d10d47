"""`--prompt-file`: one request a line, as text or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hidream.errors import HidreamError, InputError

MAX_BYTES = 64 * 2**20
MAX_REQUESTS = 10_000


@dataclass(frozen=True)
class Line:
    """One request's fields, and what messages call its place."""

    where: str
    fields: Mapping[str, Any]


def read_prompt_file(path: str) -> list[Line]:
    """The requests in a UTF-8 file; empty lines and those that begin with # are none.

    A line that begins with { is JSON with a request's fields by name, any other is a prompt.

    Raises:
        InputError: the file cannot be read, holds no request or too many, or a line is not usable.
    """
    lines = []
    for number, text in enumerate(_read(path).split("\n"), 1):
        text = text.strip()
        if not text or text.startswith("#"):
            continue
        where = f"{path}, line {number}"
        with located(where):
            fields = _read_json(text) if text.startswith("{") else {"prompt": text}
            lines.append(Line(where, fields))
    if not 1 <= len(lines) <= MAX_REQUESTS:
        raise InputError(
            f"{path} holds {len(lines) or 'no'} requests.",
            f"Write 1 … {MAX_REQUESTS} of them, one a line.",
        )
    return lines


@contextmanager
def located(where: str) -> Iterator[None]:
    """Errors inside name the place, if it has a name; what no check foresaw is an InputError."""
    try:
        yield
    except HidreamError as error:
        if not where:
            raise
        raise type(error)(f"{where}: {error.problem}", error.remedy) from error
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: a field is not usable: {error}.") from error


def _read(path: str) -> str:
    try:
        with Path(path).expanduser().open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(
            f"the prompt file {path} cannot be read: {error.strerror}.", "Check its path."
        ) from error
    except (ValueError, RuntimeError) as error:  # a NUL, or ~ of an unknown user
        raise InputError(f"the prompt file {path} cannot be read: {error}.") from error
    if len(data) > MAX_BYTES:
        raise InputError(f"{path} has more than {MAX_BYTES // 2**20} MB.", "Split it.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}, line {number}: this is not UTF-8.", "Save it as UTF-8."
        ) from error


def _read_json(text: str) -> dict[str, Any]:
    try:
        return json.loads(text, object_pairs_hook=_once)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"what begins with {{ must be JSON, and this is not ({error}).",
            'A prompt that begins so is written {"prompt": "…"}.',
        ) from error


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f'"{twice}" is given twice.', "Leave one out.")
    return found
