"""The errors a user can meet: each says what is wrong and what to do, and knows its exit code."""

from __future__ import annotations


class HidreamError(Exception):
    """Something that a user can put right.

    Args:
        problem: what is wrong, with the value and its limit.
        remedy: what to do about it, a sentence of its own; may be empty.
    """

    exit_code = 1

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem} {self.remedy}".strip()


class UsageError(HidreamError, ValueError):
    """A flag or field: an unknown name, a wrong type, a value out of range."""

    exit_code = 2


class InputError(HidreamError, ValueError):
    """What the user handed over to work on or write to: prompt, picture, mask, box, file."""

    exit_code = 3


class ModelError(HidreamError):
    """A model that is missing, gated, or whose folder is not whole."""

    exit_code = 4


class MemoryExceeded(HidreamError):
    """The request does not fit the memory of the device."""

    exit_code = 5


class Cancelled(HidreamError):
    """The caller's token ended the call; see `hidream.cancel`."""

    exit_code = 130
