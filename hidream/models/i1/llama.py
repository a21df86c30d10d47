"""Where Llama is: I1 reads with it, but it is gated and no part of I1's repository."""

from __future__ import annotations

import os
import re
from pathlib import Path

from hidream.errors import ModelError
from hidream.locating import fetch

VARIABLE = "HIDREAM_LLAMA"
REPOS = (
    "meta-llama/Llama-3.1-8B-Instruct",
    "meta-llama/Meta-Llama-3.1-8B-Instruct",
    "unsloth/Meta-Llama-3.1-8B-Instruct",  # an open mirror
)


def find_llama(folder: Path, named: str | Path | None = None) -> tuple[Path, Path]:
    """The folders of Llama's weights and of its tokenizer, on this machine; nothing is fetched.

    `named`: a folder or a hub id. Without it: `text_encoder_4` and `tokenizer_4` in the model's
    `folder`, what the environment variable HIDREAM_LLAMA names, or one of `REPOS`.

    Raises ModelError where there is none, with how to get one.
    """
    inside = folder / "text_encoder_4"
    if named is None and inside.is_dir():
        tokenizer = folder / "tokenizer_4"
        return inside, tokenizer if tokenizer.is_dir() else inside
    named = named or os.environ.get(VARIABLE)
    if named is not None:
        found = _named(str(named))
        return found, found
    for repo in REPOS:
        try:
            found = fetch(repo, local_only=True)
        except ModelError:
            continue
        return found, found
    raise ModelError(
        "HiDream-I1 reads prompts with Llama-3.1-8B-Instruct, which is gated and not on this "
        "machine.",
        'Accept its licence on its model page, run "hf auth login" and "hidream models pull '
        f'{REPOS[0]}", or name a folder or a mirror: {VARIABLE}={REPOS[-1]}.',
    )


def _named(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        return fetch(name, local_only=True)
    raise ModelError(f"the Llama folder {name} does not exist.", "Check its path.")
