"""E1: what its instructions look like, and where its refinement begins.

The network is I1's, with the source beside the picture; its three-row guidance is in
`sampling.editing`.
"""

from __future__ import annotations

from hidream.errors import InputError

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


def edit_steps(num_steps: int, refine_strength: float) -> int:
    """How many of the steps edit; the rest, by I1 without the source, refine. 28 at 0.3: 19."""
    return int(num_steps * (1.0 - refine_strength))
