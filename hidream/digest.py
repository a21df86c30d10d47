"""What a model is, as a SHA-256 over its files; each file is hashed once and then remembered."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hidream.errors import ModelError

MAX_REMEMBERED = 1000  # files


def of_bytes(data: bytes) -> str:
    """The SHA-256 in 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def of_model(folder: Path, files: Sequence[Path], cache: Path) -> str:
    """The SHA-256 over names and SHA-256s of a folder's `files`, whatever the folder's own name.

    A file that lies elsewhere comes first, by its own name.

    `cache` is a JSON file of hashes by path, size and time of change. It may be missing, damaged
    or not writable: then files are hashed again.

    Raises:
        ModelError: a file cannot be read.
    """
    remembered = _read(cache)
    found: dict[str, list[Any]] = {}
    lines = []
    for file in sorted(files, key=lambda file: (file.is_relative_to(folder), file)):
        try:
            path, status = str(file.resolve()), file.stat()
            entry = remembered.get(path)
            if not entry or entry[:2] != [status.st_size, status.st_mtime_ns]:
                with file.open("rb") as stream:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
                entry = [status.st_size, status.st_mtime_ns, digest]
        except OSError as error:
            raise ModelError(f"{file} cannot be read: {error.strerror}.") from error
        found[path] = entry
        name = file.relative_to(folder) if file.is_relative_to(folder) else Path(file.name)
        lines.append(f"{name.as_posix()} {entry[2]}\n")
    if any(remembered.get(path) != entry for path, entry in found.items()):
        there = {path: entry for path, entry in remembered.items() if os.path.exists(path)}
        kept = list({**there, **found}.items())[-MAX_REMEMBERED:]
        _write(cache, dict(kept))
    return of_bytes("".join(lines).encode("utf-8", "surrogateescape"))


def is_known(files: Sequence[Path], cache: Path) -> bool:
    """Whether `of_model` will hash none of the files anew."""
    remembered = _read(cache)
    with suppress(OSError):
        return all(
            remembered.get(str(file.resolve()), [])[:2]
            == [file.stat().st_size, file.stat().st_mtime_ns]
            for file in files
        )
    return False


def _read(cache: Path) -> dict[str, list[Any]]:
    try:
        content = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    entries = content.items() if isinstance(content, dict) else ()
    return {path: entry for path, entry in entries if _is_entry(entry)}


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 3
        and isinstance(entry[2], str)
        and re.fullmatch(r"[0-9a-f]{64}", entry[2]) is not None
    )


def _write(cache: Path, entries: dict[str, list[Any]]) -> None:
    temporary = cache.with_name(f".{cache.name}-{secrets.token_hex(8)}.tmp")
    with suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(json.dumps(entries), encoding="utf-8")
            os.replace(temporary, cache)
        finally:
            temporary.unlink(missing_ok=True)
