"""The errors a user can meet: each says what is wrong and what to do, and knows its exit code."""

from __future__ import annotations


class HidreamError(Exception):
    """Something that a user can put right.

    Args:
        problem: what is wrong, with the value and its limit.
        remedy: what to do about it, a sentence of its own; may be empty.
        details: where there is more than one thing wrong, a line for each.
    """

    exit_code = 1

    def __init__(self, problem: str, remedy: str = "", details: tuple[str, ...] = ()) -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy
        self.details = details

    def __str__(self) -> str:
        return "\n  ".join([f"{self.problem} {self.remedy}".strip(), *self.details])


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
