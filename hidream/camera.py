"""Camera language: the shots, angles and views that O1 knows by name, as words of a prompt.

The fifteen are those of the O1-Image paper, section 6.3.
"""

from __future__ import annotations

import re

from hidream.errors import UsageError
from hidream.registry import nearest

CAMERA: dict[str, dict[str, str]] = {  # field of a request -> its values -> their words
    "shot": {
        "extreme-full": "extreme full shot",
        "full": "full shot",
        "medium-full": "medium full shot",
        "medium": "medium shot",
        "medium-close-up": "medium close-up",
        "close-up": "close-up",
        "extreme-close-up": "extreme close-up",
    },
    "angle": {
        "high": "high angle",
        "low": "low angle",
        "eye-level": "eye-level",
        "birds-eye": "bird's-eye view",
    },
    "view": {
        "front": "front view",
        "side": "side view",
        "back": "back view",
        "three-quarter": "three-quarter view",
    },
}


def camera_value(field: str, value: str | None) -> str | None:
    """The name in `CAMERA[field]` of a value that may also be spelt in its words.

    "Close Up", "close-up shot" and "bird’s-eye view" are understood. UsageError names the nearest.
    """
    if value is None:
        return None
    known = CAMERA[field]
    if not isinstance(value, str):
        raise UsageError(f"{field}={value!r} is not a name.", nearest("", known))
    name = _plain(value)
    for word in ("-shot", "-angle", "-view"):
        name = name.removesuffix(word)
    if name not in known:
        raise UsageError(f'unknown {field} "{value}"; {nearest(name, known)}')
    return name


def with_camera(prompt: str, *, shot: str | None, angle: str | None, view: str | None) -> str:
    """The prompt, led by its camera: "Close-up, low angle, side view. a cat"."""
    chosen = {"shot": shot, "angle": angle, "view": view}
    words = [CAMERA[field][value] for field, value in chosen.items() if value is not None]
    if not words:
        return prompt
    sentence = ", ".join(words)
    return f"{sentence[0].upper()}{sentence[1:]}. {prompt}"


def _plain(text: str) -> str:
    return re.sub(r"[\s_-]+", "-", re.sub(r"['’]", "", text.strip().lower()))
