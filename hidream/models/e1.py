"""E1: what its instructions look like, what its scripts edit, and where its refinement begins.

The network is I1's, with the source beside the picture; its three-row guidance is in
`sampling.editing`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hidream.errors import InputError
from hidream.limits import halved

if TYPE_CHECKING:
    from PIL import Image

    from hidream.request import GenerateRequest

_INSTRUCTION, _TARGET = "Editing Instruction:", "Target Image Description:"


def edit_prompt(instruction: str, target: str) -> str:
    """What E1-Full was trained to read; E1.1 reads the plain instruction.

    `target` describes the picture as it will be. Raises InputError where either says nothing.
    """
    instruction, target = instruction.strip().strip("."), target.strip()
    for name, text in (("instruction", instruction), ("target description", target)):
        if not text:
            raise InputError(f"the {name} is empty.", "Say what to change, and what comes of it.")
    return f"{_INSTRUCTION} {instruction}. {_TARGET} {target}"


def target_description(prompt: str) -> str | None:
    """The target's description in a prompt of `edit_prompt`'s form; None if there is none.

    The refinement draws by it; without one it reads the whole prompt.
    """
    return prompt.partition(_TARGET)[2].strip() or None


def refining_warnings(request: GenerateRequest) -> tuple[str, ...]:
    """What to tell of a resolved request: that an I1 is to draw by an instruction."""
    if not request.refine_strength or target_description(request.full_prompt) is not None:
        return ()
    return (
        f'the refining I1 draws by the instruction itself: the prompt has no "{_TARGET} …", which '
        "says what the picture will show.",
    )


def published_source(
    picture: Image.Image, size: tuple[int, int], how: str, native_side: int
) -> Image.Image:
    """The source as E1's own scripts show it, at `size` (width, height).

    E1-Full's ("stretch") forgets the aspect. E1.1's ("crop") halves a picture of twice the native
    side or more, makes it as small as it can be around `size`, and keeps the middle.
    """
    from PIL import Image

    if how == "stretch":
        return picture.resize(size, Image.Resampling.BICUBIC)
    target = halved(picture.size, native_side)
    while picture.size != target:
        half = picture.width // 2, picture.height // 2
        picture = picture.resize(half, Image.Resampling.BOX)
    scale = min(there / here for there, here in zip(picture.size, size, strict=True))
    around = round(picture.width / scale), round(picture.height / scale)
    left, top = (around[0] - size[0]) // 2, (around[1] - size[1]) // 2
    whole = picture.resize(around, Image.Resampling.BICUBIC)
    return whole.crop((left, top, left + size[0], top + size[1]))


def edit_steps(num_steps: int, refine_strength: float) -> int:
    """How many of the steps edit; the rest, by I1 without the source, refine. 28 at 0.3: 19."""
    return int(num_steps * (1.0 - refine_strength))
