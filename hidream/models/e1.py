"""E1: what its instructions look like, which sizes it edits at, and where its refinement begins.

The network is I1's, with the source beside the picture; its three-row guidance is in
`sampling.editing`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from hidream.errors import InputError, UsageError

PATCH = 16  # pixels along a side of a patch: 2×2 latents of 8×8
MAX_DISTORTION = 0.02  # how far a size may be from the source's aspect

_INSTRUCTION, _TARGET = "Editing Instruction:", "Target Image Description:"


# Instructions


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


@dataclass(frozen=True)
class Refined:
    """An instruction made precise by a language model that saw the source."""

    source: str
    instruction: str
    target: str

    @property
    def prompt(self) -> str:
        return edit_prompt(self.instruction, self.target)


def parse_refined(answer: str) -> Refined:
    """The three lines of an answer: the source, the instruction and the picture as it will be.

    Raises InputError for any other answer.
    """
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    remedy = "It must be three lines: the source, the instruction, the picture as it will be."
    if len(lines) != 3:
        raise InputError(f"the refined instruction has {len(lines)} lines, not three.", remedy)
    for number, line in enumerate(lines, 1):
        if re.match(r"[\W_]*line\s*\d", line, re.IGNORECASE):
            raise InputError(f"line {number} of the refined instruction has a label.", remedy)
        if not re.search(r"\w", line):
            raise InputError(f"line {number} of the refined instruction has no words.", remedy)
    return Refined(*lines)


# Sizes


def edit_size(
    source: tuple[int, int], max_patches: int, *, keep_aspect: bool = True
) -> tuple[int, int]:
    """The (width, height) at which a source is edited: whole patches, as many as there may be.

    `max_patches` is the network's limit for source and picture together (`I1Config.max_patches`):
    4,608 for E1-Full, which is 768×768 pixels, and 8,192 for E1.1, one megapixel. Of the sizes
    whose aspect is the source's within `MAX_DISTORTION` it is the one that a source of undistorted
    aspect fills most of. Without `keep_aspect` it is the largest square, as E1-Full was published.
    """
    most = max_patches // 2
    if not keep_aspect:
        side = math.isqrt(most) * PATCH
        return side, side
    aspect = source[0] / source[1]

    def rating(size: tuple[int, int]) -> tuple[bool, float]:
        columns, rows = size
        distortion = _distortion(columns / rows, aspect)
        return distortion <= MAX_DISTORTION, columns * rows / (1 + distortion)

    columns, rows = max(_grids(aspect, most), key=rating)
    return columns * PATCH, rows * PATCH


def check_edit_size(width: int, height: int, max_patches: int) -> None:
    """UsageError where the source and the picture together have too many patches."""
    num_patches = 2 * (width // PATCH) * (height // PATCH)
    if num_patches > max_patches:
        near = "{}x{}".format(*edit_size((width, height), max_patches))
        raise UsageError(
            f"{width}x{height} and its source have {num_patches} patches; this checkpoint edits "
            f"{max_patches}.",
            f"Choose {near} or less.",
        )


def _grids(aspect: float, most: int) -> Iterator[tuple[int, int]]:
    """(columns, rows) near an aspect and the most: to each of some rows the two nearest columns."""
    top = math.isqrt(int(most / aspect)) + 1
    for rows in range(max(1, int(0.8 * top)), top + 1):
        low = math.floor(rows * aspect)
        for columns in (low, low + 1):
            if 1 <= columns <= most // rows:
                yield columns, rows
    yield (most, 1) if aspect > 1 else (1, most)  # never nothing


def _distortion(aspect: float, other: float) -> float:
    return max(aspect / other, other / aspect) - 1


# Refinement


def edit_steps(num_steps: int, refine_strength: float) -> int:
    """How many of the steps edit; the rest, by I1 without the source, refine. 28 at 0.3: 19."""
    return int(num_steps * (1.0 - refine_strength))
